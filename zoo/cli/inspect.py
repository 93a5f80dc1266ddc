"""`zoo inspect`: what a checkpoint on disk is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli._common import common, emit, pairs, say, table

if TYPE_CHECKING:
    from zoo.formats.base import TensorRef
    from zoo.spec import Spec


@click.command(short_help="What a checkpoint on disk is")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@common
def command(path: Path, tensors: bool, as_json: bool) -> None:
    """Say what the checkpoint at PATH is, canonical or in any format zoo reads, from its headers alone."""
    about, refs = look(path)
    listed = sorted(refs, key=lambda r: (r.file, r.offset))
    if as_json:
        if tensors:
            about["tensor_list"] = [
                {"name": r.name, "dtype": r.dtype, "shape": r.shape, "file": r.file, "bytes": r.nbytes}
                for r in listed
            ]
        emit(about)
        return
    architecture = about.pop("architecture", {})
    lines = [(k.replace("_", " "), _text(v)) for k, v in about.items() if v not in (None, "", [], {})]
    say(pairs([*lines, *architecture.items()]))
    if tensors:
        say()
        rows = [
            (r.name, r.dtype, "x".join(map(str, r.shape)) or "scalar", f"{r.nbytes:,}", r.file)
            for r in listed
        ]
        say(table(("TENSOR", "DTYPE", "SHAPE", "BYTES", "FILE"), rows, right=(3,)))


def look(path: Path) -> tuple[dict[str, Any], list[TensorRef]]:
    """What `zoo inspect --json` says, and the tensors. Raises ZooError if no reader knows the path."""
    from zoo import families
    from zoo.describe import describe
    from zoo.errors import ZooError
    from zoo.formats import canonical, open_checkpoint

    if canonical.detect(path):
        folder = canonical.read(path)
        refs = [*folder.tensors.values(), *folder.extra_tensors.values()]
        about: dict[str, Any] = {
            "path": str(path),
            "format": f"canonical, layout version {folder.json['layout_version']}",
            "family": folder.spec.family,
            "source": _source(folder.source),
            "layers_present": folder.layers,
            "quantised": _counts(folder.quant.values()),
            "extras": _counts(folder.extras.values()),
            "notes": [*(folder.json.get("notes") or []), *(folder.json.get("warnings") or [])],
            "verified": _verdict(path),
        }
        spec: Spec | None = folder.spec
    else:
        ckpt = open_checkpoint(path)
        refs = list(ckpt.tensors.values())
        about = {"path": str(path), "format": ckpt.format, "model_type": ckpt.config.get("model_type")}
        spec, unread = None, list[str]()
        try:
            family = families.find(ckpt.config, f"{path}")
            about["family"] = family.name
            spec, unread = families.read(ckpt.config, family, f"{path}")
        except ZooError as error:  # still worth looking at
            about["family"] = f"unknown: {error}"
        quantization = ckpt.config.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        about |= {
            "quantisation": method,
            "carried": list(ckpt.carried) or list(ckpt.synthesised),
            "notes": [*ckpt.notes, *unread],
        }
    about |= {
        "files": len({r.file for r in refs}),
        "tensors": len(refs),
        "bytes": sum(r.nbytes for r in refs),
        "dtypes": _counts(r.dtype for r in refs),
    }
    if spec is not None:
        about["architecture"] = {k: v for k, v in describe(spec).items() if k != "family"}
    return about, refs


def _source(source: dict[str, Any]) -> dict[str, Any]:
    """Where it came from, without the lists."""
    origin = {k: v for k, v in (source.get("origin") or {}).items() if k != "files"}
    if isinstance(package := source.get("package"), dict):
        origin = {"package": f"{package.get('name')} {package.get('version')}", **origin}
    return {k: source[k] for k in ("path", "format", "naming", "dtype", "rules") if source.get(k)} | origin


def _verdict(path: Path) -> str:
    from zoo.verify.certificate import standing

    return standing(path) or f"no; `zoo verify {path}`"


def _counts(things: Any) -> dict[str, int]:
    out: dict[str, int] = {}
    for thing in things:
        out[str(thing)] = out.get(str(thing), 0) + 1
    return out


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v:,}" if isinstance(v, int) else f"{k}: {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)

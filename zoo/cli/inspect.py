"""`zoo inspect`: what a checkpoint on disk is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli._common import Anywhere, common, emit, pairs, say, table
from zoo.url import is_url, without_secrets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zoo.formats.base import TensorRef
    from zoo.spec import Spec


@click.command(short_help="What a checkpoint on disk is")
@click.argument("path", type=Anywhere())
@click.option("--family", help="Take it for this family. Default: what its config says.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@common
def command(path: Path | str, family: str | None, tensors: bool, as_json: bool) -> None:
    """Say what the checkpoint at PATH, a path or the URL of a store (s3://bucket/model), is, canonical or in any format zoo
    reads, from its headers alone.

    \b
    Examples:
      zoo inspect CHECKPOINT
      zoo inspect model.gguf --tensors
    """
    about, refs = look(path, family)
    listed = sorted(refs, key=lambda r: (r.file, r.offset))
    if as_json:
        if tensors:
            about["tensor_list"] = [
                {"name": r.name, "dtype": r.dtype, "shape": r.shape, "file": r.file, "bytes": r.nbytes}
                for r in listed
            ]
        emit(about)
        return
    architecture, several = about.pop("architecture", {}), about.pop("sets", [])
    about.pop("numbers", None)  # the architecture's lines say them
    lines = [(k.replace("_", " "), _cut(_text(v))) for k, v in about.items() if v not in (None, "", [], {})]
    say(pairs([*lines, *architecture.items()]))
    if several:
        say()
        say(sets_table(several))
    if tensors:
        say()
        rows = [
            (r.name, r.dtype, "x".join(map(str, r.shape)) or "scalar", f"{r.nbytes:,}", r.file)
            for r in listed
        ]
        say(
            table(
                ("TENSOR", "DTYPE", "SHAPE", "BYTES", "FILE"),
                rows,
                right=(3,),
                short={0: 24, 4: 20},
                drop=(4, 3),
            )
        )


def sets_table(several: list[dict[str, Any]]) -> str:
    """Sets of weights, each by the name that `--file` takes."""
    from zoo.untrusted.printable import decimal

    rows = [(s["name"], str(s["files"]), decimal(s["bytes"]), s.get("quantisation", "")) for s in several]
    return table(("WEIGHTS (--file)", "FILES", "SIZE", "QUANTISATION"), rows, right=(1, 2), short={3: 12})


def look(place: Path | str, said: str | None = None) -> tuple[dict[str, Any], list[TensorRef]]:
    """What `zoo inspect --json` says of a path or a store's URL, and the tensors. `said`: the family to take it for. Raises
    ZooError if no reader knows the path, or if `said` is no family, or the folder is canonical and another's."""
    if not is_url(place):
        return _look(Path(place), said)
    from zoo.pull.stored import described

    shown = without_secrets(place)
    with described(place) as path:
        about, refs = _look(path, said)
    about["path"] = shown
    if (verified := about.get("verified")) and str(verified).startswith("no; "):
        about["verified"] = (
            f"no; `zoo pull {shown} --to FOLDER` brings it here, `zoo verify FOLDER` proves it"
        )
    return about, refs


def _look(path: Path, said: str | None) -> tuple[dict[str, Any], list[TensorRef]]:
    from zoo import families
    from zoo.describe import describe
    from zoo.errors import ZooError
    from zoo.formats import canonical, open_checkpoint, sets
    from zoo.mapping.plan import found, given
    from zoo.quant.foreign import beside
    from zoo.quant.schemes import coded, nbytes
    from zoo.quant.told import told
    from zoo.sizes import numbers

    if canonical.detect(path):
        folder = canonical.read(path)
        if said not in (None, folder.spec.family):
            raise ZooError(
                f"{path}: was converted as {folder.spec.family}; --family is for what is not converted"
            )
        refs = [*folder.tensors.values(), *folder.extra_tensors.values()]
        about: dict[str, Any] = {
            "path": str(path),
            "format": f"canonical, layout version {folder.json['layout_version']}",
            "family": folder.spec.family,
            "source": _source(folder.source),
            "values": _values(folder.source),
            "layers_present": folder.layers,
            "quantised": _counts(folder.quant.values()),
            "bytes_by_scheme": _carried(folder.quant, folder.tensors) if folder.quant else {},
            "extras": _counts(folder.extras.values()),
            "notes": [*(folder.json.get("notes") or []), *(folder.json.get("warnings") or [])],
            "verified": _verdict(path),
        }
        spec: Spec | None = folder.spec
    else:
        choice = [s.to_json() for s in sets.here(path)] if path.is_dir() else []
        several = {"sets": choice} if len(choice) > 1 else {}
        try:
            ckpt = open_checkpoint(path)
        except sets.Ambiguous as error:  # which is what one may be here to find out
            return {"path": str(path), "notes": [str(error)], **several}, []
        refs = list(ckpt.tensors.values())
        about = {"path": str(path), "format": ckpt.format, "model_type": ckpt.config.get("model_type")}
        spec, unread = None, list[str]()
        wanted = families.get(said) if said else None
        try:
            family = wanted or found(ckpt, f"{path}")
            about["family"] = family.name
            spec, unread = families.read(ckpt.config, family, f"{path}")
            unread = [*(given(ckpt.config, family) if wanted else ()), *unread]
        except ZooError as error:  # still worth looking at
            about["family"] = f"unknown: {error}"
        try:
            method = told(ckpt.config) or beside(ckpt.root)
        except ZooError as error:  # no object
            method = f"not read: {error}"
        about |= {"quantisation": method}
        if weights := list(coded(ckpt.tensors, ckpt.config)):
            about |= {
                "quantised": _counts(how for how, _ in weights),
                "bytes_by_scheme": nbytes(ckpt.tensors, weights),
            }
        about |= {
            "carried": list(ckpt.carried) or list(ckpt.synthesised),
            **several,
            "notes": [*ckpt.notes, *unread],
        }
    about |= {
        "files": len({r.file for r in refs}),
        "tensors": len(refs),
        "bytes": sum(r.nbytes for r in refs),
        "dtypes": _counts(r.dtype for r in refs),
    }
    if spec is not None:
        about["numbers"] = numbers(spec)
        about["architecture"] = {k: v for k, v in describe(spec).items() if k != "family"}
    return about, refs


def _source(source: dict[str, Any]) -> dict[str, Any]:
    """Where it came from, without the lists."""
    origin = {k: v for k, v in (source.get("origin") or {}).items() if k != "files"}
    if isinstance(package := source.get("package"), dict):
        origin = {"package": f"{package.get('name')} {package.get('version')}", **origin}
    return {k: source[k] for k in ("path", "format", "naming", "dtype", "rules") if source.get(k)} | origin


def _values(source: dict[str, Any]) -> str | None:
    """Whose values a folder holds that are not a release's."""
    if not (values := source.get("values")):
        return None
    adapter = f", adapter {values['adapter']}" if "adapter" in values else ""
    return f"not a release's: {values.get('by')}; from {values.get('from')}{adapter}; released as {values.get('release', 'unknown')}"


def _verdict(path: Path) -> str:
    from zoo.verify.certificate import standing

    return standing(path) or f"no; `zoo verify {path}`"


def _carried(quant: Mapping[str, str], tensors: Mapping[str, TensorRef]) -> dict[str, int]:
    """Bytes of a canonical folder's tensors by scheme; "plain": those of all others."""
    from zoo.quant.schemes import scheme

    out: dict[str, int] = {}
    for name, ref in tensors.items():
        stem, _, part = name.rpartition(".")
        how = quant.get(stem)
        if how is None or all(part != c.name for c in scheme(how).components):  # a bias
            how = "plain"
        out[how] = out.get(how, 0) + ref.nbytes
    return out


def _counts(things: Any) -> dict[str, int]:
    out: dict[str, int] = {}
    for thing in things:
        out[str(thing)] = out.get(str(thing), 0) + 1
    return out


SHOWN = 4000
"""Characters of one thing that is said of a checkpoint."""


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text):,} characters; --json has all)"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v:,}" if isinstance(v, int) else f"{k}: {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)

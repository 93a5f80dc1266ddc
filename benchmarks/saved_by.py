"""What other versions of transformers save, read by zoo; and what zoo exports, opened by them.

    python benchmarks/saved_by.py [VERSION ...] [--only VARIANT ...] [--work DIR] [--json FILE]

Each tiny checkpoint of tests/families that a version has a class for is built by that version, every parameter perturbed, and
saved by its `save_pretrained`, in a process of its own: once from the config as a release has it ("released"), and by
transformers 5 once more from settings in its own words ("own"). zoo reads the folder; its fp32 logits are held to that version's.
And the installed transformers writes the same checkpoint as a release, zoo converts and exports it ("exported"), and the version
opens what came out.

A version is installed into DIR/VERSION without its dependencies, but for those of VERSIONS; the rest is what is installed here.
Exit code 1 for any result that is neither equal nor told in WHY. Needs tests/ beside this folder, and transformers.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
sys.path.append(str(ROOT / "benchmarks"))

_OLD, _NEW = ["huggingface-hub==0.36.2"], ["huggingface-hub==1.33.0", "httpx==0.28.1", "httpcore==1.0.9"]
VERSIONS: dict[str, list[str]] = {
    "4.46.3": [*_OLD, "tokenizers==0.20.3"],
    "4.51.3": [*_OLD, "tokenizers==0.21.4"],
    "4.57.6": [*_OLD, "tokenizers==0.22.2"],
    "5.0.0": [*_NEW, "tokenizers==0.22.2"],
    "5.10.4": [*_NEW, "tokenizers==0.22.2"],
    "5.17.0": _NEW,
    "5.24.0": [],
}
"""Versions, and the packages that they want in other versions than zoo does."""

_ONE_GROUP = {"mamba_n_groups": 1}
TOO: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss, as released": ("gpt_oss", {"swiglu_limit": 7.0}),
    "gpt_oss_alpha, as released": ("gpt_oss_alpha", {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}),
    **{f"{name}, as released": (name, _ONE_GROUP) for name in ("bamba", "bamba_bias")},
    **{f"{name}, as released": (name, _ONE_GROUP) for name in ("granitemoehybrid", "granitemoehybrid_dense")},
    **{f"{name}, without kernels": (name, {"use_mamba_kernels": False}) for name in ("jamba", "jamba_dense")},
    **{f"{name}, one chunk": (name, {"chunk_size": 128}) for name in ("nemotron_h", "nemotron_h_latent")},
    "gemma3n, one vocabulary": ("gemma3n", {"vocab_size_per_layer_input": 131}),
}
"""Variants with values that releases have, or that need less, where versions compute alike: tried beside those they are made of."""

WHY: tuple[tuple[str, str, str], ...] = (
    (
        r"gpt_oss(_alpha)?",
        "",
        "before 5.19 limit and gain were 7.0 and 1.702 whatever the config said (disagreements)",
    ),
    (
        r"bamba.*",
        r"5\.\d\..*|5\.1[0-4]\..*",
        "from 5.0 to 5.14 whole heads turned, and before 5.23 Mamba-2's groups had one norm (disagreements)",
    ),
    (
        r"(bamba|granitemoehybrid)\w*",
        "",
        "before 5.23 Mamba-2's groups had one norm, where its CUDA kernels were not there "
        "(disagreements); config in words that this version does not know, where it was refused",
    ),
    (r"granitemoehybrid.*", r"5\.1?\d\..*", "own: layer_types in words that this version does not know"),
    (r"gemma(_bias)?", "", "from 4.48 to 5.17 a hidden_act of gelu was the exact one (disagreements)"),
    (r"minimax_m2", "", "before 5.18 whole heads turned (disagreements)"),
    (r"deepseek_v2|mistral4", "", "before 5.15 YaRN's factor on the scores was left out (disagreements)"),
    (r"deepseek_v3.*", "", "before 5.6 experts of other groups scored 0 (disagreements)"),
    (
        r"kimi_k2",
        r"4\..*",
        "up to 4.51 or later YaRN's factor was max_position_embeddings / original, here 7.5, not the 6 that the "
        "config says; in releases they are one",
    ),
    (
        r"(qwen2|qwen3)_window",
        r"4\..*",
        "up to 4.51 or later eager attention gave all layers the window of the last ones",
    ),
    (
        r"olmo3\w*",
        r"5\.\d\..*|5\.10\..*",
        "a theta beside those of each kind of layer, by which it computed: it says both",
    ),
    (
        r"gemma3n.*",
        r"4\..*|5\.[0-5]\..*",
        "without a cache, as here, layers that share keys and values took their own in 4.57 to 5.5; with one it is equal",
    ),
    (
        r"gemma[23]_?\w*",
        r"4\..*",
        "up to 4.51 or later layer_types were not read, and this one has others than its class would make",
    ),
    (
        r"hunyuan_v1_\w*",
        r"5\.0\..*",
        "5.0 weighed experts by other experts' weights, and put RoPE without alpha in at initialisation; 5.1 does not",
    ),
    (r"apertus\w*", r"4\..*", "4.57 loads xIELU's constants as bf16"),
    (
        r"cohere2_third",
        r"5\.0\..*",
        "5.0 made layer_types of its default, 4, and left the 3 of the config beside: it says both",
    ),
    (r"afmoe\w*", r"5\.0\..*", "5.0 left rope_theta beside rope_parameters, which has another: it says both"),
    (
        r"gpt_neox\w*",
        r"5\.0\..*",
        "5.0 turned a quarter of a head whatever rope_parameters said: 3 channels here, which are no pairs",
    ),
    (
        r"glm_moe_dsa",
        r"5\.\d\..*|5\.1[0-4]\..*",
        "before 5.11 halves of heads turned, not neighbours (disagreements)",
    ),
    (
        r"glm_moe_dsa_shared|laguna_channel",
        r"5\.\d\..*|5\.1[0-4]\..*",
        "5.10 does not know the field that makes this variant: it is another model",
    ),
    (
        r"nemotron_h\w*",
        r"5\.[3-9]\..*|5\.1[0-4]\..*",
        "from 5.3 to 5.14 states were summed over the wrong axis from chunk to chunk (disagreements)",
    ),
    (
        r"mixtral|qwen2_moe_step",
        r"4\.4.*",
        "4.46 has no head_dim of its own there, and biases always: it is another model",
    ),
)
"""Patterns of variants and versions, and why the result is not equal and right all the same."""

WAYS = ("released", "own", "exported")


@functools.cache
def variants() -> dict[str, Any]:
    """All variants by name, those of TOO among them."""
    import dataclasses

    import tiny

    for name, (like, changes) in TOO.items():
        v = tiny.VARIANTS[like]
        tiny.VARIANTS[name] = dataclasses.replace(v.with_text({**v.text, **changes}), name=name)
    return tiny.VARIANTS


def folder(work: Path, version: str, way: str, name: str) -> Path:
    return work / "made" / version / way / name


# --- in a process with the version ------------------------------------------------------------------------------------


def save(work: Path, version: str, names: list[str], ways: list[str], kept: bool) -> None:
    """Build, save and compute each variant, but for what is `kept`; one line of JSON on stdout for each."""
    import torch
    import transformers

    known = variants()
    assert transformers.__version__ == version, transformers.__version__
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    released = json.loads((work / "released.json").read_text())
    for name in names:
        if not hasattr(transformers, known[name].architecture):
            continue
        for way in ways:
            if way == "own" and version.startswith("4."):
                continue  # it has other words for much of it
            to = folder(work, version, way, name)
            try:
                if kept and to.with_suffix(".pt").exists():
                    pass
                elif way == "exported":
                    opened(known[name], work, to)
                else:
                    built(known[name], released[name] if way == "released" else None, to)
                said = ""
            except Exception as e:
                said = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
                if os.environ.get("TRACE"):
                    traceback.print_exc()
            print(json.dumps({"variant": name, "way": way, "said": said}), flush=True)


def built(variant: Any, released: dict[str, Any] | None, to: Path) -> None:
    import torch
    import transformers
    from tiny import CASES

    from zoo.testing import build

    cls: Any = getattr(transformers, variant.architecture)
    config = variant.build()[0] if released is None else understood(variant, cls, released)
    model = corrected(CASES[variant.family], build.perturb(eager(cls, config), seed=0))
    logits = build.logits(model, build.tokens(variant))
    model.save_pretrained(to)
    build.write_config(to, build.read_config(to) | variant.rewrite)  # a vendor's own model_type
    torch.save(logits, to.with_suffix(".pt"))


def corrected(case: Any, model: Any) -> Any:
    """With what the installed transformers is known to do otherwise put right, where this one does it too."""
    import transformers

    from zoo.testing import build

    known = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 17)
    return build.corrected(case, model) if known else model


def understood(variant: Any, cls: Any, released: dict[str, Any]) -> Any:
    """A release's config as the class reads it."""
    from tiny import CASES

    from zoo.testing.names import _plain

    keys = {
        **CASES[variant.family].upstream_keys(_plain(released)),
        "model_type": cls.config_class.model_type,
    }
    return cls.config_class.from_dict(keys)


def eager(cls: Any, config: Any) -> Any:
    """A model of random weights, attention and experts written out."""
    import torch

    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = cls(config).float().eval()
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("eager")
    return model


def opened(variant: Any, work: Path, to: Path) -> None:
    """Logits of what zoo exported."""
    import torch
    import transformers
    from tiny import CASES

    from zoo.testing import build

    cls: Any = getattr(transformers, variant.architecture)
    exported, how = work / "exported" / variant.name, {"attn_implementation": "eager"}
    if variant.rewrite:  # no model_type of transformers
        how["config"] = understood(variant, cls, build.read_config(exported))
    model = corrected(CASES[variant.family], cls.from_pretrained(exported, **how).float().eval())
    to.parent.mkdir(parents=True, exist_ok=True)
    torch.save(build.logits(model, build.tokens(variant)), to.with_suffix(".pt"))


# --- here -------------------------------------------------------------------------------------------------------------


def prepare(work: Path, names: list[str]) -> None:
    """Write each variant's config in a release's words, what zoo exports of it, and zoo's logits."""
    import tiny
    import torch

    import zoo

    released = {}
    for name in names:
        source, canon, exported = (work / kind / name for kind in ("source", "canon", "exported"))
        if not exported.exists():
            tiny.make(name, source, released_config=True)
            zoo.convert(source, canon)
            zoo.export(canon, exported)
            torch.save(logits(source, name)[0], work / "source" / f"{name}.pt")
        released[name] = json.loads((source / "config.json").read_text())
    (work / "released.json").write_text(json.dumps(released))


def logits(source: Path, name: str) -> tuple[Any, list[str]]:
    """zoo's logits [B, T, V] of a folder, and its notes."""
    import tiny

    from zoo.formats import open_checkpoint
    from zoo.mapping.plan import make_plan
    from zoo.testing.assemble import assemble
    from zoo.testing.built import decoder

    plan = make_plan(open_checkpoint(source))
    model = decoder(plan.spec, assemble(source, plan))
    return model(tiny.tokens(name)), [*plan.checkpoint.notes, *plan.notes]


def compared(work: Path, version: str, said: dict[str, Any]) -> dict[str, Any]:
    """What zoo makes of a folder that was saved, or a version of one that zoo exported."""
    import tiny
    import torch

    from zoo.errors import ZooError

    name, way = said["variant"], said["way"]
    if said["said"]:
        return {"result": "not saved" if way != "exported" else "not opened", "says": said["said"]}
    to = folder(work, version, way, name)
    theirs = torch.load(to.with_suffix(".pt"))
    if way == "exported":
        return judged(theirs, torch.load(work / "source" / f"{name}.pt"))
    try:
        ours, notes = logits(to, name)
    except ZooError as e:
        return {"result": "refused", "says": str(e).replace(f"{to}/", "").replace(f"{work}/", "")[:600]}
    except Exception as e:
        if os.environ.get("TRACE"):
            traceback.print_exc()
        return {"result": "broke", "says": f"{type(e).__name__}: {str(e)[:300]}"}
    found = judged(ours, theirs) | {"notes": notes}
    if found["result"] != "equal":
        try:
            found["installed transformers"] = judged(
                tiny.logits(tiny.upstream(to), tiny.tokens(name)), theirs
            )
        except Exception as e:
            found["installed transformers"] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    return found


def judged(ours: Any, theirs: Any) -> dict[str, Any]:
    apart = float((ours - theirs).abs().max())
    return {"result": "equal" if apart < 2e-4 else "other numbers", "apart": float(f"{apart:.2g}")}


def installed(work: Path, version: str) -> str:
    """The folder of a version, and of what it wants."""
    at = work / version
    if not at.exists():
        wanted = [f"transformers=={version}", *VERSIONS[version]]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(at)]
        subprocess.run([*pip, *wanted], check=True)
    return str(at)


def rows(work: Path, version: str, names: list[str], ways: list[str], kept: bool) -> Iterator[dict[str, Any]]:
    path = os.pathsep.join([installed(work, version), str(ROOT), str(ROOT / "tests")])
    command = [
        sys.executable,
        __file__,
        version,
        "--work",
        str(work),
        "--save",
        "--only",
        *names,
        "--ways",
        *ways,
    ]
    command += ["--kept"] if kept else []
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith("{"):
                said = json.loads(line)
                yield {"variant": said["variant"], "way": said["way"], **compared(work, version, said)}
    if worker.returncode:
        raise SystemExit(f"{version}: the process that saves ended with {worker.returncode}")


def why(row: dict[str, Any], version: str) -> str:
    unread = variants()[row["variant"]].not_read_by_upstream
    if unread and row["way"] != "own":
        return f"not read by transformers of a release: {unread}"
    if row["result"] in ("not saved", "not opened"):
        return "what transformers says of its own work"
    for names, versions, text in WHY:
        if re.fullmatch(names, row["variant"]) and re.fullmatch(versions or ".*", version):
            return text
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("version", nargs="*", default=list(VERSIONS))
    parser.add_argument("--only", nargs="+", help="variants; all where not given")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "saved-by")
    parser.add_argument("--kept", action="store_true", help="what an earlier run saved is read again")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--save", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.save:
        save(args.work, args.version[0], args.only, args.ways, args.kept)
        return 0
    import torch
    import transformers
    from about import machine

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = args.only or sorted(variants())
    prepare(args.work, names)
    out: dict[str, Any] = {}
    unexplained = 0
    for version in args.version:
        counts: Counter[str] = Counter()
        others = []
        for row in rows(args.work, version, names, args.ways, args.kept):
            counts[f"{row['way']}: {row['result']}"] += 1
            if row["result"] == "equal":
                continue
            row["why"] = why(row, version)
            unexplained += not row["why"]
            others.append(row)
            print(f"{version:8}{row['way']:10}{row['variant']:28}{row['result']:15}{row.get('apart', '')} {row.get('says', '')}"
                  f" {row.get('installed transformers', '')} [{row['why']}]", flush=True)  # fmt: skip
        print(version, dict(counts), flush=True)
        out[version] = {"counts": dict(sorted(counts.items())), "not equal": others}
        if args.json:
            about = machine("saved_by.py") | {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            args.json.write_text(json.dumps({"machine": about, "versions": out}, indent=1) + "\n")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())

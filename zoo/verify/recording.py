"""What `zoo golden` does: from a checkpoint or a canonical folder to a golden file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.formats import canonical
from zoo.formats.base import Checkpoint
from zoo.formats.opening import open_checkpoint
from zoo.spec import Spec
from zoo.verify import certificate, golden
from zoo.verify import inputs as standard
from zoo.verify.against import readable
from zoo.verify.certificate import NO_TRANSFORMERS
from zoo.verify.device import chosen, described, exact
from zoo.verify.oracle import Transformers, upstream_available
from zoo.verify.run import versions
from zoo.verify.stage import Progress, silent


def record(
    src: Path, output: Path, dtype: str, max_length: int, device: str = "cpu", say: Progress = silent
) -> dict[str, Any]:
    """Run upstream on `src`, on `device`, and write `output`; a summary. Raises ZooError if upstream can't read it."""
    if not upstream_available():
        raise ZooError(NO_TRANSFORMERS)
    golden.check_output(output)
    where = chosen(device)
    spec, root, ckpt = _open(src)
    if ckpt is None:
        raise ZooError(
            f"{src}: the source it was converted from is not there any more; name the checkpoint itself"
        )
    path = readable(ckpt)
    if path is None:
        raise ZooError(
            f"{ckpt.root}: upstream cannot read {ckpt.format} files. Run the vendor's own code on `zoo golden inputs` "
            "instead; docs/verification.md shows how"
        )
    say("opening upstream")
    oracle = Transformers(path, dtype, device=where)
    asked = standard.make(spec, root, oracle.avoid_ids, max_length, theirs=oracle.limits, dtype=dtype)
    golden.refuse_long(asked)
    say("hashing the source")
    about = {
        "source": {
            "path": ckpt.root.resolve().name,
            "files": certificate.hash_files(ckpt.root, [*ckpt.files, *ckpt.carried]),
        },
        "versions": versions(),
        "device": described(where),
        "family": spec.family,
    }
    say(f"upstream's logits of {asked.n_tokens} tokens, both ways")
    with exact(where):
        notes = golden.record(oracle, asked, spec.d_model, output, dtype, about)
    told = oracle.describe()
    return {
        "output": str(output),
        "tokens": asked.n_tokens,
        "by": f"transformers {told['version']}, {told['class']}",
        "notes": notes,
    }


def inputs(src: Path, output: Path, dtype: str, max_length: int) -> dict[str, Any]:
    """Write the standard inputs of `src` to `output`; a summary."""
    golden.check_output(output)
    spec, root, _ = _open(src)
    asked = standard.make(spec, root, frozenset(), max_length, dtype=dtype)
    golden.refuse_long(asked)
    golden.write_inputs(asked, output, dtype, spec.family)
    return {"output": str(output), "tokens": asked.n_tokens, "batches": len(asked.batches)}


def _open(src: Path) -> tuple[Spec, Path, Checkpoint | None]:
    """The Spec, the folder that has the tokenizer, and the source if it is there."""
    if canonical.detect(src):
        folder = canonical.read(src)
        source = folder.source.get("path")
        ckpt = open_checkpoint(source) if source and Path(source).exists() else None
        return folder.spec, folder.root, ckpt
    from zoo import families

    ckpt = open_checkpoint(src)
    return families.spec_of(ckpt.config), ckpt.root, ckpt

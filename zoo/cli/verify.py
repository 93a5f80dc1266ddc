"""`zoo verify`: is a conversion what upstream would compute?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli._common import DTYPE, Here, Whole, common, emit, failed, note, on, say, say_verdict, table
from zoo.cli._progress import working
from zoo.cli._ranks import Ranks, together
from zoo.errors import ZooError
from zoo.url import is_url

if TYPE_CHECKING:
    from zoo.verify.certificate import Certificate


class _Canon(Here):
    """What is verified. With --pull it may be a release that is not here yet."""

    also = "; with --pull, `zoo verify` does that first"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if ctx is not None and ctx.params.get("pull") and not is_url(value) and not os.path.lexists(value):
            return Path(value)
        return super().convert(value, param, ctx)


SHOWN = 40  # problems of a certificate, a line each
LEVELS = click.Choice(["plan", "bytes", "layers", "logits", "decode"])


@click.command(short_help="Compare a conversion with upstream")
@click.argument("canon", type=_Canon(exists=True, path_type=Path))
@click.option("--pull", "pull", is_flag=True, is_eager=True, help="Where CANON is a release that is not here, fetch it first, as `zoo pull` does.")  # fmt: skip
@click.option("--against", type=click.Path(path_type=Path), metavar="SRC", help="A checkpoint, or a golden file. Default: the source it was converted from. Of a GGUF: the canonical folder it was written of.")  # fmt: skip
@click.option("--oracle", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.py", help="Run this file's logits(ids) in place of upstream. It is run as it is: name only what you trust.")  # fmt: skip
@click.option("--level", type=LEVELS, help="How far to go; each includes those before it. Default: as far as can be judged here.")  # fmt: skip
@click.option("--require", type=LEVELS, help="Fail if this level can't be judged here, whatever else agrees.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the certificate to this file, and leave CANON/parity.json as it is.")  # fmt: skip
@click.option("--dtype", type=DTYPE, default="fp32", show_default=True, help="What both sides compute in.")
@click.option(
    "--stream/--no-stream",
    default=None,
    help="One layer in memory at a time, on both sides: for models of any size. Default: where both do not fit whole.",
)
@on("Where both sides compute: cpu, cuda, cuda:1, or auto (a GPU if there is one).")
@click.option("--max-length", default=4096, show_default=True, type=Whole(8), help="Cross the model's windows and other limits up to this many tokens.")  # fmt: skip
@click.option("--self-test", is_flag=True, help="Also inject every fault of the catalogue, and require that it is caught.")  # fmt: skip
@click.option("--signature", "signed_by", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="PUBLIC.pem", help="First hold CANON to its signature (model.sig) by this key. It covers parity.json, which is left as it is then. Needs zoo-weights[sign].")  # fmt: skip
@click.option("--check-certificate", is_flag=True, help="Only hash everything again, and say whether the certificate still holds.")  # fmt: skip
@common
def command(
    canon: Path, pull: bool, against: Path | None, oracle: Path | None, level: str | None, require: str | None, output: Path | None,
    dtype: str, stream: bool | None, device: str, max_length: int, self_test: bool, signed_by: Path | None, check_certificate: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compare the canonical folder CANON with upstream: tensors, bytes, hidden states, logits, generation.

    The result is kept in CANON/parity.json. Exit code 1 if anything departs by more than its bound.

    CANON may be a GGUF that zoo or llama.cpp wrote of the canonical folder --against: then its tensors, fields and tokenizer are held
    against the folder's, and nothing is kept but what -o names.

    torchrun --nproc-per-node N -m zoo verify ... has N ranks share the model in CANON (with --stream: texts, and the reading of each
    layer): of GPUs, each has one of its own.

    \b
    Examples:
      zoo verify smollm2-135m --pull
      zoo verify canonical --level logits --self-test
      zoo verify canonical --against golden.safetensors
    """
    if pull and not os.path.lexists(canon):
        canon = _pulled(str(canon))
    with together(device) as ranks:
        if signed_by is not None:
            from zoo.sign import check as held

            held(canon, signed_by)
        if check_certificate:
            _check(canon, as_json)
        else:
            _verify(
                ranks,
                canon,
                against,
                oracle,
                level,
                require,
                output,
                dtype,
                stream,
                max_length,
                self_test,
                signed_by is not None,
                as_json,
            )


def _pulled(name: str) -> Path:
    """The folder of the release `name`, fetched if it is not here."""
    from zoo.cli._progress import Bar
    from zoo.mapping.parts import of_process
    from zoo.pull import default_folder, pull

    folder = Path(default_folder(name))
    if folder.exists():
        note(f"{name} is in {folder}")
        return folder
    if of_process(os.environ) is not None:
        raise ZooError(f"--pull is for one process: `zoo pull {name}` first")
    with Bar() as bar:
        pull(name, folder, progress=bar)
    return folder


def _verify(
    ranks: Ranks, canon: Path, against: Path | None, oracle: Path | None, level: str | None, require: str | None,
    output: Path | None, dtype: str, stream: bool | None, max_length: int, self_test: bool, signed: bool, as_json: bool,
) -> None:  # fmt: skip
    from zoo.verify import verify
    from zoo.verify.script import Script

    other: Path | Script | None = against
    if oracle is not None:
        if against is not None:
            raise ZooError("--oracle and --against are two things to compare with: choose one")
        other = Script(oracle, dtype) if ranks.first else None
    with working(as_json) as progress:
        cert = verify(
            canon,
            other,
            level=level,
            dtype=dtype,
            stream=stream,
            device=ranks.device,
            mesh=ranks.mesh,
            max_length=max_length,
            self_test=self_test,
            require=require,
            write=output is None and not signed,
            progress=progress,
        )
    if output is not None and ranks.first:
        cert.write(output.parent, output.name)
        cert.kept = f"{output} written"
    elif canon.is_file() or signed:
        cert.kept = "nothing was written: -o FILE keeps the certificate"
    if as_json:
        emit(cert.to_json())
    else:
        say_verdict(describe(cert, canon))
    if not cert.passed:
        failed()


def _check(canon: Path, as_json: bool) -> None:
    from zoo.verify.certificate import check, unchecked

    problems, why_not = check(canon), unchecked(canon)
    if as_json:
        emit({"holds": not problems, "problems": problems, "not_checked": [why_not] if why_not else []})
    elif problems:
        say_verdict(f"{canon}: the certificate does not hold any more")
        for p in problems[:SHOWN]:
            say(f"  {p}")
        if (more := len(problems) - SHOWN) > 0:
            say(f"  and {more:,} more (--json has them all)")
    elif why_not:
        say_verdict(
            f"{canon}: the certificate holds; every canonical file and rule is what it was, but {why_not}"
        )
    else:
        say_verdict(f"{canon}: the certificate holds; every file, source and rule is what it was")
    if problems:
        failed()


def describe(cert: Certificate, canon: Path) -> str:
    """A certificate for people: the verdict, a line per check, what was not checked."""
    from zoo.verify.certificate import NOT_COMPARED

    lines = [f"{cert.headline}  {canon}  ({cert.dtype}{_where(cert)}, against {_oracle(cert)})", ""]
    rows = []
    for level in cert.levels:
        for n, c in enumerate(level.checks):
            margin = f"{c.margin:.3g}x" if c.margin is not None else ""
            relation = ">=" if c.at_least else "<="
            rows.append([
                level.name if n == 0 else "", "ok" if c.passed else "FAILED", c.name, f"{c.value:.3g}",
                f"{relation} {c.bound:.3g}", margin, c.why,
            ])  # fmt: skip
    lines.append(
        table(
            ["level", "", "check", "value", "bound", "margin", "bound from"],
            rows,
            right=[3, 4, 5],
            short={2: 32},
            drop=[6, 5],
            wrap=6,
        )
    )
    for level in cert.levels:
        lines += [f"  {level.name}: {text}" for text in level.notes]
    lines += [f"  not checked: {text}" for text in cert.not_checked]
    lines += [f"  disputed: {_disputed(d)}" for d in cert.disagreements]
    if cert.lacking and not cert.failed:
        lines += ["", f"required: {cert.lacking}, which was not judged"]
    if cert.values_unseen:
        lines += ["", NOT_COMPARED]
    if cert.diagnosis:
        lines += ["", *_diagnosis(cert)]
    if cert.faults:
        f = cert.faults
        lines += ["", f"seeded faults: {f['caught']} of {f['applicable']} caught"]
        lines += [f"  NOT CAUGHT: {x['what']} ({x['fault']})" for x in f["results"] if not x["caught"]]
    total = cert.timing.get("total")
    lines += ["", "; ".join(filter(None, (cert.kept, f"{total:.1f} s" if total else "")))]
    return "\n".join(lines)


def _where(cert: Certificate) -> str:
    name, ranks = cert.device.get("name", ""), cert.device.get("ranks", 1)
    return (f" on {name}" if name else "") + (f", {ranks} ranks" if ranks > 1 else "")


def _oracle(cert: Certificate) -> str:
    from zoo.verify import NUMERIC

    o = cert.oracle
    if cert.rests_on in ("plan", "bytes") and not any(x.name in NUMERIC for x in cert.levels):
        return f"the source's {'shapes' if cert.rests_on == 'plan' else 'bytes'}; no logits were compared"
    if o["kind"] == "transformers":
        return f"transformers {o['version']}, {o['class']}"
    return str(o.get("name") or ("nothing" if o["kind"] == "none" else o["kind"]))


def _diagnosis(cert: Certificate) -> list[str]:
    d = cert.diagnosis or {}
    return ["what departs first: " + d["where"], *("  " + text for text in d.get("suggestions", []))]


def _disputed(d: dict[str, Any]) -> str:
    stands = {
        "corrected": "upstream's model was corrected in this point",
        "as it is": f"zoo follows {d['follows']}",
        "not known": f"zoo follows {d['follows']}; whom this oracle follows is not known",
    }[d["oracle"]]
    return f"{d['about']}: upstream {d['upstream']}, the vendor {d['vendor']}; {stands} ({d['source']})"

"""`zoo check`: whether a folder is whole and unaltered."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli._common import Anywhere, common, emit, failed, note, say, say_verdict

SHOWN = 40  # problems, a line each


@click.command(short_help="Is a folder whole, and unaltered?")
@click.argument("folder", type=Anywhere(file_okay=False))
@click.argument("repo", required=False, metavar="[OWNER/NAME]")
@click.option(
    "--revision", help="Of the repository: a branch, tag or commit. Default: what was downloaded, or main."
)
@click.option(
    "--certificate",
    "by",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A parity.json that lists the files.",
)
@click.option(
    "--signature",
    "signed_by",
    metavar="PUBLIC.pem",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The folder must be signed (model.sig) by this key. Needs zoo-weights[sign].",
)
@common
def command(
    folder: Path | str,
    repo: str | None,
    revision: str | None,
    by: Path | None,
    signed_by: Path | None,
    as_json: bool,
) -> None:
    """Say whether FOLDER, which somebody downloaded or copied, is whole and unaltered.

    Files, sizes and hashes are held to the Hub's list of OWNER/NAME, to a certificate, or to what the download left beside
    it (notes, names of blobs, a clone's index); headers to the files and the index; tensors to the architecture. Without any
    list, headers and tensors alone. A folder of the Hub's cache stands for its snapshot, which is held to its own commit.
    FOLDER may be the URL of a store (s3://bucket/canon): every byte there is read, and held to the certificate or to the
    store's own hashes. Exit code 1 if something is missing or altered.

    \b
    Examples:
      zoo check canonical
      zoo check DOWNLOAD Qwen/Qwen3-0.6B
    """
    from zoo.check import check, check_store
    from zoo.cli._progress import Bar

    if revision is not None and repo is None:
        raise click.UsageError("--revision is of a repository: name it, OWNER/NAME")
    with Bar() as bar:
        bar.phase("hashing")
        if isinstance(folder, Path):
            report = check(folder, repo, revision=revision, by=by, signed_by=signed_by, progress=bar)
        elif repo is None and signed_by is None:
            report = check_store(folder, by=by, progress=bar)
        else:
            raise click.UsageError("a repository's list and a signature are for a folder on this disk")
    if as_json:
        emit(report.to_json())
    else:
        for line in report.notes:
            note(line)
        for line in report.problems[:SHOWN]:
            say(line)
        if (more := len(report.problems) - SHOWN) > 0:
            say(f"and {more:,} more (--json has them all)")
        if report.remedy is not None:
            note(report.remedy)
        told = f"{report.tensors:,} tensors" + (
            f" of {report.family}, every one in place" if report.family and report.whole else ""
        )
        say_verdict(f"{told}; {report.verdict}" if report.tensors else report.verdict)
    if not report.whole:
        failed()

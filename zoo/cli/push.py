"""`zoo push`: a canonical folder, exported, with its card and certificate, to the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli._common import DTYPE, Here, common, emit, note, say, table


@click.command(short_help="A canonical folder to the Hub, with card and certificate")
@click.argument("canon", type=Here(exists=True, path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--public/--private", default=None, help="Of a repository that is made. Default: private.")
@click.option("--revision", metavar="BRANCH", help="Upload to this branch; it is made if there is none. Default: main.")  # fmt: skip
@click.option("--dtype", type=DTYPE, help="Convert weights to this. Default: as they are.")
@click.option("--unproven", is_flag=True, help="Upload although the certificate failed, or is of other weights; the card says so.")  # fmt: skip
@click.option("--key", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="PRIVATE.pem", help="Sign what is uploaded (model.sig), as `zoo sign` does. Needs zoo-weights[sign].")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only list what would be uploaded, with sizes.")
@common
def command(
    canon: Path, repo: str, public: bool | None, revision: str | None, dtype: str | None, unproven: bool, key: Path | None,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Upload the canonical folder CANON to OWNER/NAME on the Hub: exported as `zoo export` does, with a model card and the
    certificate, in one commit.

    Every file is hashed against the certificate first: one that failed, or is of weights that were edited since, stops it. The
    token is that of `hf auth login` or HF_TOKEN. Interrupted, the same command sends only what the Hub has not got. It needs room
    for the export beside CANON.

    \b
    Examples:
      zoo push canonical me/my-model --dry-run
    """
    from zoo.cli._progress import Bar, Steps
    from zoo.cli.sign import password_of
    from zoo.push import push
    from zoo.untrusted.printable import decimal

    with Bar() as bar:
        bar.phase("exporting")
        done = push(
            canon, repo, private=None if public is None else not public, revision=revision, dtype=dtype, unproven=unproven,
            key=key, password=password_of(None if dry_run else key), dry_run=dry_run, progress=Steps(bar),
        )  # fmt: skip
    if as_json:
        emit(done.to_json())
        return
    say(table(("file", "size"), [(n, decimal(size)) for n, size in sorted(done.files.items())], right=[1]))
    say(f"{len(done.files)} files, {decimal(sum(done.files.values()))}; certificate: {done.certificate}")
    for text in done.notes:
        note(text)
    say(
        f"uploaded to {done.url}"
        if done.url
        else f"nothing was uploaded: without --dry-run they go to {repo}"
    )

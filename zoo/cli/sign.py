"""`zoo sign`: a folder, signed."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli._common import Here, common, emit, say


def password_of(key: Path | None) -> str | None:
    """Asked for, if the key has one."""
    from zoo.sign import is_encrypted

    if key is None or not is_encrypted(key):
        return None
    return str(click.prompt(f"Password of {key}", hide_input=True, err=True))


@click.command(short_help="Sign a folder with a key of your own")
@click.argument("folder", type=Here(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--key", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="PRIVATE.pem",
    help="A private key of P-256, P-384 or P-521, PEM.",
)  # fmt: skip
@common
def command(folder: Path, key: Path, as_json: bool) -> None:
    """Sign every file of FOLDER, canonical or exported, with OpenSSF's model-signing: FOLDER/model.sig.

    `zoo check FOLDER --signature PUBLIC.pem` holds the folder to it, as model-signing's own command does. Nothing is asked of any
    server. Needs zoo-weights[sign].

    \b
    Examples:
      zoo sign canonical --key private.pem
    """
    from zoo.sign import sign

    path = sign(folder, key, password_of(key))
    if as_json:
        emit({"signature": str(path)})
        return
    say(f"signed: {path}; `zoo check {folder} --signature PUBLIC.pem` holds the folder to it")

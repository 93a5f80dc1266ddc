"""`zoo pull`: a release, from the Hub to a canonical folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli._common import (
    DTYPE,
    Here,
    ReleaseName,
    Whole,
    common,
    emit,
    in_parts,
    level,
    pairs,
    part_of_these,
    say,
    which_set,
)
from zoo.url import is_url, without_secrets

if TYPE_CHECKING:
    from zoo.mapping.parts import Part


class Layers(click.ParamType[list[int]]):
    """Layer numbers and ranges: 0-3,7."""

    name = "0-3,7"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            out: list[int] = []
            for part in value.split(","):
                first, dash, last = part.partition("-")
                numbers = range(int(first), int(last if dash else first) + 1)
                if not numbers or numbers[-1] > 9999:  # no model is that deep, and the list is made here
                    raise ValueError
                out += numbers
            return sorted(set(out))
        except ValueError:
            self.fail(f"{value!r} is not a list of layers like 0-3,7", param, ctx)


@click.command(short_help="Fetch a release, check it, convert it")
@click.argument("name", type=ReleaseName())
@click.option("--to", type=Here(path_type=Path), help="The canonical folder to make. Default: ./NAME")
@click.option("--dtype", type=DTYPE, help="Convert weights to this. Default: as released.")
@click.option("--revision", help="A branch, tag or commit. Default: the manifest's, or main.")
@click.option("--format", help="Take the release in this format, where it comes in several (see `zoo show`).")
@which_set
@click.option("--family", help="Take it for this family. Default: what its config says.")
@level
@click.option(
    "--stream",
    is_flag=True,
    help="Convert as files arrive and keep none: needs little more disk than the result.",
)
@click.option("--layers", type=Layers(), help="Fetch and convert only these layers, and the ends.")
@in_parts
@click.option("--dry-run", is_flag=True, help="Say what would be fetched and written, from headers alone.")
@click.option("--force", is_flag=True, help="Replace the folder if there is one.")
@click.option("--workers", type=Whole(1, 64), default=4, show_default=True, help="Files that arrive at once.")
@common
def command(
    name: str, to: Path | None, dtype: str | None, revision: str | None, format: str | None, file: str | None,
    family: str | None, verify: str | None, device: str, stream: bool, layers: list[int] | None, part: Part | None,
    dry_run: bool, force: bool, workers: int, as_json: bool,
) -> None:  # fmt: skip
    """Fetch the release NAME (see `zoo list`; any owner/repo on the Hub; or the URL of a store), check it, and convert it.
    A canonical folder in a store is fetched as it is.

    The plan is made from headers before any weight is fetched. Every file's hash is checked. Interrupted, the same
    command goes on where it stopped. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as with `hf`.

    Several processes share the work where torchrun or srun started them, or each is given its --part: each fetches what its own
    output files are made of; the last to finish lets the folder appear.

    With --json, events are printed as they happen, an object a line; the last is `done` or `error`.

    \b
    Examples:
      zoo pull smollm2-135m
      zoo pull deepseek-v3 --to /big/deepseek-v3 --stream
    """
    if stream and layers is not None:
        raise click.UsageError("--stream and --layers are two ways to fetch: choose one")
    from zoo.cli._progress import Bar, Events
    from zoo.cli.plan import remote_json, remote_lines
    from zoo.pull import preview, pull

    how: dict[str, Any] = {
        "dtype": dtype,
        "revision": revision,
        "format": format,
        "file": file,
        "family": family,
        "layers": layers,
        "stream": stream,
    }
    if dry_run:
        with Bar() as bar:
            found = preview(name, to, progress=bar, **how)
        if as_json:
            plan = found.opened.plan.to_json() | remote_json(found)
            emit(plan | {"tensors": len(found.opened.plan.outputs)})
        else:
            say(pairs(remote_lines(found)))
            say(found.opened.plan.summary())
        return
    part = part_of_these(part)
    with Events() if as_json else Bar() as progress:
        path = pull(
            name,
            to,
            verify=verify,
            device=device,
            force=force,
            workers=workers,
            part=part,
            progress=progress,
            **how,
        )
    if part is not None and not path.exists():  # the last one tells of it
        if isinstance(progress, Events):
            progress.tell("done", part=f"{part.number}/{part.of}", appears_later=str(path))
        return
    if isinstance(progress, Events):
        progress.tell("done", path=str(path))
        return
    say(f"{without_secrets(name)} is in {path}")
    if verify is None and layers is None:
        against = " --against SOURCE" if stream or is_url(name) else ""  # what was streamed is not kept
        say(f"`zoo verify {path}{against}` compares it with upstream; `zoo generate {path} PROMPT` runs it")

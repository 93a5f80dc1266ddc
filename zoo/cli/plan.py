"""`zoo plan`: what a conversion would do, from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from zoo.cli._common import DTYPE, Source, common, emit, note, pairs, say, table, what_it_is, which_set

if TYPE_CHECKING:
    from zoo.pull import Preview


@click.command(short_help="What a conversion would do, from headers alone")
@click.argument("src", type=Source())
@click.option("--dtype", type=DTYPE, help="As for `zoo convert`.")
@which_set
@what_it_is
@click.option("--revision", help="Of a remote SRC: a branch, tag or commit.")
@click.option("--tensors", is_flag=True, help="List every canonical tensor and what it is made of.")
@common
def command(
    src: str,
    dtype: str | None,
    file: str | None,
    format: str | None,
    family: str | None,
    revision: str | None,
    tensors: bool,
    as_json: bool,
) -> None:
    """Show what converting SRC would do, reading only headers: nothing is converted or, from the Hub, downloaded.

    SRC is a checkpoint on disk, the name of a release, or owner/repo on the Hub. Fails, listing all that does not
    fit, if the family's rules do not account for every tensor.

    \b
    Examples:
      zoo plan qwen3-0.6b
      zoo plan model.gguf --tensors
    """
    from zoo.cli._progress import Bar
    from zoo.pull import is_local, not_here, open_source, preview

    with Bar() as bar:
        found: Preview | None = None
        if is_local(src):
            opened = open_source(src, dtype, format=format, family=family, file=file)
        else:
            with not_here(src):
                found = preview(
                    src,
                    dtype=dtype,
                    format=format,
                    family=family,
                    file=file,
                    revision=revision,
                    progress=bar,
                )
            opened = found.opened
    if as_json:
        plan = opened.plan.to_json()
        if found is not None:
            plan |= remote_json(found)
        listed, plan["tensors"] = plan["tensors"], len(opened.plan.outputs)
        plan |= {"tensor_list": listed} if tensors else {}
        emit(plan)
        return
    if found is not None:
        say(pairs(remote_lines(found)))
    say(opened.plan.summary())
    if tensors:
        rows = [
            (o.name, o.dtype, "x".join(map(str, o.shape)) or "scalar", ", ".join(o.sources[:4]) + (", ..." if len(o.sources) > 4 else ""))
            for o in opened.plan.outputs.values()
        ]  # fmt: skip
        say(table(("TENSOR", "DTYPE", "SHAPE", "FROM"), rows, short={0: 24}, drop=(1, 2), wrap=3))
    if found is not None and found.fetch - found.there + found.write > found.free:
        note("this disk is too small for it; `zoo pull --stream` keeps no copy of the source")


def remote_lines(found: Preview) -> list[tuple[str, str]]:
    """Where a remote source is, what would be fetched and written."""
    from zoo.untrusted.printable import decimal

    lines = [("from", _origin(found))]
    if found.opened.remote is not None:
        here = f", {decimal(found.there)} of them here already" if found.there else ""
        lines.append(("fetch", f"{decimal(found.fetch)} in {len(found.opened.remote.files)} files{here}"))
    if found.opened.stored is not None:
        lines.append(("fetch", f"{decimal(found.fetch)} in {len(found.opened.stored.files)} files"))
    lines.append(("write", f"up to {decimal(found.write)}; this disk has {decimal(found.free)} free"))
    return lines


def remote_json(found: Preview) -> dict[str, Any]:
    return {
        "origin": found.opened.origin,
        "fetch_bytes": found.fetch,
        "cached_bytes": found.there,
        "write_bytes": found.write,
        "free_bytes": found.free,
    }


def _origin(found: Preview) -> str:
    origin = found.opened.origin or {}
    if origin.get("kind") == "hub":
        return f"{origin['repo']}, {origin['revision']} = commit {origin['commit']}"
    if origin.get("kind") == "store":
        return str(origin["url"])
    return f"PyPI: {origin.get('package')} {origin.get('version')}"

"""`zoo show`: the architecture of a release, or of several side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from zoo.cli._common import ReleaseName, common, emit, pairs, say, terminal_width

if TYPE_CHECKING:
    from zoo.manifest import Manifest
    from zoo.spec import Spec


FACTS = (
    "also called",
    "vendor",
    "released",
    "from",
    "published size",
    "weights",
    "formats",
    "licence",
    "paper",
    "code",
    "architecture",
)


@click.command(short_help="How a release is built; several side by side")
@click.argument("names", nargs=-1, required=True, type=ReleaseName(), metavar="NAME...")
@common
def command(names: tuple[str, ...], as_json: bool) -> None:
    """Show what is known of a release and how it is built; several are put side by side, differences marked.

    NAME is a release (`zoo list`), or an owner/repo on the Hub: of one that zoo has no manifest of, its sets of weights are
    listed, and what its config.json says.
    """
    from zoo import manifest

    if len(names) == 1 and (found := _repository(names[0])) is not None:
        if as_json:
            emit(found)
            return
        from zoo.cli.inspect import sets_table

        lines = [("name", found["name"]), ("from", found["from"]), *found.get("architecture", {}).items()]
        lines += [("note", note) for note in found.get("notes", [])]
        say(pairs(lines))
        say()
        say(sets_table(found["sets"]))
        return
    releases = [manifest.find(name) for name in names]
    specs = [_spec(m) for m in releases]
    if as_json:
        shown = [_json(m, s) for m, s in zip(releases, specs, strict=True)]
        emit(shown[0] if len(shown) == 1 else shown)
    elif len(releases) == 1:
        say(pairs([*_facts(releases[0]).items(), *_architecture(releases[0], specs[0]).items()]))
    else:
        columns = [_facts(m) | _architecture(m, s) for m, s in zip(releases, specs, strict=True)]
        say(side_by_side([m.name for m in releases], columns))


def _repository(name: str) -> dict[str, Any] | None:
    """What a repository holds that is no release of zoo's; None for what is one, or no owner/repo."""
    from zoo import manifest
    from zoo.errors import ZooError

    try:
        manifest.find(name)
        return None
    except ZooError:
        if name.count("/") != 1:
            raise
    from zoo import families, hub, remote
    from zoo.describe import describe
    from zoo.formats.base import read_json

    snapshot = hub.resolve(name)
    out: dict[str, Any] = {
        "name": name,
        "from": f"hf:{name}, commit {snapshot.commit}",
        "sets": [s.to_json() for s in remote.sets_of(snapshot)],
    }
    if not any(f.path == "config.json" for f in snapshot.files):
        return out | {"notes": ["there is no config.json: a GGUF says itself what it is"]}
    try:
        at = hub.download(snapshot, ["config.json"]) / "config.json"
        spec = families.spec_of(read_json(at, "a checkpoint needs its config"), where=f"{name}: config.json")
    except ZooError as error:  # still worth showing
        return out | {"notes": [str(error)]}
    return out | {"architecture": describe(spec)}


def _spec(m: Manifest) -> Spec | None:
    """From the release's config, which zoo has a copy of for most."""
    from zoo import families

    return (
        None
        if m.config is None
        else families.spec_of(m.config, families.get(m.family), f"{m.name}: config.json")
    )


def _facts(m: Manifest) -> dict[str, str]:
    from zoo.printable import count

    published = f"{count(m.params_total)} total" if m.params_total else ""
    published += f", {count(m.params_active)} active" if m.params_active else ""
    facts = {
        "name": m.name,
        "also called": ", ".join(m.aliases),
        "vendor": m.vendor or "",
        "released": m.released or "",
        "from": "\n".join(str(s) for s in m.sources),
        "published size": published,
        "weights": m.quantization or m.dtype or "",
        "formats": ", ".join(m.formats),
        "licence": (m.licence or "") + (", gated: accept it on the Hub first" if m.gated else ""),
        "paper": m.links.get("paper", ""),
        "code": m.links.get("code", ""),
    }
    return {k: v for k, v in facts.items() if v}


def _architecture(m: Manifest, spec: Spec | None) -> dict[str, str]:
    from zoo.describe import describe

    if spec is None:
        return {
            "family": m.family,
            "architecture": f"zoo has no copy of its config; `zoo plan {m.name}` reads it",
        }
    from zoo import families

    disputed = "\n".join(map(str, families.disagreements(spec)))
    return describe(spec) | ({"disputed": disputed} if disputed else {})


def _json(m: Manifest, spec: Spec | None) -> dict[str, Any]:
    from zoo import describe, manifest
    from zoo.layout import active_params, total_params

    out = manifest.summary(m) | {"links": m.links}
    if spec is not None:
        out |= {
            "architecture": describe.describe(spec),
            "params": {"total": total_params(spec), "active": active_params(spec)},
            "kv_bytes_per_token": describe.kv_bytes_per_token(spec),
            "spec": spec.to_dict(),
        }
    return out


def side_by_side(names: list[str], columns: list[dict[str, str]]) -> str:
    """A column per release; rows in which they differ begin with *."""
    import textwrap

    from zoo.describe import QUESTIONS

    keys = [key for key in (*FACTS, *QUESTIONS) if any(key in column for column in columns)]
    left = max(map(len, keys)) + 4
    each = max(24, (min(200, terminal_width()) - left) // len(columns) - 2)
    lines = [" " * left + "  ".join(n.ljust(each) for n in names).rstrip()]
    for key in keys:
        values = [c.get(key, "-") for c in columns]
        mark = "*" if len(set(values)) > 1 else " "
        cells = [
            [x for v in value.split("\n") for x in textwrap.wrap(v, each, break_on_hyphens=False) or [""]]
            for value in values
        ]
        for n in range(max(map(len, cells))):
            row = "  ".join((c[n] if n < len(c) else "").ljust(each) for c in cells)
            lines.append((f"{mark} {key}" if n == 0 else "").ljust(left) + row.rstrip())
    return "\n".join(line.rstrip() for line in lines)

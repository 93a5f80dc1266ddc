"""What MkDocs asks: the gallery as files of the site, so that links into it are checked like any other; for the Python pages,
functions that share a name with a module; for phones, tables whose cells know their column; the help of every command."""

from __future__ import annotations

import html
import re
import tempfile
from pathlib import Path
from typing import Any

import click
import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from zoo import gallery, manifest
from zoo.cli import cli
from zoo.gallery.pages import NAVIGATION

_HOLDER = tempfile.TemporaryDirectory(prefix="zoo-docs-")  # until the site is written
HELP, RELEASES = "<!-- the help of every command -->", "<!-- how many releases and families -->"
FAMILIES = "| family | releases | checkpoint |"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = Path(_HOLDER.name)
    gallery.write(made)
    for path in made.rglob("*.html"):  # a way back
        text, begins = path.read_text(encoding="utf-8"), NAVIGATION
        assert begins in text, f"{path}: where is its navigation?"
        home = "../" * len(path.relative_to(made).parts) + "index.html"
        path.write_text(
            text.replace(begins, f'{begins}<a href="{home}">Documentation</a>', 1), encoding="utf-8"
        )
    for path in sorted(p for p in made.rglob("*") if p.is_file()):
        files.append(File.generated(config, f"gallery/{path.relative_to(made)}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    if HELP in markdown:
        markdown = markdown.replace(HELP, commands())
    if RELEASES in markdown:
        known = manifest.load_all()
        markdown = markdown.replace(
            RELEASES, f"{len(known)} releases, {len({m.family for m in known})} families"
        )
    return by_family(markdown) if FAMILIES in markdown else markdown


def on_page_content(html: str, **_: Any) -> str:  # the name that MkDocs calls it by
    html = re.sub(
        r"(?<!</span>)<code>[^<\n]*</code>",
        lambda m: re.sub(r"--[a-z-]+", r"<span class=option>\g<0></span>", m[0]),
        html,
    )
    return re.sub(r"<table>.*?</table>", labelled, html, flags=re.S)


def on_post_page(output: str, **_: Any) -> str:
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"')  # the theme's has no name


def commands() -> str:
    """What `zoo COMMAND --help` prints, command by command."""
    said = []
    root = click.Context(cli, info_name="zoo")
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, parent=root, info_name=name, terminal_width=92)
        every = [context]
        if isinstance(command, click.Group):
            every += [
                click.Context(inner, parent=context, info_name=n, terminal_width=92)
                for n, inner in command.commands.items()
            ]
        said.append(
            f"### zoo {name}\n\n" + "".join(f"```text\n{c.command.get_help(c)}\n```\n\n" for c in every)
        )
    return "\n".join(said)


def labelled(table: re.Match[str]) -> str:
    """The table, each cell of it with the heading of its column: on a phone a row is a list of them. Two columns explain themselves."""
    heads = [re.sub(r"<.*?>", "", h) for h in re.findall(r"<th(?: [^>]*)?>(.*?)</th>", table[0], re.S)]
    if not any(heads):
        return re.sub(r"<thead>.*?</thead>", "", table[0], flags=re.S)
    named = re.sub(r"<th( [^>]*)?></th>", r"<td\1></td>", table[0])  # what has no text is no heading
    if len(heads) < 3:
        return named

    def row(found: re.Match[str]) -> str:
        cells = iter(heads)
        return re.sub(
            r"<td", lambda _: f'<td data-label="{html.escape(next(cells, ""), quote=True)}"', found[0]
        )

    return re.sub(r"<tr>.*?</tr>", row, named, flags=re.S)


def by_family(markdown: str) -> str:
    """docs/families.md has a line a checkpoint, as it is written by machine; people read a line a family. What all
    checkpoints show is said once, and so is what some do not."""
    lines = markdown.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(FAMILIES))
    end = next(n for n in range(start, len(lines)) if not lines[n].startswith("|"))
    head = [cell.strip() for cell in lines[start].strip("|").split("|")]
    good = {
        "logits": "within bound",
        "cached decoding": "within bound",
        "greedy tokens": "equal",
        "round trip": "to the byte",
    }
    families: list[list[dict[str, str]]] = []
    for line in lines[start + 2 : end]:
        cells = dict(zip(head, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        families += [[cells]] if cells["family"] else []
        if not cells["family"]:
            families[-1].append(cells)
    rows, other = [], []
    for variants in families:
        first = variants[0]
        classes = dict.fromkeys(f"`{v['upstream class']}`" for v in variants)
        caught = "<br>".join(f"{v['checkpoint']} {v['faults caught']}" for v in variants)
        rows.append(f"| {first['family']} | {first['releases']} | {caught} | {'<br>'.join(classes)} |")
        other += [f"{v['checkpoint']}: {k} {v[k]}" for v in variants for k, ok in good.items() if v[k] != ok]
    said = "Every checkpoint has logits and cached decoding within bound, greedy tokens equal, and a round trip to the byte"
    out = [
        said + (f", but: {'; '.join(other)}." if other else "."),
        "",
        "| family | releases | checkpoints, faults caught | upstream class |",
        "|---|--:|---|---|",
        *rows,
    ]
    return "\n".join([*lines[:start], *out, *lines[end:]])


class Functions(griffe.Extension):
    """`zoo.pull`, `zoo.spec`, `zoo.verify` are functions although modules have the same names: here `zoo.pull()` is the function."""

    def __init__(self) -> None:
        self.found: dict[str, griffe.Function] = {}

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.parent is not None and func.parent.path == "zoo":
            self.found[func.name] = func

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        if pkg.path == "zoo":
            pkg.members |= {f"{name}()": func for name, func in self.found.items()}

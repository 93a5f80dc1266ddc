"""The command line: `zoo COMMAND`. One file per command; a command is a file here with a `command` in it.

Exit codes: 0 done; 1 failed, with one message on stderr (`--debug` adds the traceback); 2 wrong usage;
130 stopped by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP. Results go to stdout, as JSON with `--json`; progress and
messages to stderr.

Unusual here: starting must cost little more than importing click does, so the files of commands import torch,
numpy and huggingface_hub only when they run (a test holds them to it).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from zoo._version import __version__
from zoo.cli import _common
from zoo.system import pages

SECTIONS = {
    "Find": ("list", "show", "gallery"),
    "Bring here": ("pull", "plan", "convert", "inspect"),
    "Prove": ("verify", "report", "golden", "check"),
    "Run": ("generate", "chat"),
    "Change and give away": ("export", "merge", "lora", "push", "sign"),
}
"""As in docs/cli.md."""


class _Commands(click.Group):
    """Finds commands by the names of the files beside this one, and imports only those asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        files = {f[:-3] for f in os.listdir(__path__[0]) if f.endswith(".py") and not f.startswith("_")}
        order = [c for of in SECTIONS.values() for c in of]
        return [*(c for c in order if c in files), *sorted(files.difference(order))]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        for title, of in SECTIONS.items():
            with formatter.section(title):
                found = [(name, self.get_command(ctx, name)) for name in of if name in names]
                formatter.write_dl([(f"{n:8}", c.get_short_help_str(limit=90)) for n, c in found if c])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"zoo.cli.{name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=2)
            if not near:
                raise
            raise click.UsageError(f"{error.message} Did you mean: {', '.join(near)}?", ctx) from None


@click.command(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, "-V", "--version", message="zoo %(version)s")
def cli() -> None:
    """Open LLM checkpoints in one canonical layout: found, pulled, converted and proven.

    \b
    zoo pull smollm2-135m     fetch a release, check and convert it
    zoo show qwen3-8b llama4  architectures, side by side
    zoo verify DIR            compare it with upstream

    zoo COMMAND --help has examples. Each command takes --json, and --debug for a traceback. Exit codes: 0 done, 1 failed, 2 wrong usage.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process."""
    pages.large()
    sys.exit(_common.run(cli, args))

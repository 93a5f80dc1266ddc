"""What the commands share: `--json` and `--debug`, how a failure looks, how results are printed."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

import click

from zoo.cli._state import State
from zoo.errors import ZooError
from zoo.untrusted.printable import printable, printable_json
from zoo.url import is_url, not_here

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from zoo.mapping.parts import Part

F = TypeVar("F", bound=Callable[..., Any])


def _set(name: str) -> Callable[[click.Context, click.Parameter, bool], bool]:
    def callback(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
        if value:
            setattr(State, name, True)
        if value and name == "debug":
            _tell_everything(ctx)
        return value

    return callback


def _tell_everything(ctx: click.Context) -> None:
    """What zoo logs for those who look into it goes to stderr, too, until the command ends."""
    import logging

    class Printable(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record))

    logger, handler, level = logging.getLogger("zoo"), logging.StreamHandler(), logging.getLogger("zoo").level
    handler.setFormatter(Printable())
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)

    def end() -> None:
        logger.removeHandler(handler)
        logger.setLevel(level)

    ctx.call_on_close(end)


def common(function: F) -> F:
    """Every command's decorator, under `@click.command()`: adds `--json` (passed as `as_json`), `--json-schema` and `--debug`."""
    function = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_set("debug"),
        help="Say more of what is done, and show a traceback on failure.",
    )(function)
    function = click.option(
        "--json-schema",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_schema,
        help="Print the JSON Schema of what --json prints.",
    )(function)
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        callback=_set("json"),
        help="Print the result as JSON, for programs.",
    )(function)


def _print_schema(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from zoo.cli._schemas import schema

        click.echo(json.dumps(schema(" ".join(ctx.command_path.split()[1:])), indent=2))
        ctx.exit()


def emit(data: Any) -> None:
    """Print JSON to stdout."""
    click.echo(json_text(data))


def json_text(data: Any) -> str:
    """JSON as every command prints it."""
    return printable_json(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def say(text: str = "") -> None:
    """A result, on stdout. Sentences that are longer than the window are folded."""
    click.echo(folded(printable(text)))


VERDICTS = {
    "PASSED": "green",
    "the certificate holds": "green",
    "whole and unaltered": "green",
    "FAILED": "red",
    "NOT CAUGHT": "red",
    "NOT whole and unaltered": "red",
    "the certificate does not hold any more": "red",
}
"""The words of a verdict, and their colours. They say it without these, too."""


def say_verdict(text: str) -> None:
    """As `say`; the verdicts in it are coloured on a terminal, unless NO_COLOR is set (no-color.org)."""
    said = folded(printable(text))
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        words = "|".join(sorted(VERDICTS, key=len, reverse=True))
        said = re.sub(rf"(?<!\S)({words})\b", lambda m: click.style(m[0], fg=VERDICTS[m[0]]), said)
    click.echo(said)


def note(text: str) -> None:
    """A sentence for people, on stderr."""
    click.echo(folded(printable(text), sys.stderr), err=True)


def failed() -> NoReturn:
    """End the command with exit code 1 after its output said why."""
    raise click.exceptions.Exit(1)


def run(cli: click.Command, args: Sequence[str] | None) -> int:
    """Run the command line; its exit code."""
    State.reset()
    warnings.formatwarning = _warned
    try:
        _open_outputs()
        with _stoppable():
            result = cli.main(args=args, prog_name="zoo", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show(shown := io.StringIO())  # with names that a shell found for a pattern
        note(shown.getvalue().rstrip("\n"))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("stopped", 128 + State.stopped)
    except BrokenPipeError:  # `zoo list | head`
        _mute()
        return 0
    except SystemExit:  # click's own way with a pipe that nobody reads any more
        if type(sys.stdout).__name__.lstrip("_") != "PacifyFlushWrapper":
            raise
        _mute()
        return 0
    except ZooError as error:
        return _fail(str(error), 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(str(ZooError(f"{where}{error.strerror or error}")), 1)
    except Exception as error:
        hint = "" if State.debug else " (run again with --debug for the traceback)"
        said = f"a bug in zoo, or something it did not foresee: {type(error).__name__}: {error}{hint}"
        return _fail(str(ZooError(said)), 1)


_plain_warning = warnings.formatwarning


def _warned(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning's text: what other packages call themselves and their files may hold what a terminal obeys."""
    return printable(_plain_warning(message, category, filename, lineno, line))


@contextmanager
def _stoppable() -> Iterator[None]:
    """A job that is told to end (SIGTERM), or whose terminal has gone (SIGHUP), cleans up as after Ctrl-C."""

    def stop(number: int, _: object) -> None:
        State.stopped = signal.Signals(number)
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    names = ("SIGTERM", "SIGHUP") if main else ()
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {s: signal.signal(s, stop) for s in signals if signal.getsignal(s) is signal.SIG_DFL}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _fail(message: str, code: int) -> int:
    if State.debug:
        import traceback

        note(traceback.format_exc())
    with suppress(OSError):
        note(f"zoo: {message}")
    try:
        if State.on_failure is not None:
            State.on_failure(message)
        elif State.json:
            emit({"error": message})
        sys.stdout.flush()
    except OSError:  # a pipe that nobody reads, a full disk: what was to be said is on stderr
        _mute()
    return code


def _open_outputs() -> None:
    """Outputs that were closed (`>&-`) go nowhere, so that no file of ours is given their number; and names of files,
    which may be in any encoding, can be written."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _mute() -> None:
    """What is still to be written to stdout, at the end of the process too, is dropped."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- arguments


class ReleaseName(click.ParamType[str]):
    """The name of a release; the shell completes it."""

    name = "name"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        from zoo import manifest

        return [CompletionItem(stem) for stem in manifest.stems() if stem.startswith(incomplete.lower())]


class Source(ReleaseName):
    """A folder or file, a release's name, or owner/repo."""

    name = "src"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [*super().shell_complete(ctx, param, incomplete), CompletionItem(incomplete, type="file")]


class Anywhere(click.ParamType["Path | str"]):
    """A path, which must be there unless `new`, or the URL of a store, as it is."""

    name = "path"

    def __init__(self, new: bool = False, file_okay: bool = True) -> None:
        self.path = Here(exists=not new, file_okay=file_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        if is_url(value):
            return str(value)
        return Path(os.fsdecode(self.path.convert(value, param, ctx)))

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


class Here(click.Path):
    """A path on this disk; the URL of a store, and the name of a release that is not here, are refused with what to do."""

    also = ""
    """What else the command offers where a release is not here."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if is_url(value):
            self.fail(not_here(value, f"zoo {ctx.info_name if ctx else ''} works"), param, ctx)
        if self.exists and not os.path.lexists(value) and (why := _not_pulled(os.fspath(value))) is not None:
            self.fail(why + self.also, param, ctx)
        if not self.file_okay and os.path.isfile(value):
            name = shlex.quote(os.fspath(value))
            made = param is not None and param.name == "canon"
            what = f"{'CANON' if made else 'what is asked for'} is a folder"
            how = (
                f"`zoo convert {name} FOLDER` makes one of a checkpoint"
                if made
                else "give the one that it lies in"
            )
            self.fail(f"{name} is a file; {what}: {how}", param, ctx)
        return super().convert(value, param, ctx)


def _not_pulled(name: str) -> str | None:
    """Where the folder of the release `name` is, or what brings it; None of what is no release."""
    from zoo import manifest

    try:
        folder = manifest.find(name).name
    except ZooError:
        return None
    if os.path.isdir(folder):
        return f"there is no folder {name!r} here; this release is in {folder!r}"
    return f"the release {folder} is not here: `zoo pull {folder}` brings it to ./{folder}"


class Whole(click.IntRange):
    """A whole number within bounds, which help and refusals tell in words."""

    name = "integer"

    def _describe_range(self) -> str:  # click's help asks for it
        return _in_words(self)


class Number(click.FloatRange):
    """The same of any number."""

    name = "number"

    def _describe_range(self) -> str:
        return _in_words(self)


def _in_words(bounds: click.IntRange | click.FloatRange) -> str:
    least = str(bounds.min)
    if (most := bounds.max) is None:
        return f"{least} or more"
    for less, text in ((0, ""), (1, " - 1")):
        if most > 1 << 20 and (power := int(most) + less).bit_count() == 1:
            return f"{least} to 2^{power.bit_length() - 1}{text}"
    return f"{least} to {most}"


DTYPE = click.Choice(["bf16", "fp16", "fp32"])


def what_it_is(command: F) -> F:
    """`--format` and `--family`: for files that do not say it themselves."""
    family = click.option("--family", help="Take it for this family. Default: what its config says.")
    format = click.option("--format", help="Take the files for this format. Default: found from them.")
    return format(family(command))


def which_set(command: F) -> F:
    """`--file`: of several sets of weights."""
    return click.option(
        "--file",
        metavar="NAME",
        help="Which weights of a folder or repository, or below it: a file, an index of shards, the first of a split "
        "set. Default: those that transformers takes.",
    )(command)


class PartOf(click.ParamType["Part"]):
    """Which of several processes this is: 2/8."""

    name = "k/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Part:
        from zoo.mapping.parts import Part, parse

        try:
            return value if isinstance(value, Part) else parse(value)
        except ZooError as error:
            self.fail(str(error), param, ctx)


def in_parts(command: F) -> F:
    """`--part`."""
    return click.option(
        "--part",
        type=PartOf(),
        help="Do the k-th of n parts, other processes the others. Default: as torchrun or srun say; alone, all.",
    )(command)


def part_of_these(part: Part | None) -> Part | None:
    """The part that was asked for, or that torchrun or srun gave this process; None: all of it."""
    from zoo.mapping.parts import of_process

    if part is None and (found := of_process(os.environ)):
        part, because = found
        note(f"{part}, since {because}; --part 1/1 would do it all")
    return None if part is not None and part.of == 1 else part


def level(command: F) -> F:
    """`--verify LEVEL` and `--device`."""
    levels = click.Choice(["plan", "bytes", "layers", "logits", "decode"])
    verify = click.option("--verify", type=levels, help="Verify up to this level before the folder appears.")
    return verify(on("Where --verify computes: cpu, cuda, cuda:1, or auto.")(command))


def on(help: str) -> Callable[[F], F]:
    """`--device`."""
    return click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help=help)


# ---- tables


def terminal_width(otherwise: int = 110, stream: TextIO | None = None) -> int:
    """Columns of the terminal that the stream (stdout) is, else `otherwise`. (shutil has this, and takes longer to import.)"""
    try:
        of = stream or sys.__stdout__
        found = int(os.environ.get("COLUMNS") or os.get_terminal_size(of.fileno()).columns)  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return otherwise
    return found or otherwise  # a terminal without a size says 0


def window(stream: TextIO | None = None) -> int | None:
    """Columns that a line may have; None where the stream (stdout) is no terminal: programs read whole lines."""
    return terminal_width(stream=stream) if (stream or sys.stdout).isatty() else None


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int] = (),
    short: Mapping[int, int] = MappingProxyType({}),
    drop: Sequence[int] = (),
    wrap: int | None = None,
) -> str:
    """Columns, padded; those in `right` are aligned right.

    In a window that is too narrow: `short` columns are shortened, to so many characters at least, and the column `wrap`, the
    last, takes several lines; where that is not enough, those in `drop` are left out, the first one first, which a last line
    says. What is still too wide is cut, with an ellipsis.
    """
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
    room, kept = window(), [*range(len(head))]
    if room is None:
        wrap = None
    else:
        least = {i: min(w, short.get(i, w)) for i, w in enumerate(widths)}
        if wrap is not None:
            least[wrap] = min(widths[wrap], WRAPPED)
            assert wrap == kept[-1], "the sentences stand at the end"
        gone = [*drop]
        while gone and sum(least[i] + 2 for i in kept) - 2 > room:
            kept.remove(gone.pop(0))
        over = sum(widths[i] + 2 for i in kept) - 2 - room
        for i in reversed(kept):
            if over > 0:
                cut = min(over, widths[i] - least[i])
                widths[i], over = widths[i] - cut, over - cut
    lines = []
    for row in (head, *rows):
        cells = [
            shortened(c, w) if i != wrap else c for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        line = "  ".join(
            cells[i].rjust(widths[i]) if i in right else cells[i].ljust(widths[i]) for i in kept if i != wrap
        )
        if wrap is None or wrap not in kept:
            lines.append(line.rstrip())
            continue
        import textwrap

        parts = textwrap.wrap(row[wrap], widths[wrap]) or [""]
        lines += [f"{line if n == 0 else ' ' * len(line)}  {part}".rstrip() for n, part in enumerate(parts)]
    if room is not None:
        lines = [shortened(line, room) for line in lines]
        if left := [head[i] for i in range(len(head)) if i not in kept]:
            lines += ["", *fold(f"left out in {room} columns: {', '.join(left)}; --json has all")]
    return "\n".join(lines)


WRAPPED = 20
"""Characters that a column of sentences has at least."""


def shortened(text: str, width: int) -> str:
    """At most `width` characters, an ellipsis in place of others: of a name the middle ones, whose ends tell it from others
    (-fp8, .weight); of sentences the last."""
    if len(text) <= width:
        return text
    end = 0 if " " in text else (width - 1) // 2
    return text[: max(0, width - 1 - end)] + "…" + text[len(text) - end :]


def folded(text: str, stream: TextIO | None = None) -> str:
    """Each of its lines folded."""
    return "\n".join(part for line in text.split("\n") for part in fold(line, stream))


def fold(line: str, stream: TextIO | None = None) -> list[str]:
    """A line of prose, in as many lines as the window needs. What is copied is left whole: a path, a `command`."""
    if (room := window(stream)) is None or len(line) <= room:
        return [line]
    import textwrap

    indent = " " * (len(line) - len(line.lstrip()))
    whole = re.sub("`[^`]*`", lambda command: command[0].replace(" ", "\x00"), line)
    parts = textwrap.wrap(
        whole, room, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False
    )
    return [part.replace("\x00", " ") for part in parts] or [""]


def pairs(items: Sequence[tuple[str, str]]) -> str:
    """name  value, long values wrapped to the terminal."""
    import textwrap

    left = max(len(k) for k, _ in items) + 2
    width = max(40 - left if window() is None else 16, min(110, terminal_width()) - left)
    lines = []
    for k, v in items:
        wrapped = [
            part
            for line in (v.split("\n") or [""])
            for part in textwrap.wrap(line, width, break_on_hyphens=False) or [""]
        ]
        lines += [(k if n == 0 else "").ljust(left) + part for n, part in enumerate(wrapped)]
    return "\n".join(line.rstrip() for line in lines)

"""`zoo report`: a certificate as a page."""

from __future__ import annotations

from pathlib import Path

import click

from zoo.cli._common import Here, common, emit, say
from zoo.cli._progress import working
from zoo.errors import ZooError
from zoo.untrusted.plain import write_plain


@click.command(short_help="A certificate as one HTML page")
@click.argument("canon", type=Here(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Default: report.html in CANON."
)
@common
def command(canon: Path, output: Path | None, as_json: bool) -> None:
    """Write the certificate of the canonical folder CANON as one self-contained HTML page.

    The verdict comes first; then the model (drawing, sizes, release), every check with its bound, charts, the greedy
    continuation as text, and where everything came from.

    \b
    Examples:
      zoo report canonical -o report.html
    """
    from zoo.formats.base import read_json
    from zoo.verify import certificate, report

    data = read_json(canon / certificate.FILE, f"there is no certificate; write one with: zoo verify {canon}")
    path = output or canon / "report.html"
    try:
        with working(as_json) as stage:
            stage("drawing")
            doubts = certificate.doubts(data)
            if data["verdict"] == "passed" and not certificate.sound(data):
                data = {**data, "verdict": "failed"}
            page = report.page(data, report.of_folder(canon, data), doubts)
    except (*certificate.ODD, RecursionError) as e:
        raise ZooError(f"{canon / certificate.FILE}: not as zoo writes it ({e!r})") from None
    text = page.encode("utf-8", "backslashreplace")  # names may be in another encoding
    write_plain(path, text)
    if as_json:
        emit({"report": str(path), "verdict": data["verdict"]})
    else:
        only = data.get("rests_on")
        only = f", {only} only" if data["verdict"] == "passed" and only in ("plan", "bytes", "layers") else ""
        why = f": {doubts[0]}" if doubts else ""
        say(f"{path} ({data['verdict']}{only}{why})")

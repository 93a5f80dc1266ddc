"""The one exception that is meant for people."""

from __future__ import annotations


class ZooError(Exception):
    """Something the user can act on: its text names the file and tensor, what was expected and found,
    and what to do. The CLI prints it and exits 1; a traceback shows only with `--debug`."""

"""What is true of one run of the command line, whoever asks."""

from __future__ import annotations

import signal
from collections.abc import Callable


class State:
    debug = False
    json = False
    # Told why the command failed, where a command streams events.
    on_failure: Callable[[str], None] | None = None
    stopped = signal.SIGINT  # by what

    @classmethod
    def reset(cls) -> None:
        cls.debug = cls.json = False
        cls.on_failure, cls.stopped = None, signal.SIGINT

"""A machine whose processes are killed: an interpreter that has imported what they need, and forks one for each that starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOOP = """
import os, sys
for line in sys.stdin:
    what, *rest = line.split()
    if what == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(rest[0]), 0)[1]), flush=True)
        continue
    if (pid := os.fork()) == 0:
        code = 1
        try:
            run(*rest)
            code = 0
        except BaseException as e:
            print(repr(e), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    print(pid, flush=True)
"""


class Machine:
    """`code` defines `run(*words)`, what each process does; `args`: its sys.argv. What processes say is in the file `errors`.
    As a context: at its end the interpreter goes, and no process has said anything."""

    def __init__(self, code: str, *args: object, errors: Path, env: dict[str, str] | None = None) -> None:
        self.errors = errors
        with open(errors, "wb") as err:
            self.server = subprocess.Popen(
                [sys.executable, "-c", code + LOOP, *map(str, args)],
                cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True,
            )  # fmt: skip

    def _ask(self, *words: object) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        print(*words, file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def start(self, *words: object) -> int:
        """A process that does `run(*words)`; its id."""
        return self._ask("start", *words)

    def wait(self, pid: int) -> int:
        """Its exit code, once it has ended."""
        return self._ask("wait", pid)

    def kill(self, pid: int) -> bool:
        """Kill it; whether it had not ended well before."""
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid) != 0

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        code = self.server.wait()
        self.server.stdout.close()
        if kind is None:
            assert (code, self.errors.read_text()) == (0, "")

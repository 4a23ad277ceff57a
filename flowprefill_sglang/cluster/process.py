"""One child process of a launcher: started in a session of its own, logged to a file, ended with all its children."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PARENT_VARIABLE = "FLOWPREFILL_PARENT_PID"
"""Set for children: the process without which they should not live."""
FLOWPREFILL = ("-m", "flowprefill_sglang")
"""Python's arguments that run the ``flowprefill`` command."""
WRONG_USE = 2  # argparse's exit status, and ours
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TAIL_BYTES = 64 * 1024
_VERDICT = re.compile(r"(flowprefill|sglang)( [a-z]+)?: \S")


def describe_exit(status: int) -> str:
    """An exit status in words, as ``subprocess`` gives it: ``ended with status 1``, ``was killed by SIGKILL``."""
    return f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the launcher dies, however it dies. Call it first thing in a child.

    SGLang asks the same for its own children, so a launcher that is killed leaves nothing behind. Linux only; elsewhere
    a killed launcher can leave orphans.
    """
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the kernel was asked
        os._exit(1)


class ChildProcess:
    """A ``flowprefill`` command running in the background. Owned by the launcher that started it."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        program: Sequence[str] = FLOWPREFILL,
    ) -> None:
        """Start ``python PROGRAM ARGUMENTS``; raises OSError when the log cannot be written."""
        self.name = name
        self.log = log
        with log.open("ab") as log_file:
            self._process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, PARENT_VARIABLE: str(os.getpid())},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its process group."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative for a signal, as in ``subprocess``."""
        return self._process.poll()

    def interrupt(self) -> None:
        """Ask the command to end, as Ctrl-C would; its own children are its business."""
        if self.exit_status is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it and everything that it started, now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def log_tail(self, lines: int) -> str:
        """The last lines of its log. Raises OSError."""
        return tail_of(self.log, lines)

    def last_words(self, lines: int = 12) -> str:
        """What its log says about its end, for error messages: its own verdict if there is one, else the last lines.

        A command's verdict is a line like ``flowprefill prefill: …`` or argparse's ``…: error: …``; libraries print
        pages after it while the interpreter shuts down.
        """
        try:
            with self.log.open("rb") as log:
                log.seek(-min(_TAIL_BYTES, log.seek(0, os.SEEK_END)), os.SEEK_END)
                tail = log.read().decode(errors="replace").strip().splitlines()
        except OSError as error:
            return f"(no log: {error})"
        verdicts = [line for line in tail if _VERDICT.match(line)]
        return verdicts[-1] if verdicts else "\n".join(tail[-lines:])


def tail_of(log: Path, lines: int) -> str:
    """The last lines of a file, of its last MiB. Raises OSError."""
    with log.open("rb") as file:
        file.seek(-min(2**20, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])

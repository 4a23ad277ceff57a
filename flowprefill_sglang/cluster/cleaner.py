"""Clears away what a member leaves, also when whoever started it was killed, or the node's Ray.

One small process a member. It learns of its owner's end by a pipe that the kernel closes then, waits until the member's
processes are gone, and removes what they had in shared memory and the member's folder. That they are gone is enough: a
Ray worker that has lost its node can end the thread that started them, and hang itself. It is no child of its owner's,
for Ray ends its workers' children with them.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from flowprefill_sglang.cluster.process_group import processes_of, shared_memory_of

_PROGRAM: Final = ("-m", "flowprefill_sglang.cluster.cleaner")
_NOTE_EVERY_S: Final = (0.5, 10.0)
"""How often what a member has in shared memory is noted, at first and later: once it has ended, nobody can tell, and
most is made while it starts. Takes milliseconds."""
_AFTERLIFE_S: Final = 2.0
"""How long a member's processes, which the kernel ends with its owner, may take."""
_LAST_WORDS_S: Final = 10.0
"""How long the folder of a member that was lost with its owner stays: its log may be in it, and somebody may ask."""
_ENDS_WITHIN_S: Final = 10.0
_POLL_INTERVAL_S: Final = 0.1
_ALL_IS_WELL: Final = b"."


class Cleaner:
    """The owner's end. Made beside the member's process, for whose whole life it watches."""

    def __init__(self, group: int, folder: str) -> None:
        """``group``: of the member's processes. ``folder``: to be removed at the end."""
        self._process = subprocess.Popen(
            [sys.executable, *_PROGRAM, str(group), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def reap(self) -> None:
        """To be called now and then: the process that was started ends at once, and leaves another."""
        self._process.poll()

    def begin_to_finish(self) -> None:
        """The member has ended: remove what it left."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(_ALL_IS_WELL)

    def finish(self) -> None:
        """Return once that is done, within ten seconds."""
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            select.select([pipe], [], [], _ENDS_WITHIN_S)  # closed by its end
        self._process.wait()


def main() -> None:
    """``python -m … GROUP FOLDER``, with the owner's pipe as standard input."""
    if os.fork():
        os._exit(0)
    group, folder = int(sys.argv[1]), Path(sys.argv[2])
    shared: set[Path] = set()
    began_at = time.monotonic()
    while not _hears(_pause_s(time.monotonic() - began_at)) and processes_of(group):
        shared |= shared_memory_of(group)
    shared |= shared_memory_of(group)
    _wait(_AFTERLIFE_S, lambda: not processes_of(group))
    if processes_of(group):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        _wait(_AFTERLIFE_S, lambda: not processes_of(group))
    for file in shared:
        with contextlib.suppress(OSError):
            file.unlink()
    _wait(_LAST_WORDS_S, lambda: _is_well() or not folder.exists())
    shutil.rmtree(folder, ignore_errors=True)


def _hears(longest_s: float) -> bool:
    """Whether the owner says something within this time, or has ended."""
    return bool(select.select([0], [], [], longest_s)[0])


def _is_well() -> bool:
    """Whether the owner says that it needs nothing any more."""
    return _hears(0.0) and os.read(0, 1) == _ALL_IS_WELL


def _pause_s(age_s: float) -> float:
    first_s, longest_s = _NOTE_EVERY_S
    return min(first_s + age_s / 10, longest_s)


def _wait(longest_s: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + longest_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_INTERVAL_S)


if __name__ == "__main__":
    main()

"""One child process of a launcher: started in a session of its own, logged to a file, ended with all its children."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flowprefill_sglang.cluster.process_group import processes_of, shared_memory_of

PARENT_VARIABLE = "FLOWPREFILL_PARENT_PID"
"""Set for children: the process without which they should not live."""
FLOWPREFILL = ("-m", "flowprefill_sglang")
"""Python's arguments that run the ``flowprefill`` command."""
WRONG_USE = 2  # argparse's exit status, and ours
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_INTERVAL_S = 0.05
_AFTERLIFE_S = 2.0
"""How long what a killed command has started may take to end by itself. Python's resource tracker is among it, which
removes the semaphores and shared memory of those that were killed."""
_TAIL_BYTES = 64 * 1024
_VERDICT = re.compile(r"(flowprefill|sglang)( [a-z]+)?: \S")


def describe_exit(status: int) -> str:
    """An exit status in words, as ``subprocess`` gives it: ``ended with status 1``, ``was killed by SIGKILL``."""
    return f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the launcher dies, however it dies. Call it first thing in a child.

    A child also has to listen to the launcher's interrupts: Ray blocks them in everything that it starts, and what they
    start (``ray/_private/services.py``, 2.60).

    SGLang asks the same for its own children, so a launcher that is killed leaves nothing behind. Linux only; elsewhere
    a killed launcher can leave orphans.
    """
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None:
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if not sys.platform.startswith("linux"):
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
            self._log_begins_at = log_file.tell()  # a former process may have written before
            self._process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, PARENT_VARIABLE: str(os.getpid())},
                start_new_session=True,
            )
        self._shared_memory: set[Path] = set()

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

    def terminate(self) -> None:
        """Ask the command to end when what it has in hand is done: SIGTERM."""
        if self.exit_status is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and everything that it started, now. Blocks until that is so."""
        _kill((self,))

    def note_shared_memory(self) -> None:
        """Remember what is to be removed once it has ended. Takes some milliseconds."""
        self._shared_memory |= shared_memory_of(self.pid)

    def clear_shared_memory(self) -> None:
        """Remove what it, or what it had started, has left there."""
        for file in self._shared_memory:
            with contextlib.suppress(OSError):
                file.unlink()

    def kill_alone(self) -> None:
        """End the command by force, and reap it. What it started is told by the kernel, and not waited for."""
        self._process.kill()
        self._process.wait()

    def how_it_ended(self) -> str:
        """Its exit status and its last words; of one that was killed only the last line, which tells what it was at.
        It must have ended."""
        status = self.exit_status
        assert status is not None
        return f"{describe_exit(status)}: {self.last_words(12 if status >= 0 else 1)}"

    def log_tail(self, lines: int) -> str:
        """The last lines of its log. Raises OSError."""
        return tail_of(self.log, lines)

    def last_words(self, lines: int = 12) -> str:
        """What it logged about its end, for error messages: its own verdict if there is one, else the last lines.

        A command's verdict is a line like ``flowprefill prefill: …`` or argparse's ``…: error: …``; libraries print
        pages after it while the interpreter shuts down. Python's resource tracker has words for every process that is
        killed, which are left out.
        """
        try:
            with self.log.open("rb") as log:
                log.seek(max(self._log_begins_at, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                tail = log.read().decode(errors="replace").strip().splitlines()
        except OSError as error:
            return f"(no log: {error})"
        tail = [line for line in tail if "resource_tracker" not in line]
        verdicts = [line for line in tail if _VERDICT.match(line)]
        return verdicts[-1] if verdicts else "\n".join(tail[-lines:])


def end(
    children: Sequence[ChildProcess], graces_s: Sequence[float], is_hurried: Callable[[], bool] = lambda: False
) -> None:
    """Interrupt them once for each grace while one still runs, then end what is left by force. Blocks. What they have
    left in shared memory is removed.

    ``is_hurried`` is asked again and again: when true, only the last grace is given.
    """
    for child in children:
        child.note_shared_memory()
    for number, grace_s in enumerate(graces_s, 1):
        for child in children:
            child.interrupt()
        deadline = time.monotonic() + grace_s
        while any(child.exit_status is None for child in children) and time.monotonic() < deadline:
            if is_hurried() and number < len(graces_s):
                break
            time.sleep(_POLL_INTERVAL_S)  # a child's end raises no event that all platforms share
    _kill(children)


def _kill(children: Sequence[ChildProcess]) -> None:
    for child in children:
        child.note_shared_memory()
        child.kill_alone()
    _wait_until_gone(children)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    _wait_until_gone(children)
    for child in children:
        child.clear_shared_memory()


def _wait_until_gone(children: Sequence[ChildProcess]) -> None:
    """All that they have started, for a while."""
    deadline = time.monotonic() + _AFTERLIFE_S
    while any(processes_of(child.pid) for child in children) and time.monotonic() < deadline:
        time.sleep(_POLL_INTERVAL_S)


def server_environment(folder: str, threads: int | None) -> dict[str, str]:
    """Of an SGLang server whose temporary files go to ``folder``; ``threads`` of its scheduler, None: as here."""
    environment = {"PYTHONUNBUFFERED": "1"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    # SGLang 0.5.23 never removes its IPC sockets and lock files, so they get a folder that we remove. What PyTorch
    # compiles is kept in the temporary folder too, and the next start should find it again.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        environment["TORCHINDUCTOR_CACHE_DIR"] = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
    return {**environment, "TMPDIR": folder}


def tail_of(log: Path, lines: int) -> str:
    """The last lines of a file, of its last MiB. Raises OSError."""
    with log.open("rb") as file:
        file.seek(-min(2**20, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])

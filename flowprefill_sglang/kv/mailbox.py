"""Work for a thread that sits in a ZeroMQ poll: calls put in by other threads, run by the one that owns the sockets."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable


class Mailbox:
    """``post`` from any thread; ``fileno`` becomes readable; the owner then calls ``run_all``."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        os.set_blocking(self._write_end, False)
        self._write_lock = threading.Lock()  # the number of a closed pipe may be another file's by the next write
        self._is_closed = False

    def fileno(self) -> int:
        """Readable while calls are waiting."""
        return self._read_end

    def post(self, call: Callable[[], None]) -> None:
        """Have the owner run ``call``, after those posted before it. Nothing happens once the mailbox is closed."""
        self._calls.put(call)
        with self._write_lock, contextlib.suppress(BlockingIOError):  # the pipe is full, so the owner is awake already
            if not self._is_closed:
                os.write(self._write_end, b"\0")

    def run_all(self) -> None:
        """Run what was posted, in order. An exception of a call leaves the later ones for the next time."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read_end, 4096)
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                return
            call()

    def close(self) -> None:
        """The owner has ended: what is posted from now on is not run."""
        with self._write_lock:
            self._is_closed = True
            os.close(self._read_end)
            os.close(self._write_end)

"""A thread that owns links, and ends before the interpreter does.

Python ends a daemon thread that comes back from native code after the interpreter has begun to go. Where that code is
PyTorch's (a page being copied), C++ does not let the thread unwind and ends the process with SIGABRT.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from typing import Final

EXIT_GRACE_S: Final = 2.0
"""A thread waits for no peer; a copy takes milliseconds."""


class LinkThread(threading.Thread):
    """``run_loop`` on a daemon thread. ``ask_to_end`` has it return soon; it is called at the exit of the interpreter,
    by another thread."""

    def __init__(self, name: str, run_loop: Callable[[], None], ask_to_end: Callable[[], None]) -> None:
        super().__init__(name=name, target=run_loop, daemon=True)
        self._ask_to_end = ask_to_end
        atexit.register(self._end_at_exit)

    def wait(self) -> None:
        """Until it has ended, as its owner has asked it to."""
        self.join()
        atexit.unregister(self._end_at_exit)

    def _end_at_exit(self) -> None:
        self._ask_to_end()
        self.join(EXIT_GRACE_S)

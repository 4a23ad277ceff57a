"""What ``up`` shows while a cluster starts: a line for each step, and between steps what the members are doing."""

from __future__ import annotations

import shutil
import sys
from typing import Final, TextIO

from flowprefill_sglang.cluster.launcher import LaunchEvent

EVERY_S: Final = 10.0
"""How often a member that takes long gets a line where there is no terminal."""
_WIPE: Final = "\r\x1b[2K"


class StartDisplay:
    """Takes a launcher's events. On a terminal the last line lives: it is written over."""

    def __init__(self, out: TextIO | None = None) -> None:
        """``out``: standard output, unless given."""
        self._out = out or sys.stdout
        self._lives = self._out.isatty()
        self._doing: dict[str, str] = {}
        self._said_at: dict[str, float] = {}

    def __call__(self, event: LaunchEvent) -> None:
        """Show it, now or with others."""
        if event.is_step:
            self._doing.pop(event.name, None)
            self._line(event)
        elif self._lives:
            self._doing[event.name] = event.detail
        elif event.elapsed_s - self._said_at.get(event.name, 0.0) >= EVERY_S:
            self._line(event)
        if self._lives:
            line = "   ".join(f"{name} {detail}" for name, detail in self._doing.items())
            self._out.write(_WIPE + line[: shutil.get_terminal_size().columns - 1])
        self._out.flush()

    def _line(self, event: LaunchEvent) -> None:
        self._said_at[event.name] = event.elapsed_s
        line = f"[{event.elapsed_s:6.1f} s] {event.name:<10} {event.state:<11} {event.detail}".rstrip()
        self._out.write(f"{_WIPE if self._lives else ''}{line}\n")

"""What a server that is starting is doing, read from the end of its log, and kept for those who ask."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from flowprefill_sglang.cluster.supervision import Member, MemberState
from flowprefill_sglang.errors import FlowPrefillError

LOOK_EVERY_S: Final = 2.0
_LINES: Final = 40
_LONGEST: Final = 100  # characters
_STAMPED: Final = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[^]]*\] (.+)")
_SHARDS: Final = re.compile(r"(\d+)% Completed \| (\d+)/(\d+)")
_BAR: Final = re.compile(r"(.+?):?\s+\d+%\|[^|]*\| (\d+)/(\d+)")
_SAYS_NOTHING: Final = ("INFO:  ", "server_args=", "Ignore import error")
"""Lines of the HTTP server, which answers health checks while it loads; all settings; models that are not installed."""


def doing(tail: str) -> str:
    """The last thing of interest in the end of an SGLang 0.5.23 server's log; empty when it says nothing yet.

    Log lines have a time in front. Progress bars (weights by file, graphs by batch size) have none.
    """
    for line in reversed(tail.splitlines()):
        if (shards := _SHARDS.search(line)) is not None:
            return f"weights: {shards[2]} of {shards[3]} files"
        if (bar := _BAR.match(line)) is not None:
            return f"{bar[1][:_LONGEST]}: {bar[2]} of {bar[3]}"
        if (stamped := _STAMPED.match(line)) is not None and not stamped[1].startswith(_SAYS_NOTHING):
            return stamped[1][:_LONGEST].rstrip()
    return ""


class Doings:
    """Of the members that load. Looks at their logs now and then, on a task of its own: a log may be far away."""

    def __init__(self, log: Callable[[str, int], Awaitable[str]], told: Callable[[Member, str], None]) -> None:
        """``log``: the last lines of a member's; ``told`` is called with each look's result."""
        self._log = log
        self._told = told
        self._of: dict[str, str] = {}
        self._looked_at = float("-inf")
        self._looking: asyncio.Task[None] | None = None

    def of(self, name: str) -> str:
        """What it is doing; empty for one that does not load."""
        return self._of.get(name, "")

    def look_if_due(self, members: Iterable[Member], now: float) -> None:
        """To be called often, on the event loop. ``now``: seconds on a monotonic clock."""
        loading = [member for member in members if member.state is MemberState.LOADING]
        names = {member.name for member in loading}
        self._of = {name: text for name, text in self._of.items() if name in names}
        is_looking = self._looking is not None and not self._looking.done()
        if loading and not is_looking and now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            self._looking = asyncio.get_running_loop().create_task(self._look(loading))

    async def _look(self, loading: list[Member]) -> None:
        for member in loading:
            start = member.start
            try:
                text = doing(await self._log(member.name, _LINES))
            except (FlowPrefillError, OSError):  # between two processes
                continue
            if member.state is MemberState.LOADING and member.start == start:
                self._of[member.name] = text
                self._told(member, text)

    def close(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()

"""Work on servers that somebody watches: it ends when they do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

Answer = TypeVar("Answer")
_CAUSE_S = 0.5
"""Work on a server that has just died fails too, with less to say: the watch gets this long to name the cause."""


async def while_alive(watch: Coroutine[None, None, None], work: Coroutine[None, None, Answer]) -> Answer:
    """The work's result. ``watch`` never returns, and raises when the work cannot be done any more: so does this."""
    working, watching = asyncio.create_task(work), asyncio.create_task(watch)
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if working.done() and working.exception() is not None:
            await asyncio.wait([watching], timeout=_CAUSE_S)
        if watching.done():
            await watching
        return await working
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)

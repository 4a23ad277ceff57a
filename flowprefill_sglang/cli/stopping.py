"""Ends a command in order when it is told to stop by SIGTERM."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine


def run_until_told_to_stop(work: Coroutine[None, None, int]) -> int:
    """Run ``work`` to its exit status; SIGTERM cancels it, so that it takes down what it has started."""
    try:
        return asyncio.run(_cancelled_by_sigterm(work))
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM


async def _cancelled_by_sigterm(work: Coroutine[None, None, int]) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work

"""Pools on this machine with a real router, whose members are stand-ins in processes of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp

from flowprefill_sglang.cluster.launcher import ClusterSpec, LaunchEvent
from flowprefill_sglang.cluster.local_pool import ADDRESS, LocalHost
from flowprefill_sglang.cluster.members import Order
from flowprefill_sglang.cluster.pool_starting import RunningPool
from flowprefill_sglang.cluster.supervision import KINDS
from flowprefill_testing.stand_in_member import PROGRAM

WAIT_S = 60.0


class StandIns(LocalHost):
    """Starts stand-ins, some with flags of their own."""

    def __init__(self, gpus: Sequence[str] = ()) -> None:
        super().__init__(gpus, dict.fromkeys(KINDS, 1) if gpus else {})
        self.flags: dict[str, tuple[str, ...]] = {}

    def start(self, order: Order) -> None:
        arguments = (*order.arguments, *self.flags.get(order.name, ()))
        super().start(replace(order, program=PROGRAM, arguments=arguments))


class Seen:
    """A pool, what runs its members, and what it has reported."""

    def __init__(self, spec: ClusterSpec, *, replaces: bool, gpus: Sequence[str] = ()) -> None:
        """``gpus``: one for each member; none are divided."""
        self.host = StandIns(gpus)
        self.events: list[LaunchEvent] = []
        self.pool = RunningPool(spec, self.host, ADDRESS, self.events.append, replaces=replaces)

    def member(self, name: str) -> dict[str, object]:
        return next((one for one in self.pool.status()["members"] if one["name"] == name), {"state": "gone"})

    def states(self) -> dict[str, object]:
        return {one["name"]: one["state"] for one in self.pool.status()["members"]}

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - the pool looks a few times a second too
                await asyncio.sleep(0.02)


@asynccontextmanager
async def watched(seen: Seen) -> AsyncIterator[None]:
    async with seen.pool:
        watching = asyncio.create_task(seen.pool.watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait([watching])


@asynccontextmanager
async def load(url: str) -> AsyncIterator[list[int]]:
    """Four clients that ask on meanwhile; the statuses of all answers, complete at the end."""
    statuses: list[int] = []
    done = asyncio.Event()

    async def client(session: aiohttp.ClientSession) -> None:
        while not done.is_set():
            async with session.post(f"{url}/generate", json={"text": "abc"}) as answer:
                await answer.read()
                statuses.append(answer.status)

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as clients:
        for _ in range(4):
            clients.create_task(client(session))
        try:
            yield statuses
        finally:
            done.set()


def run(scenario: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(3 * WAIT_S):
            await scenario

    asyncio.run(limited())

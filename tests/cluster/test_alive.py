from __future__ import annotations

import asyncio

import pytest

from flowprefill_sglang.cluster.alive import while_alive
from flowprefill_sglang.errors import PeerFault


async def forever() -> None:
    await asyncio.Event().wait()


async def dies(after_s: float) -> None:
    await asyncio.sleep(after_s)
    raise PeerFault("prefill-0 was killed")


async def fails() -> int:
    raise PeerFault("no answer")


async def seven() -> int:
    return 7


def test_the_works_result() -> None:
    assert asyncio.run(while_alive(forever(), seven())) == 7


def test_work_ends_when_its_servers_do() -> None:
    with pytest.raises(PeerFault, match="prefill-0 was killed"):
        asyncio.run(asyncio.wait_for(while_alive(dies(0), forever()), 10))


def test_the_cause_comes_before_the_consequence() -> None:
    with pytest.raises(PeerFault, match="prefill-0 was killed"):
        asyncio.run(while_alive(dies(0.05), fails()))
    with pytest.raises(PeerFault, match="no answer"):
        asyncio.run(while_alive(forever(), fails()))

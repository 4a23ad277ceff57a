"""Places in the cluster and in the queue."""

from __future__ import annotations

import asyncio

import pytest

from flowprefill_sglang.router.admission import Admission
from flowprefill_sglang.router.answers import Refusal
from flowprefill_testing.stand_ins import in_loop


@in_loop
async def test_first_come_first_served() -> None:
    one = Admission(limit=1, queue_size=2, timeout_s=10)
    assert one.try_enter()
    assert not one.try_enter()
    first, second = one.queue_up(), one.queue_up()
    with pytest.raises(Refusal) as refused:
        one.queue_up()
    assert refused.value.status == 429
    one.leave()
    assert first.done()
    assert not second.done()
    assert await one.wait(first)
    one.leave()
    assert await one.wait(second)
    one.leave()
    assert (one.inside, one.waiting) == (0, 0)


@in_loop
async def test_those_who_left_the_queue_are_passed_over() -> None:
    one = Admission(limit=1, queue_size=3, timeout_s=10)
    one.try_enter()
    leaver, stayer = one.queue_up(), one.queue_up()
    waiting = asyncio.ensure_future(one.wait(leaver))
    await asyncio.sleep(0)
    leaver.cancel()
    assert not await waiting
    assert one.waiting == 1
    one.leave()
    assert await one.wait(stayer)


@in_loop
async def test_a_wait_that_is_too_long_ends_with_429() -> None:
    one = Admission(limit=1, queue_size=1, timeout_s=0.01)
    one.try_enter()
    with pytest.raises(Refusal) as refused:
        await one.wait(one.queue_up())
    assert refused.value.status == 429
    one.leave()
    assert (one.inside, one.waiting) == (0, 0)


@in_loop
async def test_a_cancelled_waiter_gives_its_place_on() -> None:
    one = Admission(limit=1, queue_size=2, timeout_s=10)
    one.try_enter()
    place = one.queue_up()
    waiting = asyncio.ensure_future(one.wait(place))
    await asyncio.sleep(0)
    one.leave()  # the place comes, and the waiter is cancelled before it can take it
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (one.inside, one.waiting) == (0, 0)

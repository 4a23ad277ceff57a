"""Frames that would come to lie across the end of a chunk do not."""

import resource
from collections.abc import Callable

import pytest
from greenlet import greenlet

from flowprefill_sglang.prefill_worker.frame_room import with_frame_room

CALLS = 2_000
DEPTHS = range(0, 260, 3)
"""Frames of ``at_depth`` take over 80 bytes: together more than a chunk of 16 KiB."""


def leaf() -> None:
    """Its frame is larger than the steps between the depths, so one of them has it on the end of a chunk."""


leaf.__code__ = leaf.__code__.replace(co_stacksize=100)


def at_depth(depth: int) -> None:
    if depth:
        at_depth(depth - 1)
        return
    for _ in range(CALLS):
        leaf()


def page_faults(function: Callable[[], None]) -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    greenlet(function).switch()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_no_depth_pays_for_a_chunk_at_every_call() -> None:
    """A chunk that is mapped for a call and unmapped at its return costs a page fault each time."""
    bare = max(page_faults(lambda d=depth: at_depth(d)) for depth in DEPTHS)  # type: ignore[misc]
    roomy = max(page_faults(lambda d=depth: with_frame_room(lambda: at_depth(d))) for depth in DEPTHS)  # type: ignore[misc]
    assert bare >= CALLS, "this interpreter does not do what the room is there for"
    assert roomy < CALLS / 10


def test_a_failure_comes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        with_frame_room(lambda: print(1 / 0))

"""Decode instances' states from the results of checks."""

from __future__ import annotations

from flowprefill_sglang.router.decode_registry import DecodeFacts, DecodeRegistry
from flowprefill_sglang.router.states import WorkerState

FACTS = DecodeFacts(model="m", names=frozenset({"m"}), cards=())


def test_joining_stays_joining_until_healthy() -> None:
    registry = DecodeRegistry(failure_threshold=2)
    one = registry.add("http://a")
    assert registry.add("http://a") is one
    for _ in range(5):
        assert not registry.on_failure(one, "not up yet")
    assert (one.state, one.reason) == (WorkerState.JOINING, "not up yet")
    assert registry.on_healthy(one, FACTS)
    assert registry.ready() == [one]
    assert not registry.on_healthy(one, FACTS)


def test_dead_after_some_failures_in_a_row_or_one_that_is_certain() -> None:
    registry = DecodeRegistry(failure_threshold=2)
    one = registry.add("http://a")
    registry.on_healthy(one, FACTS)
    assert not registry.on_failure(one, "slow")
    registry.on_healthy(one, FACTS)
    assert not registry.on_failure(one, "slow")
    assert registry.on_failure(one, "slow")
    assert (one.state, registry.ready()) == (WorkerState.DEAD, [])
    assert registry.on_healthy(one, FACTS)
    assert registry.on_failure(one, "refused", certain=True)
    assert one.state is WorkerState.DEAD


def test_removed_is_gone() -> None:
    registry = DecodeRegistry(failure_threshold=2)
    registry.on_healthy(registry.add("http://a"), FACTS)
    assert registry.remove("http://a") is not None
    assert registry.ready() == []
    assert registry.remove("http://a") is None

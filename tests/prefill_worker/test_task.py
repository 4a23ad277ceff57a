from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from threading import Thread
from typing import Any

import pytest
from greenlet import greenlet

from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.carriers import MAX_IDLE
from flowprefill_sglang.prefill_worker.task import ForwardTask

HUB = "hub's"
context: ContextVar[str] = ContextVar("context", default="nobody's")


class OneValue:
    """Shared state of one value, which tasks change, and a mode, which they must not."""

    def __init__(self) -> None:
        self.value = HUB
        self.mode = "as agreed"
        self.is_stoppable = True

    def save(self) -> object:
        return self.value

    def restore(self, saved: object) -> None:
        assert isinstance(saved, str)
        self.value = saved

    def may_stop(self) -> bool:
        return self.is_stoppable

    def check(self) -> None:
        if self.mode != "as agreed":
            raise InternalError(self.mode)


class World:
    def __init__(self) -> None:
        self.gate = Gate()
        self.state = OneValue()
        self.log: list[str] = []
        self.gate.raise_flag()

    def task(self, run: Callable[[], str]) -> ForwardTask[str]:
        return ForwardTask(run, self.gate, self.state)

    def forward(self, name: str, boundaries: int = 2) -> ForwardTask[str]:
        """A task that keeps its name in the shared state and in a context variable over so many boundaries."""

        def run() -> str:
            self.state.value = name
            context.set(name)
            try:
                for _ in range(boundaries):
                    self.gate.cross()
                    assert self.state.value == name
                    assert context.get() == name
                    self.log.append(name)
            finally:
                assert self.state.value == name, "finally blocks run under the task's own state"
                self.log.append(f"{name} left")
            return f"{name}'s result"

        return self.task(run)


@pytest.fixture
def world() -> World:
    return World()


def test_runs_to_its_end_when_nothing_happens(world: World) -> None:
    world.gate.clear()
    task = world.forward("a")
    assert not task.is_started
    assert task.advance()
    assert (task.result, task.suspensions, task.is_over) == ("a's result", 0, True)
    assert world.gate.is_closed


def test_stops_at_each_boundary_and_goes_on_where_it_stood(world: World) -> None:
    task = world.forward("a")
    assert not task.advance()
    assert (world.log, task.is_started, task.is_over, world.gate.is_closed) == ([], True, False, True)
    assert not task.advance()
    assert task.advance()
    assert (world.log, task.suspensions) == (["a", "a", "a left"], 2)


def test_state_of_tasks_that_end_out_of_order_is_kept_apart(world: World) -> None:
    a, b, c = world.forward("a", 3), world.forward("b", 2), world.forward("c", 1)
    order = [a, b, c, b, a, c, a, b, a]
    for task in order:
        task.advance()
        assert world.state.value == HUB
        assert context.get() == "nobody's"
    assert [task.result for task in (a, b, c)] == ["a's result", "b's result", "c's result"]


def test_a_started_task_sees_the_context_it_was_started_in(world: World) -> None:
    token = context.set("starter's")
    task = world.task(context.get)
    try:
        task.advance()
    finally:
        context.reset(token)
    assert task.result == "starter's"


def test_an_exception_reaches_the_hub_and_leaves_the_others_alone(world: World) -> None:
    other = world.forward("b")
    other.advance()

    def run() -> str:
        world.state.value = "a"
        world.gate.cross()
        raise ZeroDivisionError

    failing = world.task(run)
    failing.advance()
    with pytest.raises(ZeroDivisionError):
        failing.advance()
    assert failing.is_over
    assert (world.state.value, world.gate.is_closed) == (HUB, True)
    with pytest.raises(InternalError, match="no result"):
        _ = failing.result
    while not other.advance():
        pass
    assert other.result == "b's result"


def test_discard_runs_finally_blocks_under_the_tasks_state_and_no_boundary(world: World) -> None:
    def run() -> str:
        world.state.value = "a"
        try:
            world.gate.cross()
        finally:
            world.log.append(world.state.value)
            world.gate.cross()
            world.log.append("past a boundary")
        return "never"

    task = world.task(run)
    task.advance()
    other = world.forward("b")
    other.advance()
    boundaries = world.gate.boundaries
    task.discard()
    assert world.log == ["a", "past a boundary"]
    assert (task.is_over, world.state.value, world.gate.boundaries) == (True, HUB, boundaries)
    task.discard()
    with pytest.raises(InternalError, match="over"):
        task.advance()
    other.discard()


def greenlets() -> int:
    gc.collect()
    return sum(type(found) is greenlet and not found.dead for found in gc.get_objects())


@pytest.mark.parametrize("how", ["finished", "failed", "discarded"])
def test_a_task_that_is_over_holds_nothing_and_gives_its_greenlet_back(world: World, how: str) -> None:
    """What its frames named, a suspended pass's activations, is free, though the task itself is still known."""
    held: list[weakref.ref[World]] = []

    def run() -> str:
        activations = World()
        held.append(weakref.ref(activations))
        world.gate.cross()
        if how == "failed":
            raise ZeroDivisionError
        return "done"

    world.task(lambda: "leaves an idle carrier").advance()
    before = greenlets()
    task = world.task(run)
    task.advance()
    assert held[0]() is not None, "it is suspended"
    assert greenlets() == before
    if how == "discarded":
        task.discard()
    else:
        with contextlib.suppress(ZeroDivisionError):
            task.advance()
    assert task.is_over
    assert greenlets() == before - (how == "discarded")
    assert held[0]() is None


def test_carriers_of_many_suspended_tasks_are_not_all_kept(world: World) -> None:
    before = greenlets()
    tasks = [world.forward(f"task {number}") for number in range(3 * MAX_IDLE)]
    for task in tasks:
        task.advance()
    assert greenlets() >= before + 2 * MAX_IDLE
    for task in tasks:
        while not task.is_over:
            task.advance()
    assert greenlets() <= before + MAX_IDLE


def test_an_idle_carrier_keeps_neither_task_nor_context(world: World) -> None:
    variable: ContextVar[World] = ContextVar("variable")

    def run() -> str:
        variable.set(World())
        kept.append(weakref.ref(variable.get()))
        return "done"

    kept: list[weakref.ref[Any]] = []
    task = world.task(run)
    kept.append(weakref.ref(task))
    task.advance()
    del task
    gc.collect()
    assert [found() for found in kept] == [None, None]
    seen: list[World | None] = []
    world.task(lambda: seen.append(variable.get(None)) or "done").advance()
    assert seen == [None]


def test_discard_of_a_task_that_never_started_runs_nothing(world: World) -> None:
    task = world.forward("a")
    task.discard()
    assert (task.is_over, world.log) == (True, [])


def test_what_discarding_raises_reaches_the_hub(world: World) -> None:
    def run() -> str:
        try:
            world.gate.cross()
        finally:
            raise OSError("while leaving")

    task = world.task(run)
    task.advance()
    with pytest.raises(OSError, match="while leaving"):
        task.discard()
    assert (task.is_over, world.state.value) == (True, HUB)


def test_a_place_where_it_cannot_stop_postpones_the_stop(world: World) -> None:
    def run() -> str:
        world.state.is_stoppable = False
        world.gate.cross()
        world.state.is_stoppable = True
        world.gate.cross()
        return "done"

    task = world.task(run)
    assert not task.advance()
    assert (task.postponed, task.suspensions) == (1, 1)
    task.discard()


def test_another_greenlet_inside_of_a_task_does_not_stop_it(world: World) -> None:
    task = world.task(lambda: str(greenlet(world.gate.cross).switch()))
    assert task.advance()
    assert task.postponed == 1


def test_a_mode_that_was_changed_outside_of_tasks_is_an_error(world: World) -> None:
    task = world.forward("a")
    world.state.mode = "changed"
    with pytest.raises(InternalError, match="changed"):
        task.advance()
    assert not task.is_started


def test_a_mode_that_a_task_leaves_changed_is_an_error(world: World) -> None:
    def run() -> str:
        world.state.mode = "left on"
        return "done"

    with pytest.raises(InternalError, match="left on"):
        world.task(run).advance()


def test_the_flag_may_be_raised_from_another_thread(world: World) -> None:
    world.gate.clear()

    def run() -> str:
        thread = Thread(target=world.gate.raise_flag)
        thread.start()
        thread.join()
        world.gate.cross()
        return "done"

    task = world.task(run)
    assert not task.advance()
    task.discard()

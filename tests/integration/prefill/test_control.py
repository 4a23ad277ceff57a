"""What SGLang's scheduler is shown of the tasks, and what the loop is told of control requests, with stand-ins."""

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.integration.prefill.control import NO_TASKS_BEYOND, NOTHING_BEGUN_BEYOND, control, hooks
from flowprefill_testing.sglang_process import facts_of


class Loop:
    """Records what it is told, in the order of everything that happens."""

    def __init__(self) -> None:
        self.happened: list[object] = []
        self.begun: list[object] = []

    def finish_what_is_begun(self, *, half_prefilled: bool) -> None:
        self.happened.append("all finished" if half_prefilled else "tasks finished")

    def withdraw_what_is_gone(self) -> None:
        self.happened.append("withdrawn")

    def begun_reqs(self) -> list[object]:
        return self.begun


@pytest.fixture
def loop() -> Iterator[Loop]:
    control.loop = Loop()
    yield control.loop
    control.loop = None


def hook(target: str):
    (found,) = [hook.function for hook in hooks() if hook.target.endswith(f".{target}")]
    return found


def made(name: str) -> object:
    """A request of a class of this name, which is all that is looked at."""
    return type(name, (), {})()


def process(loop: Loop, *names: str) -> list[object]:
    requests = [made(name) for name in names]
    hook("process_input_requests")(lambda _, got: loop.happened.append(got), object(), requests)
    return loop.happened


def test_every_name_is_one_of_sglangs() -> None:
    """A class that SGLang renames would be let through to a suspended task."""
    pytest.importorskip("sglang", reason="the seam needs SGLang")
    names = sorted(NO_TASKS_BEYOND | NOTHING_BEGUN_BEYOND | {"AbortReq"})
    facts = facts_of(f"""
        from sglang.srt.managers import io_struct

        facts["missing"] = [name for name in {names!r} if not isinstance(getattr(io_struct, name, None), type)]
    """)
    assert facts["missing"] == []


@pytest.mark.parametrize("name", sorted(NOTHING_BEGUN_BEYOND))
def test_nothing_is_begun_when_weights_may_change(loop: Loop, name: str) -> None:
    first, _ = process(loop, name)
    assert first == "all finished"


def test_no_task_is_under_way_when_the_engine_pauses(loop: Loop) -> None:
    first, _ = process(loop, "PauseGenerationReqInput")
    assert first == "tasks finished"


def test_the_stricter_one_wins(loop: Loop) -> None:
    first, _ = process(loop, "PauseGenerationReqInput", "UpdateWeightFromDiskReqInput")
    assert first == "all finished"


def test_aborts_are_followed_up_after_sglang(loop: Loop) -> None:
    (requests, last) = process(loop, "AbortReq")
    assert last == "withdrawn"
    assert isinstance(requests, list)


@pytest.mark.parametrize("names", [(), ("FlushCacheReqInput",), ("TokenizedGenerateReqInput",)])
def test_all_others_go_through(loop: Loop, names: tuple[str, ...]) -> None:
    assert len(process(loop, *names)) == 1


def test_begun_is_not_idle(loop: Loop) -> None:
    is_fully_idle = hook("is_fully_idle")
    assert is_fully_idle(lambda: True)
    assert not is_fully_idle(lambda: False)
    loop.begun = [object()]
    assert not is_fully_idle(lambda: True)


def test_begun_is_in_flight(loop: Loop) -> None:
    loop.begun = [object(), object()]
    running, last, ours = hook("_collect_inflight_batches")(["running", None], object())
    assert (running, last) == ("running", None)
    assert ours.reqs == loop.begun


def test_begun_is_load(loop: Loop) -> None:
    loop.begun = [SimpleNamespace(seqlen=100, prefix_len=30), SimpleNamespace(seqlen=8, prefix_len=0)]
    load = SimpleNamespace(num_running_reqs=1, num_waiting_uncached_tokens=5)
    assert hook("get_loads")(load, object()) is None
    assert load.num_running_reqs == 3
    assert load.num_waiting_uncached_tokens == 5 + 70 + 8


@pytest.mark.parametrize("is_idle", [True, False])
def test_memory_is_released_only_when_the_cache_can_be_flushed(is_idle: bool) -> None:
    """What SGLang asserts in its scheduler is asked before."""
    released: list[tuple] = []

    async def flush_cache() -> SimpleNamespace:
        return SimpleNamespace(success=is_idle)

    async def release(*args: object) -> None:
        released.append(args)

    manager = SimpleNamespace(flush_cache=flush_cache)
    with nullcontext() if is_idle else pytest.raises(BadInput, match="only while nothing is under way"):
        asyncio.run(hook("release_memory_occupation")(release, manager, "tags", None))
    assert released == ([(manager, "tags", None)] if is_idle else [])


def test_without_a_loop_nothing_changes() -> None:
    """The hooks are in place before the loop is made, in every process of the worker."""
    assert control.loop is None
    assert hook("is_fully_idle")(lambda: True)
    (ours,) = hook("_collect_inflight_batches")([], object())
    assert list(ours.reqs) == []
    seen: list[object] = []
    hook("process_input_requests")(lambda _, got: seen.append(got), object(), [made("PauseGenerationReqInput")])
    assert len(seen) == 1

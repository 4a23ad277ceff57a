"""What a server's log says of its start, and how a pool keeps it."""

import asyncio

import pytest

from flowprefill_sglang.cluster.log_progress import LOOK_EVERY_S, Doings, doing
from flowprefill_sglang.cluster.supervision import Member, MemberState
from flowprefill_sglang.errors import PeerFault

BEGIN = "[2026-11-25 17:00:31] Load weight begin. avail mem=8.79 GB"
NOISE = """/venv/sglang/srt/layers/quantization/gguf.py:76: UserWarning: Only CUDA, MUSA and NPU support GGUF.
  warnings.warn(
[2026-11-25 17:00:32] INFO:     192.0.2.2:50618 - "GET /health HTTP/1.1" 503 Service Unavailable
[2026-11-25 17:00:32] Ignore import error when loading sglang.srt.models.inkling: No module named 'cutlass'"""


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        ("", ""),
        (NOISE, ""),
        (f"{BEGIN}\n{NOISE}", "Load weight begin. avail mem=8.79 GB"),
        ("[2026-11-25 17:00:30 TP1] Init parallel begin.", "Init parallel begin."),
        (
            f"{BEGIN}\n\rMulti-thread loading shards:   0% Completed | 0/4 [00:00<?, ?it/s]"
            "\rMulti-thread loading shards:  25% Completed | 1/4 [00:01<00:03,  1.0s/it]\n",
            "weights: 1 of 4 files",
        ),
        (
            f"{BEGIN}\nCapturing batches (bs=160 avail_mem=61.5 GB):   4%|▍         | 1/23 [00:00<00:15,  1.4it/s]",
            "Capturing batches (bs=160 avail_mem=61.5 GB): 1 of 23",
        ),
        ("[2026-11-25 17:00:30] " + "long " * 100, ("long " * 20).rstrip()),
    ],
    ids=["empty", "noise", "stamped", "of one rank", "weights", "graphs", "long"],
)
def test_the_last_thing_of_interest(tail: str, words: str) -> None:
    assert doing(tail) == words


def member(name: str, state: MemberState) -> Member:
    return Member(name=name, kind="prefill", state=state)


def test_those_that_load_are_looked_at_now_and_then_and_forgotten_once_ready() -> None:
    async def scenario() -> None:
        told: list[tuple[str, str]] = []
        looked_at = asyncio.Queue[str]()

        async def log(name: str, lines: int) -> str:
            looked_at.put_nowait(name)
            if name == "prefill-2":
                raise PeerFault("no process of it runs")
            return BEGIN

        doings = Doings(log, lambda one, text: told.append((one.name, text)))
        members = [member("prefill-0", MemberState.READY), member("prefill-1", MemberState.LOADING)]
        members.append(member("prefill-2", MemberState.LOADING))
        for now in (0.0, 0.3, LOOK_EVERY_S - 0.1):
            doings.look_if_due(members, now)
            if now == 0.0:
                assert [await looked_at.get(), await looked_at.get()] == ["prefill-1", "prefill-2"]
        assert looked_at.empty()
        assert told == [("prefill-1", "Load weight begin. avail mem=8.79 GB")]
        assert [doings.of(one.name) != "" for one in members] == [False, True, False]
        doings.look_if_due(members, LOOK_EVERY_S)
        assert await looked_at.get() == "prefill-1"
        members[1].enter(MemberState.READY, LOOK_EVERY_S)
        doings.look_if_due(members, LOOK_EVERY_S + 0.3)
        assert doings.of("prefill-1") == ""
        doings.close()

    asyncio.run(scenario())


def test_a_log_that_comes_after_the_process_has_ended_is_not_told_of_the_next_one() -> None:
    async def scenario() -> None:
        told: list[str] = []
        asked, answered = asyncio.Event(), asyncio.Event()

        async def log(name: str, lines: int) -> str:
            asked.set()
            await answered.wait()
            return BEGIN

        one = member("prefill-0", MemberState.LOADING)
        doings = Doings(log, lambda of, text: told.append(text))
        doings.look_if_due([one], 0.0)
        await asked.wait()
        one.start += 1
        answered.set()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        assert told == []
        assert doings.of("prefill-0") == ""

    asyncio.run(scenario())

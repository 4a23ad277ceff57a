"""No event is slept through, and a worker that has nothing to do does nothing."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from flowprefill_testing import prompts
from flowprefill_testing.clusters import wait_until
from flowprefill_testing.direct import Pair
from flowprefill_testing.http import generate

pytestmark = pytest.mark.cluster

LONG = 6_000


@pytest.mark.parametrize("late", ["decode", "prefill"])
@pytest.mark.parametrize("is_busy", [False, True])
def test_whichever_side_comes_last_wakes_the_loop(roomy: Pair, stock_url: str, late: str, is_busy: bool) -> None:
    seed = 900 + 2 * is_busy + (late == "decode")
    body = prompts.ids(80, seed)
    go = threading.Event()
    urgent = roomy.ask(
        body,
        name="urgent",
        ttft_slo_ms=20_000,
        max_new_tokens=2,
        decode_after=go if late == "decode" else None,
        prefill_after=go if late == "prefill" else None,
    )
    if late == "decode":
        wait_until(lambda: roomy.load()["disaggregation"]["prefill_bootstrap_queue_reqs"] == 1, timeout_s=20)
    long = roomy.ask(prompts.ids(LONG, seed), name="long", ttft_slo_ms=60_000) if is_busy else None
    if long is not None:
        roomy.wait_for("started", long)
    sent_at = time.monotonic()
    go.set()
    urgent.decode.result(60)
    assert urgent.answered_at is not None
    assert urgent.answered_at - sent_at < 5
    if long is not None:
        long.whole()
        steps = roomy.steps(long, urgent)
        assert steps.index(("finished", "urgent")) < steps.index(("finished", "long"))
    assert urgent.whole()["output_ids"] == generate(stock_url, input_ids=body, max_new_tokens=2)["output_ids"]


@pytest.mark.parametrize("is_busy", [False, True])
def test_the_end_of_a_grammars_compilation_wakes_the_loop(roomy: Pair, is_busy: bool) -> None:
    """A grammar that nobody has used is compiled on another thread; nothing else happens meanwhile."""
    long = roomy.ask(prompts.ids(LONG, 910), name="long", ttft_slo_ms=60_000) if is_busy else None
    if long is not None:
        roomy.wait_for("started", long)
    regex = {"regex": f"[a-c]{{2}}{'xy'[is_busy]}{os.getpid()}"}
    asked = roomy.ask(prompts.ids(70, 911), name="asked", ttft_slo_ms=20_000, max_new_tokens=4, sampling=regex)
    assert asked.whole()["text"][2] == "xy"[is_busy]
    assert asked.latency_s < 10
    if long is not None:
        long.whole()
        steps = roomy.steps(long, asked)
        assert steps.index(("finished", "asked")) < steps.index(("finished", "long"))


def test_an_idle_worker_sleeps_and_gets_up_for_a_request(roomy: Pair) -> None:
    """Its loop gets up for its housekeeping alone, every 30 s: what it burns is ``benchmarks/idle_cpu.py``'s to say."""
    roomy.ask(prompts.ids(50, 920)).whole()
    loop = scheduler_of(roomy)
    wait_until(lambda: times_up_during(loop, 5.0) <= 2, timeout_s=60)
    answer = roomy.ask(prompts.ids(50, 921), name="waker", max_new_tokens=1)
    answer.whole()
    events = {event["type"]: event["at"] for event in roomy.events(answer)}
    assert events["started"] - events["arrived"] < 5  # not at the next housekeeping


def times_up_during(process: psutil.Process, seconds: float) -> int:
    """How often a process's main thread went to sleep in this time: a poll every 50 ms makes twenty a second."""
    before = sleeps_of_main_thread(process)
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(left)  # the measurement itself
    return sleeps_of_main_thread(process) - before


def sleeps_of_main_thread(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/task/{process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("voluntary_ctxt_switches"))
    return int(line.split()[1])


def scheduler_of(worker: Pair) -> psutil.Process:
    """The worker's scheduler process: the child of the one that listens on its port."""
    port = int(worker.prefill_url.rpartition(":")[2])
    (listener,) = {c.pid for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == "LISTEN"}
    children = psutil.Process(listener).children(recursive=True)
    (scheduler,) = [
        child
        for child in children
        if "scheduler" in Path(f"/proc/{child.pid}/comm").read_text().lower()
        or "scheduler" in " ".join(child.cmdline()).lower()
    ]
    return scheduler

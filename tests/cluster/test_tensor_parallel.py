"""A prefill worker of two tensor-parallel ranks: preempted as one of one rank is, with the same answers, and gone as a
whole when one of its ranks is, with its requests retried on another."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from flowprefill_testing import prompts
from flowprefill_testing.clusters import Cluster, wait_until
from flowprefill_testing.direct import Answer, Pair, expected
from flowprefill_testing.http import at_once, generate, get

pytestmark = pytest.mark.cluster

LONG = 6_000


@pytest.fixture(scope="module")
def pair(wide: Cluster) -> Pair:
    """The cluster's worker and decode instance, asked without the router."""
    prefill_url = wide.workers["prefill-0"]["url"]
    _, server = get(f"{prefill_url}/server_info")
    assert server["tp_size"] == 2
    port = server["disaggregation_bootstrap_port"]
    return Pair(prefill_url, port, wide.workers["decode-0"]["url"], wide.process)


def three_deep(pair: Pair, seed: int) -> tuple[list[list[int]], list[Answer]]:
    """Two suspended tasks and a running one, each more urgent than the one before."""
    bodies, answers = [prompts.ids(LONG - 500 * depth, seed + depth) for depth in range(3)], []
    for depth, body in enumerate(bodies):
        answer = pair.ask(body, name=f"deep{depth}", ttft_slo_ms=110_000 - 25_000 * depth)
        answers.append(answer)
        pair.wait_for("started", answer)
    return bodies, answers


def test_answers_are_those_of_one_rank_and_the_urgent_goes_first(pair: Pair, stock_url: str) -> None:
    bodies, answers = three_deep(pair, 900)
    small = [prompts.ids(length, 910 + length) for length in (1, 40, 300, 700, 1_200)]
    others = [pair.ask(body, name=f"small{n}", ttft_slo_ms=20_000) for n, body in enumerate(small)]
    for body, answer in zip(bodies + small, answers + others, strict=True):
        assert answer.whole()["output_ids"] == expected(stock_url, body), len(body)
    steps = pair.steps(*answers)
    assert {name for kind, name in steps if kind == "preempted"} >= {"deep0", "deep1"}
    assert [name for kind, name in steps if kind == "finished"] == ["deep2", "deep1", "deep0"]


def test_a_shared_prefix_is_taken_from_the_cache_on_both_ranks(pair: Pair, stock_url: str) -> None:
    head = prompts.ids(1_600, 920)
    pair.ask(head).whole()
    body = head + prompts.ids(100, 921)
    answer = pair.ask(body).whole()
    assert answer["meta_info"]["cached_tokens"] >= 1_500
    assert answer["output_ids"] == expected(stock_url, body)


def test_abort_and_flush_while_suspended(pair: Pair, stock_url: str) -> None:
    bodies, answers = three_deep(pair, 930)
    assert pair.control("/flush_cache")[0] == 400, "refused while anything is begun"
    assert pair.control("/abort_request", {"rid": answers[0].rid})[0] == 200
    status, document = answers[0].prefill.result(60)
    assert status != 200 or document["meta_info"]["finish_reason"]["type"] == "abort", document
    answers[0].decode.result(60)
    for body, answer in list(zip(bodies, answers, strict=True))[1:]:
        assert answer.whole()["output_ids"] == expected(stock_url, body)
    steps = pair.steps(*answers)
    assert ("finished", "deep0") not in steps
    assert steps.index(("ended", "deep0")) < steps.index(("finished", "deep1")), "at once"
    wait_until(lambda: pair.control("/flush_cache")[0] == 200, timeout_s=30)
    assert pair.load()["num_used_tokens"] == 0


def test_pause_and_continue(pair: Pair, stock_url: str) -> None:
    bodies, answers = three_deep(pair, 940)
    assert pair.control("/pause_generation", {"mode": "in_place"})[0] == 200
    try:
        wait_until(lambda: ("finished", "deep0") in pair.steps(answers[0]), timeout_s=60)
    finally:
        assert pair.control("/continue_generation", {})[0] == 200
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.whole()["output_ids"] == expected(stock_url, body)


def test_an_idle_worker_sleeps(wide: Cluster) -> None:
    """Neither rank spins while there is nothing to do."""
    ranks = schedulers(wide)
    before, began_at = [busy_s(rank) for rank in ranks], time.monotonic()
    wait_until(lambda: time.monotonic() > began_at + 3, timeout_s=10)
    used = [busy_s(rank) - was for rank, was in zip(ranks, before, strict=True)]
    assert max(used) < (time.monotonic() - began_at) / 4, used


def test_a_killed_rank_ends_the_worker_and_another_takes_its_place(wide: Cluster, pair: Pair, stock_url: str) -> None:
    """What the router had sent to it is retried on the other worker, what came past the router fails. The last test
    here: the new worker is another process, elsewhere."""
    bodies = [prompts.ids(3_000, 960 + number) for number in range(8)]
    with ThreadPoolExecutor(1) as pool:
        routed = pool.submit(at_once, lambda body: generate(wide.url, input_ids=body), bodies)
        wait_until(lambda: member(wide).get("in_flight", 0) > 1, wide.process, timeout_s=60, pause_s=0.005)
        direct = pair.ask(prompts.ids(LONG, 950))
        before = psutil.Process(wide.workers["prefill-0"]["pid"])
        os.kill(schedulers(wide)[1].pid, signal.SIGKILL)
        before.wait(60)
        log = (wide.log_dir / "prefill-0.log").read_text(errors="replace")
        assert "rank 1 of this worker has ended" in log
        assert direct.prefill.exception(60) is not None or direct.prefill.result()[0] != 200
        got = [document["output_ids"] for document in routed.result()]
    assert got == [expected(stock_url, body) for body in bodies]
    assert "request_retried" in (wide.log_dir / "router.log").read_text()
    wait_until(lambda: member(wide).get("state") == "ready", wide.process, timeout_s=120)


def member(cluster: Cluster) -> dict:
    """What the router says of the worker; nothing while it knows none of that name."""
    _, document = get(f"{cluster.url}/workers")
    return next((worker for worker in document["workers"] if worker.get("name") == "prefill-0"), {})


def schedulers(cluster: Cluster) -> list[psutil.Process]:
    """The prefill worker's scheduler processes, by rank."""
    worker = psutil.Process(cluster.workers["prefill-0"]["pid"])
    named = {" ".join(process.cmdline()): process for process in worker.children(recursive=True)}
    ranks = [process for name, process in sorted(named.items()) if name.startswith("sglang::scheduler")]
    assert len(ranks) == 2, list(named)
    return ranks


def busy_s(process: psutil.Process) -> float:
    """CPU seconds that it has used."""
    times = process.cpu_times()
    return float(times.user + times.system)

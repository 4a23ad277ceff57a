"""What happens in the middle of a prompt, with a worker whose forward passes stand still there until the test lets them
go on: many half-prefilled prompts, control requests beside suspended tasks, and SGLang's watchdog."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flowprefill_testing import prompts
from flowprefill_testing.clusters import Cluster, wait_until
from flowprefill_testing.direct import Answer, DirectWorkers, Pair, assert_right, expected
from flowprefill_testing.held_passes import PLACES, HeldPasses, flags
from flowprefill_testing.servers import STRICT, with_support, with_us

pytestmark = pytest.mark.cluster

CHUNK = 1_024
WATCHDOG_S = 5.0
WATCHDOG_WORDS = "Scheduler watchdog timeout"


@dataclass(frozen=True)
class HeldWorker:
    """A prefill worker without a router, what holds its passes, and its log."""

    pair: Pair
    passes: HeldPasses
    log: Path


@pytest.fixture(scope="module")
def _worker(cluster: Cluster, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeldWorker]:
    folder = tmp_path_factory.mktemp("held")
    memory = ["--max-total-tokens", "20000", "--chunked-prefill-size", str(CHUNK)]
    watched = ["--watchdog-timeout", str(WATCHDOG_S)]
    # Before it ends a stuck worker SGLang waits 5 s for a GPU to settle, if it is to look at Python's stacks.
    settings = {**STRICT, **with_us(), **with_support(), "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0"}
    with DirectWorkers(model_path, cluster.log_dir, settings) as workers:
        workers.start("held", [*memory, *watched, *flags(folder)])
        pair = workers.pair("held", cluster.workers["decode-0"]["url"])
        yield HeldWorker(pair, HeldPasses(folder), cluster.log_dir / "held.log")


@pytest.fixture
def worker(_worker: HeldWorker) -> Iterator[HeldWorker]:
    """Held by nothing before and after each test, with an empty cache."""
    wait_until(lambda: _worker.pair.control("/flush_cache")[0] == 200, timeout_s=30)
    yield _worker
    _worker.passes.free()


def half_prefilled(worker: HeldWorker, seed: int, count: int) -> tuple[list[list[int]], list[Answer]]:
    """So many prompts of four chunks: each has its first one behind it when the next, more urgent one comes. The last
    one's pass stands still, in its second chunk."""
    bodies, answers = [prompts.ids(3 * CHUNK + 100, seed + number) for number in range(count)], []
    worker.passes.hold()
    for number, body in enumerate(bodies):
        answer = worker.pair.ask(body, name=f"half{number}", ttft_slo_ms=110_000 - 15_000 * number)
        answers.append(answer)
        worker.pair.wait_for("started", answer)
        worker.passes.let_to_its_end()
        worker.passes.let(1)
        worker.pair.wait_for("finished", answer)
    return bodies, answers


def test_many_half_prefilled_at_once(worker: HeldWorker, stock_url: str) -> None:
    """Four, and a fifth that is more urgent and fits, a sixth for which there is no memory before they end."""
    bodies, answers = half_prefilled(worker, 1_100, 4)
    bodies += [prompts.ids(2_500, 1_110), prompts.ids(6_500, 1_111)]
    for number, body in enumerate(bodies[4:], 4):
        answers.append(worker.pair.ask(body, name=f"late{number}", ttft_slo_ms=90_000 - 15_000 * number))
        worker.pair.wait_for("arrived", answers[-1])
    steps = worker.pair.steps(*answers)
    for number in range(4):
        assert ("finished", f"half{number}") in steps, "a chunk of it is computed"
        assert ("ended", f"half{number}") not in steps
    worker.passes.free()
    assert_right(answers, bodies, stock_url)
    ends = [name for kind, name in worker.pair.steps(*answers) if kind == "ended"]
    assert [name for name in ends if name.startswith("half")] == ["half3", "half2", "half1", "half0"]


def test_a_half_prefilled_request_is_aborted(worker: HeldWorker, stock_url: str) -> None:
    """Between two of its chunks, while another one runs: answered, and gone, before that one has ended."""
    pair, passes, go = worker.pair, worker.passes, threading.Event()
    passes.hold()
    body = prompts.ids(2_900, 1_120)
    other = pair.ask(body, name="other", ttft_slo_ms=30_000, prefill_after=go)
    victim = pair.ask(prompts.ids(2_900, 1_121), name="victim", ttft_slo_ms=90_000)
    pair.wait_for("started", victim)
    passes.let_to_its_end()
    go.set()  # the other one's message comes behind the last boundary of this chunk
    pair.wait_for("started", other)
    assert [kind for kind, _ in pair.steps(victim)] == ["arrived", "started", "finished"]
    assert pair.control("/abort_request", {"rid": victim.rid})[0] == 200
    status, document = victim.prefill.result(60)
    assert status != 200 or document["meta_info"]["finish_reason"]["type"] == "abort", document
    assert ("finished", "other") not in pair.steps(other)
    passes.free()
    assert other.whole()["output_ids"] == expected(stock_url, body)
    victim.decode.result(60)
    ends = [(event["rid"], event["outcome"]) for event in pair.events(victim, other) if event["type"] == "ended"]
    assert ends == [(victim.rid, "aborted"), (other.rid, "prefilled")]
    wait_until(lambda: pair.load()["num_used_tokens"] == 0, timeout_s=30)


def test_memory_is_not_released_under_suspended_tasks(worker: HeldWorker, stock_url: str) -> None:
    """SGLang's own scheduler would end. On a CPU a release gives nothing back, but it empties the cache."""
    bodies, answers = half_prefilled(worker, 1_130, 2)
    status, words = worker.pair.control("/release_memory_occupation", {})
    assert (status, "only while nothing is under way" in words) == (400, True), words
    assert not {("ended", "half0"), ("ended", "half1")} & set(worker.pair.steps(*answers)), "or nothing was tried"
    worker.passes.free()
    assert_right(answers, bodies, stock_url)
    wait_until(lambda: worker.pair.control("/release_memory_occupation", {})[0] == 200, timeout_s=30)
    assert worker.pair.control("/resume_memory_occupation", {})[0] == 200
    again = worker.pair.ask(bodies[0]).whole()
    assert again["output_ids"] == expected(stock_url, bodies[0])
    assert again["meta_info"]["cached_tokens"] == 0


def test_the_watchdog_is_content_with_a_slow_pass_beside_a_suspended_one(worker: HeldWorker, stock_url: str) -> None:
    """One forward pass that takes longer than SGLang's watchdog waits for the next one, but goes on in it."""
    bodies, answers = half_prefilled(worker, 1_140, 2)
    began_at = time.monotonic()
    for step in range(1, PLACES):
        wait_until(lambda: time.monotonic() > began_at + step * 0.4 * WATCHDOG_S, timeout_s=WATCHDOG_S)  # noqa: B023
        worker.passes.let(1)
    worker.passes.free()
    assert_right(answers, bodies, stock_url)
    assert WATCHDOG_WORDS not in worker.log.read_text()


def test_the_watchdog_ends_a_worker_whose_pass_is_stuck(worker: HeldWorker) -> None:
    """The last test here: the worker is gone. Clients of the suspended task hear of it too."""
    _, answers = half_prefilled(worker, 1_150, 2)
    worker.passes.stick()
    assert worker.pair.process.wait(60) != 0
    assert WATCHDOG_WORDS in worker.log.read_text()
    for answer in answers:
        assert answer.prefill.exception(60) is not None or answer.prefill.result()[0] != 200
        worker.pair.give_up(answer)

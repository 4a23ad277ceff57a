"""SGLang's control requests while forward passes are suspended: each does what it does in SGLang."""

import json
import time
from pathlib import Path

import pytest

from flowprefill_sglang.workload.tiny_model import TinyModelShape, make_tiny_model
from flowprefill_testing import prompts
from flowprefill_testing.clusters import wait_until
from flowprefill_testing.direct import Answer, Pair
from flowprefill_testing.http import generate

pytestmark = pytest.mark.cluster

LONG = 6_000


def two_under_way(worker: Pair, seed: int) -> tuple[Answer, Answer]:
    """A suspended task and, more urgent, a running one; long ones both, of prompts that nobody has asked before."""
    suspended = worker.ask(prompts.ids(LONG, seed), name="suspended", ttft_slo_ms=60_000)
    worker.wait_for("started", suspended)
    running = worker.ask(prompts.ids(LONG, seed + 1), name="running", ttft_slo_ms=30_000)
    worker.wait_for("preempted", suspended)
    return suspended, running


def assert_right(suspended: Answer, running: Answer, stock_url: str, seed: int) -> None:
    for answer, ids in ((suspended, prompts.ids(LONG, seed)), (running, prompts.ids(LONG, seed + 1))):
        assert answer.whole()["output_ids"] == generate(stock_url, input_ids=ids)["output_ids"]


def test_flush_is_refused_while_a_task_is_suspended(roomy: Pair, stock_url: str) -> None:
    suspended, running = two_under_way(roomy, 600)
    status, words = roomy.control("/flush_cache")
    assert status == 400, words
    assert ("ended", "suspended") not in roomy.steps(suspended), "or the test has not tried it"
    assert_right(suspended, running, stock_url, 600)
    wait_until(lambda: roomy.control("/flush_cache")[0] == 200, timeout_s=30)
    again = roomy.ask(prompts.ids(LONG, 600))
    assert again.whole()["meta_info"]["cached_tokens"] == 0


@pytest.mark.parametrize(("path", "seed"), [("/health", 610), ("/health_generate", 612)])
def test_health_is_answered_during_a_long_prefill(roomy: Pair, path: str, seed: int) -> None:
    """SGLang itself looks once a second whether the scheduler has said anything."""
    suspended, running = two_under_way(roomy, seed)
    began_at = time.monotonic()
    assert roomy.control(path, method="GET")[0] == 200
    assert time.monotonic() - began_at < 8
    suspended.whole(), running.whole()


@pytest.mark.parametrize(("mode", "seed"), [("in_place", 620), ("retract", 623)])
def test_pause_and_continue(roomy: Pair, stock_url: str, mode: str, seed: int) -> None:
    suspended, running = two_under_way(roomy, seed)
    waiting = roomy.ask(prompts.ids(400, seed + 2), name="waiting", ttft_slo_ms=90_000)
    roomy.wait_for("arrived", waiting)
    assert roomy.control("/pause_generation", {"mode": mode})[0] == 200
    try:
        wait_until(lambda: ("finished", "suspended") in roomy.steps(suspended), timeout_s=30)
        assert ("started", "waiting") not in roomy.steps(waiting), "it is paused"
    finally:
        assert roomy.control("/continue_generation", {})[0] == 200
    assert_right(suspended, running, stock_url, seed)
    assert waiting.whole()["output_ids"] == generate(stock_url, input_ids=prompts.ids(400, seed + 2))["output_ids"]


def test_pause_that_aborts(roomy: Pair, stock_url: str) -> None:
    suspended, running = two_under_way(roomy, 630)
    assert roomy.control("/pause_generation", {"mode": "abort"})[0] == 200
    assert {event["outcome"] for event in roomy.events(suspended, running) if "outcome" in event} == {"aborted"}
    assert roomy.control("/continue_generation", {})[0] == 200
    for answer in (suspended, running):
        answer.prefill.result(60), answer.decode.result(60)
    ids = prompts.ids(300, 631)
    assert roomy.ask(ids).whole()["output_ids"] == generate(stock_url, input_ids=ids)["output_ids"]


def test_load_counts_what_is_begun(roomy: Pair) -> None:
    """SGLang tells its load when a batch ends."""
    suspended, running = two_under_way(roomy, 640)
    roomy.ask(prompts.ids(40, 642), name="urgent", ttft_slo_ms=15_000, max_new_tokens=1).whole()
    assert roomy.steps(suspended, running).count(("finished", "suspended")) == 0, "or there is nothing to count"
    wait_until(lambda: roomy.load()["num_running_reqs"] in (1, 2), timeout_s=10, pause_s=0.005)
    load = roomy.load()
    assert load["num_waiting_uncached_tokens"] == load["num_running_reqs"] * LONG
    assert load["num_used_tokens"] >= load["num_running_reqs"] * LONG
    suspended.whole(), running.whole()
    wait_until(lambda: roomy.load()["num_running_reqs"] == 0, timeout_s=30)


@pytest.fixture
def other_weights(tmp_path: Path) -> Path:
    """The same shape with other random weights."""
    return make_tiny_model(tmp_path, TinyModelShape(seed=1))


def test_weights_change_between_prompts_only(
    tight: Pair, stock_url: str, model_path: Path, other_weights: Path
) -> None:
    """What has begun is computed to its end with the old weights, the one in a task and the one between two chunks."""
    bodies = [prompts.ids(2_900, seed) for seed in (650, 651)]
    kind = {"return_logprob": True, "max_new_tokens": 1}
    half = tight.ask(bodies[0], name="half", ttft_slo_ms=60_000, **kind)
    tight.wait_for("started", half, times=2)
    running = tight.ask(bodies[1], name="running", ttft_slo_ms=30_000, **kind)
    tight.wait_for("started", running)
    try:
        assert tight.control("/pause_generation", {"mode": "in_place"})[0] == 200
        change = {"model_path": str(other_weights), "flush_cache": False}
        status, words = tight.control("/update_weights_from_disk", change)
        assert status == 200, words
        assert json.loads(words)["success"], words
        assert tight.control("/continue_generation", {})[0] == 200
        for answer, body in ((half, bodies[0]), (running, bodies[1])):
            assert first_logprob(answer.whole()) == pytest.approx(old_logprob(stock_url, body), abs=2e-3)
        new_ids = prompts.ids(900, 652)
        new = tight.ask(new_ids, **kind).whole()
        assert first_logprob(new) != pytest.approx(old_logprob(stock_url, new_ids), abs=2e-3), "they did change"
    finally:
        tight.control("/continue_generation", {})
        assert tight.control("/update_weights_from_disk", {"model_path": str(model_path)})[0] == 200
        wait_until(lambda: tight.control("/flush_cache")[0] == 200, timeout_s=30)


def first_logprob(answer: dict) -> float:
    return answer["meta_info"]["output_token_logprobs"][0][0]


def old_logprob(stock_url: str, input_ids: list[int]) -> float:
    return first_logprob(generate(stock_url, input_ids=input_ids, max_new_tokens=1, return_logprob=True))

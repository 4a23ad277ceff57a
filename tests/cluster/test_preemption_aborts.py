"""Aborts in every phase of a request: it is answered, what it held is free at once, and the others never notice."""

import threading

import pytest

from flowprefill_testing import prompts
from flowprefill_testing.clusters import wait_until
from flowprefill_testing.direct import Answer, Pair
from flowprefill_testing.http import generate

pytestmark = pytest.mark.cluster

LONG = 6_000


def abort(worker: Pair, answer: Answer) -> None:
    assert worker.control("/abort_request", {"rid": answer.rid})[0] == 200


def assert_aborted(answer: Answer) -> None:
    """The prefill side answers as SGLang does for an abort; the decode side must answer too, in whichever way."""
    status, document = answer.prefill.result(60)
    assert status != 200 or document["meta_info"]["finish_reason"]["type"] == "abort", document
    answer.decode.result(60)


def assert_unharmed(answer: Answer, stock_url: str, input_ids: list[int]) -> None:
    assert answer.whole()["output_ids"] == generate(stock_url, input_ids=input_ids)["output_ids"]


def assert_all_free(worker: Pair) -> None:
    """Nothing is held once all have ended; SGLang's strict check stops an idle worker that has lost a slot."""
    wait_until(lambda: worker.load()["num_used_tokens"] == 0, timeout_s=30)
    assert worker.ask(prompts.ids(30)).whole()["output_ids"]


def test_a_running_task(roomy: Pair) -> None:
    victim = roomy.ask(prompts.ids(LONG, 500), name="victim")
    roomy.wait_for("started", victim)
    abort(roomy, victim)
    assert_aborted(victim)
    assert ("finished", "victim") not in roomy.steps(victim), "its forward pass was ended, not waited for"
    assert_all_free(roomy)


def test_a_suspended_task(roomy: Pair, stock_url: str) -> None:
    survivor_ids = prompts.ids(LONG, 502)
    victim = roomy.ask(prompts.ids(LONG, 501), name="victim", ttft_slo_ms=60_000)
    roomy.wait_for("started", victim)
    survivor = roomy.ask(survivor_ids, name="survivor", ttft_slo_ms=30_000)
    roomy.wait_for("preempted", victim)
    abort(roomy, victim)
    assert_aborted(victim)
    assert_unharmed(survivor, stock_url, survivor_ids)
    steps = roomy.steps(victim, survivor)
    assert ("finished", "victim") not in steps
    assert steps.index(("ended", "victim")) < steps.index(("finished", "survivor")), "at once"
    assert_all_free(roomy)


def test_the_memory_of_an_aborted_one_is_free_at_once(tight: Pair, stock_url: str) -> None:
    """The pool holds two of these three; the third starts when the first is aborted, not when the second has ended."""
    bodies = [prompts.ids(2_900, seed) for seed in (510, 511, 512)]
    victim = tight.ask(bodies[0], name="victim", ttft_slo_ms=90_000)
    tight.wait_for("started", victim)
    second = tight.ask(bodies[1], name="second", ttft_slo_ms=60_000)
    tight.wait_for("started", second)
    third = tight.ask(bodies[2], name="third", ttft_slo_ms=30_000)
    tight.wait_for("arrived", third)
    abort(tight, victim)
    assert_aborted(victim)
    assert_unharmed(second, stock_url, bodies[1])
    assert_unharmed(third, stock_url, bodies[2])
    ends = [name for kind, name in tight.steps(victim, second, third) if kind == "ended"]
    assert ends == ["victim", "third", "second"]
    assert_all_free(tight)


def test_one_member_of_a_batch(roomy: Pair, stock_url: str) -> None:
    """Small prompts that wait behind a long one go on together; one of them is aborted under way."""
    bodies = [prompts.ids(600, seed) for seed in (530, 531, 532)]
    long = roomy.ask(prompts.ids(LONG, 533), name="long", ttft_slo_ms=20_000)
    roomy.wait_for("started", long)
    small = [roomy.ask(body, name=f"small{n}", ttft_slo_ms=60_000) for n, body in enumerate(bodies)]
    for answer in small:
        roomy.wait_for("arrived", answer)
    long.whole()
    roomy.wait_for("started", small[1])
    abort(roomy, small[1])
    assert_unharmed(small[0], stock_url, bodies[0])
    assert_unharmed(small[2], stock_url, bodies[2])
    small[1].prefill.result(60)  # aborted, or done before the abort came
    small[1].decode.result(60)
    started = [event["rids"] for event in roomy.events(*small) if event["type"] == "started"]
    assert any(len(rids) > 1 for rids in started), "they were a batch"
    assert_all_free(roomy)


def test_a_waiting_request(roomy: Pair, stock_url: str) -> None:
    running_ids = prompts.ids(LONG, 540)
    running = roomy.ask(running_ids, name="running", ttft_slo_ms=20_000)
    roomy.wait_for("started", running)
    victim = roomy.ask(prompts.ids(3_000, 541), name="victim", ttft_slo_ms=90_000)
    roomy.wait_for("arrived", victim)
    abort(roomy, victim)
    assert_aborted(victim)
    assert_unharmed(running, stock_url, running_ids)
    steps = roomy.steps(running, victim)
    assert ("started", "victim") not in steps
    assert steps.index(("ended", "victim")) < steps.index(("finished", "running"))
    assert_all_free(roomy)


def test_a_request_whose_decode_side_has_not_come(roomy: Pair) -> None:
    never = threading.Event()
    victim = roomy.ask(prompts.ids(500, 550), name="victim", decode_after=never)
    wait_until(lambda: roomy.load()["num_waiting_reqs"] == 1, timeout_s=30)
    abort(roomy, victim)
    status, document = victim.prefill.result(60)
    assert status != 200 or document["meta_info"]["finish_reason"]["type"] == "abort"
    assert roomy.steps(victim) == [], "the scheduler never heard of it"
    assert_all_free(roomy)


def test_abort_all(roomy: Pair) -> None:
    """Running, suspended, waiting and bootstrapping at once."""
    never = threading.Event()
    suspended = roomy.ask(prompts.ids(LONG, 560), name="suspended", ttft_slo_ms=60_000)
    roomy.wait_for("started", suspended)
    running = roomy.ask(prompts.ids(LONG, 561), name="running", ttft_slo_ms=30_000)
    waiting = roomy.ask(prompts.ids(2_000, 562), name="waiting", ttft_slo_ms=90_000)
    bootstrapping = roomy.ask(prompts.ids(2_000, 563), name="bootstrapping", decode_after=never)
    roomy.wait_for("preempted", suspended)
    roomy.wait_for("arrived", waiting)
    assert roomy.control("/abort_request", {"rid": "", "abort_all": True})[0] == 200
    for answer in (suspended, running, waiting):
        assert_aborted(answer)
    bootstrapping.prefill.result(60)
    ends = {event["rid"]: event["outcome"] for event in roomy.events(suspended, running, waiting) if "outcome" in event}
    assert ends == {answer.rid: "aborted" for answer in (suspended, running, waiting)}
    assert_all_free(roomy)

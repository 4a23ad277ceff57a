"""A prefill that is interrupted, as clients see it: the urgent goes first, and nothing else changes."""

import random
import re

import pytest

from flowprefill_testing import prompts
from flowprefill_testing.clusters import Cluster
from flowprefill_testing.direct import Answer, Pair
from flowprefill_testing.http import generate

pytestmark = pytest.mark.cluster

LONG = 8_000
SAME = 2e-3
"""Logprobs differ by float32 rounding between batch sizes; a wrong page of KV moves them by 0.1 and more."""


def expected(stock_url: str, input_ids: list[int], max_new_tokens: int = 12, **fields: object) -> dict:
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, **fields.pop("sampling", {})}
    return generate(stock_url, input_ids=input_ids, **{**fields, "sampling_params": sampling})


def assert_same(got: dict, stock: dict, what: object) -> None:
    assert got["output_ids"] == stock["output_ids"], what
    assert got["text"] == stock["text"], what
    for key in ("prompt_tokens", "completion_tokens"):
        assert got["meta_info"][key] == stock["meta_info"][key], (what, key)
    for key in ("input_token_logprobs", "output_token_logprobs"):
        assert (key in got["meta_info"]) == (key in stock["meta_info"]), (what, key)
        ours, truth = got["meta_info"].get(key, []), stock["meta_info"].get(key, [])
        assert [entry[1] for entry in ours] == [entry[1] for entry in truth], (what, key)
        logprobs = [entry[0] for entry in truth if entry[0] is not None]
        assert [entry[0] for entry in ours if entry[0] is not None] == pytest.approx(logprobs, abs=SAME), (what, key)
    for key in ("input_top_logprobs", "output_top_logprobs"):
        ours, truth = got["meta_info"].get(key) or [], stock["meta_info"].get(key) or []
        for mine, theirs in zip(ours, truth, strict=True):
            values = [[entry[0] for entry in entries or ()] for entries in (mine, theirs)]
            assert values[0] == pytest.approx(values[1], abs=SAME), (what, key)


def test_an_urgent_prompt_overtakes_a_long_one(roomy: Pair, stock_url: str) -> None:
    long_ids, urgent_ids = prompts.ids(LONG, 100), prompts.ids(60, 100)
    long = roomy.ask(long_ids, name="long", return_logprob=True)
    roomy.wait_for("started", long)
    urgent = roomy.ask(urgent_ids, name="urgent", ttft_slo_ms=20_000, max_new_tokens=4)
    long_answer, urgent_answer = long.whole(), urgent.whole()
    steps = roomy.steps(long, urgent)
    overtaking = [
        ("preempted", "long"),
        ("started", "urgent"),
        ("finished", "urgent"),
        ("resumed", "long"),
        ("finished", "long"),
    ]
    assert [step for step in steps if step in overtaking] == overtaking
    at = {step: event["at"] for step, event in zip(steps, roomy.events(long, urgent), strict=True)}
    first_token_s = at["finished", "urgent"] - at["arrived", "urgent"]
    assert first_token_s < (at["finished", "long"] - at["arrived", "urgent"]) / 4, "it did not wait for the rest"
    assert_same(long_answer, expected(stock_url, long_ids, return_logprob=True), "long")
    assert_same(urgent_answer, expected(stock_url, urgent_ids, 4), "urgent")


def test_its_long_operators_are_sliced(roomy: Pair, cluster: Cluster) -> None:
    """What the other tests here compare with stock SGLang's answers was computed in slices."""
    log = (cluster.log_dir / "roomy.log").read_text()
    (target,) = [line for line in log.splitlines() if "blocking target" in line]
    assert re.search(r"blocking target 2 ms: layers above \d+ rows, attention are sliced", target)
    assert int(target.split(" above ")[1].split()[0]) < LONG
    assert "layers are not sliced" not in log


def test_several_deep(roomy: Pair, stock_url: str) -> None:
    """Each is more urgent than the one that runs; they end in the reverse order."""
    bodies = [prompts.ids(LONG - 1000 * depth, 101) for depth in range(4)]
    answers: list[Answer] = []
    for depth, body in enumerate(bodies):
        answer = roomy.ask(body, name=f"deep{depth}", ttft_slo_ms=90_000 - 15_000 * depth, max_new_tokens=6)
        answers.append(answer)
        roomy.wait_for("started", answer)
    wholes = [answer.whole() for answer in answers]
    steps = roomy.steps(*answers)
    assert [name for kind, name in steps if kind == "preempted"] == ["deep0", "deep1", "deep2"]
    assert [name for kind, name in steps if kind == "finished"] == ["deep3", "deep2", "deep1", "deep0"]
    for body, whole in zip(bodies, wholes, strict=True):
        assert_same(whole, expected(stock_url, body, 6), len(body))


REGEX = {"regex": r"[a-z]{3}-[0-9]{2}"}
SCHEMA = {
    "json_schema": '{"type":"object","properties":{"a":{"type":"integer","minimum":1,"maximum":9}},"required":["a"]}'
}


def mixed_requests(rng: random.Random) -> list[tuple[list[int], dict]]:
    """Prompts of all lengths: a third share prefixes, and each kind of answer appears."""
    shared = [prompts.ids(length, 102) for length in (160, 1_000, 2_500)]
    bodies = [prompts.ids(rng.choice([1, 20, 90, 400, 1_200, 2_000, 4_000]), seed) for seed in range(200, 224)]
    bodies += [rng.choice(shared) + prompts.ids(rng.randrange(1, 300), seed) for seed in range(12)]
    bodies += [prompts.ids(LONG, seed) for seed in (300, 301)]
    kinds: list[dict] = [
        {},
        {"return_logprob": True},
        {"return_logprob": True, "logprob_start_len": 0},
        {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2},
        {"sampling": REGEX},
        {"sampling": SCHEMA},
    ]
    rng.shuffle(bodies)
    return [(body, kinds[index % len(kinds)]) for index, body in enumerate(bodies)]


def test_mixed_prompts_under_random_preemption(roomy: Pair, stock_url: str) -> None:
    rng = random.Random(7)
    requests = mixed_requests(rng)
    answers = [
        # Objectives that are met, that are missed, and that no one could meet.
        roomy.ask(body, ttft_slo_ms=rng.choice([1, 200, 1_000, 5_000, 30_000, 90_000]), **kind)
        for body, kind in requests
    ]
    wholes = [answer.whole() for answer in answers]
    for number, ((body, kind), whole) in enumerate(zip(requests, wholes, strict=True)):
        assert_same(whole, expected(stock_url, body, **kind), (number, len(body), kind))
    ended = [event["rid"] for event in roomy.events(*answers) if event["type"] == "ended"]
    assert sorted(ended) == sorted(answer.rid for answer in answers), "each ends once"


def test_prompt_logprobs_across_chunks_and_preemptions(tight: Pair, stock_url: str) -> None:
    """Two prompts in chunks, the second one while the first is half done."""
    bodies = [prompts.ids(2_900, 400), prompts.ids(2_500, 401)]
    kind = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    first = tight.ask(bodies[0], name="first", ttft_slo_ms=60_000, **kind)
    tight.wait_for("started", first)
    second = tight.ask(bodies[1], name="second", ttft_slo_ms=30_000, **kind)
    wholes = [first.whole(), second.whole()]
    for body, whole in zip(bodies, wholes, strict=True):
        assert len(whole["meta_info"]["input_token_logprobs"]) == len(body)
        assert_same(whole, expected(stock_url, body, **kind), len(body))
    ends = [name for kind, name in tight.steps(first, second) if kind == "finished"]
    assert sorted(ends) == ["first"] * 3 + ["second"] * 3, "a chunk is a task"
    assert ends[-1] == "first", "the second went ahead"

"""What the cluster answers is what one stock SGLang engine answers, token for token."""

import itertools

import pytest

from flowprefill_testing import prompts
from flowprefill_testing.clusters import CHUNK_TOKENS, PAGE_TOKENS, Cluster
from flowprefill_testing.http import at_once, generate, get, post, stream

pytestmark = pytest.mark.cluster

EDGES = [
    length + delta
    for length in (PAGE_TOKENS, 4 * PAGE_TOKENS, CHUNK_TOKENS, 2 * CHUNK_TOKENS, 4 * CHUNK_TOKENS)
    for delta in (-1, 0, 1)
]
LENGTHS = [1, 2, 3, 5, 8, 30, 47, 100, 129, 200, 255, 300, 400, 600, 700, 800, 900, 1200, 1500, 1800, 2300, 2700, 3000]
LENGTHS = sorted([*LENGTHS, *EDGES, 3500, 4000])
assert len(LENGTHS) >= 40


def comparable(answer: dict) -> tuple:
    meta = answer["meta_info"]
    return answer["output_ids"], answer["text"], meta["prompt_tokens"], meta["completion_tokens"]


def test_greedy_answers_equal_a_stock_engines(cluster: Cluster, stock_url: str) -> None:
    def ask(url: str):
        return lambda length: comparable(generate(url, input_ids=prompts.ids(length)))

    ours = at_once(ask(cluster.url), LENGTHS, workers=8)
    stock = at_once(ask(stock_url), LENGTHS, workers=1)
    for length, got, expected in zip(LENGTHS, ours, stock, strict=True):
        assert got == expected, f"prompt of {length} tokens"
    assert len({answer[1] for answer in ours}) > len(LENGTHS) * 3 // 4, "prompts that differ are answered differently"


def test_both_workers_take_part(cluster: Cluster) -> None:
    at_once(lambda number: generate(cluster.url, input_ids=prompts.ids(500, number)), list(range(8)), workers=8)
    _, document = get(f"{cluster.url}/workers")
    prefill = [worker for worker in document["workers"] if worker["type"] == "prefill"]
    assert sorted(worker["name"] for worker in prefill) == ["prefill-0", "prefill-1"]
    assert all(worker["dispatched_total"] > 0 for worker in prefill), prefill


@pytest.mark.parametrize("length", [1, PAGE_TOKENS, CHUNK_TOKENS + 1, 1500])
def test_streaming_equals_not_streaming(cluster: Cluster, length: int) -> None:
    body = {"input_ids": prompts.ids(length, 1), "sampling_params": {"temperature": 0, "max_new_tokens": 20}}
    events = stream(f"{cluster.url}/generate", {**body, "stream": True})
    whole = generate(cluster.url, input_ids=body["input_ids"], max_new_tokens=20)
    assert len(events) > 1, "tokens arrive one after another, not all at the end"
    assert comparable(events[-1]) == comparable(whole)
    texts = [event["text"] for event in events]
    assert all(later.startswith(former) for former, later in itertools.pairwise(texts))


def test_prefix_cache_hits_change_nothing(cluster: Cluster, stock_url: str) -> None:
    prefix = prompts.ids(900, 2)
    bodies = [prefix + prompts.ids(50 + tail, tail) for tail in range(6)]
    first = [comparable(generate(cluster.url, input_ids=body)) for body in bodies]
    again = [generate(cluster.url, input_ids=body) for body in bodies]
    assert [comparable(answer) for answer in again] == first
    assert first == [comparable(generate(stock_url, input_ids=body)) for body in bodies]


def test_concurrent_requests_do_not_mix(cluster: Cluster) -> None:
    bodies = [prompts.ids(40 + 37 * number, number) for number in range(32)]

    def ask(body: list[int]) -> tuple:
        return comparable(generate(cluster.url, input_ids=body, max_new_tokens=8))

    together = at_once(ask, bodies, workers=32)
    alone = [ask(body) for body in bodies]
    assert together == alone


def test_a_batch_in_one_request(cluster: Cluster, stock_url: str) -> None:
    batch = [prompts.ids(length, 3) for length in (3, 70, 600)]
    sampling = {"temperature": 0, "max_new_tokens": 6}
    _, ours = post(f"{cluster.url}/generate", {"input_ids": batch, "sampling_params": sampling})
    _, stock = post(f"{stock_url}/generate", {"input_ids": batch, "sampling_params": sampling})
    assert [comparable(answer) for answer in ours] == [comparable(answer) for answer in stock]


@pytest.mark.parametrize("streamed", [False, True])
def test_prompt_logprobs_come_from_the_prefill_side(cluster: Cluster, stock_url: str, streamed: bool) -> None:
    body = {
        "input_ids": prompts.ids(150, 4),
        "sampling_params": {"temperature": 0, "max_new_tokens": 5},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
    }
    _, stock = post(f"{stock_url}/generate", body)
    if streamed:
        ours = stream(f"{cluster.url}/generate", {**body, "stream": True})[-1]
    else:
        _, ours = post(f"{cluster.url}/generate", body)
    for name in ("input_token_logprobs", "output_token_logprobs"):
        got, expected = ours["meta_info"][name], stock["meta_info"][name]
        assert [entry[1] for entry in got] == [entry[1] for entry in expected], name
        for (mine, *_), (theirs, *_) in zip(got, expected, strict=True):
            assert mine == pytest.approx(theirs, abs=2e-4) if theirs is not None else mine is None
    assert len(ours["meta_info"]["input_top_logprobs"]) == len(stock["meta_info"]["input_top_logprobs"])

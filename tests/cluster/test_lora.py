"""LoRA adapters on a worker that suspends prefills: each prompt gets its own adapter's answer, and the adapters of
suspended ones stay in their slots.

One prefill worker and one decode instance with three adapters. The worker has slots for two of them at a time, and the
decode instance for all, since it keeps requests back by itself that find no slot. What a prompt is answered when
nothing else runs is the truth.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowprefill_testing import prompts
from flowprefill_testing.adapters import make_adapter
from flowprefill_testing.clusters import CONTEXT_TOKENS, Cluster, wait_until
from flowprefill_testing.direct import Pair
from flowprefill_testing.http import get, post
from flowprefill_testing.servers import sizes, started_up

pytestmark = pytest.mark.cluster

LONG = 6_000
ATTEMPTS = 8


@pytest.fixture(scope="module")
def adapters(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(directory / name, model_path, seed) for seed, name in enumerate("abcd")}


@pytest.fixture(scope="module")
def adapted(model_path: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    paths = [f"{name}={path}" for name, path in adapters.items() if name != "d"]
    slots = ["--max-loras-per-batch", "5", "--prefill-args=--max-loras-per-batch 2"]
    flags = ["--lora-paths", *paths, *slots, "--chunked-prefill-size", str(CONTEXT_TOKENS)]
    with started_up([*sizes(model_path), *flags], tmp_path_factory.mktemp("adapted")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def pair(adapted: Cluster) -> Pair:
    """The cluster's worker and decode instance, asked without the router."""
    prefill_url = adapted.workers["prefill-0"]["url"]
    _, server = get(f"{prefill_url}/server_info")
    return Pair(
        prefill_url, server["disaggregation_bootstrap_port"], adapted.workers["decode-0"]["url"], adapted.process
    )


def alone(pair: Pair, input_ids: list[int], adapter: str | None) -> list[int]:
    """The answer when nothing else runs; nothing of it stays in the prefix cache."""
    answer = pair.ask(input_ids, lora_path=adapter).whole()
    wait_until(lambda: pair.control("/flush_cache")[0] == 200, timeout_s=30)
    return answer["output_ids"]


def test_each_adapter_answers_for_itself(pair: Pair) -> None:
    """Or the others here could not fail."""
    found = [alone(pair, prompts.ids(300, 1_000), adapter) for adapter in ("a", "b", "c", None)]
    assert len({tuple(output) for output in found}) == 4


def test_suspended_prompts_keep_their_adapters(pair: Pair) -> None:
    """Two hold both slots, one of them suspended; the most urgent one has a third adapter and waits for a slot.

    How soon its message gets through is not ours to say, so it is tried until it came while both were held."""
    bodies = {"a": prompts.ids(LONG, 1_010), "b": prompts.ids(8_000, 1_011), "c": prompts.ids(200, 1_012)}
    truth = {name: alone(pair, body, name) for name, body in bodies.items()}
    for _ in range(ATTEMPTS):
        go = threading.Event()
        first = pair.ask(bodies["a"], name="first", ttft_slo_ms=110_000, lora_path="a")
        pair.wait_for("started", first)
        third = pair.ask(bodies["c"], name="third", ttft_slo_ms=20_000, lora_path="c", decode_after=go)
        second = pair.ask(bodies["b"], name="second", ttft_slo_ms=80_000, lora_path="b")
        pair.wait_for("started", second)
        go.set()
        for name, answer in zip("abc", (first, second, third), strict=True):
            assert answer.whole()["output_ids"] == truth[name], name
        steps = pair.steps(first, second, third)
        at = {step: number for number, step in reversed(list(enumerate(steps)))}
        if ("preempted", "first") in at and at["arrived", "third"] < at["finished", "second"]:
            break
        wait_until(lambda: pair.control("/flush_cache")[0] == 200, timeout_s=30)
    else:
        pytest.fail(f"it never came while both slots were held: {steps}")
    assert at["finished", "second"] < at["started", "third"] < at["finished", "first"], "a slot was free only then"


def test_a_batch_of_several_adapters(pair: Pair) -> None:
    """Small prompts behind a long one go on together, each with its own."""
    small = {adapter: prompts.ids(150, 1_020 + number) for number, adapter in enumerate(("a", None))}
    truth = {adapter: alone(pair, body, adapter) for adapter, body in small.items()}
    long = pair.ask(prompts.ids(LONG, 1_030), name="long", ttft_slo_ms=20_000, lora_path="a")
    pair.wait_for("started", long)
    answers = {adapter: pair.ask(body, ttft_slo_ms=60_000, lora_path=adapter) for adapter, body in small.items()}
    for adapter, answer in answers.items():
        assert answer.whole()["output_ids"] == truth[adapter], adapter
    long.whole()


def test_an_adapter_is_loaded_between_prompts_only(pair: Pair, adapters: dict[str, Path]) -> None:
    """What has begun is computed to its end first."""
    body = prompts.ids(LONG, 1_040)
    truth = alone(pair, body, "a")
    suspended = pair.ask(body, name="suspended", ttft_slo_ms=90_000, lora_path="a")
    pair.wait_for("started", suspended)
    running = pair.ask(prompts.ids(LONG, 1_041), name="running", ttft_slo_ms=60_000, lora_path="b")
    pair.wait_for("preempted", suspended)
    load = {"lora_name": "d", "lora_path": str(adapters["d"])}
    status, words = pair.control("/load_lora_adapter", load)
    assert (status, json.loads(words)["success"]) == (200, True), words
    steps = pair.steps(suspended, running)
    assert {("finished", "suspended"), ("finished", "running")} <= set(steps)
    assert suspended.whole()["output_ids"] == truth
    running.whole()
    assert post(f"{pair.decode_url}/load_lora_adapter", load)[0] == 200
    assert pair.ask(prompts.ids(300, 1_000), lora_path="d").whole()["output_ids"] != alone(
        pair, prompts.ids(300, 1_000), "a"
    )


def test_an_adapter_is_unloaded_between_prompts_only(pair: Pair, adapters: dict[str, Path]) -> None:
    """One that nobody uses: what has begun is computed to its end first, with its own adapters. Then it is gone."""
    body = prompts.ids(LONG, 1_050)
    truth = alone(pair, body, "a")
    load = {"lora_name": "unused", "lora_path": str(adapters["d"])}
    assert pair.control("/load_lora_adapter", load)[0] == 200
    suspended = pair.ask(body, name="suspended", ttft_slo_ms=90_000, lora_path="a")
    pair.wait_for("started", suspended)
    running = pair.ask(prompts.ids(LONG, 1_051), name="running", ttft_slo_ms=60_000, lora_path="b")
    pair.wait_for("preempted", suspended)
    status, words = pair.control("/unload_lora_adapter", {"lora_name": "unused"})
    assert (status, json.loads(words)["success"]) == (200, True), words
    assert {("finished", "suspended"), ("finished", "running")} <= set(pair.steps(suspended, running))
    assert suspended.whole()["output_ids"] == truth
    running.whole()
    refused = {"input_ids": body, "lora_path": "unused", "sampling_params": {"max_new_tokens": 1}}
    assert post(f"{pair.prefill_url}/generate", refused)[0] == 400


def test_an_adapter_of_a_suspended_prompt_is_unloaded_after_it(pair: Pair, adapters: dict[str, Path]) -> None:
    """SGLang refuses new prompts for it at once, and waits for those that have begun."""
    body = prompts.ids(LONG, 1_060)
    load, unload = {"lora_name": "used", "lora_path": str(adapters["d"])}, {"lora_name": "used"}
    for url in (pair.prefill_url, pair.decode_url):
        assert post(f"{url}/load_lora_adapter", load)[0] == 200
    truth = alone(pair, body, "used")
    suspended = pair.ask(body, name="suspended", ttft_slo_ms=90_000, lora_path="used")
    pair.wait_for("started", suspended)
    running = pair.ask(prompts.ids(LONG, 1_061), name="running", ttft_slo_ms=60_000, lora_path="b")
    pair.wait_for("preempted", suspended)
    status, words = pair.control("/unload_lora_adapter", unload)
    assert (status, json.loads(words)["success"]) == (200, True), words
    assert ("ended", "suspended") in pair.steps(suspended)
    assert suspended.whole()["output_ids"] == truth
    running.whole()
    assert post(f"{pair.decode_url}/unload_lora_adapter", unload)[0] == 200

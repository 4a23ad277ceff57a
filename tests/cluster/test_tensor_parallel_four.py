"""A prefill worker of four tensor-parallel ranks, against one of one rank with the same weights: preempted, with the
same first tokens and logprobs of the prompt. What they have computed is handed over to nobody."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flowprefill_sglang.workload.tiny_model import TinyModelShape, make_tiny_model
from flowprefill_testing import prompts
from flowprefill_testing.direct import Answer, DirectWorkers, Pair
from flowprefill_testing.servers import STRICT, with_us

pytestmark = pytest.mark.cluster

RANKS = 4
LONG = 3_000
TOLERANCE = 1e-3
"""Of a logprob: float32 sums over ranks. A token's alternatives differ by far more."""


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Pair]]:
    """By the number of ranks."""
    directory = tmp_path_factory.mktemp("four")
    model = make_tiny_model(directory / "model", TinyModelShape(num_attention_heads=RANKS))
    with DirectWorkers(model, directory, {**STRICT, **with_us()}) as starting:
        for ranks in (RANKS, 1):
            starting.start(f"tp{ranks}", ["--tp-size", str(ranks), "--max-total-tokens", "20000"])
        yield {ranks: starting.pair(f"tp{ranks}", "") for ranks in (RANKS, 1)}


def three_deep(pair: Pair, *, nested: bool) -> list[Answer]:
    """Each more urgent than the one before; ``nested``: each sent once the one before is running."""
    answers = []
    for depth in range(3):
        body = prompts.ids(LONG - 500 * depth, 970 + depth)
        slo_ms = 110_000 - 25_000 * depth
        logprobs = {"return_logprob": True, "logprob_start_len": 0}
        answers.append(pair.prefill_alone(body, ttft_slo_ms=slo_ms, name=f"deep{depth}", **logprobs))
        pair.wait_for("started" if nested else "finished", answers[-1])
    return answers


def test_four_ranks_stop_together_and_compute_what_one_does(workers: dict[int, Pair]) -> None:
    four, one = workers[RANKS], workers[1]
    answers = three_deep(four, nested=True)
    for answer, alone in zip(answers, three_deep(one, nested=False), strict=True):
        (status, got), (_, expected) = answer.prefill.result(180), alone.prefill.result(180)
        assert status == 200, got
        assert got["output_ids"] == expected["output_ids"]
        (_, *ours), (_, *theirs) = (of["meta_info"]["input_token_logprobs"] for of in (got, expected))
        assert len(ours) > 1_000
        assert max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)) < TOLERANCE
    steps = four.steps(*answers)
    assert {name for kind, name in steps if kind == "preempted"} >= {"deep0", "deep1"}
    assert [name for kind, name in steps if kind == "finished"] == ["deep2", "deep1", "deep0"]

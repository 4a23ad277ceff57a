from __future__ import annotations

from collections import Counter

import pytest

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.datasets import random_lengths, shared_prefixes
from flowprefill_sglang.workload.prompts import prompt_text


def test_random_lengths_are_within_their_range_and_repeat_for_a_seed() -> None:
    made = [
        random_lengths(requests=300, input_tokens=100, output_tokens=40, range_ratio=0.5, seed=seed).requests
        for seed in (1, 1, 2)
    ]
    assert made[0] == made[1] != made[2]
    lengths = {r.input_tokens for r in made[0]}
    assert (min(lengths), max(lengths)) == (50, 100)
    assert {r.output_tokens for r in made[0]} == set(range(20, 41))


def test_a_ratio_of_nonsense_is_refused() -> None:
    with pytest.raises(BadInput, match="expected a number from 0 to 1, got 2"):
        random_lengths(requests=1, input_tokens=9, output_tokens=9, range_ratio=2, seed=0)


def test_a_group_shares_exactly_its_prefix() -> None:
    trace = shared_prefixes(
        groups=3, prompts_per_group=4, prefix_tokens=64, question_tokens=16, output_tokens=8, seed=0
    )
    assert not trace.has_arrivals
    prompts = [prompt_text(request, row, 0) for row, request in enumerate(trace.requests)]
    assert {len(prompt) + 1 for prompt in prompts} == {80}
    assert sorted(Counter(prompt[:63] for prompt in prompts).values()) == [4, 4, 4]
    assert len({prompt[64:] for prompt in prompts}) == 12
    groups = [request.hash_ids for request in trace.requests]
    assert groups != sorted(groups), "in random order"

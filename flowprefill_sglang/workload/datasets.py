"""The datasets that SGLang's ``bench_serving`` (0.5.23) generates: the same distributions, from a seed of our own.

They have no arrival times, as there: give them some with ``trace.poisson_arrivals``.
"""

from __future__ import annotations

import random

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.workload.trace import MIN_PROMPT_TOKENS, Trace, TraceRequest


def random_lengths(*, requests: int, input_tokens: int, output_tokens: int, range_ratio: float, seed: int) -> Trace:
    """SGLang's ``random``: lengths uniform between ``range_ratio`` times the given ones and these; no shared prefixes.

    Raises BadInput for a ratio outside of 0 to 1.
    """
    if not 0 <= range_ratio <= 1:
        raise BadInput(f"--random-range-ratio: expected a number from 0 to 1, got {range_ratio:g}")
    rng = random.Random(f"random lengths {seed}")

    def length(full: int) -> int:
        return rng.randint(max(1, int(full * range_ratio)), full)

    rows = (
        TraceRequest(
            arrival_s=0.0,
            input_tokens=max(MIN_PROMPT_TOKENS, length(input_tokens)),
            output_tokens=length(output_tokens),
        )
        for _ in range(requests)
    )
    return Trace(name=f"random, seed {seed}", requests=tuple(rows), has_arrivals=False)


def shared_prefixes(
    *, groups: int, prompts_per_group: int, prefix_tokens: int, question_tokens: int, output_tokens: int, seed: int
) -> Trace:
    """SGLang's ``generated-shared-prefix``: each group's prompts begin with the group's own prefix; in random order."""
    rows = [
        TraceRequest(
            arrival_s=0.0,
            input_tokens=prefix_tokens + question_tokens,
            output_tokens=output_tokens,
            hash_ids=(group,),
            hash_block_tokens=prefix_tokens,
        )
        for group in range(groups)
        for _ in range(prompts_per_group)
    ]
    random.Random(f"shared prefixes {seed}").shuffle(rows)
    return Trace(name=f"generated-shared-prefix, seed {seed}", requests=tuple(rows), has_arrivals=False)

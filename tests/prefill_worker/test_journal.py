"""What is written down of the state machine's steps."""

from __future__ import annotations

import pytest

from flowprefill_sglang.core.aging import AgingLimits
from flowprefill_sglang.core.batching import BatchLimits
from flowprefill_sglang.core.prefill_cost import CostModel, Extent, Predictor
from flowprefill_sglang.observe.events import Event, TaskStarted
from flowprefill_sglang.prefill_worker.journal import Journal
from flowprefill_sglang.prefill_worker.scheduler import PrefillScheduler, Request

SECOND_PER_1000_TOKENS = CostModel(base_s=0.0, short_token_s=0.001, long_token_s=0.001, pair_s=0.0)


def test_the_start_of_a_chunk_says_what_will_follow_it() -> None:
    core = PrefillScheduler(
        Predictor(SECOND_PER_1000_TOKENS), policy="feasible", aging=AgingLimits(), batching=BatchLimits(), now=0.0
    )
    prompt = Request(rid="a", slo_class="text", new_tokens=3000, cached_tokens=0, arrived_at=0.0, deadline_at=9.0)
    core.arrived(prompt)
    written: list[Event] = []
    Journal(written.append).started(core.started([prompt], [Extent(1000, 0)], 0.5), 0.5)
    (event,) = written
    assert isinstance(event, TaskStarted)
    assert (event.rids, event.new_tokens, event.predicted_s) == (["a"], 1000, pytest.approx(1.0))
    assert event.rest_s == pytest.approx(2.0)

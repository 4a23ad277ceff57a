"""Who joins the head."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.core.batching import Batch, BatchLimits, fill_batch
from flowprefill_sglang.core.candidate import Candidate, Standing
from flowprefill_sglang.core.policies import feasible, sedf
from flowprefill_sglang.core.prefill_cost import CostModel, Extent
from flowprefill_testing.single_machine import Gather, JobClass, draw, serve

BASE_S, TOKEN_S = 0.25, 1 / 1024


def predict(extents: Sequence[Extent]) -> float:
    return BASE_S + TOKEN_S * sum(extent.new_tokens for extent in extents)


class Prompts:
    """Candidates with their extents, and a count of the predictions asked for."""

    def __init__(self) -> None:
        self.extents: dict[int, Extent | None] = {}
        self.predictions = 0

    def add(self, new_tokens: int, deadline_at: float, arrived_at: float = 0.0, cached_tokens: int = 0) -> Candidate:
        key = len(self.extents)
        self.extents[key] = extent = Extent(new_tokens, cached_tokens)
        return Candidate(key=key, arrived_at=arrived_at, deadline_at=deadline_at, remaining_s=predict([extent]))

    def add_task(self, remaining_s: float, deadline_at: float) -> Candidate:
        key = len(self.extents)
        self.extents[key] = None
        return Candidate(
            key=key, arrived_at=0.0, deadline_at=deadline_at, remaining_s=remaining_s, standing=Standing.SUSPENDED
        )

    def fill(
        self,
        *candidates: Candidate,
        now: float = 0.0,
        kv_room_tokens: int = 1 << 20,
        kept: Sequence[Candidate] | None = None,
        **limits: float,
    ) -> tuple[list[int], Batch]:
        def counted(extents: Sequence[Extent]) -> float:
            self.predictions += 1
            return predict(extents)

        batch = fill_batch(
            candidates[0],
            candidates,
            now,
            extent_of=lambda candidate: self.extents[candidate.key],
            predict=counted,
            kv_room_tokens=kv_room_tokens,
            limits=BatchLimits(**limits),
            kept=kept,
        )
        assert batch.extents == [self.extents[member.key] for member in batch.members]
        assert batch.predicted_s == pytest.approx(predict(batch.extents))
        return [member.key for member in batch.members], batch


@pytest.fixture
def prompts() -> Prompts:
    return Prompts()


class TestBudgets:
    def test_small_ones_join_up_to_the_token_budget(self, prompts: Prompts) -> None:
        candidates = [prompts.add(700, inf) for _ in range(4)]
        assert prompts.fill(*candidates)[0] == [0, 1]
        assert prompts.fill(*candidates, max_new_tokens=2100)[0] == [0, 1, 2]

    def test_cached_tokens_do_not_count(self, prompts: Prompts) -> None:
        assert prompts.fill(prompts.add(1000, inf), prompts.add(1000, inf, cached_tokens=9000))[0] == [0, 1]

    def test_a_large_head_runs_alone(self, prompts: Prompts) -> None:
        assert prompts.fill(prompts.add(2048, inf), prompts.add(1, inf), prompts.add(0, inf))[0] == [0]
        assert prompts.predictions == 1

    def test_who_is_too_large_is_passed_over(self, prompts: Prompts) -> None:
        assert prompts.fill(prompts.add(100, inf), prompts.add(3000, inf), prompts.add(100, inf))[0] == [0, 2]

    def test_requests_of_a_batch(self, prompts: Prompts) -> None:
        assert prompts.fill(*[prompts.add(1, inf) for _ in range(9)], max_requests=3)[0] == [0, 1, 2]

    def test_only_so_many_are_looked_at(self, prompts: Prompts) -> None:
        candidates = [prompts.add(1, inf), *[prompts.add(5000, inf) for _ in range(3)], prompts.add(1, inf)]
        assert prompts.fill(*candidates, max_considered=3)[0] == [0]
        assert prompts.fill(*candidates, max_considered=4)[0] == [0, 4]

    def test_one_prediction_for_each_considered(self, prompts: Prompts) -> None:
        prompts.fill(*[prompts.add(1, inf) for _ in range(500)], max_requests=500, max_considered=20)
        assert prompts.predictions == 21

    def test_none_once_the_head_has_no_time_left(self, prompts: Prompts) -> None:
        assert prompts.fill(prompts.add(256, 0.5), *[prompts.add(1, 9.0) for _ in range(20)])[0] == [0]
        assert prompts.predictions == 1

    def test_kv_room_is_counted_in_pages(self, prompts: Prompts) -> None:
        candidates = [prompts.add(65, inf), prompts.add(65, inf), prompts.add(64, inf)]
        assert prompts.fill(*candidates, kv_room_tokens=194)[0] == [0, 1, 2]
        assert prompts.fill(*candidates, kv_room_tokens=193)[0] == [0, 1]
        assert prompts.fill(*candidates, kv_room_tokens=194, page_tokens=64)[0] == [0, 2]
        assert prompts.fill(*candidates, kv_room_tokens=65)[0] == [0]

    def test_a_task_joins_nothing(self, prompts: Prompts) -> None:
        assert prompts.fill(prompts.add(10, inf), prompts.add_task(0.1, inf), prompts.add(10, inf))[0] == [0, 2]

    def test_a_head_must_be_a_prompt(self, prompts: Prompts) -> None:
        with pytest.raises(ValueError):
            prompts.fill(prompts.add_task(1.0, inf))

    @pytest.mark.parametrize(
        "wrong", [{"max_new_tokens": 0}, {"alpha": -0.1}, {"alpha": 1.0}, {"page_tokens": 0}, {"max_considered": -1}]
    )
    def test_nonsense_is_refused(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError):
            BatchLimits(**wrong)


class TestDeadlines:
    """256 tokens take 0.25 s + 0.25 s."""

    def test_the_head_keeps_its_part_of_its_objective(self, prompts: Prompts) -> None:
        # 0.75 s for both; of an objective of 0.84 s, a tenth must be left.
        assert prompts.fill(prompts.add(256, 0.84), prompts.add(256, 9.0))[0] == [0, 1]
        assert prompts.fill(prompts.add(256, 0.83), prompts.add(256, 9.0))[0] == [2]
        assert prompts.fill(prompts.add(256, 0.83), prompts.add(256, 9.0), alpha=0.0)[0] == [4, 5]

    def test_so_does_everyone_who_has_joined(self, prompts: Prompts) -> None:
        head, third = prompts.add(256, 9.0), prompts.add(256, 9.0)
        assert prompts.fill(head, prompts.add(256, 1.12), third)[0] == [0, 2, 1]
        assert prompts.fill(head, prompts.add(256, 1.11), third)[0] == [0, 3]

    def test_a_head_without_a_deadline_does_not_lift_the_others(self, prompts: Prompts) -> None:
        assert prompts.fill(prompts.add(256, inf), prompts.add(256, 1.11), prompts.add(256, 9.0))[0] == [0, 1]

    def test_one_with_little_time_may_still_join(self, prompts: Prompts) -> None:
        assert prompts.fill(prompts.add(256, 9.0), prompts.add(256, 0.75), prompts.add(256, 9.0))[0] == [0, 1]

    def test_who_would_be_late_in_it_does_not_join_a_head_on_time(self, prompts: Prompts) -> None:
        assert prompts.fill(prompts.add(256, 9.0), prompts.add(256, 0.74), prompts.add(256, 9.0))[0] == [0, 2]

    def test_late_ones_join_a_late_head(self, prompts: Prompts) -> None:
        assert prompts.fill(*[prompts.add(256, 0.1) for _ in range(5)])[0] == [0, 1, 2, 3, 4]

    def test_but_not_at_the_cost_of_one_on_time(self, prompts: Prompts) -> None:
        late = [prompts.add(256, 0.1) for _ in range(3)]
        assert prompts.fill(late[0], prompts.add(256, 1.12), *late[1:])[0] == [0, 3, 1]
        assert prompts.fill(late[0], prompts.add(256, 1.11), *late[1:])[0] == [0, 4]

    def test_who_is_passed_over_stays_on_time(self, prompts: Prompts) -> None:
        """The head takes 0.5 s and the large one 4.25 s; with another in the batch it would start at 0.75 s."""
        head, small = prompts.add(256, 9.0), prompts.add(256, 9.0)
        assert prompts.fill(head, prompts.add(4096, 5.0), small)[0] == [0, 1]
        assert prompts.fill(head, prompts.add(4096, 4.9), small)[0] == [0]
        assert prompts.fill(head, prompts.add(4096, 4.7), small)[0] == [0, 1], "late whatever we do"

    def test_so_do_all_that_are_passed_over_together(self, prompts: Prompts) -> None:
        head, small = prompts.add(256, 9.0), prompts.add(256, 9.0)
        assert prompts.fill(head, prompts.add_task(1.0, 5.0), prompts.add_task(1.0, 2.8), small)[0] == [0, 1]
        assert prompts.fill(head, prompts.add_task(1.0, 5.0), prompts.add_task(1.0, 2.7), small)[0] == [0]

    @given(
        tokens=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
        data=st.data(),
        alpha=st.sampled_from([0.0, 0.1, 0.5]),
    )
    def test_batching_makes_nobody_late(self, tokens: list[int], data: st.DataObject, alpha: float) -> None:
        """Whoever is on time when all run one by one is on time when the batch goes first, and the others after it
        that can be on time."""
        prompts = Prompts()
        deadlines = st.integers(1, 64).map(lambda count: count / 8)
        candidates = sorted((prompts.add(count, data.draw(deadlines)) for count in tokens), key=Candidate.order)
        _, batch = prompts.fill(*candidates, alpha=alpha)
        one_by_one, finish_at = set(), 0.0
        for candidate in candidates:
            finish_at += candidate.remaining_s
            if finish_at <= candidate.deadline_at:
                one_by_one.add(candidate.key)
        met = {one.key for one in batch.members if batch.predicted_s <= one.deadline_at}
        finish_at = batch.predicted_s
        for candidate in candidates:
            if candidate not in batch.members and finish_at + candidate.remaining_s <= candidate.deadline_at:
                finish_at += candidate.remaining_s
                met.add(candidate.key)
        assert one_by_one <= met


MODEL = CostModel(base_s=0.012, short_token_s=0.0, long_token_s=4.5e-5, knee_tokens=256, pair_s=7e-10, request_s=2e-4)
"""Of the shape of a model of 8 billion parameters on a large GPU; no measurement."""
SMALL = (
    JobClass(objective_s=0.1, median=60, share=0.7),
    JobClass(objective_s=0.25, median=200, share=0.2),
    JobClass(objective_s=4.0, median=2000, share=0.1),
)


class TestUnderLoad:
    """What the rules were chosen by, on short prompts, where batching matters."""

    def workload(self, seed: int, load: float) -> tuple[list, dict[int, Extent]]:
        lengths: list[int] = []

        def work_s_of(tokens: float) -> float:
            lengths.append(max(8, int(tokens)))
            return MODEL.seconds([Extent(lengths[-1])])

        jobs = draw(seed, load=load, count=1000, classes=SMALL, work_s_of=work_s_of)
        return jobs, {key: Extent(tokens) for key, tokens in enumerate(lengths)}

    def gather(self, extents: dict[int, Extent], **limits: float) -> Gather:
        def gather(head: Candidate, present: Sequence[Candidate], now: float) -> tuple[list[Candidate], float]:
            batch = fill_batch(
                head,
                sedf(present, now),
                now,
                extent_of=lambda one: extents[one.key] if one.standing is Standing.WAITING else None,
                predict=MODEL.seconds,
                kv_room_tokens=1 << 20,
                limits=BatchLimits(**limits),
            )
            return batch.members, batch.predicted_s

        return gather

    def test_batching_keeps_more_promises(self) -> None:
        alone, batched = [], []
        for seed in range(3):
            jobs, extents = self.workload(seed, load=2.5)
            alone.append(serve(jobs, feasible).attainment)
            batched.append(serve(jobs, feasible, self.gather(extents)).attainment)
        assert mean(batched) > mean(alone) + 0.1
        assert mean(batched) > 0.9


def test_one_that_was_given_up_joins_where_the_batch_saves_most_of_it() -> None:
    prompts = Prompts()
    head = prompts.add(64, deadline_at=10.0)
    short = prompts.add(64, deadline_at=10.0)  # adds 1/16 s to a batch and takes 5/16 alone
    long = prompts.add(512, deadline_at=10.0)  # adds 1/2 s and takes 3/4
    assert prompts.fill(head, short, long)[0] == [0, 1, 2]
    assert prompts.fill(head, short, long, kept=[])[0] == [0, 1]
    assert prompts.fill(head, short, long, kept=[long])[0] == [0, 1, 2]


def test_one_that_was_given_up_may_be_overtaken() -> None:
    prompts = Prompts()
    head, other = prompts.add(64, deadline_at=10.0), prompts.add(256, deadline_at=10.0)
    task = prompts.add_task(1.0, deadline_at=1.4)  # could start at 0.4; the batch of both ends at 0.56
    assert prompts.fill(head, task, other)[0] == [0]
    assert prompts.fill(head, task, other, kept=[other])[0] == [0, 1]


def test_what_a_request_adds_to_a_full_batch() -> None:
    model = CostModel(base_s=0.5, short_token_s=0.0, long_token_s=0.001, knee_tokens=100, pair_s=1e-6)
    limits = BatchLimits(max_new_tokens=1_000)
    # A batch of 1,000 tokens takes 0.5 and 0.9 s; 200 of them a fifth of it, and 0.02 s of attention of their own.
    assert limits.added_s(Extent(200, 0), model.parts) == pytest.approx(0.28 + 0.02)
    assert limits.added_s(Extent(2_000, 0), model.parts) == pytest.approx(model.seconds([Extent(2_000, 0)]))
    alone = BatchLimits(max_requests=1)
    assert alone.added_s(Extent(200, 0), model.parts) == pytest.approx(model.seconds([Extent(200, 0)]))

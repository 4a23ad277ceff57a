"""Prefills interrupted by a plan, and what their outcome must equal.

A *job* is what a prefill worker does for one batch: a forward, or one per chunk of a long prompt. Each job of the fixed
pool has a reference outcome, computed without any interruption. A *schedule* names jobs and steps: run job ``j`` for
``n`` boundaries, then suspend it, discard it, or let it fail there. At the end all jobs that are left run to their
ends, in the schedule's order. Everything runs on a real SGLang model (``integration.offline_forward``).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from flowprefill_sglang.core.slicing import OperatorCosts
from flowprefill_sglang.integration.offline_forward import OfflineEngine
from flowprefill_sglang.integration.preemption.attention_slots import AttentionSlots
from flowprefill_sglang.integration.preemption.attention_tiles import AttentionTiles
from flowprefill_sglang.integration.preemption.forward_state import ForwardState
from flowprefill_sglang.integration.preemption.operator_boundaries import install, install_cuts
from flowprefill_sglang.integration.preemption.operator_work import work_of
from flowprefill_sglang.integration.preemption.sliced_operators import SlicedOperators
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.task import ForwardTask
from flowprefill_testing.tiny_models import VOCABULARY

SHARED_PREFIX_TOKENS = 8
SLICE_ROWS = 8
SLICE_PAIRS = 200.0
"""Eight rows against up to 24 keys in one call; of longer prompts the last rows see their keys in parts."""


@dataclass(frozen=True)
class JobSpec:
    """Prompt lengths of the batch, without the cached prefix that prompts named in ``shared`` begin with."""

    lengths: tuple[int, ...]
    shared: tuple[int, ...] = ()
    chunk_tokens: int | None = None


JOBS: tuple[JobSpec, ...] = (
    JobSpec((17,)),
    JobSpec((17,)),
    JobSpec((9, 21)),
    JobSpec((12, 12), shared=(1,)),
    JobSpec((14,), shared=(0,)),
    JobSpec((30,), chunk_tokens=11),
    JobSpec((25,), shared=(0,), chunk_tokens=10),
    JobSpec((5, 16, 5), shared=(2,)),
    JobSpec((14,)),
)


class Action(StrEnum):
    SUSPEND = "suspend"
    DISCARD = "discard"
    FAIL = "fail"


@dataclass(frozen=True)
class Step:
    job: int
    """Index into the schedule's jobs."""
    boundaries: int
    action: Action = Action.SUSPEND


@dataclass(frozen=True)
class Schedule:
    jobs: tuple[int, ...]
    """Indices into ``JOBS``, each at most once: two copies of one prompt would share what the first has cached."""
    steps: tuple[Step, ...]
    ends: tuple[int, ...]
    """The order in which the jobs are run to their ends, as indices into ``jobs``."""


class Planted(Exception):
    """The failure that a schedule asked for."""


class Mismatch(AssertionError):
    """Interrupted jobs differ from their references, or have left something behind."""

    def __init__(self, what: Sequence[str]) -> None:
        super().__init__(", ".join(what))
        self.what = what


@dataclass
class Outcome:
    """Logits and sampled tokens of each forward of a job, and K and V of each layer of each request."""

    forwards: list[tuple[torch.Tensor, list[int]]] = field(default_factory=list)
    kv: list[list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)

    def distance(self, other: Outcome) -> float:
        """The largest difference of two numbers at one place, in logits and KV."""
        logits = [(a[0], b[0]) for a, b in zip(self.forwards, other.forwards, strict=True)]
        layers = [
            pair
            for mine, others in zip(self.kv, other.kv, strict=True)
            for mine_kv, others_kv in zip(mine, others, strict=True)
            for pair in zip(mine_kv, others_kv, strict=True)
        ]
        return max(float((a - b).abs().max()) for a, b in [*logits, *layers])

    def differences(self, other: Outcome) -> Iterator[str]:
        for mine, others in zip(self.forwards, other.forwards, strict=True):
            if not torch.equal(mine[0], others[0]) or mine[1] != others[1]:
                yield "logits"
        for request, others_request in zip(self.kv, other.kv, strict=True):
            for layer, (mine_kv, others_kv) in enumerate(zip(request, others_request, strict=True)):
                if not all(torch.equal(a, b) for a, b in zip(mine_kv, others_kv, strict=True)):
                    yield f"KV of layer {layer}"


class Bench:
    """A loaded model with boundaries, and the references."""

    def __init__(self, engine: OfflineEngine, prompts_seed: int = 0, adapters: Sequence[str | None] = (None,)) -> None:
        """``adapters``: LoRA ids that the prompts of all jobs have in turn."""
        self.engine = engine
        self._adapters = adapters
        self.gate = Gate()
        self.slices = SlicedOperators(self.gate)
        install(self.gate, self.slices)
        self.slots = AttentionSlots(engine.model_runner, self.gate)
        self.slots.install()
        self.state = self.make_state()
        self._all_items = self.state.items
        self.is_sliced = False
        self.max_depth = 0
        self.suspensions = 0
        self.endings: dict[str, int] = dict.fromkeys(["end", *Action], 0)
        metrics = engine.scheduler.scheduler_stage_metrics
        metrics.enabled = True  # as --enable-metrics would
        metrics.start(time.monotonic_ns())
        rng = random.Random(prompts_seed)
        self._prefix = [rng.randrange(1, VOCABULARY) for _ in range(SHARED_PREFIX_TOKENS)]
        self._prompts = [[self._prompt(rng, spec, i) for i in range(len(spec.lengths))] for spec in JOBS]
        self._references: dict[int, Outcome] = {}

    def adapter(self, job: int, prompt: int) -> str | None:
        """The LoRA id of one of a job's prompts."""
        return self._adapters[(job + prompt) % len(self._adapters)]

    def make_state(self, without: Sequence[str] = ()) -> ForwardState:
        """The shared state of this model; ``without`` as for ``ForwardState``."""
        metrics = self.engine.scheduler.scheduler_stage_metrics
        return ForwardState(self.engine.model_runner, stage_metrics=metrics, without=without)

    def _prompt(self, rng: random.Random, spec: JobSpec, index: int) -> list[int]:
        own = [rng.randrange(1, VOCABULARY) for _ in range(spec.lengths[index])]
        return self._prefix + own if index in spec.shared else own

    def slice_operators(self) -> None:
        """From now on every operator of tasks runs in slices of a few rows, and so do those of the references."""
        self.is_sliced = True
        self._references.clear()
        runner = self.engine.model_runner
        install_cuts(self.gate, self.slices)
        work = work_of(runner.model)
        self.slices.set_limits(dict.fromkeys(work.kinds, SLICE_ROWS))
        tiles = AttentionTiles(self.slots.build, type(runner.attn_backend).__name__, granule_rows=SLICE_ROWS)
        self.slices.set_attention(tiles, OperatorCosts(0.0, pair_s=1.0), SLICE_PAIRS)

    def reference(self, job: int) -> Outcome:
        """The job's outcome when nothing interrupts it, and, unless operators are sliced, no task is involved."""
        if job not in self._references:
            self._start_over()
            run = JobRun(self, job)
            if self.is_sliced:
                run.advance(Step(0, 1_000_000))
            while not run.is_over:
                run.finish_forward(self.engine.run(run.batch))
            self._references[job] = run.outcome
            run.release()
        return self._references[job]

    def _start_over(self) -> None:
        self.engine.forget()
        for adapter in self._adapters:  # each has a prefix cache of its own
            warm = self.engine.request([*self._prefix, 1], adapter)
            self.engine.run(self.engine.batch([warm]))
            self.engine.release(warm, keep=True)

    def check(self, schedule: Schedule) -> None:
        """Run a schedule; Mismatch if any job that came to its end differs from its reference, or if the hub sees
        anything of a task between two steps."""
        references = [self.reference(job) for job in schedule.jobs]
        self._start_over()
        before = self.hub_state()
        free = self.engine.free_tokens()
        found: set[str] = set()
        runs: dict[int, JobRun] = {}
        try:
            for step in (*schedule.steps, *(Step(index, 1_000_000) for index in schedule.ends)):
                self._advance(runs, schedule, step)
                found.update(f"hub's {name}" for name, now in self.hub_state().items() if not _same(now, before[name]))
        finally:
            for run in runs.values():
                run.release()
        for index, run in runs.items():
            found.update(run.outcome.differences(references[index]) if run.is_complete else ())
        if self.engine.free_tokens() != free:
            found.add("number of free KV slots")
        if found:
            raise Mismatch(sorted(found))

    def hub_state(self) -> dict[str, Any]:
        """Everything that a forward must leave as it was. The LoRA metadata of its batch it leaves to the next one."""
        return {item.name: item.take() for item in self._all_items if item.name != "lora_batch"}

    def _advance(self, runs: dict[int, JobRun], schedule: Schedule, step: Step) -> None:
        run = runs.get(step.job) or runs.setdefault(step.job, JobRun(self, schedule.jobs[step.job]))
        if run.is_over:
            return
        run.advance(step)
        self.max_depth = max(self.max_depth, sum(r.is_suspended for r in runs.values()))


class JobRun:
    """One job under way. Holds KV from its making until ``release``."""

    def __init__(self, bench: Bench, job: int) -> None:
        self._bench = bench
        self._spec = JOBS[job]
        self.requests = [
            bench.engine.request(tokens, bench.adapter(job, index)) for index, tokens in enumerate(bench._prompts[job])
        ]
        self.batch = bench.engine.batch(self.requests, self._spec.chunk_tokens)
        self.outcome = Outcome()
        self.is_over = False
        self.is_complete = False
        self._task: ForwardTask[Any] | None = None

    @property
    def is_suspended(self) -> bool:
        return self._task is not None

    def advance(self, step: Step) -> None:
        """Run for so many boundaries, over the ends of chunks, then do what the step says."""
        gate = self._bench.gate
        stop_at = gate.boundaries + step.boundaries

        def is_due() -> bool:
            if gate.boundaries < stop_at:
                return False
            if step.action is Action.FAIL:
                raise Planted
            return True

        gate.watch(is_due)
        try:
            while not self.is_over:
                task = self._task or ForwardTask(lambda: self._bench.engine.run(self.batch), gate, self._bench.state)
                self._task = task
                if not task.advance():
                    break
                self._count(task)
                self.finish_forward(task.result)
        except Planted:
            self._end(Action.FAIL)
        finally:
            gate.watch(None)
        if step.action is Action.DISCARD and self._task is not None:
            self._task.discard()
            self._end(Action.DISCARD)

    def finish_forward(self, result: tuple[torch.Tensor, list[int]]) -> None:
        """Note a forward's result and go on to the next chunk, if there is one."""
        self.outcome.forwards.append((result[0].clone(), result[1]))
        first = self.requests[0]
        if first.extend_end < len(first.origin_input_ids):
            self._bench.engine.checkpoint(first)
            self.batch = self._bench.engine.batch(self.requests, self._spec.chunk_tokens)
            return
        self.outcome.kv = [self._bench.engine.kv(request) for request in self.requests]
        self.is_complete = True
        self._end("end")

    def _count(self, task: ForwardTask[Any]) -> None:
        self._bench.suspensions += task.suspensions
        self._task = None

    def _end(self, how: str) -> None:
        if self._task is not None:
            self._count(self._task)
        self.is_over = True
        self._bench.endings[how] += 1

    def release(self) -> None:
        """Free what the job holds; one that is still under way is discarded."""
        if self._task is not None:
            self._task.discard()
        for request in self.requests:
            self._bench.engine.release(request, keep=False)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_same(value[key], other[key]) for key in value)
    if isinstance(value, tuple):
        return len(value) == len(other) and all(map(_same, value, other))
    return value is other or (isinstance(value, int | str | bool) and value == other)

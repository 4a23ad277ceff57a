"""What the parts that look at forward passes share: an engine in this process, its gate, and times by the device."""

from __future__ import annotations

import argparse
import json
import random
import time
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kit_models import TINY, model_folder

from flowprefill_sglang.core.prefill_cost import Extent, Predictor
from flowprefill_sglang.integration.costs.cost_model import cost_model
from flowprefill_sglang.integration.offline_forward import OfflineEngine
from flowprefill_sglang.integration.preemption.attention_slots import AttentionSlots
from flowprefill_sglang.integration.preemption.forward_state import ForwardState
from flowprefill_sglang.integration.preemption.operator_boundaries import ensure_boundaries, install
from flowprefill_sglang.integration.preemption.run_ahead import run_ahead
from flowprefill_sglang.integration.preemption.sliced_operators import SlicedOperators
from flowprefill_sglang.integration.preemption.slicing import slice_long_operators
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.run_ahead import Cost, RunAhead
from flowprefill_sglang.prefill_worker.settings import ACCELERATOR_MAX_BLOCKING_MS, RunAheadKind, SchedulerSettings
from flowprefill_sglang.prefill_worker.task import ForwardTask

SLACK_TOKENS = 8_192
"""Of the KV pool beside the longest prompt: for the urgent one."""
TINY_MAX_BLOCKING_MS = 0.1
"""Of a try on tiny shapes, whose operators are short, so that there are slices."""


class Way(StrEnum):
    """How a task runs so that it can be stopped."""

    SLICES = "slices"
    """FlowPrefill: long operators in slices, and the device kept near."""
    WHOLE = "whole"
    """The same with whole operators."""
    SYNCHRONISE = "synchronise"
    """Whole operators, and a wait for the device at every boundary: the paper's way."""
    UNBOUNDED = "unbounded"
    """Whole operators, and the device as far behind as it comes."""

    @property
    def run_ahead(self) -> RunAheadKind:
        """How far the device may be behind."""
        return RunAheadKind(self.value) if self in (Way.SYNCHRONISE, Way.UNBOUNDED) else RunAheadKind.BUDGET


def options_of(about: str | None) -> argparse.Namespace:
    """The flags of every part that has an engine."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--backend", default="triton", help="SGLang's --attention-backend, on a GPU")
    parser.add_argument("--seconds", type=float, default=400.0, help="nothing more begins after this")
    parser.add_argument("--max-blocking-ms", type=float)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.max_blocking_ms is None:
        options.max_blocking_ms = ACCELERATOR_MAX_BLOCKING_MS if options.device == "cuda" else TINY_MAX_BLOCKING_MS
    return options


def write(options: argparse.Namespace, document: dict[str, Any]) -> None:
    """The result of a part."""
    keys = ("device", "model", "layers", "backend", "max_blocking_ms", "seed")
    about = {key: value for key, value in vars(options).items() if key in keys}
    options.json.write_text(json.dumps(about | document, indent=1) + "\n")


class Bench:
    """One model that can be interrupted."""

    def __init__(self, options: argparse.Namespace, longest: int) -> None:
        torch.set_grad_enabled(False)  # for hub and tasks alike, or no task may stop
        self.is_cuda = options.device == "cuda"
        name = options.model if self.is_cuda else TINY
        settings: dict[str, Any] = {"max_total_tokens": longest + SLACK_TOKENS, "chunked_prefill_size": -1}
        if self.is_cuda:
            settings |= {
                "load_format": "dummy",
                "dtype": "bfloat16",
                "attention_backend": options.backend,
                "sampling_backend": "pytorch",
                "mem_fraction_static": 0.8,
                "disable_prefill_cuda_graph": True,  # nothing is short here, and capturing takes minutes
                "disable_decode_cuda_graph": True,
            }
        path = model_folder(name, options.json.parent / "models", options.layers)
        self.engine = OfflineEngine(str(path), device=options.device, log_level="error", **settings)
        self.runner = self.engine.model_runner
        self.gate = Gate()
        self._slices = SlicedOperators(self.gate)
        install(self.gate, self._slices)
        self.boundaries, _ = ensure_boundaries(self.runner.model, self.gate)
        slots = AttentionSlots(self.runner, self.gate)
        slots.reserve(2)
        slots.install()
        self.state = ForwardState(self.runner, stage_metrics=self.engine.scheduler.scheduler_stage_metrics)
        costs = cost_model(self.engine.scheduler, None)
        self.predictor = Predictor(costs)
        self._max_blocking_ms = options.max_blocking_ms
        target_s = SchedulerSettings(max_blocking_ms=options.max_blocking_ms).slice_target_s(options.device)
        if target_s:
            slice_long_operators(self.engine.scheduler, self.gate, self.state, self._slices, slots, costs, target_s)
        self.sliced = self._slices.describe()
        """What runs in slices, in words."""
        self._can_slice = self._slices.is_on
        self._devices: dict[RunAheadKind, tuple[RunAhead, RunAhead | None]] = {}
        self._rng = random.Random(options.seed)

    def use(self, way: Way) -> RunAhead:
        """Run tasks in this way from now on; none may be under way."""
        self._slices.is_on = self._can_slice and way is Way.SLICES
        kind = way.run_ahead
        if kind not in self._devices:
            settings = SchedulerSettings(max_blocking_ms=self._max_blocking_ms, run_ahead=kind)
            self._devices[kind] = run_ahead(self.runner, settings)
        device, self.gate.device = self._devices[kind]
        return device

    @property
    def slices(self) -> int:
        """Run so far."""
        return self._slices.slices

    def prompt(self, tokens: int) -> Any:  # SGLang's Req
        """One that shares nothing with any other."""
        return self.engine.request([self._rng.randrange(97, 123) for _ in range(tokens)])

    def cost(self, tokens: int) -> Cost:
        """Predicted, of the forward pass of one prompt."""
        overhead_s, tokens_s, attention_s = self.predictor.parts([Extent(tokens)])
        return Cost(attention_s, overhead_s + tokens_s)

    def task(self, request: Any) -> ForwardTask[Any]:
        """The forward pass of one prompt, to be advanced."""
        return ForwardTask(partial(self.engine.run, self.engine.batch([request])), self.gate, self.state)

    def finish(self, task: ForwardTask[Any], device: RunAhead, cost: Cost) -> None:
        """Run a task to its end."""
        self.gate.clear()
        while not task.is_over:
            device.runs(cost)
            has_ended = task.advance()
            device.stopped(has_ended=has_ended)

    def plain_s(self, tokens: int) -> float:
        """Seconds of a forward pass as SGLang runs it: boundaries are closed, and nothing is limited."""
        request = self.prompt(tokens)
        batch = self.engine.batch([request])
        self.synchronise()
        began = time.perf_counter()
        self.engine.run(batch)  # returns with the sampled token on the host
        seconds = time.perf_counter() - began
        self.engine.release(request, keep=False)
        return seconds

    def task_s(self, tokens: int, way: Way) -> float:
        """The same as an undisturbed task."""
        device, request = self.use(way), self.prompt(tokens)
        task, cost = self.task(request), self.cost(tokens)
        self.synchronise()
        began = time.perf_counter()
        self.finish(task, device, cost)
        seconds = time.perf_counter() - began
        self.engine.release(request, keep=False)
        return seconds

    def synchronise(self) -> None:
        """Before a measurement begins."""
        if self.is_cuda:
            torch.cuda.synchronize()


class Moments:
    """Two moments, by the device's clock where it is a GPU: an event on a stream of its own has the time of its
    recording, one on the compute stream that of the end of what is before it."""

    def __init__(self, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        if is_cuda:
            self._side = torch.cuda.Stream()
            self._arrival = torch.cuda.Event(enable_timing=True)
            self._first = torch.cuda.Event(enable_timing=True)
        self._at = [0.0, 0.0]

    def arrival(self) -> None:
        """The urgent prompt has come. From any thread."""
        if self._is_cuda:
            self._arrival.record(self._side)
        else:
            self._at[0] = time.perf_counter()

    def first_kernel(self) -> None:
        """Its first kernel is launched next."""
        if self._is_cuda:
            self._first.record(torch.cuda.current_stream())
        else:
            self._at[1] = time.perf_counter()

    def between_ms(self) -> float:
        """From the one to the other."""
        if not self._is_cuda:
            return 1_000 * (self._at[1] - self._at[0])
        self._first.synchronize()
        self._arrival.synchronize()
        return float(self._arrival.elapsed_time(self._first))

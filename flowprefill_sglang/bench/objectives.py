"""TTFT objectives for the machine at hand: the paper's, scaled by how much slower this machine is.

An objective of 0.25 s means "a few times what the prompt takes alone" on the hardware it was set for. On other hardware
the same meaning needs another number: objective = class objective x (measured isolated TTFT of the class's median
prompt / what that prompt takes alone on the reference).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from flowprefill_sglang.bench.client import RequestRecord
from flowprefill_sglang.workload.classes import CLASSES
from flowprefill_sglang.workload.trace import TraceRequest

REFERENCE = "Llama-3-8B on one A800 (estimated)"
_REFERENCE_FLOPS = 0.5 * 312e12  # half of the GPU's dense bfloat16 peak, a usual share in prefill
_LINEAR_FLOPS_PER_TOKEN = 2 * 7.5e9  # parameters without the embedding
_ATTENTION_FLOPS_PER_TOKEN_PAIR = 4 * 32 * 4_096  # 32 layers, hidden size 4,096; QK and PV
_REFERENCE_FIXED_S = 0.010  # tokenisation, scheduling, launch, first token's way back


def reference_ttft_s(input_tokens: float) -> float:
    """TTFT in seconds of a prompt that is alone on the reference, estimated from FLOPs; not a measurement."""
    pairs = input_tokens**2 / 2
    flops = _LINEAR_FLOPS_PER_TOKEN * input_tokens + _ATTENTION_FLOPS_PER_TOKEN_PAIR * pairs
    return _REFERENCE_FIXED_S + flops / _REFERENCE_FLOPS


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """One class's TTFT objective and where it comes from."""

    slo_ms: float
    class_slo_ms: float | None
    """The paper's objective; None for a class that is not the paper's."""
    factor: float | None
    """``slo_ms / class_slo_ms``."""
    median_input_tokens: int | None = None
    """The class's median prompt as it was sent; None where nothing was measured."""
    isolated_ttft_ms: float | None = None
    """Measured, that prompt alone."""

    def derivation(self) -> str:
        """How it comes about, for people."""
        if self.class_slo_ms is None or self.factor is None:
            return f"{self.slo_ms:5.0f} ms, as stated"
        return f"{self.class_slo_ms:5.0f} ms × {self.factor:.3f} = {self.slo_ms:5.0f} ms"

    def is_met_by(self, record: RequestRecord) -> bool:
        """Whether the answer was complete and its first token in time."""
        return record.error is None and record.ttft_s is not None and 1_000 * record.ttft_s <= self.slo_ms


def unscaled_objectives(factor: float = 1.0) -> dict[str, Objective]:
    """The paper's objectives times a factor that the user states."""
    return {
        c.name: Objective(slo_ms=1_000 * c.slo_s * factor, class_slo_ms=1_000 * c.slo_s, factor=factor) for c in CLASSES
    }


def stated_objectives(slo_ms: Mapping[str, float]) -> dict[str, Objective]:
    """Objectives in milliseconds, as the user states them for each class."""
    papers = {c.name: 1_000 * c.slo_s for c in CLASSES}
    return {
        name: Objective(slo_ms=ms, class_slo_ms=papers.get(name), factor=ms / papers[name] if name in papers else None)
        for name, ms in slo_ms.items()
    }


def median_prompts(requests: Sequence[TraceRequest]) -> dict[str, int]:
    """Median prompt length of each class that occurs, in tokens."""
    lengths: dict[str, list[int]] = {}
    for request in requests:
        lengths.setdefault(request.class_name, []).append(request.input_tokens)
    return {name: round(median(values)) for name, values in sorted(lengths.items())}


def scaled_objectives(
    medians: Mapping[str, int], isolated_ttft_s: Mapping[str, Sequence[float]], length_factor: float
) -> dict[str, Objective]:
    """Objectives for each class in ``medians``.

    ``medians`` are lengths as sent, that is ``length_factor`` times the trace's, and the reference is asked about the
    trace's own length. ``isolated_ttft_s`` holds one or more measurements a class; their median counts.
    """
    objectives = {}
    for request_class in CLASSES:
        name = request_class.name
        if name not in medians:
            continue
        measured_s = median(isolated_ttft_s[name])
        factor = measured_s / reference_ttft_s(medians[name] / length_factor)
        objectives[name] = Objective(
            slo_ms=1_000 * request_class.slo_s * factor,
            class_slo_ms=1_000 * request_class.slo_s,
            factor=factor,
            median_input_tokens=medians[name],
            isolated_ttft_ms=1_000 * measured_s,
        )
    return objectives

"""The paper's four request classes, their TTFT objectives, and how a trace without types is divided into them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flowprefill_sglang.workload.trace import TraceRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestClass:
    """One class of requests.

    Names and objectives are the paper's (FlowPrefill, arXiv:2602.16603: Llama-3-8B on one GPU). Shares, lengths and the
    limits between classes are our assumptions; the paper takes them from the Qwen-Bailian trace, which is not shipped.
    """

    name: str
    slo_s: float
    """TTFT objective on the reference model and hardware."""
    share: float
    """Part of all requests in the generated workload."""
    median_input_tokens: int
    sigma: float
    """Standard deviation of the logarithm of the prompt length."""
    max_input_tokens: int
    """In the generated workload."""
    up_to_tokens: float
    """A trace row without a type belongs to the first class whose limit its prompt does not exceed."""


CLASSES: tuple[RequestClass, ...] = (
    RequestClass(
        name="text",
        slo_s=0.25,
        share=0.60,
        median_input_tokens=400,
        sigma=0.8,
        max_input_tokens=2_000,
        up_to_tokens=800,
    ),
    RequestClass(
        name="image",
        slo_s=0.5,
        share=0.20,
        median_input_tokens=1_200,
        sigma=0.3,
        max_input_tokens=3_000,
        up_to_tokens=2_000,
    ),
    RequestClass(
        name="search",
        slo_s=4.0,
        share=0.12,
        median_input_tokens=4_000,
        sigma=0.4,
        max_input_tokens=12_000,
        up_to_tokens=6_000,
    ),
    RequestClass(
        name="file",
        slo_s=6.0,
        share=0.08,
        median_input_tokens=10_000,
        sigma=0.5,
        max_input_tokens=24_000,
        up_to_tokens=float("inf"),
    ),
)
CLASS_NAMES = frozenset(c.name for c in CLASSES)
ClassRule = Literal["type", "length"]


def class_for_length(input_tokens: int) -> str:
    """The class of a prompt of this length, before any scaling."""
    return next(c.name for c in CLASSES if input_tokens <= c.up_to_tokens)


def assign_classes(
    requests: Sequence[TraceRequest], *, by: ClassRule = "type", names: Collection[str] = CLASS_NAMES
) -> tuple[TraceRequest, ...]:
    """Each request with a class.

    ``type``: the trace's own type where it is one of ``names``, else by prompt length. ``length``: always by length.
    """
    return tuple(
        r if by == "type" and r.class_name in names else replace(r, class_name=class_for_length(r.input_tokens))
        for r in requests
    )

"""What ``flowprefill simulate`` plays: a part of a trace, or the generated workload; and what it promises."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowprefill_sglang.bench.objectives import median_prompts, scaled_objectives, unscaled_objectives
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.flag_values import count, factor, seconds
from flowprefill_sglang.sim.arrivals import Workload, generated, replayed
from flowprefill_sglang.sim.machine import Machine
from flowprefill_sglang.workload.classes import CLASS_NAMES, CLASSES, assign_classes
from flowprefill_sglang.workload.formats import FORMATS, load_trace
from flowprefill_sglang.workload.trace import scale_lengths, spread_ties, window

DEFAULT_REQUESTS = 5_000
COARSE_TIMES = frozenset({"mooncake"})
"""Formats whose arrivals are known to a few seconds only."""


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that choose requests and objectives."""
    load = parser.add_argument_group("workload (default: generated, the paper's four request classes)")
    load.add_argument("--trace", type=Path, metavar="FILE", help="play this trace")
    load.add_argument("--format", choices=sorted(FORMATS), help="the trace's format")
    load.add_argument(
        "--skip-bad-rows", action="store_true", help="count broken rows of the trace, do not stop at them"
    )
    load.add_argument("--start-s", type=seconds, default=0.0, metavar="S", help="where its window starts (default 0)")
    load.add_argument("--duration-s", type=seconds, metavar="S", help="length of its window (default: all)")
    load.add_argument("--limit", type=count, metavar="N", help="only the first N requests of the window")
    load.add_argument(
        "--spread-ties",
        action=argparse.BooleanOptionalAction,
        help="spread arrivals of one instant over the time to the next (default: for mooncake, with its coarse times)",
    )
    load.add_argument("--requests", type=count, metavar="N", help=f"requests to generate (default {DEFAULT_REQUESTS})")
    load.add_argument("--length-scale", type=factor, default=1.0, metavar="L", help="times the lengths (default 1)")
    load.add_argument("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    load.add_argument(
        "--slo", type=_objectives, default={}, metavar="CLASS=S,…", help="TTFT objectives in seconds, e.g. text=0.25"
    )
    load.add_argument(
        "--slo-factor",
        type=_slo_factor,
        default=1.0,
        metavar="F|auto",
        help="objectives of other classes: F times the paper's; auto scales each by how long its median prompt takes "
        "on this machine (default 1)",
    )


@dataclass(frozen=True, kw_only=True)
class ChosenWorkload:
    """Requests, and how long the class's median prompt is."""

    play: Workload
    about: dict[str, Any]
    """For the result file."""
    medians: Mapping[str, int]
    """After scaling, by class."""
    length_scale: float

    def objectives_s(self, machine: Machine, namespace: argparse.Namespace) -> dict[str, float]:
        """Each class's TTFT objective."""
        found = unscaled_objectives(1.0 if namespace.slo_factor is None else namespace.slo_factor)
        if namespace.slo_factor is None:
            alone = {
                name: [machine.alone_s(tokens) + machine.handoff_s(tokens)] for name, tokens in self.medians.items()
            }
            found = found | scaled_objectives(self.medians, alone, self.length_scale)
        stated: dict[str, float] = namespace.slo
        return {name: one.slo_ms / 1e3 for name, one in found.items()} | stated


def chosen_workload(namespace: argparse.Namespace) -> ChosenWorkload:
    """What the flags ask for. Raises BadInput."""
    if (namespace.trace is None) != (namespace.format is None):
        raise BadInput(f"--trace and --format go together; formats: {', '.join(sorted(FORMATS))}")
    return _generated(namespace) if namespace.trace is None else _replayed(namespace)


def _generated(namespace: argparse.Namespace) -> ChosenWorkload:
    for flag, value in (("limit", namespace.limit), ("duration-s", namespace.duration_s)):
        if value is not None:
            raise BadInput(f"--{flag} is for a trace; use --requests for the generated workload")
    requests, scale = namespace.requests or DEFAULT_REQUESTS, namespace.length_scale
    return ChosenWorkload(
        play=generated(requests, namespace.seed, scale),
        about={"name": "generated", "sha256": None, "skipped_rows": 0},
        medians={one.name: max(1, round(one.median_input_tokens * scale)) for one in CLASSES},
        length_scale=scale,
    )


def _replayed(namespace: argparse.Namespace) -> ChosenWorkload:
    if namespace.requests is not None:
        raise BadInput("--requests is for the generated workload; use --limit with --trace")
    trace = load_trace(namespace.trace, namespace.format, skip_bad_rows=namespace.skip_bad_rows)
    requests = window(trace.requests, namespace.start_s, namespace.duration_s)
    is_spread = namespace.format in COARSE_TIMES if namespace.spread_ties is None else namespace.spread_ties
    if is_spread:
        requests = spread_ties(requests, namespace.seed)
    requests = scale_lengths(assign_classes(requests[: namespace.limit]), namespace.length_scale)
    if not requests:
        raise BadInput(f"no request of {trace.name} arrives in the chosen window")
    return ChosenWorkload(
        play=replayed(requests),
        about={
            "name": trace.name,
            "sha256": trace.sha256,
            "skipped_rows": trace.skipped_rows,
            "is_spread": is_spread,
        },
        medians=median_prompts(requests),
        length_scale=namespace.length_scale,
    )


def _objectives(text: str) -> dict[str, float]:
    expected = f"CLASS=SECONDS,… with classes {', '.join(sorted(CLASS_NAMES))} and seconds above 0"
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            found[name] = factor(value)
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {part!r}") from None
        if name not in CLASS_NAMES:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {part!r}")
    return found


def _slo_factor(text: str) -> float | None:
    return None if text == "auto" else factor(text)

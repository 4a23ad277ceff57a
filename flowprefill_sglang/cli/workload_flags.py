"""The flags that choose a workload, shared by all commands that send load, and what they mean."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.flag_values import count, factor, seconds
from flowprefill_sglang.workload.classes import CLASS_NAMES, assign_classes
from flowprefill_sglang.workload.datasets import random_lengths, shared_prefixes
from flowprefill_sglang.workload.formats import FORMATS, load_trace
from flowprefill_sglang.workload.formats.conversations import tokens_by_characters
from flowprefill_sglang.workload.generator import generate_workload
from flowprefill_sglang.workload.token_count import token_counter
from flowprefill_sglang.workload.trace import (
    Trace,
    TraceRequest,
    at_rate,
    poisson_arrivals,
    scale_rate,
    spread_ties,
    window,
)

DEFAULT_REQUESTS = 200
DEFAULT_RATE_RPS = 4.5
GENERATED_LENGTH_SCALE = 0.5
"""The generator's lengths suit an 8B model on a GPU. Half of them keep a tiny model's prefill worker on one core busy
for about 60% of the time, with prompts of over a second among others of 20 ms."""
DATASETS = ("classes", "generated-shared-prefix", "random")
"""What can be generated: our four classes, and SGLang's two generated datasets under its names."""


def add_workload_arguments(load: argparse._ArgumentGroup) -> None:
    """Everything that ``load_workload`` reads."""
    add_trace_arguments(load)
    add_generator_arguments(load)
    add_scale_arguments(load)


def add_trace_arguments(load: argparse._ArgumentGroup) -> None:
    """A trace file and the part of it to use."""
    load.add_argument("--trace", type=Path, metavar="FILE", help="replay this trace")
    load.add_argument("--format", choices=sorted(FORMATS), help="the trace's format")
    add_row_arguments(load)
    load.add_argument(
        "--spread-ties",
        action="store_true",
        help="requests with the same time arrive at random moments before the next one, for traces with coarse times "
        "such as Mooncake's",
    )
    add_window_arguments(load)


def add_window_arguments(load: argparse._ArgumentGroup) -> None:
    """The part of a trace to use."""
    load.add_argument("--limit", type=count, metavar="N", help="only the first N requests of the trace's window")
    load.add_argument(
        "--start",
        "--start-s",
        dest="start_s",
        type=seconds,
        default=0.0,
        metavar="S",
        help="the window begins S seconds after the trace's first request (default 0)",
    )
    load.add_argument(
        "--duration",
        "--duration-s",
        dest="duration_s",
        type=seconds,
        metavar="S",
        help="length of the window in seconds (default: all)",
    )


def add_row_arguments(load: argparse._ArgumentGroup) -> None:
    """How the rows of a trace are read."""
    load.add_argument(
        "--skip-bad-rows", action="store_true", help="count broken rows of the trace, do not stop at them"
    )
    load.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="tokenizer.json, or a model's folder, that measures the texts of "
        "--format custom, openai and sharegpt (default: four characters a token)",
    )
    load.add_argument(
        "--class-by",
        choices=("type", "length"),
        default="type",
        help="class of a request: the trace's own type where it has one (default), or always by the prompt's length",
    )


def add_generator_arguments(load: argparse._ArgumentGroup) -> None:
    """SGLang's generated datasets, with its names and defaults."""
    load.add_argument(
        "--dataset-name", choices=DATASETS, help="what to generate instead (default: classes, the paper's four)"
    )
    for flag, default, about in (
        ("--random-input-len", 1024, "random: most prompt tokens"),
        ("--random-output-len", 1024, "random: most answer tokens"),
        ("--gsp-num-groups", 64, "generated-shared-prefix: groups"),
        ("--gsp-prompts-per-group", 16, "generated-shared-prefix: prompts that share a prefix"),
        ("--gsp-system-prompt-len", 2048, "generated-shared-prefix: tokens of a prefix"),
        ("--gsp-question-len", 128, "generated-shared-prefix: tokens of what follows it"),
        ("--gsp-output-len", 256, "generated-shared-prefix: answer tokens"),
    ):
        load.add_argument(flag, type=count, default=default, metavar="N", help=f"{about} (default {default})")
    load.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="F",
        help="random: least length as a share of the most (default 0)",
    )


def add_scale_arguments(load: argparse._ArgumentGroup) -> None:
    """What is done to the rows, generated or not."""
    load.add_argument("--requests", type=count, metavar="N", help=f"requests to generate (default {DEFAULT_REQUESTS})")
    load.add_argument(
        "--rate",
        type=factor,
        metavar="RPS",
        help="requests per second on average: stretches the arrivals, and makes "
        "them (Poisson) for a source that has none (default: as the source says)",
    )
    load.add_argument("--rate-scale", type=factor, default=1.0, metavar="R", help="times the request rate (default 1)")
    load.add_argument(
        "--length-scale",
        type=factor,
        metavar="L",
        help=f"times the lengths (default: {GENERATED_LENGTH_SCALE} for the generated classes; else the largest up to "
        "1 with which every prompt fits the model's context)",
    )
    load.add_argument(
        "--max-output-tokens", type=count, default=16, metavar="N", help="cut answers to this length (default 16)"
    )
    load.add_argument("--seed", type=int, default=0, help="seed of what is generated, and of prompts (default 0)")


def check_trace_flags(namespace: argparse.Namespace) -> None:
    """Raise BadInput for flags that do not go together."""
    if (namespace.trace is None) != (namespace.format is None):
        raise BadInput(f"--trace and --format go together; formats: {', '.join(sorted(FORMATS))}")
    if namespace.trace is not None and namespace.requests is not None:
        raise BadInput("--requests is for the generated workload; use --limit with --trace")


def read_trace(path: Path, format_name: str, namespace: argparse.Namespace) -> Trace:
    """A trace file, read as the flags of ``add_row_arguments`` ask."""
    count_tokens = token_counter(namespace.tokenizer) if namespace.tokenizer is not None else tokens_by_characters
    return load_trace(path, format_name, skip_bad_rows=namespace.skip_bad_rows, count_tokens=count_tokens)


def load_workload(
    namespace: argparse.Namespace, class_names: frozenset[str] = CLASS_NAMES
) -> tuple[tuple[TraceRequest, ...], dict[str, Any]]:
    """The workload before lengths are scaled, and what the results say about it. Raises BadInput."""
    if namespace.trace is not None:
        trace = read_trace(namespace.trace, namespace.format, namespace)
        if namespace.spread_ties and trace.has_arrivals:
            trace = replace(trace, requests=spread_ties(trace.requests, namespace.seed))
    else:
        trace = _generated(namespace)
    requests = chosen_window(trace, namespace)
    about = {
        "name": trace.name,
        "sha256": trace.sha256,
        "skipped_rows": trace.skipped_rows,
        "left_out_rows": trace.left_out_rows,
    }
    timed = _with_arrivals(trace, requests, namespace)
    return assign_classes(timed, by=namespace.class_by, names=class_names), about | _chosen(namespace)


def chosen_window(trace: Trace, namespace: argparse.Namespace) -> tuple[TraceRequest, ...]:
    """What the flags of ``add_window_arguments`` choose. Raises BadInput when that is nothing."""
    requests = trace.requests
    if trace.has_arrivals:
        requests = window(requests, namespace.start_s, namespace.duration_s)
    if not requests:
        raise BadInput(f"no request of {trace.name} arrives in the chosen window")
    return requests[: namespace.limit]


def _with_arrivals(
    trace: Trace, requests: tuple[TraceRequest, ...], namespace: argparse.Namespace
) -> tuple[TraceRequest, ...]:
    if not trace.has_arrivals:
        if namespace.rate is None:
            raise BadInput(f"{trace.name} has no arrival times: say how many requests a second with --rate")
        requests = poisson_arrivals(requests, namespace.rate, namespace.seed)
    elif namespace.rate is not None:
        requests = at_rate(requests, namespace.rate)
    return scale_rate(requests, namespace.rate_scale)


def _chosen(namespace: argparse.Namespace) -> dict[str, Any]:
    flags = (
        "format",
        "dataset_name",
        "start_s",
        "duration_s",
        "limit",
        "spread_ties",
        "class_by",
        "rate",
        "rate_scale",
        "max_output_tokens",
        "seed",
        "endpoint",
        "prompts",
    )
    return {flag: getattr(namespace, flag) for flag in flags}


def _generated(namespace: argparse.Namespace) -> Trace:
    requests = namespace.requests or DEFAULT_REQUESTS
    if namespace.dataset_name == "random":
        return random_lengths(
            requests=requests,
            input_tokens=namespace.random_input_len,
            output_tokens=namespace.random_output_len,
            range_ratio=namespace.random_range_ratio,
            seed=namespace.seed,
        )
    if namespace.dataset_name == "generated-shared-prefix":
        if namespace.requests is not None:
            raise BadInput("--requests: the shared prefixes' number is --gsp-num-groups × --gsp-prompts-per-group")
        return shared_prefixes(
            groups=namespace.gsp_num_groups,
            prompts_per_group=namespace.gsp_prompts_per_group,
            prefix_tokens=namespace.gsp_system_prompt_len,
            question_tokens=namespace.gsp_question_len,
            output_tokens=namespace.gsp_output_len,
            seed=namespace.seed,
        )
    return generate_workload(requests=requests, rate_rps=DEFAULT_RATE_RPS, seed=namespace.seed)

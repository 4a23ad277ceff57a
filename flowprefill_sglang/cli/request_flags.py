"""The flags that say how a workload's rows become requests, shared by ``demo`` and ``bench``."""

from __future__ import annotations

import argparse

from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.experiment import ExperimentSettings
from flowprefill_sglang.cli.workload_flags import GENERATED_LENGTH_SCALE
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.flag_values import factor, number
from flowprefill_sglang.workload.classes import CLASS_NAMES


def add_request_arguments(how: argparse._ArgumentGroup) -> None:
    """Endpoint, content and patience."""
    how.add_argument("--endpoint", choices=sorted(ENDPOINTS), default="generate", help="default: generate")
    how.add_argument(
        "--prompts",
        choices=("bytes", "ids"),
        default="bytes",
        help="send text, exact in length for the tiny model (bytes, default), or token ids, exact for any model (ids)",
    )
    add_objective_arguments(how)
    how.add_argument("--model", metavar="NAME", help="as the server lists it (default: the first that it lists)")
    how.add_argument("--api-key", metavar="KEY", help="bearer token that the server wants")
    how.add_argument("--timeout-s", type=factor, default=300.0, metavar="S", help="per request (default 300)")


def add_objective_arguments(how: argparse._ArgumentGroup) -> None:
    """TTFT objectives."""
    how.add_argument(
        "--slo",
        type=class_objective,
        action="append",
        default=[],
        metavar="CLASS=MS",
        help="TTFT objective of a class in milliseconds; several times for several, classes of the trace's own too",
    )
    how.add_argument(
        "--slo-factor",
        type=factor,
        metavar="F",
        help="objectives of the other classes: F times the paper's (default: measure single requests first and scale "
        "by those)",
    )


def class_objective(text: str) -> tuple[str, float]:
    """``CLASS=MS``, for ``argparse``."""
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"expected CLASS=MS, like text=250, got {text!r}")
    return name, number(value, "CLASS=MS with a number of milliseconds above 0", lambda ms: ms > 0)


def class_names(namespace: argparse.Namespace) -> frozenset[str]:
    """Classes that requests may have: the paper's, and those with an objective of their own."""
    return CLASS_NAMES | {name for name, _ in namespace.slo}


def check_request_flags(namespace: argparse.Namespace) -> None:
    """Raise BadInput for flags that do not go together."""
    if namespace.prompts == "ids" and not ENDPOINTS[namespace.endpoint].takes_ids:
        raise BadInput(f"--prompts ids: the {namespace.endpoint} endpoint takes text only")


def check_url(url: str) -> None:
    """Raise BadInput for something else than an address."""
    if not url.startswith(("http://", "https://")):
        raise BadInput(f"--url: expected an address like http://127.0.0.1:30000, got {url!r}")


def request_settings(namespace: argparse.Namespace) -> ExperimentSettings:
    """What the flags of a workload and of its requests come to."""
    is_ours = namespace.trace is None and namespace.dataset_name in (None, "classes")
    return ExperimentSettings(
        endpoint=namespace.endpoint,
        prompts=namespace.prompts,
        seed=namespace.seed,
        length_scale=namespace.length_scale or (GENERATED_LENGTH_SCALE if is_ours else None),
        max_output_tokens=namespace.max_output_tokens,
        slo_factor=namespace.slo_factor,
        slo_ms=dict(namespace.slo),
        model=namespace.model,
        api_key=namespace.api_key,
        timeout_s=namespace.timeout_s,
    )

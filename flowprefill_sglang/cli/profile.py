"""``flowprefill profile``: how long prefill takes on this hardware and model, as a cost model for prefill workers."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flowprefill_sglang.bench.provenance import provenance
from flowprefill_sglang.core.cost_file import CostFile, default_path, save
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.flag_values import count, positive_seconds
from flowprefill_sglang.workload.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from flowprefill_sglang.integration.costs.cost_profile import Profile


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``profile``; others go to SGLang."""
    parser.add_argument("--model-path", type=Path, metavar="DIR", help="model folder (default: a tiny one made here)")
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        default=60.0,
        metavar="S",
        help="how long to measure, after loading (default 60)",
    )
    parser.add_argument(
        "--threads",
        type=count,
        metavar="N",
        help="threads that PyTorch computes with on a CPU: as many as the prefill worker has (default: PyTorch's)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the cost model goes (default: where prefill workers look for it)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured as JSON")


def run_profile(namespace: argparse.Namespace) -> int:
    """Measure, fit, print, write. Raises BadInput and StartupError."""
    started = datetime.now(UTC)
    if namespace.json is not None and not namespace.json.absolute().parent.is_dir():
        raise BadInput(f"--json: the folder {namespace.json.parent} does not exist")
    if namespace.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(namespace.threads)  # before PyTorch is imported
    model_path = (namespace.model_path or make_tiny_model()).resolve()
    if not (model_path / "config.json").is_file():
        raise BadInput(f"--model-path: no model at {model_path}: it has no config.json")
    console = Console()
    profile = _measure(model_path, namespace, console)
    content = CostFile(format=1, model=profile.model, hardware=profile.hardware, coefficients=profile.coefficients)
    path = namespace.output or default_path(profile.model, profile.hardware)
    origin = provenance(["flowprefill", *sys.argv[1:]], started)
    more: dict[str, Any] = {"held_out": asdict(profile.held_out), "made": origin}
    save(path, content, more)
    if namespace.json is not None:
        save(namespace.json, content, more | {"samples": profile.rows()})
    _print(profile, console)
    console.print(f"written to {path}", soft_wrap=True)
    return 0


def _measure(model_path: Path, namespace: argparse.Namespace, console: Console) -> Profile:
    with console.status(f"loading {model_path.name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang 0.5.23 warns of each kernel library that is not for this device
        from flowprefill_sglang.integration.costs.cost_profile import Profiler

        profiler = Profiler(model_path, namespace.rest)
    with Progress(console=console) as progress:
        bar = progress.add_task("measuring", total=namespace.seconds)
        return profiler.run(namespace.seconds, lambda seconds: progress.advance(bar, seconds))


def _print(profile: Profile, console: Console) -> None:
    table = Table(
        "new tokens", "cached tokens", "requests", "measured", "predicted", "error", title="cost of a prefill"
    )
    for row in profile.rows():
        if row["is_held_out"]:
            continue
        error = row["predicted_s"] / row["seconds"] - 1
        table.add_row(
            f"{sum(row['new_tokens']):,}",
            f"{sum(row['cached_tokens']):,}",
            str(len(row["new_tokens"])),
            f"{row['seconds'] * 1e3:.2f} ms",
            f"{row['predicted_s'] * 1e3:.2f} ms",
            f"{error:+.1%}",
        )
    for column in table.columns:
        column.justify = "right"
    console.print(table)
    held_out = profile.held_out
    console.print(
        f"on {held_out.batches} other batches: median error {held_out.median_error:.1%}, p90 {held_out.p90_error:.1%}; "
        f"of single runs {held_out.run_median_error:.1%} and {held_out.run_p90_error:.1%}",
        soft_wrap=True,
    )

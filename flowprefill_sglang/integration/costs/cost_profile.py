"""What ``flowprefill profile`` does: load a model as a prefill worker does, measure a grid, fit, and check the fit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

from flowprefill_sglang.core.calibration import Measurement, grid, held_out, measure
from flowprefill_sglang.core.cost_file import HardwareKey, ModelKey
from flowprefill_sglang.core.cost_fit import Sample, errors, fit
from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.integration.costs.cost_model import hardware_key, limits, model_key
from flowprefill_sglang.integration.costs.profiling import ForwardTimer
from flowprefill_sglang.integration.cpu_arithmetic import flush_denormals
from flowprefill_sglang.integration.offline_forward import OfflineEngine
from flowprefill_sglang.integration.platform import has_accelerator
from flowprefill_sglang.integration.prefill.refusals import refused_by_sglang

HELD_OUT_BATCHES: Final = 40
LENGTH_FACTOR: Final = 2.0
SEED: Final = 20260216


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """How far predictions are off on batches that the fit has not seen, as shares of what was measured."""

    batches: int
    median_error: float
    """Against each batch's shortest run."""
    p90_error: float
    run_median_error: float
    """Against every single run, disturbed ones included."""
    run_p90_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What was measured and fitted."""

    model: ModelKey
    hardware: HardwareKey
    coefficients: CostModel
    held_out: HeldOut
    grid: Sequence[Measurement]
    others: Sequence[Measurement]
    """Not used for the fit."""

    def rows(self) -> list[dict[str, Any]]:
        """Every batch as a JSON object, the grid first."""
        batches = [(m, False) for m in self.grid] + [(m, True) for m in self.others]
        return [
            {
                "new_tokens": [extent.new_tokens for extent in measurement.batch],
                "cached_tokens": [extent.cached_tokens for extent in measurement.batch],
                "seconds": min(measurement.seconds),
                "runs_s": list(measurement.seconds),
                "predicted_s": self.coefficients.seconds(measurement.batch),
                "is_held_out": is_held_out,
            }
            for measurement, is_held_out in batches
        ]


class Profiler:
    """One model in this process. Not to be made twice in a process (``OfflineEngine``)."""

    def __init__(self, model_path: Path, sglang_arguments: Sequence[str]) -> None:
        """Loads the model. Raises BadInput for flags that cannot be profiled, StartupError when SGLang refuses."""
        settings = _settings(model_path, sglang_arguments)
        for flag in ("tp_size", "pp_size", "dp_size"):
            if settings.get(flag, 1) != 1:
                raise BadInput(
                    f"--{flag.replace('_', '-')}: a profile is made in one process; start the prefill worker without "
                    "one, it then calibrates itself on all its ranks"
                )
        if not has_accelerator():
            flush_denormals()  # as in a worker
        with refused_by_sglang():
            self._engine = OfflineEngine(str(model_path), **settings)

    def run(self, budget_s: float, on_run: Callable[[float], None]) -> Profile:
        """Measure for about ``budget_s``; ``on_run`` is told the seconds of each forward."""
        scheduler, model_runner = self._engine.scheduler, self._engine.model_runner
        allowed = limits(model_runner, scheduler.chunked_prefill_size, budget_s, length_factor=LENGTH_FACTOR)
        others = held_out(allowed, HELD_OUT_BATCHES, random.Random(SEED))
        timer = ForwardTimer(model_runner, scheduler.tree_cache)
        measured = measure(timer, allowed, [*grid(allowed), *others], on_run)
        unseen = [m for m in measured if m.batch in set(others)]
        seen = [m for m in measured if m.batch not in set(others)]
        coefficients = fit([m.sample for m in seen])
        return Profile(
            model=model_key(model_runner),
            hardware=hardware_key(model_runner),
            coefficients=coefficients,
            held_out=_check(coefficients, unseen),
            grid=seen,
            others=unseen,
        )


def _check(model: CostModel, measured: Sequence[Measurement]) -> HeldOut:
    if len(measured) < 2:
        raise BadInput("--seconds: too short to check the cost model on anything; give more")
    by_batch = errors(model, [m.sample for m in measured])
    by_run = errors(model, [Sample(m.batch, seconds) for m in measured for seconds in m.seconds])
    return HeldOut(
        batches=len(measured),
        median_error=median(by_batch),
        p90_error=quantiles(by_batch, n=10)[-1],
        run_median_error=median(by_run),
        run_p90_error=quantiles(by_run, n=10)[-1],
    )


def _settings(model_path: Path, sglang_arguments: Sequence[str]) -> dict[str, Any]:
    """What these flags change in SGLang's settings, by field."""
    from sglang.srt.plugins import load_plugins

    load_plugins()  # it adds choices to flags
    from sglang.srt.server_args import ServerArgs, prepare_server_args, record_fields

    chosen = prepare_server_args(["--model-path", str(model_path), "--log-level", "error", *sglang_arguments])
    default = ServerArgs(model_path=str(model_path))
    names = [field.name for field in record_fields(ServerArgs)]
    changed = {name: getattr(chosen, name) for name in names if getattr(chosen, name) != getattr(default, name)}
    changed.pop("disable_overlap_schedule", None)  # OfflineEngine's own
    return changed

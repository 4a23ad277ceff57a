"""What several processes do at the same moment; importable by spawned children, which test modules are not."""

from __future__ import annotations

from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from flowprefill_sglang.workload.tiny_model import TinyModelShape, make_tiny_model


def make_model_after(barrier: Barrier, parent: Path, shape: TinyModelShape, results: Any) -> None:
    """Make the model once everybody is there; its folder goes to ``results``, a queue."""
    barrier.wait(60)
    results.put(str(make_tiny_model(parent, shape)))

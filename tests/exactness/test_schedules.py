"""Interrupted prefills equal uninterrupted ones bit for bit: logits, sampled tokens, and K and V of every layer.

Real SGLang forwards of tiny models of four architectures, on torch-native attention and, under Triton's interpreter, on
triton attention, each in a process of its own (``flowprefill_testing.exactness``). Random schedules suspend at random
boundaries, several deep, end out of order, discard and fail; batches have equal and unequal lengths, cached prefixes
and chunks (``flowprefill_testing.interrupted``). Then the same with every operator in slices of eight rows, and those
against whole operators.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from flowprefill_testing.servers import with_support
from flowprefill_testing.tiny_models import ARCHITECTURES

pytestmark = pytest.mark.cluster

SCHEDULES = {"torch_native": 40, "triton": 12}
"""How many a model runs; Triton's interpreter needs a hundred times longer."""
MODELS = [(architecture, backend) for backend in SCHEDULES for architecture in ARCHITECTURES]
BROKEN_TOO = "llama"
LORA = "llama:torch_native:24:lora"
"""Prompts of one batch have two adapters and none, in turn."""
TIMEOUT_S = 570  # less than pytest's faulthandler_timeout

EVERYWHERE = {
    "forward_context": "hub's forward_context",
    "attn_backend": "hub's attn_backend",
    "model_config_overrides": "hub's model_config_overrides",
    "scheduler_stage": "hub's scheduler_stage",
    "own input tensors": "KV of layer 1",
}
"""What must go wrong when one thing is left out. The items that no model here uses: integration/test_forward_state."""
ON_TRITON = EVERYWHERE | {"forward_context": "logits", "own attention backend": "logits"}
"""torch-native attention keeps nothing of a batch in its backend, so it does not notice these two."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What each model's process reported."""
    directory = tmp_path_factory.mktemp("exactness")
    words = [
        f"{architecture}:{backend}:{SCHEDULES[backend]}" + (":broken" if architecture == BROKEN_TOO else "")
        for architecture, backend in reversed(MODELS)  # the slow ones first
    ]
    words.append(LORA)
    run = subprocess.run(
        [sys.executable, "-m", "flowprefill_testing.exactness", str(directory), *words],
        env=os.environ | with_support() | {"OMP_NUM_THREADS": "1"},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    names = [*MODELS, ("llama", "torch_native-lora")]
    return {name: json.loads((directory / f"{name[0]}-{name[1]}.json").read_text()) for name in names}


@pytest.mark.parametrize(("architecture", "backend"), MODELS)
def test_interrupted_equals_uninterrupted(reports: Any, architecture: str, backend: str) -> None:
    report = reports[architecture, backend]
    assert "error" not in report, report["error"]
    assert report["attention"] == {"torch_native": "TorchNativeAttnBackend", "triton": "TritonAttnBackend"}[backend]
    assert report["schedules"] >= SCHEDULES[backend]
    assert report["self_test"] == []


@pytest.mark.parametrize(("architecture", "backend"), MODELS)
def test_activation_bound_holds_and_is_not_idle(reports: Any, architecture: str, backend: str) -> None:
    assert 0.5 < reports[architecture, backend]["held_over_bound"] <= 1


def test_interrupted_prompts_have_the_answers_of_their_own_adapters(reports: Any) -> None:
    report = reports["llama", "torch_native-lora"]
    assert "error" not in report, report["error"]
    assert report["schedules"] >= 24
    assert report["max_depth"] >= 3
    assert report["held_over_bound"] <= 1
    assert report["self_test"] == []
    assert report["broken"]["nothing"] == []
    assert "logits" in report["broken"]["lora_batch"], report["broken"]


def test_schedules_were_worth_running(reports: Any) -> None:
    runs = [report for report in (reports[model] for model in MODELS) if "error" not in report]
    assert sum(run["schedules"] for run in runs) >= 200
    assert max(run["max_depth"] for run in runs) >= 3
    assert sum(run["suspensions"] for run in runs) >= 500
    for ending in ("end", "discard", "fail"):
        assert sum(run["endings"][ending] for run in runs) >= 10, ending


@pytest.mark.parametrize("backend", SCHEDULES)
def test_each_thing_left_out_is_noticed(reports: Any, backend: str) -> None:
    report = reports[BROKEN_TOO, backend]
    assert "error" not in report, report["error"]
    broken = report["broken"]
    assert broken["nothing"] == [], "the schedules must pass with everything in place"
    assert broken["self-test without own input tensors"] != []
    for name, sign in (ON_TRITON if backend == "triton" else EVERYWHERE).items():
        assert sign in broken[name], f"without {name} nothing went wrong but {broken[name]}"


OFF_THE_WHOLE = 1e-5
"""Of the largest logit: float32 sums taken in another order. A wrong row is off by about 1."""


@pytest.mark.parametrize(("architecture", "backend"), MODELS)
def test_sliced_operators_interrupted_equal_uninterrupted(reports: Any, architecture: str, backend: str) -> None:
    report = reports[architecture, backend]
    assert "error" not in report, report["error"]
    run = report["sliced"]
    assert run["schedules"] >= SCHEDULES[backend] // 2
    assert run["suspensions"] > run["schedules"]
    assert run["slices"] > 100, "operators ran whole"
    assert run["held_over_bound"] <= 1


@pytest.mark.parametrize(("architecture", "backend"), MODELS)
def test_slices_equal_whole_operators(reports: Any, architecture: str, backend: str) -> None:
    run = reports[architecture, backend]["sliced"]
    assert run["distance"] <= OFF_THE_WHOLE * run["scale"]
    faults = run["faults"]
    assert "off those of whole operators" in faults.pop("a row left out")
    assert set(faults.values()) == {None}

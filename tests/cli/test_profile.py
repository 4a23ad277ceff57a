"""``flowprefill profile`` as a shell sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowprefill_sglang.core.cost_file import load
from flowprefill_sglang.core.prefill_cost import Extent


def profile(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowprefill_sglang", "profile", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"COLUMNS": "120"} | environ
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--seconds", "0"), "expected a number of seconds above 0, got '0'"),
        (("--seconds", "soon"), "expected a number of seconds above 0, got 'soon'"),
        (("--threads", "0"), "expected a whole number of at least 1, got 0"),
        (("--json", "/no/such/folder/f"), "--json: the folder /no/such/folder does not exist"),
        (("--model-path", "/no/such/model"), "--model-path: no model at /no/such/model"),
    ],
)
def test_wrong_use(words: tuple[str, ...], expected: str) -> None:
    done = profile(*words)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.cluster
def test_several_ranks_are_refused(tmp_path: Path) -> None:
    done = profile("--tp-size", "2", FLOWPREFILL_COST_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "--tp-size: a profile is made in one process" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.cluster
def test_what_it_writes_and_prints(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = profile(
        *("--seconds", "4", "--threads", "1", "--json", str(result), "--max-total-tokens", "20000"),
        FLOWPREFILL_COST_DIR=str(tmp_path / "cost"),
    )
    assert done.returncode == 0, done.stderr
    (kept,) = (tmp_path / "cost").iterdir()
    assert "median error" in done.stdout
    assert kept.name in done.stdout.replace("\n", "")
    document = json.loads(result.read_text())
    assert {"model", "hardware", "coefficients", "held_out", "samples", "made"} <= set(document)
    assert document["hardware"]["threads"] == 1
    assert 0 <= document["held_out"]["median_error"] < 1
    assert {sample["is_held_out"] for sample in document["samples"]} == {True, False}
    assert all(min(sample["runs_s"]) == sample["seconds"] > 0 for sample in document["samples"])
    assert load(kept) == load(result)
    assert load(kept).seconds((Extent(1000),)) > load(kept).seconds((Extent(10),)) > 0

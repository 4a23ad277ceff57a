"""The measurements for a GPU, on a CPU and tiny shapes: that the scripts run, and that what they write can be used."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
KIT = CHECKOUT / "benchmarks" / "gpu"


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(KIT / "run.py"), "--out", str(out), "--device", "cpu", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def written(out: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return document


@pytest.mark.cluster
def test_cheap_parts_run_and_are_kept(tmp_path: Path) -> None:
    done = run(tmp_path, "--parts", "kernels,correctness-triton,correctness-flashinfer")
    assert done.returncode == 0, done.stdout + done.stderr
    states = written(tmp_path, "index")["parts"]
    assert {name: state["state"] for name, state in states.items()} == {
        "environment": "done",
        "kernels": "done",
        "correctness-triton": "done",
        "correctness-flashinfer": "cannot run",
    }
    assert written(tmp_path, "environment")["packages"]["torch"]["loads"]
    kernels = written(tmp_path, "kernels")
    assert kernels["device"] == "cpu"
    assert all(row["over_floor"] > 0 for row in kernels["rows"])
    correctness = written(tmp_path, "correctness-triton")
    assert correctness["summary"]["bit_equal"]
    assert correctness["summary"]["stops"] > 10
    slices = {row["way"]: row["slices"] for row in correctness["rows"]}
    assert slices["slices"] > 0
    assert slices["whole"] == 0

    before = (tmp_path / "kernels.json").stat().st_mtime_ns
    again = run(tmp_path, "--parts", "kernels")
    assert again.returncode == 0
    assert "kernels: kept" in again.stdout
    assert (tmp_path / "kernels.json").stat().st_mtime_ns == before


def test_results_of_another_device_are_not_passed_off(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"device": "cpu", "cannot_run": {}}))
    (tmp_path / "kernels.json").write_text(json.dumps({"device": "cuda"}))
    done = run(tmp_path, "--parts", "kernels")
    assert done.returncode == 1
    assert written(tmp_path, "index")["parts"]["kernels"]["state"] == "refused"


def test_a_part_that_nobody_knows_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--parts", "kernels,latency")
    assert done.returncode == 2
    assert "latency" in done.stderr


def test_a_checkout_that_is_not_installed_gets_its_entry_points(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(KIT / "kit_entry_points.py"), str(tmp_path)], check=True, capture_output=True)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert found.metadata["Name"] == project["name"]
    points = {(point.group, point.name, point.value) for point in found.entry_points}
    assert points == {
        (group, name, value) for group, entries in project["entry-points"].items() for name, value in entries.items()
    }


STARTS_ANOTHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
child.wait()
"""


def test_a_part_that_takes_too_long_leaves_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(KIT))
    from kit_processes import status_within

    left = tmp_path / "pid"
    assert status_within(5.0, [sys.executable, "-c", STARTS_ANOTHER, str(left)]) is None
    assert ended(int(left.read_text()))
    assert status_within(60.0, [sys.executable, "-c", "raise SystemExit(3)"]) == 3


def ended(pid: int) -> bool:
    """Within ten seconds. One that nobody has waited for counts."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False

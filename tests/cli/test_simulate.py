"""``flowprefill simulate`` as a shell sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.{tenth}000000,{300 + 97 * ((7 * second + tenth) % 23)},5\n"
    for second in range(20)
    for tenth in (0, 4, 5)
)


def simulate(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flowprefill_sglang", "simulate", *words]
    environ = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environ)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return str(path)


def test_what_it_prints_and_writes(tmp_path: Path, trace: str) -> None:
    def result(name: str) -> dict[str, object]:
        done = simulate(
            *("--trace", trace, "--format", "azure", "--policy", "feasible,fcfs@chunk512", "--load", "0.5,2"),
            *("--workers", "2", "--routers", "2", "--prediction-error", "0.2", "--seed", "4", "--bound"),
            *("--slo", "text=0.2,file=9", "--json", str(tmp_path / name)),
        )
        assert done.returncode == 0, done.stderr
        assert "of the bound" in done.stdout
        assert "fcfs@chunk512" in done.stdout
        return json.loads((tmp_path / name).read_text())

    first = result("first.json")
    assert set(first["policies"]) == {"feasible", "fcfs@chunk512"}
    for rows in first["policies"].values():
        assert [row["load"] for row in rows] == [0.5, 2.0]
        for row, bound in zip(rows, first["bound"], strict=True):
            assert row["requests"] == 60 == sum(one["count"] for one in row["classes"].values())
            assert 0 <= row["attainment"] <= 1
            assert 0 < bound["attainment"] <= 1, "of the machine without the error, so it is not compared"
            assert row["load"] == bound["load"]
            assert row["goodput_rps"] == pytest.approx(row["attainment"] * row["offered_rps"], rel=1e-4)
    assert first["settings"]["objectives_s"] == {"text": 0.2, "image": 0.5, "search": 4.0, "file": 9.0}
    assert len(first["workload"]["sha256"]) == 64
    assert {"commit", "versions", "hardware", "command", "started_at"} <= set(first)
    again = result("again.json")
    for key in ("policies", "bound", "workload", "settings"):
        assert json.dumps(first[key]) == json.dumps(again[key]), "the same seed gives the same bytes"


def test_the_bound_and_the_best_without_batches(tmp_path: Path, trace: str) -> None:
    path = tmp_path / "result.json"
    done = simulate(
        *("--trace", trace, "--format", "azure", "--policy", "feasible", "--load", "2", "--no-batching", "--bound"),
        *("--bound-seconds", "20", "--json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    assert "(best without batches)" in done.stdout
    result = json.loads(path.read_text())
    (bound,) = result["bound"]
    assert result["policies"]["feasible"][0]["attainment"] <= bound["surely"] + 1e-6
    assert bound["surely"] <= bound["without_batches"] == bound["attainment"] < 1
    assert result["settings"]["bound_seconds"] == 20


def test_the_generated_workload_and_objectives_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = simulate(
        "--requests", "40", "--slo-factor", "auto", "--cost-model", "llama-3-70b-tp4-a800", "--json", str(path)
    )
    assert done.returncode == 0, done.stderr
    objectives = json.loads(path.read_text())["settings"]["objectives_s"]
    assert 2 * 0.25 < objectives["text"] < 6 * 0.25
    assert json.loads(path.read_text())["bound"] == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--policy", "lifo"), "'lifo': expected POLICY[@operator|@layer|@chunkN|@whole] with one of edf, fcfs,"),
        (("--policy", "sedf,sedf"), "a policy is named twice"),
        (("--load", "0"), "expected a number above 0, got '0'"),
        (("--load", "1,x"), "expected a number above 0, got 'x'"),
        (("--cost-model", "nothing"), "--cost-model: 'nothing' is no file and no built-in MODEL-tpN-GPU"),
        (("--workers", "2", "--routers", "3"), "--routers: 3 routers need at least as many --workers"),
        (("--trace", "x"), "--trace and --format go together"),
        (("--trace", "/no/trace", "--format", "azure"), "/no/trace: the trace cannot be read"),
        (("--limit", "3"), "--limit is for a trace; use --requests"),
        (("--requests", "1"), "1 requests that all arrive at once have no rate to scale"),
        (("--slo", "talk=1"), "expected CLASS=SECONDS,… with classes file, image, search, text"),
        (("--slo", "text=0"), "expected CLASS=SECONDS,…"),
        (("--slo-factor", "some"), "expected a number above 0, got 'some'"),
        (("--json", "/no/such/folder/f"), "--json: the folder /no/such/folder does not exist"),
        (("--prediction-error", "9"), "expected a number from 0 to 2, got '9'"),
    ],
)
def test_wrong_use(words: tuple[str, ...], expected: str) -> None:
    done = simulate(*words)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr

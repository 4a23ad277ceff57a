"""A worker that is told to stop while forward passes are suspended, and one that cannot start."""

import subprocess
import sys
from pathlib import Path

import pytest

from flowprefill_testing import prompts
from flowprefill_testing.clusters import wait_until
from flowprefill_testing.direct import Pair
from flowprefill_testing.http import generate

pytestmark = pytest.mark.cluster

LONG = 6_000


def test_what_is_begun_is_finished_before_the_worker_ends(roomy: Pair, stock_url: str) -> None:
    bodies = [prompts.ids(LONG, 950), prompts.ids(LONG, 951), prompts.ids(300, 952)]
    suspended = roomy.ask(bodies[0], name="suspended", ttft_slo_ms=60_000)
    roomy.wait_for("started", suspended)
    running = roomy.ask(bodies[1], name="running", ttft_slo_ms=30_000)
    waiting = roomy.ask(bodies[2], name="waiting", ttft_slo_ms=90_000)
    roomy.wait_for("preempted", suspended)
    roomy.wait_for("arrived", waiting)
    roomy.process.terminate()
    for answer, body in zip((suspended, running, waiting), bodies, strict=True):
        assert answer.whole()["output_ids"] == generate(stock_url, input_ids=body)["output_ids"]
    wait_until(lambda: roomy.process.poll() is not None, timeout_s=60)
    assert roomy.process.returncode == 0


def test_a_setting_that_cannot_work_is_one_line_and_status_2(model_path: Path) -> None:
    command = ["prefill", "--router", "tcp://127.0.0.1:1", "--model-path", str(model_path), "--schedule-policy", "lpm"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "flowprefill_sglang", *command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("flowprefill prefill:")]
    assert len(lines) == 1
    assert "--schedule-policy lpm" in lines[0]
    assert "Traceback" not in done.stderr

"""``flowprefill up`` on this machine with real SGLang: loses a worker, grows, shrinks, and ends, under load."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flowprefill_sglang.cluster.ports import require_free
from flowprefill_testing.leftovers import holdings_of
from flowprefill_testing.ray_pools import UpPool

pytestmark = pytest.mark.cluster
RECOVERY_S = 240.0


@pytest.fixture(scope="module")
def pool(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpPool]:
    running = UpPool(model_path, tmp_path_factory.mktemp("local-pool"))
    try:
        running.wait_ready()
        yield running
    finally:
        running.clear_away()


def flowprefill(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flowprefill_sglang", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_serves_and_shows_itself(pool: UpPool) -> None:
    assert pool.ask(1) == 200
    shown = flowprefill("status", "--ready-file", str(pool.ready_file))
    assert "prefill: 1 of 1 ready, decode: 1 of 1 ready" in shown
    log = flowprefill("logs", "decode-0", "--lines", "5", "--ready-file", str(pool.ready_file))
    assert 1 <= len(log.splitlines()) <= 5
    assert [worker["name"] for worker in pool.document["workers"]] == ["router", "prefill-0", "decode-0"]
    output = pool.log.read_text()
    assert f"control   {pool.document['control']}" in output
    # Of the lines that tell a state; what a slow member says meanwhile may have the word in it too.
    assert len(re.findall(r"^\[ *[\d.]+ s\] \S+ +ready ", output, re.MULTILINE)) == 3


def test_grows_loses_a_worker_and_shrinks_under_load_without_a_lost_request(pool: UpPool) -> None:
    ready = str(pool.ready_file)
    with pool.load() as statuses:
        flowprefill("scale", "--prefill", "2", "--decode", "2", "--ready-file", ready)
        pool.wait(lambda: list(pool.states().values()) == ["ready"] * 4, RECOVERY_S)
        victim = pool.member("prefill-0")
        os.kill(victim["pid"], signal.SIGKILL)
        pool.wait(lambda: pool.restarted("prefill-0", victim["restarts"]), RECOVERY_S)
        assert pool.member("prefill-0")["url"] != victim["url"]
        assert "was killed by SIGKILL" in pool.member("prefill-0")["last_failure"]
        flowprefill("scale", "--prefill", "1", "--decode", "1", "--ready-file", ready)
        pool.wait(lambda: sorted(pool.states()) == ["decode-0", "prefill-0"], RECOVERY_S)
        served = len(statuses)
        pool.wait(lambda: len(statuses) > served + 3, RECOVERY_S)
    assert set(statuses) == {200}


def test_ends_and_leaves_nothing(pool: UpPool) -> None:
    held = holdings_of([pool.process.pid], pool.temporary)
    assert {member["pid"] for member in pool.status()["members"]} <= {process.pid for process in held.processes}
    kinds = {re.split("[-_]", path.name)[0] for path in held.shared_memory}
    assert "sglang" in kinds, "what SGLang may leave is looked at"
    assert len(held.listening) >= 6
    assert pool.end() == 0
    psutil.wait_procs(held.processes, timeout=20)
    assert held.left() == []
    assert {path.name for path in pool.temporary.iterdir()} <= {f"torchinductor_{os.getuid()}"}, "kept for next time"
    for _, port in held.listening:
        require_free("127.0.0.1", port)
    assert not pool.ready_file.exists()

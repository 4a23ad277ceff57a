"""Children of a launcher: logged, ended with all they started, gone when the launcher is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from flowprefill_sglang.cluster.process import ChildProcess, describe_exit
from flowprefill_testing.clusters import wait_until


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_child_logs_and_reports_its_status(tmp_path: Path) -> None:
    child = ChildProcess("v", ["version"], tmp_path / "v.log", {})
    wait_until(lambda: child.exit_status is not None, timeout_s=20)
    assert child.exit_status == 0
    assert "flowprefill-sglang" in child.last_words()


def test_wrong_use_is_seen_in_the_last_words(tmp_path: Path) -> None:
    child = ChildProcess("v", ["version", "--nonsense"], tmp_path / "v.log", {})
    wait_until(lambda: child.exit_status is not None, timeout_s=20)
    assert child.exit_status == 2
    assert "unrecognized arguments: --nonsense" in child.last_words()


def test_a_verdict_is_found_before_the_noise_of_the_end(tmp_path: Path) -> None:
    child = ChildProcess("v", ["version"], tmp_path / "v.log", {})
    wait_until(lambda: child.exit_status is not None, timeout_s=20)
    noise = "".join(f" - leaked function {number}\n" for number in range(100))
    child.log.write_text(f"loading\nflowprefill prefill: the router refused this worker\n{noise}")
    assert child.last_words() == "flowprefill prefill: the router refused this worker"
    child.log.write_text("x" * 100_000 + "\n" + noise)
    assert child.last_words(3).splitlines() == [f" - leaked function {number}" for number in (97, 98, 99)]
    child.log.unlink()
    assert "no log" in child.last_words()


def test_exit_statuses_in_words() -> None:
    assert describe_exit(3) == "ended with status 3"
    assert describe_exit(-9) == "was killed by SIGKILL"


def test_a_child_dies_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """The launcher gets SIGKILL, so it can do nothing; the kernel ends its child."""
    log = tmp_path / "router.log"
    script = f"""
import pathlib, sys, time
from flowprefill_sglang.cluster.process import ChildProcess
from flowprefill_sglang.cluster.ports import free_ports
http, worker = free_ports(2)
child = ChildProcess("r", ["router", "--port", str(http), "--worker-bind", f"tcp://127.0.0.1:{{worker}}"],
                     pathlib.Path({str(log)!r}), {{}})
print(child.pid, flush=True)
time.sleep(60)
"""
    launcher = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    with launcher.stdout:
        child_pid = int(launcher.stdout.readline())
        try:
            wait_until(
                lambda: log.exists() and log.stat().st_size > 0, timeout_s=20
            )  # past its first lines, so the kernel was asked
            assert is_running(child_pid)
            launcher.kill()
            launcher.wait()
            wait_until(lambda: not is_running(child_pid), timeout_s=20)
        finally:
            if is_running(child_pid):
                os.kill(child_pid, signal.SIGKILL)

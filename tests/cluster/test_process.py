"""Children of a launcher: logged, ended with all they started, gone when the launcher is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_sglang.cluster.process import ChildProcess, describe_exit, end, server_environment
from flowprefill_sglang.cluster.process_group import memory_bytes, processes_of, shared_memory_of
from flowprefill_testing.clusters import wait_until
from flowprefill_testing.servers import with_support

INTERRUPTED = """
import signal, sys, time
left = int(sys.argv[1])
def interrupted(*_):
    global left
    left -= 1
    print("interrupted", flush=True)
    if not left:
        sys.exit(0)
signal.signal(signal.SIGINT, interrupted)
print("ready", flush=True)
time.sleep(600)
"""


def interrupted_child(folder: Path, times: int) -> ChildProcess:
    """Ends after so many interrupts."""
    child = ChildProcess("c", [str(times)], folder / f"{times}.log", {}, ("-uc", INTERRUPTED))
    wait_until(lambda: "ready" in child.log.read_text(), timeout_s=20)
    return child


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


def test_what_a_former_process_has_logged_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "v.log").write_text("flowprefill prefill: no memory\n")
    child = ChildProcess("v", ["print(1); print(2)"], tmp_path / "v.log", {}, ("-c",))
    wait_until(lambda: child.exit_status is not None, timeout_s=20)
    assert child.how_it_ended() == "ended with status 0: 1\n2"
    assert child.log_tail(3).splitlines() == ["flowprefill prefill: no memory", "1", "2"]


def test_of_one_that_was_killed_the_last_line_is_quoted(tmp_path: Path) -> None:
    child = interrupted_child(tmp_path, 9)
    child.interrupt()
    wait_until(lambda: "interrupted" in child.log.read_text(), timeout_s=20)
    with child.log.open("a") as log:
        log.write("/lib/resource_tracker.py:254: UserWarning: resource_tracker: 9 leaked semaphores\n")
    child.kill()
    assert child.how_it_ended() == "was killed by SIGKILL: interrupted"


def test_children_are_asked_once_for_each_grace_and_then_killed(tmp_path: Path) -> None:
    children = [interrupted_child(tmp_path, times) for times in (1, 2, 9)]
    end(children, (1.0, 1.0))
    assert [child.exit_status for child in children] == [0, 0, -signal.SIGKILL]
    assert [child.log.read_text().count("interrupted") for child in children] == [1, 2, 2]


def test_in_a_hurry_only_the_last_grace_is_given(tmp_path: Path) -> None:
    child = interrupted_child(tmp_path, 2)
    began_at = time.monotonic()
    end([child], (1_000.0, 20.0), is_hurried=lambda: time.monotonic() > began_at + 0.2)
    assert child.exit_status == 0, "its second interrupt"


def test_what_python_shares_is_removed_for_one_that_is_killed_with_all_it_has_started(tmp_path: Path) -> None:
    script = """
import multiprocessing, sys, time
context = multiprocessing.get_context("spawn")
lock = context.Lock()
print(lock._semlock.name, flush=True)
time.sleep(600)
"""
    child = ChildProcess("c", [], tmp_path / "c.log", {}, ("-c", script))
    wait_until(lambda: child.log.read_text().endswith("\n"), timeout_s=20)
    semaphore = Path(f"/dev/shm/sem.{child.log.read_text().strip().lstrip('/')}")
    assert semaphore.exists()
    assert len(processes_of(child.pid)) == 2, "Python's resource tracker is one of them"
    child.kill()
    assert processes_of(child.pid) == []
    assert not semaphore.exists()


def test_what_the_kernel_says_of_a_group(tmp_path: Path) -> None:
    ours, others = Path(f"/dev/shm/sglang_loads_test_{os.getpid()}.shm"), Path(f"/dev/shm/others_{os.getpid()}")
    for file in (ours, others):
        file.write_bytes(b"x" * 4096)
    files = f"mmap.mmap(os.open(name, os.O_RDWR), 0) for name in ({str(ours)!r}, {str(others)!r})"
    script = f"import mmap, os; held = [{files}]; {INTERRUPTED}"
    child = ChildProcess("c", ["1"], tmp_path / "c.log", {}, ("-c", script))
    try:
        wait_until(lambda: "ready" in child.log.read_text(), timeout_s=20)
        assert processes_of(child.pid) == [child.pid]
        assert shared_memory_of(child.pid) == {ours}, "only what SGLang has named"
        assert 2**20 < memory_bytes(child.pid) < 2**30
        end([child], (20.0,))
        assert (ours.exists(), others.exists()) == (False, True), "SGLang itself would leave it"
    finally:
        child.kill()
        ours.unlink(missing_ok=True)
        others.unlink()
    assert (processes_of(child.pid), shared_memory_of(child.pid), memory_bytes(child.pid)) == ([], set(), 0)


def test_what_is_compiled_is_kept_for_the_next_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    environment = server_environment("/scratch", 3)
    assert (environment["TMPDIR"], environment["OMP_NUM_THREADS"]) == ("/scratch", "3")
    assert not environment["TORCHINDUCTOR_CACHE_DIR"].startswith("/scratch")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    assert not {"TORCHINDUCTOR_CACHE_DIR", "OMP_NUM_THREADS"} & set(server_environment("/scratch", None))


def test_exit_statuses_in_words() -> None:
    assert describe_exit(3) == "ended with status 3"
    assert describe_exit(-9) == "was killed by SIGKILL"


def test_a_child_hears_interrupts_though_the_launcher_blocks_them(tmp_path: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as in a Ray actor
    try:
        http, worker = free_ports(2)
        arguments = ["router", "--port", str(http), "--worker-bind", f"tcp://127.0.0.1:{worker}"]
        child = ChildProcess("r", arguments, tmp_path / "r.log", {})
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    wait_until(lambda: "router_listening" in child.log.read_text(), timeout_s=60)
    end([child], (60.0,))
    assert child.exit_status == 0


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


@pytest.mark.cluster
def test_a_cluster_and_a_stock_server_end_with_the_session_that_is_killed(model_path: Path, tmp_path: Path) -> None:
    """As when pytest gets SIGKILL: nobody can end anything, and ``flowprefill up`` has children of its own."""
    script = f"""
import pathlib, subprocess, sys, time
from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_testing.servers import STOCK_SERVER, environment, sizes
folder, model = pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(model_path)!r})
settings = dict(env=environment(folder), start_new_session=True)
up = ["-m", "flowprefill_sglang", "up", "--port", "0", "--log-dir", str(folder / "logs"), *sizes(model)]
with (folder / "up.log").open("wb") as log:
    subprocess.Popen([sys.executable, *up], stdout=log, stderr=log, **settings)
with (folder / "stock.log").open("wb") as log:
    stock = [*STOCK_SERVER, *sizes(model), "--port", str(*free_ports(1))]
    subprocess.Popen([sys.executable, *stock], stdout=log, stderr=log, **settings)
time.sleep(300)
"""
    session = subprocess.Popen([sys.executable, "-c", script], env=os.environ | with_support())
    started: dict[int, psutil.Process] = {}

    def have_begun() -> bool:
        """Router, prefill worker, decode instance and their launcher, and the stock server. One that has not asked the
        kernel yet to end it with its parent finds out by itself."""
        logs = list((tmp_path / "logs").glob("*.log"))
        started.update({child.pid: child for child in psutil.Process(session.pid).children(recursive=True)})
        return len(started) >= 5 and len(logs) == 3

    try:
        wait_until(have_begun, session, timeout_s=120)
        assert [is_running(child.pid) for child in psutil.Process(session.pid).children()] == [True, True]
        session.kill()
        session.wait()
        _, left = psutil.wait_procs(started.values(), timeout=20)
        assert left == []
        wait_until(lambda: not list((tmp_path / "tmp").glob("flowprefill-member-*")), timeout_s=60)
    finally:
        session.kill()
        for process in started.values():
            if process.is_running():
                process.kill()

"""A pool on a real Ray cluster of three nodes: serves, loses processes, an actor and a node, grows, shrinks, ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowprefill_testing.clusters import answers
from flowprefill_testing.leftovers import Holdings, holdings_of
from flowprefill_testing.ray_pools import FLAGS, RayPool, ray_nodes

pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]
RECOVERY_S = 240.0
CLEARED_S = 60.0
"""Until what a lost actor has left is gone. Its log stays for some seconds."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with ray_nodes(workers=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def pool(nodes: Any, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPool]:
    # A hang is noticed in seconds here, on a machine where an operator takes milliseconds.
    sooner = ["--prefill-args", "--unresponsive-secs 10"]
    sooner += ["--router-args", "--health-check-interval-secs 1 --health-check-timeout-secs 5"]
    running = RayPool(nodes.address, model_path, tmp_path_factory.mktemp("ray-pool"), *sooner)
    try:
        running.wait_ready()
        yield running
    finally:
        running.clear_away()


def flowprefill(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "flowprefill_sglang", *arguments], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def test_serves_and_shows_itself(pool: RayPool) -> None:
    assert pool.ask(1) == 200
    ready = str(pool.ready_file)
    status, shown = flowprefill("status", "--ready-file", ready)
    assert status == 0, shown
    assert "prefill: 1 of 1 ready, decode: 1 of 1 ready" in shown
    nodes_used = {member["node"] for member in pool.status()["members"]}
    assert len(nodes_used) == 2, "members spread over the nodes"
    status, log = flowprefill("logs", "prefill-0", "--lines", "5", "--ready-file", ready)
    assert status == 0
    assert 1 <= len(log.splitlines()) <= 5
    status, said = flowprefill("logs", "prefill-9", "--ready-file", ready)
    assert (status, "no member is called 'prefill-9'" in said) == (2, True)
    status, said = flowprefill("scale", "--prefill", "100", "--ready-file", ready)
    assert (status, "no room" in said) == (1, True), said
    assert pool.status()["desired"] == {"prefill": 1, "decode": 1}


SCHEDULER, DETOKENIZER = "sglang::sched", "sglang::detok"


def process_of(member: dict[str, Any], name: str) -> psutil.Process:
    """One of the processes that SGLang's HTTP process has started."""
    children = psutil.Process(member["pid"]).children(recursive=True)
    return next(child for child in children if child.name().startswith(name))


def test_grows_loses_hung_workers_and_shrinks_under_load_without_a_lost_request(pool: RayPool) -> None:
    ready = str(pool.ready_file)
    with pool.load() as statuses:
        assert flowprefill("scale", "--prefill", "3", "--ready-file", ready)[0] == 0
        pool.wait(lambda: any(one["doing"] for one in pool.status()["members"]), RECOVERY_S)
        pool.wait(lambda: list(pool.states().values()) == ["ready"] * 4, RECOVERY_S)
        hung = {"prefill-1": SCHEDULER, "prefill-2": DETOKENIZER}
        for name, process in hung.items():
            process_of(pool.member(name), process).suspend()  # its HTTP process beats on
        pool.wait(lambda: all(pool.member(name)["state"] != "ready" for name in hung), RECOVERY_S)
        assert "its scheduler process has not answered for 1" in pool.member("prefill-1")["last_failure"]
        assert "its detokenizer process has not answered for 1" in pool.member("prefill-2")["last_failure"]
        assert "process has not answered" in flowprefill("status", "--ready-file", ready)[1]
        assert flowprefill("scale", "--prefill", "1", "--ready-file", ready)[0] == 0
        pool.wait(lambda: sorted(pool.states()) == ["decode-0", "prefill-0"], RECOVERY_S)
    assert len(statuses) > 5
    assert set(statuses) == {200}, pool.router_says("request_")


def held_by(pool: RayPool, member: dict[str, Any]) -> Holdings:
    """What a member has. Nobody but its successor may have it later."""
    return holdings_of([member["pid"]], pool.temporary)


def test_a_killed_process_is_replaced(pool: RayPool) -> None:
    before = pool.member("prefill-0")
    held = held_by(pool, before)
    assert held.shared_memory
    os.kill(before["pid"], signal.SIGKILL)
    pool.wait(lambda: pool.restarted("prefill-0", before["restarts"]), RECOVERY_S)
    after = pool.member("prefill-0")
    assert after["pid"] != before["pid"]
    assert "was killed by SIGKILL" in after["last_failure"]
    assert held.left() == []
    assert pool.ask(2) == 200


def test_a_worker_that_is_stopped_as_a_whole_is_replaced(pool: RayPool) -> None:
    before = pool.member("prefill-0")
    group = [psutil.Process(before["pid"]), *psutil.Process(before["pid"]).children(recursive=True)]
    for process in group:
        process.suspend()
    pool.wait(lambda: pool.restarted("prefill-0", before["restarts"]), RECOVERY_S)
    failure = pool.member("prefill-0")["last_failure"]
    assert "failed its health checks for 10 s: the router says: dead (no message for" in failure
    assert psutil.wait_procs(group, timeout=10)[1] == []
    assert pool.ask(5) == 200


def test_decode_grows_loses_hung_processes_and_shrinks_under_load_without_a_lost_request(pool: RayPool) -> None:
    ready = str(pool.ready_file)
    with pool.load(answer_tokens=600) as statuses:  # each keeps an instance busy for seconds
        assert flowprefill("scale", "--decode", "2", "--ready-file", ready)[0] == 0
        pool.wait(lambda: list(pool.states().values()) == ["ready"] * 3, RECOVERY_S)
        for name, process in (("decode-0", SCHEDULER), ("decode-1", DETOKENIZER)):
            before = pool.member(name)
            served = len(statuses)
            pool.wait(lambda served=served: len(statuses) > served + 3, RECOVERY_S)
            process_of(before, process).suspend()
            assert not answers(f"{before['url']}/health"), f"{name} has work, and yet no answer"
            pool.wait(lambda name=name, before=before: pool.restarted(name, before["restarts"]), RECOVERY_S)
            assert "the router says: dead (its health check timed out)" in pool.member(name)["last_failure"]
        assert flowprefill("scale", "--decode", "1", "--ready-file", ready)[0] == 0
        pool.wait(lambda: sorted(pool.states()) == ["decode-0", "prefill-0"], RECOVERY_S)
    assert len(statuses) > 8
    assert set(statuses) == {200}, pool.router_says("request_")


def test_a_killed_actor_is_replaced(pool: RayPool) -> None:
    before = pool.member("prefill-0")
    held = held_by(pool, before)
    assert held.shared_memory
    os.kill(psutil.Process(before["pid"]).ppid(), signal.SIGKILL)
    pool.wait(lambda: not psutil.pid_exists(before["pid"]), 20)
    pool.wait(lambda: pool.restarted("prefill-0", before["restarts"]), RECOVERY_S)
    assert "actor" in pool.member("prefill-0")["last_failure"]
    assert held.left_after(CLEARED_S) == []
    assert pool.ask(3) == 200


def test_the_members_of_a_lost_node_are_placed_elsewhere(pool: RayPool, nodes: Any) -> None:
    before = pool.member("decode-0")
    (lost,) = [node for node in nodes.worker_nodes if node.node_id == before["node"]]
    nodes.remove_node(lost, allow_graceful=False)
    pool.wait(lambda: pool.restarted("decode-0", before["restarts"]), RECOVERY_S)
    assert pool.member("decode-0")["node"] != before["node"]
    assert pool.ask(4) == 200


def test_ends_and_leaves_nothing(pool: RayPool) -> None:
    members = [member["pid"] for member in pool.status()["members"]]
    held = holdings_of([pool.process.pid, *members], pool.temporary)
    assert len(held.processes) >= 8, "up, router, and three of each member"
    assert len(held.listening) >= 6, "control, router, workers' port, two members, KV bootstrap"
    assert held.unix_sockets
    assert held.shared_memory
    assert pool.end() == 0
    psutil.wait_procs(held.processes, timeout=20)
    assert held.left() == []
    assert list(pool.temporary.iterdir()) == []
    assert not pool.ready_file.exists()


def test_a_ray_of_its_own_ends_with_it_and_leaves_nothing(model_path: Path, tmp_path: Path) -> None:
    ray_before = set(Path("/tmp").glob("ray*"))
    pool = RayPool(None, model_path, tmp_path)
    try:
        pool.wait_ready()
        members = [psutil.Process(member["pid"]).ppid() for member in pool.status()["members"]]
        held = holdings_of([pool.process.pid, *members], pool.temporary)
        assert any("raylet" in process.name() for process in held.processes)
        assert [line for line in pool.log.read_text().splitlines() if " loading     for " in line], (
            "it said what it did"
        )
        assert pool.end() == 0
        psutil.wait_procs(held.processes, timeout=20)
        assert held.left() == []
        compiled = f"torchinductor_{os.getuid()}"  # which the next start should find
        assert [path.name for path in pool.temporary.iterdir() if path.name != compiled] == []
        assert set(Path("/tmp").glob("ray*")) <= ray_before
    finally:
        pool.clear_away()


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--ray-address", "127.0.0.1:1"], 1, "no Ray at 127.0.0.1:1"),
        (["--ray-address", "ray://somewhere"], 2, "expected HOST:PORT"),
        (["--ray-address", "HERE", "--prefill", "50"], 1, "asked for 50 prefill × 1 CPU and 1 decode × 1 CPU"),
        (["--ray-address", "HERE", "--model-path", "/nowhere"], 1, "no model at /nowhere"),
        (["--ray-address", "HERE", "--device", "cuda"], 1, "pass --device cpu"),
    ],
    ids=["nobody there", "no address", "too few CPUs", "model missing on a node", "no GPU"],
)
def test_bad_input_is_one_clear_line(nodes: Any, model_path: Path, flags: list[str], status: int, words: str) -> None:
    given = [nodes.address if flag == "HERE" else flag for flag in flags]
    common = ["up", "--launcher", "ray", "--port", "0", "--model-path", str(model_path), *FLAGS]
    ended, said = flowprefill(*common, *given)
    assert ended == status, said
    assert words in said.splitlines()[-1], said


def test_a_port_that_is_taken_is_one_clear_line_and_nothing_is_left(
    nodes: Any, model_path: Path, tmp_path: Path
) -> None:
    def members() -> set[int]:
        return {one.pid for one in psutil.process_iter() if str(model_path) in " ".join(_command_of(one))}

    before = members()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        common = ["up", "--launcher", "ray", "--ray-address", nodes.address, "--model-path", str(model_path), *FLAGS]
        common += ["--log-dir", str(tmp_path / "logs"), "--ready-file", str(tmp_path / "ready.json")]
        status, said = flowprefill(*common, "--port", port)
        assert status == 1, said
        assert said.splitlines()[-1].startswith("flowprefill up: ")
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port" in said
        assert not (tmp_path / "logs").exists(), "it was known before anything was started"
        # Found by the router alone, when members are starting already.
        status, said = flowprefill(*common, "--port", "0", "--router-args", f"--prometheus-port {port}")
        assert status == 1, said
        assert f"cannot serve on 127.0.0.1:{port}: Address already in use" in said.splitlines()[-1]
        assert "Traceback" not in said
    assert members() <= before
    assert not (tmp_path / "ready.json").exists()


def _command_of(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def test_control_commands_say_what_is_wrong(tmp_path: Path) -> None:
    assert flowprefill("status", "--control", "http://127.0.0.1:1")[0] == 1
    assert flowprefill("status", "--ready-file", str(tmp_path / "none.json"))[0] == 2
    (tmp_path / "local.json").write_text(json.dumps({"url": "http://x"}))
    status, said = flowprefill("status", "--ready-file", str(tmp_path / "local.json"))
    assert (status, "names no control address" in said) == (2, True)

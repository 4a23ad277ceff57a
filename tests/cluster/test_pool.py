"""A pool on this machine with a real router and real processes, whose members are stand-ins: no SGLang, so seconds."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from flowprefill_sglang.cli.main import main
from flowprefill_sglang.cluster import local_pool
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.cluster.pool import Pool
from flowprefill_sglang.cluster.process_group import processes_of
from flowprefill_sglang.errors import BadInput, PeerFault, StartupError
from flowprefill_testing.stand_in_member import said
from flowprefill_testing.stand_in_pools import WAIT_S, Seen, load, run, watched

IN_THEIR_PLACES = ["router", "prefill-0", "decode-0"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All temporary files of this process and its children."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def spec(tmp_path: Path) -> ClusterSpec:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return ClusterSpec(model_path=tmp_path / "model", startup_timeout_s=WAIT_S)


def test_serves_and_shows_itself_and_leaves_nothing(spec: ClusterSpec, temporary: Path) -> None:
    groups: list[int] = []

    async def scenario() -> None:
        seen = Seen(replace(spec, threads=3), replaces=True)
        async with watched(seen):
            pool = seen.pool
            assert pool.names() == IN_THEIR_PLACES
            groups.extend(pool.pid(name) for name in pool.names())
            async with load(pool.url) as statuses:
                await seen.until(lambda: len(statuses) > 20)
            assert set(statuses) == {200}
            status = pool.status()
            assert (status["url"], status["model"]) == (pool.url, "echo-model")
            assert [(m["state"], m["restarts"], m["last_failure"]) for m in status["members"]] == [("ready", 0, "")] * 2
            targets = {row["labels"]["name"]: row["targets"] for row in pool.targets()}
            assert targets == {n: [pool.member_url(n).removeprefix("http://")] for n in ("router", "prefill-0")}
            assert said(await pool.logs("prefill-0", 100), "threads") == ["3"]
            assert {path.name for path in pool.log_dir.iterdir()} == {f"{name}.log" for name in IN_THEIR_PLACES}
            with pytest.raises(BadInput, match="no member is called 'prefill-9'; there are: router, prefill-0"):
                await pool.logs("prefill-9", 1)
        steps = [(event.name, event.state) for event in seen.events]
        for name in IN_THEIR_PLACES:
            assert (name, "ready") in steps

    run(scenario())
    assert [processes_of(group) for group in groups] == [[], [], []]
    assert list(temporary.iterdir()) == []


def test_a_killed_worker_is_replaced_without_a_lost_request(spec: ClusterSpec, temporary: Path) -> None:
    async def scenario() -> None:
        seen = Seen(replace(spec, prefill=2), replaces=True)
        async with watched(seen), load(seen.pool.url) as statuses:
            await seen.until(lambda: len(statuses) > 10)
            url = seen.pool.member_url("prefill-1")
            os.kill(seen.pool.pid("prefill-1"), signal.SIGKILL)
            await seen.until(lambda: seen.member("prefill-1")["restarts"] == 1)
            await seen.until(lambda: seen.member("prefill-1")["state"] == "ready")
            assert seen.pool.member_url("prefill-1") != url
            assert "was killed by SIGKILL" in str(seen.member("prefill-1")["last_failure"])
            served = len(statuses)
            await seen.until(lambda: len(statuses) > served + 10)
        assert set(statuses) == {200}
        assert ("prefill-1", "backing_off") in [(event.name, event.state) for event in seen.events]

    run(scenario())
    assert list(temporary.iterdir()) == []


def test_a_worker_that_hangs_is_replaced_without_a_lost_request(spec: ClusterSpec, temporary: Path) -> None:
    async def scenario() -> None:
        seen = Seen(replace(spec, prefill=2), replaces=True)
        async with watched(seen), load(seen.pool.url) as statuses:
            await seen.until(lambda: len(statuses) > 10)
            os.kill(seen.pool.pid("prefill-0"), signal.SIGSTOP)
            await seen.until(lambda: seen.member("prefill-0")["restarts"] == 1)
            await seen.until(lambda: seen.member("prefill-0")["state"] == "ready")
            assert "failed its health checks for 10 s" in str(seen.member("prefill-0")["last_failure"])
        assert set(statuses) == {200}

    run(scenario())
    assert list(temporary.iterdir()) == []


def test_grows_and_shrinks_under_load_without_a_lost_request(spec: ClusterSpec, temporary: Path) -> None:
    async def scenario() -> None:
        seen = Seen(spec, replaces=True)
        async with watched(seen), load(seen.pool.url) as statuses:
            await seen.pool.scale(2, 2)
            await seen.until(lambda: list(seen.states().values()) == ["ready"] * 4)
            added = [seen.pool.pid(name) for name in ("prefill-1", "decode-1")]
            served = len(statuses)
            await seen.until(lambda: len(statuses) > served + 10)
            await seen.pool.scale(1, 1)
            assert seen.states()["decode-1"] == "draining"
            await seen.until(lambda: [*seen.states()] == ["prefill-0", "decode-0"])
            assert [processes_of(pid) for pid in added] == [[], []]
            with pytest.raises(StartupError, match="free ports are needed"):
                await seen.pool.scale(20_000, 1)
            assert seen.pool.status()["desired"] == {"prefill": 1, "decode": 1}
        assert set(statuses) == {200}
        assert {(e.name, e.state) for e in seen.events} >= {("prefill-1", "stopped"), ("decode-1", "stopped")}

    run(scenario())
    assert list(temporary.iterdir()) == []


def test_gpus_go_with_those_that_leave_to_those_that_come(
    spec: ClusterSpec, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        seen = Seen(replace(spec, prefill=2), replaces=True, gpus=("0", "1", "GPU-5ebe9f43-ac33"))

        def gpus() -> dict[str, str]:
            return {one["name"]: one["gpus"] for one in seen.pool.status()["members"]}

        async with watched(seen):
            assert gpus() == {"prefill-0": "0", "prefill-1": "1", "decode-0": "GPU-5ebe9f43-ac33"}
            assert await asyncio.to_thread(main, ["status", "--control", seen.pool.control]) == 0
            rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
            column = rows[0].index("GPUS") + 1  # a number has its unit beside it
            assert [row[column] for row in rows[1:]] == ["0", "1", "GPU-5ebe9f43"]
            assert await asyncio.to_thread(main, ["scale", "--prefill", "3", "--control", seen.pool.control]) == 1
            refused = capsys.readouterr().err
            assert "no room for 3 prefill × 1 GPU and 1 decode × 1 GPU: 3 GPUs are visible" in refused
            assert seen.pool.status()["desired"] == {"prefill": 2, "decode": 1}
            await seen.pool.scale(1, 2)
            reason = "waits for GPUs of members that are to end"
            await seen.until(lambda: seen.member("decode-1")["reason"] == reason)
            await seen.until(lambda: seen.states() == dict.fromkeys(("prefill-0", "decode-0", "decode-1"), "ready"))
            assert gpus()["decode-1"] == "1"
            assert said(await seen.pool.logs("decode-1", 100), "gpus") == ["1"]

    run(scenario())
    assert list(temporary.iterdir()) == []


def test_a_crash_loop_is_shown_with_its_reason_and_ends_with_it(spec: ClusterSpec, temporary: Path) -> None:
    async def scenario() -> None:
        seen = Seen(spec, replaces=True)
        async with watched(seen):
            seen.host.flags["prefill-1"] = ("--broken",)
            await seen.pool.scale(2, 1)
            await seen.until(lambda: seen.member("prefill-1").get("failures_in_a_row") == 2)
            await seen.until(lambda: seen.member("prefill-1")["state"] == "backing_off")
            shown = seen.member("prefill-1")
            assert shown["last_failure"] == "ended with status 1: flowprefill member: it is broken"
            assert shown["retry_in_s"] is not None
            del seen.host.flags["prefill-1"]
            await seen.until(lambda: seen.member("prefill-1")["state"] == "ready")

    run(scenario())
    assert list(temporary.iterdir()) == []


def test_a_pool_that_replaces_nobody_ends_with_the_first_loss(spec: ClusterSpec, temporary: Path) -> None:
    pools: list[Pool] = []

    async def scenario() -> None:
        seen = Seen(replace(spec, prefill=2), replaces=False)
        pools.append(seen.pool)
        async with seen.pool:
            os.kill(seen.pool.pid("prefill-1"), signal.SIGKILL)
            async with asyncio.timeout(WAIT_S):
                await seen.pool.watch()

    with pytest.raises(PeerFault, match=r"prefill-1 was killed by SIGKILL: .*; its log is ") as caught:
        run(scenario())
    log = Path(str(caught.value).rpartition("its log is ")[2])
    assert log.is_file()
    assert list(temporary.iterdir()) == [pools[0].log_dir], "only what the message names"


def test_a_lost_router_ends_the_pool(spec: ClusterSpec, temporary: Path) -> None:
    async def scenario() -> None:
        seen = Seen(spec, replaces=True)
        async with seen.pool:
            os.kill(seen.pool.pid("router"), signal.SIGKILL)
            async with asyncio.timeout(WAIT_S):
                await seen.pool.watch()

    with pytest.raises(PeerFault, match=r"the router was killed by SIGKILL: .*; its log is .*router\.log"):
        run(scenario())


@pytest.mark.parametrize(
    ("flag", "error", "words"),
    [
        ("--wrong", BadInput, r"^decode-0 does not take these flags: ended with status 2: .*this is wrong$"),
        ("--broken", StartupError, r"^decode-0 ended with status 1: flowprefill member: it is broken; its log is \S+$"),
    ],
)
def test_the_first_failure_ends_the_start(
    spec: ClusterSpec, temporary: Path, flag: str, error: type[Exception], words: str
) -> None:
    groups: list[int] = []

    async def scenario() -> None:
        seen = Seen(spec, replaces=True)
        seen.host.flags["decode-0"] = (flag,)
        try:
            async with seen.pool:
                raise AssertionError("it started")
        finally:
            groups.extend(int(event.detail.split()[1]) for event in seen.events if event.detail.startswith("pid"))

    with pytest.raises(error, match=words):
        run(scenario())
    assert len(groups) >= 2
    assert [group for group in groups if processes_of(group)] == []
    assert len(list(temporary.iterdir())) == (error is StartupError), "the log, where the message names it"


def test_told_to_end_while_starting(spec: ClusterSpec, temporary: Path) -> None:
    async def scenario() -> None:
        seen = Seen(spec, replaces=True)
        starting = asyncio.create_task(seen.pool.start())
        await seen.until(lambda: len(seen.events) >= 3)
        starting.cancel()
        await asyncio.wait([starting])
        await seen.pool.stop()

    run(scenario())
    assert list(temporary.iterdir()) == []


def test_hurrying_does_without_the_first_grace(
    spec: ClusterSpec, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_pool, "_END_GRACES_S", (60.0, 1.0))
    groups: list[int] = []

    async def scenario() -> None:
        seen = Seen(replace(spec, log_dir=temporary / "logs"), replaces=True)
        seen.host.flags["decode-0"] = ("--stubborn",)
        await seen.pool.start()
        groups.append(seen.pool.pid("decode-0"))
        ending = asyncio.create_task(seen.pool.stop())
        log = temporary / "logs" / "decode-0.log"
        await seen.until(lambda: said(log.read_text(), "told"))
        seen.pool.hurry()
        async with asyncio.timeout(50):
            await ending

    run(scenario())
    assert processes_of(groups[0]) == []
    assert [path.name for path in temporary.iterdir()] == ["logs"]

"""The launcher with small stand-ins for its children: graces, force, folders."""

import asyncio
import signal
from pathlib import Path

import pytest

from flowprefill_sglang.cluster import launcher
from flowprefill_sglang.cluster.launcher import ClusterSpec, LocalCluster
from flowprefill_sglang.errors import PeerFault, StartupError


class StandInChild:
    """Ends after so many interrupts; never by itself unless ``exit_status`` is set."""

    def __init__(self, interrupts_needed: float) -> None:
        self.exit_status: int | None = None
        self.interrupts = 0
        self.killed = False
        self.log = Path("x.log")
        self._needed = interrupts_needed

    def interrupt(self) -> None:
        self.interrupts += 1
        if self.interrupts >= self._needed:
            self.exit_status = 0

    def kill(self) -> None:
        self.killed = True
        if self.exit_status is None:
            self.exit_status = -signal.SIGKILL

    def last_words(self) -> str:
        return "its last words"


def cluster_of(**interrupts_needed: float) -> tuple[LocalCluster, dict[str, StandInChild]]:
    cluster = LocalCluster(ClusterSpec(model_path=Path("/none")))
    children = {name.replace("_", "-"): StandInChild(needed) for name, needed in interrupts_needed.items()}
    cluster._members = {name: launcher._Member(child, f"http://{name}") for name, child in children.items()}
    return cluster, children


@pytest.fixture
def short_graces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_INTERRUPT_GRACE_S", 0.05)
    monkeypatch.setattr(launcher, "_HURRY_GRACE_S", 0.05)
    monkeypatch.setattr(launcher, "_POLL_INTERVAL_S", 0.01)


@pytest.mark.usefixtures("short_graces")
def test_a_child_is_asked_twice_before_it_is_killed() -> None:
    cluster, children = cluster_of(router=2, prefill_0=1, decode_0=float("inf"))
    asyncio.run(cluster.stop())
    assert {name: child.exit_status for name, child in children.items()} == {
        "router": 0,
        "prefill-0": 0,
        "decode-0": -signal.SIGKILL,
    }
    assert children["decode-0"].interrupts == 2
    assert all(child.killed for child in children.values()), "what a child leaves behind is ended with it"
    assert cluster.names() == []


def test_hurrying_does_without_the_first_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_INTERRUPT_GRACE_S", 1_000)
    monkeypatch.setattr(launcher, "_HURRY_GRACE_S", 0.05)
    cluster, children = cluster_of(router=2, decode_0=float("inf"))

    async def scenario() -> None:
        stopping = asyncio.create_task(cluster.stop())
        while not children["router"].interrupts:  # noqa: ASYNC110 - a stand-in raises no event
            await asyncio.sleep(0)
        cluster.hurry()
        async with asyncio.timeout(10):
            await stopping

    asyncio.run(scenario())
    assert children["router"].exit_status == 0, "its second interrupt, at which it answers its clients"
    assert children["decode-0"].exit_status == -signal.SIGKILL


def test_the_watch_ends_when_the_last_of_a_kind_is_gone() -> None:
    seen = []
    cluster, children = cluster_of(router=1, prefill_0=1, decode_0=1, decode_1=1)
    cluster._on_progress = lambda event: seen.append((event.name, event.state))

    async def scenario() -> None:
        children["decode-1"].exit_status = 0
        watching = asyncio.create_task(cluster.watch())
        while not seen:  # noqa: ASYNC110 - the watch polls too
            await asyncio.sleep(0.001)
        assert not watching.done(), "the other decode instance serves on"
        children["decode-0"].exit_status = 1
        with pytest.raises(PeerFault, match=r"decode-0 ended with status 1\. The end of x\.log:\nits last words"):
            await watching

    asyncio.run(scenario())
    assert seen == [("decode-1", "stopped"), ("decode-0", "failed")]


def test_nothing_is_left_of_a_cluster_that_could_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def scenario() -> None:
        async with LocalCluster(ClusterSpec(model_path=tmp_path / "no-model")):
            pass

    with pytest.raises(StartupError, match="no model at"):
        asyncio.run(scenario())
    assert list(tmp_path.iterdir()) == []

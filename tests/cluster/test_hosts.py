"""What a pool expects of whoever runs its members, for every host there is: start, die, stop, drain, logs, room, names.

The members are stand-ins; a host cannot tell.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, TypeVar

import pytest

from flowprefill_sglang.cluster.local_pool import LocalHost
from flowprefill_sglang.cluster.members import Host, Order, Sight
from flowprefill_sglang.cluster.process_group import processes_of
from flowprefill_sglang.cluster.supervision import KINDS, Kind
from flowprefill_sglang.errors import PeerFault, StartupError
from flowprefill_testing.ray_pools import ray_nodes
from flowprefill_testing.stand_in_member import PROGRAM, said

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
WAIT_S = 60.0
GPUS = 3
"""That a host has for those members that take some. Nobody computes on them."""
Seen = TypeVar("Seen")


class MakeHost(Protocol):
    def __call__(self, gpus_each: int = 0) -> Host: ...


def local_host(stack: ExitStack) -> MakeHost:
    def make(gpus_each: int = 0) -> Host:
        return LocalHost(tuple(map(str, range(GPUS))), dict.fromkeys(KINDS, gpus_each)) if gpus_each else LocalHost()

    return make


def ray_host(stack: ExitStack) -> MakeHost:
    pytest.importorskip("ray")
    from flowprefill_sglang.cluster.ray_pool import connect

    nodes = stack.enter_context(ray_nodes(workers=1, gpus=GPUS))

    def make(gpus_each: int = 0) -> Host:
        host = connect(nodes.address)
        host.needs = dict.fromkeys(KINDS, ("GPU", gpus_each) if gpus_each else ("CPU", 1))
        return host

    return make


HOSTS = {"local": local_host, "ray": ray_host}


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.cluster)])
def make_host(request: pytest.FixtureRequest) -> Iterator[MakeHost]:
    with ExitStack() as stack:
        yield HOSTS[request.param](stack)


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return str(tmp_path / "model")


def order(name: str, model: str, *flags: str, log_dir: Path | None = None) -> Order:
    kind: Kind = "prefill" if name.startswith("prefill") else "decode"
    arguments = ("--model-path", model, *flags)
    log = str(log_dir) if log_dir else None
    return Order(name=name, kind=kind, model_path=model, arguments=arguments, log_dir=log, program=PROGRAM)


def with_host(make_host: MakeHost, scenario: Callable[[Host], object], gpus_each: int = 0) -> None:
    """Run it, and end everything."""

    async def run() -> None:
        host = make_host(gpus_each)
        try:
            async with asyncio.timeout(2 * WAIT_S):
                await scenario(host)
        finally:
            await host.end_all()

    asyncio.run(run())


async def until(look: Callable[[], Awaitable[Seen]], condition: Callable[[Seen], object]) -> Seen:
    async with asyncio.timeout(WAIT_S):
        while True:
            if condition(seen := await look()):
                return seen
            await asyncio.sleep(0.05)


async def seen(host: Host, name: str, condition: Callable[[Sight], object]) -> Sight:
    return await until(lambda: host.look(name), condition)


async def running(host: Host, *orders: Order) -> list[Sight]:
    """Start them; what is seen of them once they are ready to be told something."""
    for one in orders:
        host.start(one)
    sights = [await seen(host, one.name, lambda sight: sight.pid or sight.ended) for one in orders]
    for one in orders:
        await logged(host, one.name, "ready")
    return sights


async def logged(host: Host, name: str, words: str) -> str:
    return await until(lambda: host.log(name, 100), lambda text: words in text)


async def living(group: int) -> list[int]:
    return processes_of(group)


def exists(path: str) -> bool:
    return Path(path).exists()


async def ended(host: Host, name: str) -> Sight:
    return await seen(host, name, lambda sight: sight.ended is not None)


def test_members_run_under_their_names_at_addresses_of_their_own(make_host: MakeHost, model: str) -> None:
    async def scenario(host: Host) -> None:
        one, two = await running(host, order("prefill-3", model), order("decode-0", model))
        assert (one.ended, two.ended, one.waiting_for) == (None, None, "")
        assert len({one.url, two.url}) == len({one.pid, two.pid}) == 2
        log = await host.log("prefill-3", 100)
        port = one.url.rpartition(":")[2]
        assert f"'--port', '{port}', '--name', 'prefill-3', '--disaggregation-bootstrap-port'" in said(log, "flags")[0]
        assert exists(said(log, "folder")[0])
        assert "--name" not in said(await host.log("decode-0", 100), "flags")[0]
        assert (await host.log("decode-0", 1)).splitlines() == ["ready"]
        assert one.log.endswith("prefill-3.log")

    with_host(make_host, scenario)


def test_one_that_is_killed_is_seen_and_its_name_is_free_again(make_host: MakeHost, model: str) -> None:
    async def scenario(host: Host) -> None:
        (before,) = await running(host, order("prefill-0", model))
        folder = said(await host.log("prefill-0", 100), "folder")[0]
        os.kill(before.pid, signal.SIGKILL)
        after = await ended(host, "prefill-0")
        assert after.ended == "was killed by SIGKILL: ready"
        assert not after.wrong_use
        await host.remove("prefill-0")
        assert not exists(folder)
        (again,) = await running(host, order("prefill-0", model))
        assert again.ended is None
        assert again.pid != before.pid

    with_host(make_host, scenario)


def test_one_that_does_not_take_its_flags_says_so(make_host: MakeHost, model: str) -> None:
    async def scenario(host: Host) -> None:
        host.start(order("decode-0", model, "--wrong"))
        sight = await ended(host, "decode-0")
        assert sight.wrong_use
        assert "ended with status 2" in str(sight.ended)
        assert "this is wrong" in str(sight.ended)

    with_host(make_host, scenario)


def test_one_without_a_model_is_not_started(make_host: MakeHost) -> None:
    async def scenario(host: Host) -> None:
        host.start(order("decode-0", "/nowhere"))
        sight = await ended(host, "decode-0")
        assert "no model at /nowhere" in str(sight.ended)
        assert sight.pid == 0
        await host.remove("decode-0")

    with_host(make_host, scenario)


def test_one_that_is_asked_to_end_ends_by_itself(make_host: MakeHost, model: str) -> None:
    async def scenario(host: Host) -> None:
        await running(host, order("decode-0", model))
        await host.ask_to_end("decode-0")
        sight = await ended(host, "decode-0")
        assert "ended with status 0" in str(sight.ended)
        assert said(await host.log("decode-0", 100), "told") == ["SIGTERM"]

    with_host(make_host, scenario)


def test_removing_ends_what_does_not_want_to_and_all_it_has_started(make_host: MakeHost, model: str) -> None:
    async def scenario(host: Host) -> None:
        (sight,) = await running(host, order("prefill-0", model, "--stubborn"))
        log = await host.log("prefill-0", 100)
        child, folder = int(said(log, "child")[0]), said(log, "folder")[0]
        assert {sight.pid, child} <= set(processes_of(sight.pid))
        await host.remove("prefill-0")
        await until(lambda: living(sight.pid), lambda left: not left)
        assert not exists(folder)
        with pytest.raises(PeerFault, match="prefill-0 has no log"):
            await host.log("prefill-0", 10)
        assert (await host.look("prefill-0")).pid == 0
        await host.remove("prefill-0")

    with_host(make_host, scenario)


def test_the_end_interrupts_all_and_leaves_the_logs_alone(make_host: MakeHost, model: str, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    sights: list[Sight] = []

    async def scenario(host: Host) -> None:
        orders = [order(name, model, log_dir=logs) for name in ("prefill-0", "decode-0")]
        sights.extend(await running(host, *orders))

    with_host(make_host, scenario)
    for sight, name in zip(sights, ("prefill-0", "decode-0"), strict=True):
        assert processes_of(sight.pid) == []
        log = (logs / f"{name}.log").read_text()
        assert said(log, "told") == ["SIGINT"]
        assert not exists(said(log, "folder")[0])


@pytest.fixture
def long_first_grace(make_host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds."""
    for name in ("local_pool", "ray_pool"):
        if module := sys.modules.get(f"flowprefill_sglang.cluster.{name}"):
            monkeypatch.setattr(module, "_END_GRACES_S", (60.0, 1.0))
    return 60.0


def test_an_end_in_a_hurry_does_without_the_first_grace(
    make_host: MakeHost, model: str, long_first_grace: float
) -> None:
    sights: list[Sight] = []
    told_at = 0.0

    async def scenario(host: Host) -> None:
        nonlocal told_at
        sights.extend(await running(host, order("decode-0", model, "--stubborn")))
        host.hurry()
        told_at = time.monotonic()

    with_host(make_host, scenario)
    assert time.monotonic() - told_at < long_first_grace
    assert processes_of(sights[0].pid) == []


def test_what_there_is_no_room_for_is_known_before(make_host: MakeHost) -> None:
    async def scenario(host: Host) -> None:
        host.require_room({"prefill": 1, "decode": 1})
        with pytest.raises(StartupError):
            host.require_room({"prefill": 100_000, "decode": 1})

    with_host(make_host, scenario)


async def gpus_of(host: Host, name: str) -> list[str]:
    """What it sees, which is what it is said to have."""
    (gpus,) = said(await host.log(name, 100), "gpus")
    assert (await host.look(name)).gpus == gpus
    return gpus.split(",")


def test_members_have_gpus_of_their_own_and_their_successors_too(make_host: MakeHost, model: str) -> None:
    async def scenario(host: Host) -> None:
        names = ["prefill-0", "prefill-1", "decode-0"]
        sights = await running(host, *(order(name, model) for name in names))
        given = [gpu for name in names for gpu in await gpus_of(host, name)]
        assert sorted(given) == ["0", "1", "2"]
        os.kill(sights[1].pid, signal.SIGKILL)
        await ended(host, "prefill-1")
        await host.remove("prefill-1")
        await running(host, order("prefill-1", model))
        assert await gpus_of(host, "prefill-1") == [given[1]]

    with_host(make_host, scenario, gpus_each=1)


def test_one_that_comes_before_another_is_gone_waits_for_its_gpus(make_host: MakeHost, model: str) -> None:
    async def scenario(host: Host) -> None:
        await running(host, order("prefill-0", model))
        given = await gpus_of(host, "prefill-0")
        assert len(given) == 2
        host.start(order("decode-0", model))
        sight = await seen(host, "decode-0", lambda sight: "GPU" in sight.waiting_for)
        assert (sight.pid, sight.ended) == (0, None)
        await host.remove("prefill-0")
        await seen(host, "decode-0", lambda sight: sight.pid)
        await logged(host, "decode-0", "ready")
        assert set(given) & set(await gpus_of(host, "decode-0"))

    with_host(make_host, scenario, gpus_each=2)


def test_one_that_waits_for_gpus_may_be_given_up(make_host: MakeHost, model: str) -> None:
    async def scenario(host: Host) -> None:
        await running(host, order("prefill-0", model))
        host.start(order("decode-0", model))
        await seen(host, "decode-0", lambda sight: "GPU" in sight.waiting_for)
        await host.remove("decode-0")
        await host.remove("prefill-0")
        await running(host, order("prefill-0", model))
        assert (await host.look("decode-0")).pid == 0

    with_host(make_host, scenario, gpus_each=2)


def test_members_that_take_no_gpus_see_what_we_see(
    make_host: MakeHost, model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(host: Host) -> None:
        (sight,) = await running(host, order("decode-0", model))
        (gpus,) = said(await host.log("decode-0", 100), "gpus")
        assert (gpus, sight.gpus) == (str(os.environ.get("CUDA_VISIBLE_DEVICES")), "")

    if request.node.callspec.params["make_host"] == "local":  # on Ray they see what its nodes were started with
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with_host(make_host, scenario)


def test_more_gpus_than_there_are_is_one_clear_message(make_host: MakeHost) -> None:
    async def scenario(host: Host) -> None:
        host.require_room({"prefill": 2, "decode": 1})
        words = r"no room for .*3 prefill × 1 GPU and 1 decode × 1 GPU.*3 GPUs"
        with pytest.raises(StartupError, match=words):
            host.require_room({"prefill": 3, "decode": 1})

    with_host(make_host, scenario, gpus_each=1)

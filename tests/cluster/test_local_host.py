"""What is the local host's own: memory, cores and ports. What every host does is in ``test_hosts.py``."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from flowprefill_sglang.cluster import local_pool
from flowprefill_sglang.cluster.local_pool import LocalHost
from flowprefill_sglang.cluster.members import Order, in_one_line
from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_sglang.errors import StartupError
from flowprefill_testing.stand_in_member import PROGRAM

GIB = 2**30


def order(name: str, model: Path, **more: object) -> Order:
    kind = "prefill" if name.startswith("prefill") else "decode"
    arguments = ("--model-path", str(model))
    fields = {"arguments": arguments, "log_dir": None, "program": PROGRAM, **more}
    return Order(name=name, kind=kind, model_path=str(model), **fields)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("cores", "servers", "threads", "of_the_shell", "expected"),
    [
        (8, 3, None, None, 2),
        (2, 3, None, None, 1),
        (8, 3, 5, None, 5),
        (8, 3, None, "4", None),
        (8, 3, 5, "4", 5),
    ],
)
def test_members_divide_the_cores_unless_somebody_says_otherwise(
    cores: int,
    servers: int,
    threads: int | None,
    of_the_shell: str | None,
    expected: int | None,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if of_the_shell is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", of_the_shell)
    assert local_pool._threads(order("prefill-0", model, servers=servers, threads=threads)) == expected


def test_members_that_are_added_must_find_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        host = LocalHost()
        try:
            host.require_room({"prefill": 1, "decode": 1})
            for name in ("prefill-0", "prefill-1", "decode-0"):
                host.start(order(name, model))
            sizes = {(await host.look(name)).pid: size for name, size in SIZES.items()}
            monkeypatch.setattr(local_pool, "memory_bytes", sizes.__getitem__)
            monkeypatch.setattr(local_pool, "available_bytes", lambda: 6 * GIB)
            host.require_room({"prefill": 4, "decode": 1})
            host.require_room({"prefill": 1, "decode": 1})
            host.require_room({"prefill": 2, "decode": 7})
            words = "no room for 3 more prefill × 3.0 GiB and 1 more decode × 1.0 GiB: 6.0 GiB of memory are left"
            with pytest.raises(StartupError, match=re.escape(words)):
                host.require_room({"prefill": 5, "decode": 2})
        finally:
            host.hurry()
            await host.end_all()

    asyncio.run(scenario())


SIZES = {"prefill-0": 2 * GIB, "prefill-1": 3 * GIB, "decode-0": 1 * GIB}


def test_ports_that_are_given_away_are_not_given_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens on them yet: a server binds its port long after its start."""
    free = free_ports(10)
    monkeypatch.setattr("flowprefill_sglang.cluster.ports._CANDIDATES", free)

    async def scenario() -> None:
        host = LocalHost()
        try:
            names = [f"prefill-{number}" for number in range(4)]
            for name in names:
                host.start(order(name, model, taken_ports=tuple(free[:2])))
            ports = [port for process in host._processes.values() for port in process.ports]
            assert sorted(ports) == sorted(free[2:])
            host.start(order("decode-0", model, taken_ports=tuple(free[:2])))
            assert "free ports are needed" in str((await host.look("decode-0")).ended)
        finally:
            host.hurry()
            await host.end_all()

    asyncio.run(scenario())


def test_how_one_ended_in_a_line() -> None:
    assert in_one_line("") == ""
    assert in_one_line("was killed by SIGKILL: busy") == "was killed by SIGKILL: busy"
    assert in_one_line("ended with status 1: Traceback\n  File\nValueError: x") == (
        "ended with status 1: Traceback … ValueError: x"
    )
    assert in_one_line("x" * 1_000) == "x" * 200 + "…"

"""The control port of a running pool, and the commands that ask it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from flowprefill_sglang.cli.main import main
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_testing.stand_in_pools import Seen, run, watched


@pytest.fixture
def spec(tmp_path: Path) -> ClusterSpec:
    (tmp_path / "config.json").write_text("{}")
    return ClusterSpec(model_path=tmp_path, log_dir=tmp_path / "logs", api_key="secret")


def test_status_scale_and_logs(spec: ClusterSpec, capsys: pytest.CaptureFixture[str]) -> None:
    async def command(*words: str) -> tuple[int, str, str]:
        status = await asyncio.to_thread(main, words)
        return status, *capsys.readouterr()

    async def scenario() -> None:
        seen = Seen(spec, replaces=True)
        async with watched(seen):
            where = ("--control", seen.pool.control)
            status, shown, _ = await command("status", *where)
            assert status == 0
            first, sizes, titles, *rows = shown.splitlines()
            assert first == f"{seen.pool.url}  echo-model"
            assert sizes == "prefill: 1 of 1 ready, decode: 1 of 1 ready"
            assert titles.split() == ["NAME", "STATE", "FOR", "RESTARTS", "NODE", "PID", "REASON"]
            assert [row.split()[:2] for row in rows] == [["prefill-0", "ready"], ["decode-0", "ready"]]
            assert "secret" not in shown
            status, shown, _ = await command("status", "--json", *where)
            assert json.loads(shown)["members"][0]["pid"] == seen.pool.pid("prefill-0")

            seen.host.flags["prefill-1"] = ("--broken",)
            status, shown, _ = await command("scale", "--prefill", "2", *where)
            assert (status, shown) == (0, "prefill: 2, decode: 1; 'flowprefill status' shows the way\n")
            await seen.until(lambda: seen.member("prefill-1")["state"] == "backing_off")
            status, shown, _ = await command("status", *where)
            assert "last failure: ended with status 1: flowprefill member: it is broken" in shown
            assert (await command("scale", "--prefill", "1", *where))[0] == 0
            await seen.until(lambda: "prefill-1" not in seen.states())
            status, _, said = await command("scale", "--prefill", "20000", *where)
            assert (status, "flowprefill scale: " in said, len(said.splitlines())) == (2, True, 1)
            status, _, said = await command("scale", "--prefill", "9999", *where)
            assert (status, "ports" in said or "no room" in said, len(said.splitlines())) == (1, True, 1)

            status, shown, _ = await command("logs", "prefill-0", "--lines", "1", *where)
            assert (status, shown) == (0, "ready\n")
            status, _, said = await command("logs", "prefill-9", *where)
            assert (status, "no member is called 'prefill-9'" in said) == (2, True)

    run(scenario())


def test_what_prometheus_asks_and_what_is_wrong(spec: ClusterSpec) -> None:
    async def scenario() -> None:
        seen = Seen(spec, replaces=True)
        async with watched(seen), aiohttp.ClientSession(seen.pool.control) as session:

            async def ask(method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
                async with session.request(method, path, data=body) as answer:
                    return answer.status, await answer.json()

            _, targets = await ask("GET", "/prometheus/targets")
            assert [row["labels"] for row in targets] == [
                {"name": "router", "role": "router"},
                {"name": "prefill-0", "role": "prefill"},
            ]
            assert targets[1]["targets"] == [seen.pool.member_url("prefill-0").removeprefix("http://")]
            for body in (b"", b"{", b"[]", b"{}", b'{"prefil": 1}', b'{"prefill": 0}', b'{"decode": "2"}'):
                status, answer = await ask("POST", "/scale", body)
                assert (status, bool(answer["error"]["message"])) == (400, True), body
            assert (await ask("POST", "/scale", b'{"prefill": 9999}'))[0] == 409
            assert (await ask("GET", "/nothing"))[0] == 404
            assert (await ask("GET", "/logs/router?lines=no"))[0] == 400
            assert seen.pool.status()["desired"] == {"prefill": 1, "decode": 1}

    run(scenario())

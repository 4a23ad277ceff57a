"""``flowprefill demo``: flags, exit status and results, with a stand-in for the cluster."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
from aiohttp import web

from flowprefill_sglang.cli import demo
from flowprefill_sglang.cluster.launcher import ClusterSpec, LaunchEvent
from flowprefill_sglang.errors import PeerFault


class StandInCluster:
    """Has ``LocalCluster``'s interface; serves an answer of the right length, or fails as the test wants."""

    specs: ClassVar[list[ClusterSpec]] = []
    stopped: ClassVar[int] = 0
    refuse_after: ClassVar[int | None] = None
    dies: ClassVar[bool] = False
    terminates: ClassVar[bool] = False

    def __init__(self, spec: ClusterSpec, on_progress: Any) -> None:
        self.specs.append(spec)
        self.on_progress = on_progress
        self.served = 0

    async def __aenter__(self) -> StandInCluster:
        app = web.Application()
        app.router.add_get("/v1/models", self.list_models)
        app.router.add_post("/generate", self.generate)
        self.runner = web.AppRunner(app, shutdown_timeout=1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        self.on_progress(LaunchEvent("router", "ready", 1.0))
        return self

    async def __aexit__(self, *error: object) -> None:
        type(self).stopped += 1
        await self.runner.cleanup()

    async def watch(self) -> None:
        while not (self.dies and self.served > 3):  # noqa: ASYNC110 - as the real one does
            await asyncio.sleep(0.001)
        raise PeerFault("the cluster cannot serve any more: decode-0 ended with status 1")

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "/models/tiny", "max_model_len": 16_384}]})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.served += 1
        if self.terminates and self.served == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        if (self.dies and self.served > 3) or (self.terminates and self.served >= 20):
            await asyncio.Event().wait()
        if self.refuse_after is not None and self.served > self.refuse_after:
            return web.Response(status=503, text="[red]no worker[/red]")
        tokens = (await request.json())["sampling_params"]["max_new_tokens"]
        response = web.StreamResponse()
        await response.prepare(request)
        event = {"text": "x" * tokens, "meta_info": {"completion_tokens": tokens}}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\ndata: [DONE]\n\n")
        return response


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[StandInCluster]:
    class Fresh(StandInCluster):
        specs: ClassVar[list[ClusterSpec]] = []
        stopped = 0

    monkeypatch.setattr(demo, "LocalCluster", Fresh)
    monkeypatch.setattr(demo, "make_tiny_model", lambda: tmp_path / "model")
    return Fresh


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    demo.add_demo_arguments(parser)
    return demo.run_demo(parser.parse_args([str(a) for a in arguments]))


FAST = ("--rate-scale", 1_000, "--requests", 20)


def test_all_answered(cluster: type[StandInCluster], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FAST, "--prefill", 3, "--decode", 2, "--json", tmp_path / "out.json") == 0
    (spec,) = cluster.specs
    assert (spec.prefill, spec.decode, cluster.stopped) == (3, 2, 1)
    assert "20 of 20 requests succeeded" in " ".join(capsys.readouterr().out.split())
    document = json.loads((tmp_path / "out.json").read_text())
    assert (document["requests"], document["succeeded"]) == (20, 20)
    assert set(document["classes"]) == {"text", "image", "search", "file"}
    assert document["workload"]["seed"] == 0
    assert document["server"] == {"prefill": 3, "decode": 2}
    assert {"commit", "versions", "hardware", "command"} <= set(document)
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_one_failure_is_a_failure(
    cluster: type[StandInCluster], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.refuse_after = 4 * 4 + 19  # the single requests, and all but one of the load
    assert run(*FAST, "--json", tmp_path / "out.json") == 1
    assert "1 × HTTP 503: [red]no worker[/red]" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["succeeded"] == 19
    assert cluster.stopped == 1


def test_a_dying_cluster_ends_the_demo_at_once(cluster: type[StandInCluster]) -> None:
    cluster.dies = True
    with pytest.raises(PeerFault, match="decode-0 ended"):
        run(*FAST, "--timeout-s", 1_000)
    assert cluster.stopped == 1


def test_sigterm_takes_the_cluster_down(cluster: type[StandInCluster]) -> None:
    cluster.terminates = True
    assert run(*FAST, "--timeout-s", 1_000) == 128 + signal.SIGTERM
    assert cluster.stopped == 1


def test_a_running_server_is_used_and_left_alone(cluster: type[StandInCluster]) -> None:
    async def main() -> int:
        async with cluster(ClusterSpec(model_path=Path()), lambda event: None) as running:
            status = await asyncio.to_thread(run_without_signals, running.url)
            assert running.served == 4 * 4 + 20
            return status

    def run_without_signals(url: str) -> int:  # signal handlers belong to the main thread
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio.SelectorEventLoop, "add_signal_handler", lambda *_: None)
            return run(*FAST, "--url", url)

    assert asyncio.run(main()) == 0
    assert cluster.stopped == 1


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.5,{700 * second},44\n" for second in range(1, 11)
)


def test_a_trace_slice(cluster: type[StandInCluster], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(AZURE + "broken\n")
    flags = ("--trace", trace, "--format", "azure", "--rate-scale", 1_000, "--start-s", 2, "--duration-s", 5)
    out = tmp_path / "out.json"
    assert run(*flags, "--limit", 3) == 2
    assert f"{trace}:12: expected TIMESTAMP" in capsys.readouterr().err
    assert cluster.specs == [], "wrong use must not start a cluster first"
    assert run(*flags, "--limit", 3, "--skip-bad-rows", "--length-scale", 0.5, "--json", out) == 0
    document = json.loads(out.read_text())
    assert [r["input_tokens"] for r in document["records"]] == [1_050, 1_400, 1_750]
    assert [r["class_name"] for r in document["records"]] == ["search", "search", "search"]
    assert (document["length_factor"], document["workload"]["skipped_rows"]) == (0.5, 1)
    assert len(document["workload"]["sha256"]) == 64


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--trace", "x"), "--trace and --format go together"),
        (("--format", "azure"), "--trace and --format go together"),
        (("--trace", "x", "--format", "azure"), "cannot be read"),
        (("--trace", "x", "--format", "azure", "--requests", 3), "use --limit"),
        (("--url", "http://x", "--prefill", 2), "--prefill starts a cluster and --url uses one"),
        (("--url", "localhost:30000"), "expected an address like http://127.0.0.1:30000"),
        (("--json", "/nowhere/out.json"), "does not exist"),
        (("--start-s", 1e9), "no request"),
        (("--length-scale", 3), "the largest scale that fits"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    arguments: tuple[object, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--requests", "0", "whole number of at least 1"),
        ("--requests", "2.5", "whole number of at least 1"),
        ("--limit", "many", "whole number of at least 1"),
        ("--rate-scale", "-1", "number above 0"),
        ("--length-scale", "nan", "number above 0"),
        ("--duration-s", "-3", "number of seconds, 0 or more"),
        ("--format", "parquet", "azure"),
    ],
)
def test_wrong_values_say_what_was_expected(
    flag: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(flag, value)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err

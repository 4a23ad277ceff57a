"""``flowprefill demo``: flags, exit status and results, with a stand-in for the cluster."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from aiohttp import web

from flowprefill_sglang.cli import demo, demo_run
from flowprefill_sglang.cluster.launcher import ClusterSpec, LaunchEvent
from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.observe.events import Event, TaskFinished, TaskPreempted, TaskResumed, TaskStarted
from flowprefill_testing.recorded_workers import RecordedWorkers


class StandInCluster:
    """Has a pool's interface; serves an answer of the right length, or fails as the test wants."""

    specs: ClassVar[list[ClusterSpec]] = []
    stopped: ClassVar[int] = 0
    refuse_after: ClassVar[int | None] = None
    dies: ClassVar[bool] = False
    terminates: ClassVar[bool] = False
    headers: ClassVar[list[tuple[str, str]]] = []
    has_events: ClassVar[bool] = True

    def __init__(self, spec: ClusterSpec, on_progress: Any, *, replaces: bool) -> None:
        assert not replaces, "what is compared must not change on the way"
        self.specs.append(spec)
        self.on_progress = on_progress
        self.served = 0
        self.workers = RecordedWorkers([])

    async def __aenter__(self) -> StandInCluster:
        app = web.Application()
        app.router.add_get("/v1/models", self.list_models)
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/server_info", self.server_info)
        self.workers.add_routes(app.router)
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

    def member_url(self, name: str) -> str:
        assert name == "prefill-0"
        return self.url

    async def server_info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"schedule_policy": "fcfs", "chunked_prefill_size": 4096, "max_prefill_tokens": 16384, "other": None}
        )

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
        body = await request.json()
        tokens = body["sampling_params"]["max_new_tokens"]
        if body["rid"].startswith("load-"):
            self.headers.append((request.headers["x-slo-class"], request.headers["x-sgl-ttft-slo-ms"]))
            self.workers.events[0].extend(
                events_of(self.served, body["rid"], "flowprefill" in self.specs[-1].prefill_arguments)
            )
        response = web.StreamResponse()
        await response.prepare(request)
        event = {"text": "x" * tokens, "meta_info": {"completion_tokens": tokens}}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\ndata: [DONE]\n\n")
        return response


def events_of(task: int, rid: str, is_preempted: bool) -> list[Event]:
    """A request's prefill of 2 ms, just now on a clock that says 0 when the recording is taken."""
    common = {"task": task, "rids": [rid]}
    events: list[Event] = [
        TaskStarted(at=-0.004, new_tokens=10, cached_tokens=0, predicted_s=0.1, deadline_at=1e9, **common),
        TaskFinished(at=-0.001, new_tokens=10, executed_s=0.002, predicted_s=0.1, preemptions=0, **common),
    ]
    if is_preempted:
        events[1:1] = [
            TaskPreempted(at=-0.003, victim_class="text", by_class="text", blocking_s=0.001, **common),
            TaskResumed(at=-0.002, suspended_s=0.001, **common),
        ]
    return events if rid.endswith("-3") else []  # one at a time, as a worker does


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[StandInCluster]:
    class Fresh(StandInCluster):
        specs: ClassVar[list[ClusterSpec]] = []
        headers: ClassVar[list[tuple[str, str]]] = []
        stopped = 0

    monkeypatch.chdir(tmp_path)  # where the picture goes
    monkeypatch.setattr(demo_run, "pool_here", Fresh)
    monkeypatch.setattr(demo, "make_tiny_model", lambda: tmp_path / "model")
    return Fresh


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    demo.add_demo_arguments(parser)
    return demo.run_demo(parser.parse_args([str(a) for a in arguments]))


FAST = ("--rate-scale", 1_000, "--requests", 20)


def test_both_schedulers_side_by_side(
    cluster: type[StandInCluster], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*FAST, "--prefill", 3, "--decode", 2, "--json", tmp_path / "out.json") == 0
    assert [spec.prefill_arguments for spec in cluster.specs] == [
        ("--prefill-scheduler", "stock"),
        ("--prefill-scheduler", "flowprefill"),
    ]
    assert {(spec.prefill, spec.decode) for spec in cluster.specs} == {(3, 2)}
    assert cluster.stopped == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "FlowPrefill | stock SGLang" in out
    assert "stock SGLang: 20 of 20 requests succeeded" in out
    assert "FlowPrefill suspended running prefills 1 times, stock SGLang 0 times" in out
    assert "--schedule-policy fcfs --chunked-prefill-size 4096 --max-prefill-tokens 16384" in out
    document = json.loads((tmp_path / "out.json").read_text())
    assert (document["requests"], document["succeeded"]) == (20, 20)
    assert set(document["classes"]) == {"text", "image", "search", "file"}
    assert document["workload"]["seed"] == 0
    assert document["server"] == {"prefill": 3, "decode": 2}
    assert {"commit", "versions", "hardware", "command", "schedulers"} <= set(document)
    assert {name: s["preemptions"] for name, s in document["schedulers"].items()} == {"flowprefill": 1, "stock": 0}
    assert document["timeline"] == "flowprefill-timeline.png"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flowprefill-timeline.png", "out.json"]


def test_both_schedulers_get_the_same_requests_with_the_same_objectives(
    cluster: type[StandInCluster], tmp_path: Path
) -> None:
    assert run(*FAST, "--json", tmp_path / "out.json", "--no-timeline") == 0
    document = json.loads((tmp_path / "out.json").read_text())
    stock, flow = (document["schedulers"][name] for name in ("stock", "flowprefill"))
    same = ("class_name", "input_tokens", "output_tokens", "scheduled_at")
    assert [[r[k] for k in same] for r in stock["records"]] == [[r[k] for k in same] for r in flow["records"]]
    assert {n: c["slo_ms"] for n, c in stock["classes"].items()} == {n: c["slo_ms"] for n, c in flow["classes"].items()}
    assert sorted(cluster.headers[:20]) == sorted(cluster.headers[20:])
    assert {name for name, _ in cluster.headers} == {"text", "image", "search", "file"}
    assert (document["timeline"], list(tmp_path.iterdir())) == (None, [tmp_path / "out.json"])


def test_one_scheduler_alone(cluster: type[StandInCluster], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FAST, "--scheduler", "stock", "--json", tmp_path / "out.json", "--timeline", "t.svg") == 0
    assert cluster.stopped == 1
    assert "20 of 20 requests succeeded" in " ".join(capsys.readouterr().out.split())
    assert list(json.loads((tmp_path / "out.json").read_text())["schedulers"]) == ["stock"]
    assert (tmp_path / "t.svg").exists()


def test_without_matplotlib_there_is_a_table_and_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(*FAST, "--json", tmp_path / "out.json") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "FlowPrefill | stock SGLang" in out
    assert "no timeline drawn: a picture needs Matplotlib: pip install 'flowprefill-sglang[plot]'" in out
    assert json.loads((tmp_path / "out.json").read_text())["timeline"] is None


def test_one_failure_is_a_failure(
    cluster: type[StandInCluster], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.refuse_after = 4 * 4 + 19  # the single requests, and all but one of the load
    assert run(*FAST, "--json", tmp_path / "out.json") == 1
    assert "stock SGLang: 1 × HTTP 503: [red]no worker[/red]" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["succeeded"] == 19
    assert cluster.stopped == 2


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
        async with cluster(ClusterSpec(model_path=Path()), lambda event: None, replaces=False) as running:
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
        (("--timeline", "/nowhere/out.png"), "--timeline: the folder /nowhere does not exist"),
        (("--timeline", "out.txt"), "--timeline: expected a file that ends in .png, .svg, .pdf, got 'out.txt'"),
        (("--url", "http://x", "--scheduler", "stock"), "--scheduler starts a cluster and --url uses one"),
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

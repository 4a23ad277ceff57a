"""``flowprefill bench suite``: flags, exit status and results, with stand-ins for the servers."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest

from flowprefill_sglang.cli import bench_suite
from flowprefill_sglang.cli.main import main
from flowprefill_sglang.errors import PeerFault
from flowprefill_testing.streaming_server import StreamingServer, served

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:{minute:02}:{second:02}.5,{100 + second},44\n" for minute in range(2) for second in range(60)
)
STATED = ("--slo", "text=300", "--minutes", "0.1")


class StandInWorkers:
    """Has ``LiveWorkers``' interface."""

    made: ClassVar[list[Any]] = []
    stopped: ClassVar[int] = 0
    dies: ClassVar[bool] = False
    is_pinned = False

    def __init__(self, model: Path, configurations: Any, *, log_dir: Path | None, flags: Any) -> None:
        self.made.append((model, [c.name for c in configurations], flags))
        self.configurations = configurations
        self.servers: dict[str, Any] = {}

    async def __aenter__(self) -> StandInWorkers:
        self.stack = AsyncExitStack()
        for configuration in self.configurations:
            url = await self.stack.enter_async_context(served(StreamingServer(seconds_per_token=0.0005)))
            self.servers[configuration.name] = StandInServer(url)
        return self

    async def __aexit__(self, *error: object) -> None:
        type(self).stopped += 1
        await self.stack.aclose()

    def __getitem__(self, name: str) -> StandInServer:
        return self.servers[name]

    async def watch(self) -> None:
        await asyncio.sleep(0.3 if self.dies else 3_600)
        raise PeerFault("prefill-fcfs was killed by SIGKILL under load")


class StandInServer:
    def __init__(self, url: str) -> None:
        self.url = url

    async def drained(self) -> None:
        pass

    def scheduler_cpu_s(self) -> float:
        return 0.0


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[StandInWorkers]:
    class Fresh(StandInWorkers):
        made: ClassVar[list[Any]] = []
        stopped = 0

    monkeypatch.setattr(bench_suite, "LiveWorkers", Fresh)
    monkeypatch.setattr(bench_suite, "make_deep_model", lambda: (tmp_path / "deep", None))
    return Fresh


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    return path


def suite(*arguments: object) -> int:
    return main(["bench", "suite", *map(str, arguments)])


def test_the_quick_suite_writes_its_report(
    workers: type[StandInWorkers], trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    report, out = tmp_path / "report", tmp_path / "s.json"
    flags = ("--only", "flowprefill,fcfs,priority", "--quick", *STATED, "--mem-fraction-static", "0.2")
    assert suite("--trace", trace, "--format", "azure", *flags, "--report", report, "--json", out) == 0
    document = json.loads(out.read_text())
    assert set(document["configs"]) == {"flowprefill", "fcfs", "priority"}
    assert all(isinstance(ratio, float) for ratio in document["ratios"].values())
    assert set(document["ratios"]) == {"flowprefill/fcfs", "flowprefill/priority"}
    assert {"commit", "hardware", "versions", "command", "seed", "trace", "rows"} <= set(document)
    assert document["trace"]["files"][0]["sha256"] is not None
    assert {path.name for path in report.iterdir()} == {
        "report.md",
        "result.json",
        "attainment-rate.png",
        "attainment-slo-scale.png",
    }
    page = (report / "report.md").read_text()
    assert "| `fcfs` | `--prefill-scheduler stock" in page
    assert "figures mean nothing" in page
    assert workers.stopped == 1
    model, names, sglang_flags = workers.made[0]
    assert (model.name, names) == ("deep", ["flowprefill", "fcfs", "priority"])
    assert sglang_flags[-2:] == ("--mem-fraction-static", "0.2"), "flags that are not its own go to SGLang"
    assert "Max goodput: requests/s with 90% in time" in capsys.readouterr().out


def test_all_of_stock_sglangs_schedulers_are_measured_by_default() -> None:
    names = [configuration.name for configuration in bench_suite.SUITE]
    stock = ["fcfs", "fcfs-8192", "fcfs-2048", "fcfs-512", "shortest-prefill-first", "hrrn", "priority"]
    assert names == ["flowprefill", *stock]
    flags = {c.name: " ".join(c.flags) for c in bench_suite.SUITE}
    assert "--chunked-prefill-size -1" in flags["fcfs"]
    assert "--enable-priority-scheduling" in flags["priority"]


def test_a_server_that_dies_ends_the_suite_and_everything_it_started(
    workers: type[StandInWorkers], trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workers.dies = True
    assert suite("--trace", trace, "--format", "azure", "--only", "flowprefill,fcfs", "--quick", *STATED) == 1
    error = capsys.readouterr().err
    assert error == "flowprefill bench suite: prefill-fcfs was killed by SIGKILL under load\n"
    assert workers.stopped == 1


def test_traces_are_merged_by_their_times(trace: Path, tmp_path: Path) -> None:
    mooncake = tmp_path / "m.jsonl"
    rows = [{"timestamp": 1_500 * n, "input_length": 600, "output_length": 9, "hash_ids": [n]} for n in range(20)]
    mooncake.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "s.json"
    both = ("--trace", trace, "--format", "azure", "--trace", mooncake, "--format", "mooncake")
    assert suite(*both, "--only", "flowprefill,fcfs", "--quick", *STATED, "--json", out) == 0
    document = json.loads(out.read_text())
    assert [file["file"] for file in document["trace"]["files"]] == ["trace.csv", "m.jsonl"]
    assert document["trace"]["requests"] == 140


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--trace", "absent", "--format", "azure"), "the trace cannot be read"),
        (("--trace", "a", "--trace", "b", "--format", "azure"), "each --trace needs its --format"),
        (("--trace", "TRACE", "--format", "azure", "--limit", "3"), "too few for 3 windows"),
        (("--trace", "TRACE", "--format", "azure", "--max-tokens", "1"), "too few"),
        (("--trace", "TRACE", "--format", "azure", "--json", "/nowhere/x"), "does not exist"),
        (("--trace", "TRACE", "--format", "azure", "--report", "/nowhere/x"), "cannot be made"),
    ],
)
def test_wrong_use_is_one_line_and_status_2_before_anything_is_started(
    workers: type[StandInWorkers],
    trace: Path,
    flags: tuple[str, ...],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert suite(*(str(trace) if flag == "TRACE" else flag for flag in flags)) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert workers.made == []


def test_no_model_there(workers: type[StandInWorkers], trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite("--trace", trace, "--format", "azure", "--model-path", trace.parent) == 1
    assert "it has no config.json" in capsys.readouterr().err


def test_unknown_configurations_are_named(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        suite("--trace", trace, "--format", "azure", "--only", "fcfs,magic")
    assert caught.value.code == 2
    assert "got magic" in capsys.readouterr().err

"""``flowprefill timeline``: what it writes, and what it says when there is nothing to write."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from pathlib import Path

import msgspec
import pytest

from flowprefill_sglang.cli import timeline
from flowprefill_sglang.errors import BadInput, PeerFault, StartupError
from flowprefill_sglang.observe import recording
from flowprefill_testing.recorded_workers import RecordedWorkers, one_prefill, served


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    timeline.add_timeline_arguments(parser)
    return timeline.run_timeline(parser.parse_args([str(a) for a in arguments]))


def run_on(workers: RecordedWorkers, *arguments: object) -> int:
    async def main() -> int:
        async with served(workers) as url, asyncio.timeout(60):
            return await asyncio.to_thread(run, "--url", url, "--seconds", 0.05, *arguments)

    return asyncio.run(main())


def test_a_picture_of_every_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "t.png"
    workers = RecordedWorkers(one_prefill("a", -0.04, -0.01), one_prefill("b", -0.03, -0.02))
    assert run_on(workers, "-o", picture) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out


def test_raw_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.json"
    assert run_on(RecordedWorkers(one_prefill("a"), one_prefill("b")), "-o", out) == 0
    document = json.loads(out.read_text())
    assert document["seconds"] == 0.05
    assert [worker["worker"] for worker in document["workers"]] == ["prefill-0", "prefill-1"]
    read = recording.decode(msgspec.json.encode(document["workers"][0]))
    assert read.events == one_prefill("a")
    assert "8 events of 2 prefill workers" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_nothing_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "t.png"
    assert run_on(RecordedWorkers([], []), "-o", picture) == 1
    assert "no prefill in 0.05 s on prefill-0, prefill-1" in capsys.readouterr().err
    assert not picture.exists()


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    really_sleep = asyncio.sleep  # the HTTP server sleeps too, for 0 s

    async def sleep(seconds: float) -> None:
        assert seconds < 1, "waited for nothing"
        await really_sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)


@pytest.mark.usefixtures("no_wait")
def test_no_worker_is_known_before_the_wait(tmp_path: Path) -> None:
    with pytest.raises(PeerFault, match="in touch with no prefill worker"):
        run_on(RecordedWorkers(), "--seconds", 500, "-o", tmp_path / "t.png")
    with pytest.raises(PeerFault, match=r"no answer from http://127\.0\.0\.1:1"):
        run("--url", "http://127.0.0.1:1", "--seconds", 500, "-o", tmp_path / "t.png")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-o", "/nowhere/t.png"), "--output: the folder /nowhere does not exist"),
        (("-o", "t.txt"), r"expected a file that ends in \.png, \.svg, \.pdf, \.json, got 't\.txt'"),
        (("-o", "t.png", "--url", "localhost:30000"), "expected an address like http://127.0.0.1:30000"),
    ],
)
def test_wrong_use(arguments: tuple[str, ...], expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        run("--seconds", 1, *arguments)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "601", "soon", str(math.inf)])
def test_wrong_seconds(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--seconds", seconds, "-o", "t.png")
    assert "expected a number of seconds above 0 and up to 600" in capsys.readouterr().err


def test_without_matplotlib_it_says_so_before_the_wait_and_still_writes_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(StartupError, match=r"flowprefill-sglang\[plot\]"):
        run("--url", "http://127.0.0.1:1", "--seconds", 500, "-o", tmp_path / "t.png")
    assert run_on(RecordedWorkers(one_prefill()), "-o", tmp_path / "t.json") == 0

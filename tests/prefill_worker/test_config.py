"""A worker's own flags."""

import argparse
import os

import pytest

from flowprefill_sglang.prefill_worker import config
from flowprefill_sglang.prefill_worker.config import WorkerConfig
from flowprefill_sglang.prefill_worker.settings import RunAheadKind


def parse(*words: str) -> WorkerConfig:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    return config.from_arguments(parser.parse_args(words))


def test_flags() -> None:
    words = ("--router", "tcp://[fd00::1]:30100", "--name", "w7", "--shutdown-drain-secs", "0.5")
    words += ("--unresponsive-secs", "7")
    assert parse(*words) == WorkerConfig(
        router="tcp://[fd00::1]:30100", name="w7", leave_after_s=0.5, unresponsive_s=7.0
    )


def test_how_far_a_gpu_may_be_behind() -> None:
    assert parse("--router", "tcp://h:1", "--run-ahead", "synchronise").scheduler.run_ahead is RunAheadKind.SYNCHRONISE


def test_defaults() -> None:
    parsed = parse("--router", "tcp://router:30100")
    assert parsed.name.endswith(f"-{os.getpid()}")
    assert parsed == WorkerConfig(router="tcp://router:30100", name=parsed.name)


@pytest.mark.parametrize(
    "router", ["", "localhost:1", "tcp://", "tcp://host", "tcp://host:0", "tcp://:1", "http://h:1"]
)
def test_a_wrong_router_address(router: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--router", router)
    assert caught.value.code == 2
    assert "expected tcp://HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "soon"])
def test_a_wrong_time(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--router", "tcp://h:1", "--shutdown-drain-secs", seconds)
    assert caught.value.code == 2
    assert "expected a number of seconds, 0 or more" in capsys.readouterr().err


def test_the_blocking_target() -> None:
    assert parse("--router", "tcp://h:1", "--max-blocking-ms", "0.5").scheduler.max_blocking_ms == 0.5
    assert parse("--router", "tcp://h:1", "--max-blocking-ms", "0").scheduler.max_blocking_ms == 0
    assert parse("--router", "tcp://h:1").scheduler.max_blocking_ms is None


def test_a_negative_blocking_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--router", "tcp://h:1", "--max-blocking-ms", "-2")
    assert "expected a number of milliseconds, 0 or more" in capsys.readouterr().err

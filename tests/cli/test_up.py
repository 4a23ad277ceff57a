"""``flowprefill up`` with a stand-in for the cluster: signals, exit statuses, the ready file, what it prints."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from flowprefill_sglang.cli import up
from flowprefill_sglang.cli.main import main
from flowprefill_sglang.cluster.launcher import ClusterSpec
from flowprefill_sglang.cluster.local_pool import ADDRESS, LocalHost
from flowprefill_sglang.cluster.pool_starting import RunningPool
from flowprefill_sglang.errors import BadInput, PeerFault, StartupError


class StandInCluster(RunningPool):
    """Starts nothing. ``script`` names what happens, in order; a signal goes to this very process."""

    script: tuple[str, ...] = ()
    ready_file: Path | None = None

    def __init__(self, spec: ClusterSpec, on_progress: object) -> None:
        super().__init__(spec, LocalHost(), ADDRESS, on_progress)
        if "taken" in self.script:
            raise StartupError("cannot listen on 127.0.0.1:1")
        type(self).made.append(self)
        self.stopped = 0
        self.seen: list[bool] = []

    made: list[StandInCluster] = []  # noqa: RUF012 - replaced by the fixture

    async def start(self) -> None:
        self.seen.append(self.ready_file is not None and self.ready_file.exists())
        if "signal while starting" in self.script:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        if "fail" in self.script:
            raise StartupError("decode-0 ended with status 1")
        self.url, self.model, self._folder = "http://127.0.0.1:1", "tiny", Path("/logs")

    async def watch(self) -> None:
        self.seen.append(self.ready_file is not None and self.ready_file.exists())
        if "die" in self.script:
            raise PeerFault("the cluster cannot serve any more")
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    async def stop(self, *, keep_logs: bool = False) -> None:
        self.stopped += 1
        self.kept_logs = keep_logs
        if "signal while stopping" in self.script:
            os.kill(os.getpid(), signal.SIGINT)
            while not self._in_a_hurry:  # noqa: ASYNC110 - as the real one does
                await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandInCluster]:
    class Fresh(StandInCluster):
        made: list[StandInCluster] = []  # noqa: RUF012 - this class lives for one test

    monkeypatch.setattr(up, "pool_here", Fresh)
    monkeypatch.setattr(up, "make_tiny_model", lambda: Path("/model"))
    return Fresh


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    up.add_up_arguments(parser)
    namespace, namespace.rest = parser.parse_known_args([str(word) for word in words])
    return up.run_up(namespace)


def test_until_ctrl_c(stand_in: type[StandInCluster], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in.ready_file = tmp_path / "ready.json"
    stand_in.ready_file.write_text("of a launcher that was killed")
    assert run("--ready-file", stand_in.ready_file, "--api-key", "secret", "--tp-size", 2) == 0
    (cluster,) = stand_in.made
    assert cluster.seen == [False, True], "the ready file is there while the cluster is ready, and only then"
    assert not stand_in.ready_file.exists()
    assert (cluster.stopped, cluster.kept_logs) == (1, False)
    assert cluster.spec.sglang_arguments == ("--tp-size", "2")
    assert cluster.spec.prefill_arguments == ("--prefill-scheduler", "flowprefill")
    printed = capsys.readouterr().out
    assert "curl http://127.0.0.1:1/generate" in printed
    assert "Bearer KEY" in printed
    assert "secret" not in printed


def test_the_prefill_workers_have_flags_of_their_own(stand_in: type[StandInCluster]) -> None:
    assert run("--prefill-scheduler", "stock", "--prefill-args", "--scheduler-policy sedf") == 0
    assert stand_in.made[0].spec.prefill_arguments == ("--prefill-scheduler", "stock", "--scheduler-policy", "sedf")


def test_the_ready_file_is_what_scripts_expect(tmp_path: Path) -> None:
    cluster = StandInCluster(ClusterSpec(model_path=tmp_path), None)
    cluster.url = "http://127.0.0.1:1"
    up._write_ready_file(tmp_path / "ready", cluster)
    expected = {"url": "http://127.0.0.1:1", "control": "", "workers": []}
    assert json.loads((tmp_path / "ready").read_text()) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["ready"]


def test_told_to_stop_before_it_was_ready(stand_in: type[StandInCluster]) -> None:
    stand_in.script = ("signal while starting",)
    assert run() == 128 + signal.SIGTERM
    assert stand_in.made[0].stopped == 1


def test_a_second_ctrl_c_hurries(stand_in: type[StandInCluster]) -> None:
    stand_in.script = ("signal while stopping",)
    assert run() == 0


@pytest.mark.parametrize(("script", "error"), [("fail", StartupError), ("die", PeerFault)])
def test_what_breaks_is_raised_after_everything_was_stopped(
    stand_in: type[StandInCluster], tmp_path: Path, script: str, error: type[Exception]
) -> None:
    stand_in.script = (script,)
    with pytest.raises(error):
        run("--ready-file", tmp_path / "ready.json")
    assert (stand_in.made[0].stopped, stand_in.made[0].kept_logs) == (1, True)
    assert not (tmp_path / "ready.json").exists()


def test_a_second_up_leaves_the_first_ones_ready_file(stand_in: type[StandInCluster], tmp_path: Path) -> None:
    stand_in.script = ("taken",)
    (tmp_path / "ready.json").write_text("of the first")
    with pytest.raises(StartupError):
        run("--ready-file", tmp_path / "ready.json")
    assert (tmp_path / "ready.json").read_text() == "of the first"


def test_a_ready_file_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "such" / "folder", tmp_path):
        with pytest.raises(BadInput, match="expected a file in a folder"):
            run("--ready-file", path)


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--port", "banana", "expected a port from 1 to 65535"),
        ("--port", "65536", "expected a port from 1 to 65535"),
        ("--prefill", "two", "whole number of at least 1"),
        ("--decode", "0", "whole number of at least 1"),
        ("--router-args", "'open", "expected flags as a shell would take them"),
    ],
)
def test_wrong_values_say_what_was_expected(
    flag: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(flag, value)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


def run_with_file(tmp_path: Path, text: str, *words: object) -> int:
    (tmp_path / "cluster.yaml").write_text(text)
    return main(["up", "--config", str(tmp_path / "cluster.yaml"), *(str(word) for word in words)])


FILE = """
model: {path: llama}
router: {port: 8000, queue_size: 64, api_key: of-the-file}
prefill: {count: 3, scheduler: stock, sglang: {dtype: float16}}
decode: {count: 2, sglang: {dtype: bfloat16}}
servers: {threads: 2, sglang: {context-length: 4096}}
launcher: {startup_timeout_secs: 5}
logs: {dir: logs}
"""


def test_a_file_says_what_to_start(stand_in: type[StandInCluster], tmp_path: Path) -> None:
    assert run_with_file(tmp_path, FILE) == 0
    assert stand_in.made[0].spec == ClusterSpec(
        model_path=tmp_path / "llama",
        prefill=3,
        decode=2,
        port=8000,
        api_key="of-the-file",
        router_arguments=("--queue-size", "64"),
        prefill_arguments=("--prefill-scheduler", "stock", "--dtype", "float16"),
        decode_arguments=("--dtype", "bfloat16"),
        sglang_arguments=("--context-length", "4096"),
        log_dir=tmp_path / "logs",
        threads=2,
        startup_timeout_s=5.0,
    )


@pytest.mark.parametrize(
    ("text", "words", "shared"),
    [
        ("", [], False),
        ("", ["--share-gpus"], True),
        ("launcher: {share_gpus: true}", [], True),
    ],
)
def test_gpus_are_shared_where_somebody_says_so(
    stand_in: type[StandInCluster], tmp_path: Path, text: str, words: list[str], shared: bool
) -> None:
    assert run_with_file(tmp_path, text, *words) == 0
    assert stand_in.made[0].spec.share_gpus is shared


def test_gpus_are_not_shared_on_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with_file(tmp_path, "launcher: {kind: ray, share_gpus: true}") == 2
    assert run_with_file(tmp_path, "launcher: {kind: ray}", "--share-gpus") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "launcher.share_gpus: expected false, since launcher.kind is ray" in first
    assert "--share-gpus needs --launcher local" in second


def test_flags_win_over_the_file_wherever_they_stand(stand_in: type[StandInCluster], tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(FILE)
    words = [
        "--prefill",
        "1",
        "--config",
        tmp_path / "cluster.yaml",
        "--port",
        30000,
        "--decode",
        1,
        "--api-key",
        "mine",
    ]
    words += ["--router-args", "--queue-size 5", "--prefill-args", "--dtype float32", "--context-length", 99]
    assert main(["up", *(str(word) for word in words), "--prefill-scheduler", "flowprefill"]) == 0
    spec = stand_in.made[0].spec
    assert (spec.prefill, spec.decode, spec.port, spec.api_key) == (1, 1, 30000, "mine"), "though they are the defaults"
    assert spec.router_arguments == ("--queue-size", "64", "--queue-size", "5")
    assert spec.prefill_arguments == (
        *("--prefill-scheduler", "flowprefill", "--dtype", "float16"),
        *("--dtype", "float32"),
    )
    assert spec.sglang_arguments == ("--context-length", "4096", "--context-length", "99")


def test_a_wrong_file_starts_nothing(
    stand_in: type[StandInCluster], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with_file(tmp_path, "prefill: {count: 0}\n") == 2
    assert run_with_file(tmp_path, "launcher: {ray_address: 'head:6379'}\n") == 2
    assert not stand_in.made
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        f"flowprefill up: {tmp_path}/cluster.yaml:1: prefill.count: expected a whole number of at least 1, not 0"
    )
    assert "launcher.ray_address" in second
    assert "launcher.kind is not ray" in second


def test_a_file_may_ask_for_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with_file(tmp_path, "launcher: {kind: ray, ray_address: 'http://head'}\n") == 2
    assert "expected HOST:PORT of a Ray cluster's head, or auto" in capsys.readouterr().err

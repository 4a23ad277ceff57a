"""``flowprefill config``: what it prints, and its statuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowprefill_sglang.cli.main import main


def test_what_show_prints_passes_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show"]) == 0
    file = tmp_path / "cluster.yaml"
    file.write_text(capsys.readouterr().out)
    assert main(["config", "check", str(file)]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert out.splitlines()[-1] == f"{file} is right"


def test_check_shows_what_would_be_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "router: {queue_size: 5, api_key: secret}\nprefill: {count: 12}\ndecode: {sglang: {dtype: float16}}\n"
        "launcher: {kind: ray, ray_address: auto}\n"
    )
    assert main(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "          count  what",
        "model            a tiny random-weight one, made at the start",
        "router        1  http://127.0.0.1:30000, with a key: --queue-size 5",
        "prefill      12  workers: --prefill-scheduler flowprefill",
        "decode        1  instances: --dtype float16",
        "servers      13  SGLang",
        "launcher         ray, joins auto, ready within 600 s",
        "logs             a temporary folder",
        f"{file} is right",
    ]


def test_a_wrong_file_is_status_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("router:\n  prot: 3\n")
    assert main(["config", "check", str(file)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err == f"flowprefill config check: {file}:2: router.prot: no such field; did you mean port?\n"


def test_no_file_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(tmp_path / "none.yaml")]) == 2
    assert "No such file" in capsys.readouterr().err

"""The command line as a shell sees it: exit statuses, and one line that says what is wrong."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flowprefill_sglang.cli.main import COMMANDS


def flowprefill(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowprefill_sglang", *words], capture_output=True, text=True, timeout=120, check=False
    )


def test_version_names_what_a_bug_report_needs() -> None:
    done = flowprefill("version")
    assert done.returncode == 0
    for name in ("flowprefill-sglang", "sglang", "torch", "pyzmq", "python", "wire protocol version", "KV handoff"):
        assert name in done.stdout


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str) -> None:
    done = flowprefill(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: flowprefill {command}")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["version", "config show", "--help"])
def test_output_that_nobody_reads_ends_it_without_a_word(words: str, unbuffered: str) -> None:
    """As in ``flowprefill version | head -0``."""
    done = unread(words, subprocess.PIPE, PYTHONUNBUFFERED=unbuffered)
    assert done.stderr == ""
    assert done.returncode in ((0, 141) if words == "--help" else (141,))  # argparse may have forgiven it


def test_nobody_reads_its_errors_either() -> None:
    assert unread("version", subprocess.STDOUT).returncode == 141


def unread(words: str, stderr: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command whose output goes into a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-m", "flowprefill_sglang", *words.split()],
            stdout=writer,
            stderr=stderr,
            env=os.environ | environment,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("dance",), "invalid choice: 'dance'"),
        (("version", "--dance"), "unrecognized arguments: --dance"),
        (("up", "--prefill", "0"), "expected a whole number of at least 1, got 0"),
        (("up", "--port", "99999"), "expected a port from 1 to 65535, or 0 for a free one, got 99999"),
        (("up", "--ready-file", "/no/such/folder/f"), "expected a file in a folder that exists"),
        (("prefill",), "the following arguments are required: --router"),
        (("prefill", "--router", "localhost:30100"), "expected tcp://HOST:PORT"),
        (("prefill", "--router", "tcp://localhost"), "expected tcp://HOST:PORT"),
        (("prefill", "--router", "tcp://localhost:x"), "expected tcp://HOST:PORT"),
    ],
)
def test_wrong_use_is_status_2_and_says_what_was_expected(words: tuple[str, ...], expected: str) -> None:
    done = flowprefill(*words)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_up_without_a_model_there(tmp_path: Path) -> None:
    done = flowprefill("up", "--port", "0", "--model-path", str(tmp_path))
    assert done.returncode == 1
    assert f"no model at {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_up_on_a_port_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = flowprefill("up", "--port", str(port), "--model-path", str(tmp_path))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_up_where_no_logs_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = flowprefill("up", "--port", "0", "--model-path", str(tmp_path), "--log-dir", str(tmp_path / "config.json"))
    assert done.returncode == 1
    assert f"cannot write logs to {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_up_with_flags_that_a_process_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    files = ("--model-path", str(tmp_path), "--log-dir", str(tmp_path / "logs"))
    done = flowprefill("up", "--port", "0", *files, "--router-args=--queue-size many")
    assert done.returncode == 2
    assert "router does not take these flags" in done.stderr
    assert "argument --queue-size: invalid int value: 'many'" in done.stderr


def test_up_on_an_address_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = flowprefill("up", "--port", "0", "--model-path", str(tmp_path), "--host", "no-such-host.invalid")
    assert done.returncode == 1
    assert "no such address: --host no-such-host.invalid" in done.stderr


def test_up_quotes_the_process_that_could_not_start(tmp_path: Path) -> None:
    """A model that SGLang cannot load: its own message, at once, and nothing left running."""
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "no_such_type"}')
    files = ("--model-path", str(tmp_path), "--log-dir", str(tmp_path / "logs"))
    done = flowprefill("up", "--port", "0", *files)
    assert done.returncode == 1
    assert "ended with status" in done.stderr
    assert "no_such_type" in done.stderr

"""requirements/install-cpu.sh, with an interpreter that only writes down what it was asked to do."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "requirements" / "install-cpu.sh"

FAKE_PYTHON = """#!/bin/sh
# Both the interpreter on PATH and the one inside the environment that it pretends to make.
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/pyvenv.cfg"; echo "venv" >> "$CALLS";;
  "-m pip "*) echo "$*" >> "$CALLS"; [ -z "$FAIL_ON" ] || ! echo "$*" | grep -qe "$FAIL_ON";;
  --version) echo "Python 3.11.0";;
esac
"""


class Installer:
    """A copied checkout with the script in it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        (self.root / "requirements").mkdir(parents=True)
        self.script = self.root / "requirements" / SCRIPT.name
        self.script.write_bytes(SCRIPT.read_bytes())
        self.script.chmod(0o755)
        for package in ("kernels", "prefill_worker", "router"):
            (self.root / "flowprefill_sglang" / package).mkdir(parents=True)
        (self.root / "pyproject.toml").touch()
        self.python = folder / "fake-python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.venv = self.root / ".venv"
        self.stamp = self.venv / ".stamp-1"
        self._calls = folder / "calls"

    def start(self, **environment: str) -> subprocess.Popen[str]:
        self._calls.write_text("")
        settings = {
            "PYTHON": str(self.python),
            "CALLS": str(self._calls),
            "FAIL_ON": "",
            "TORCH_CPU_INDEX": "file:///t",
        }
        return subprocess.Popen(
            [self.script, ".venv", ".venv/.stamp-1"],
            env=os.environ | settings | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(**environment)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def change_requirements(self) -> None:
        """Make the requirements newer than the stamp."""
        later = self.stamp.stat().st_mtime + 1
        os.utime(self.root / "pyproject.toml", (later, later))

    def calls(self) -> list[str]:
        """What the last run asked of the interpreter: "venv", or the arguments of a pip call."""
        return self._calls.read_text().splitlines()


@pytest.fixture
def installer(tmp_path: Path) -> Installer:
    return Installer(tmp_path)


def test_torch_comes_first_and_sglang_without_dependencies(installer: Installer) -> None:
    done = installer.run()
    assert done.returncode == 0, done.stderr
    venv, torch, sglang, ours = installer.calls()
    assert venv == "venv"
    assert torch.endswith("--requirement requirements/torch-cpu.txt")
    assert "--no-deps" in sglang
    assert "sglang-cpu.txt" in sglang
    assert ours.endswith("--constraint requirements/torch-cpu.txt --editable .[cpu,plot,ray,dev]")
    assert installer.stamp.exists()


def test_pytorchs_own_index_is_asked_only_when_the_configured_one_has_no_cpu_build(installer: Installer) -> None:
    installer.run()
    assert not any("file:///t" in call for call in installer.calls())
    installer.stamp.unlink()
    # The second attempt fails too here, since it names the same file; what counts is that it was made, and where.
    failed = installer.run(FAIL_ON="--requirement requirements/torch-cpu.txt")
    assert failed.returncode != 0
    assert [call.partition("--quiet ")[2] for call in installer.calls() if call != "venv"] == [
        "--requirement requirements/torch-cpu.txt",
        "--extra-index-url file:///t --requirement requirements/torch-cpu.txt",
    ]


@pytest.mark.parametrize("step", ["torch-cpu.txt", "sglang-cpu.txt", "editable"])
def test_a_failed_installation_is_made_anew(installer: Installer, step: str) -> None:
    assert installer.run(FAIL_ON=step).returncode != 0
    assert not installer.stamp.exists()
    (installer.venv / "half-written").touch()
    assert installer.run().returncode == 0
    assert installer.calls()[0] == "venv"
    assert not (installer.venv / "half-written").exists()


def test_changed_requirements_update_in_place(installer: Installer) -> None:
    installer.run()
    (installer.venv / "kept").touch()
    installer.change_requirements()
    assert installer.run().returncode == 0
    assert "venv" not in installer.calls()
    assert (installer.venv / "kept").exists()
    assert installer.stamp.exists()


def test_a_failed_update_is_made_anew(installer: Installer) -> None:
    installer.run()
    installer.change_requirements()
    assert installer.run(FAIL_ON="sglang-cpu.txt").returncode != 0
    assert installer.run().returncode == 0
    assert installer.calls()[0] == "venv"


def test_leftovers_of_an_interrupted_removal_do_no_harm(installer: Installer) -> None:
    for leftover in (".venv.discarded", ".venv.new", ".venv"):
        (installer.root / leftover / "bin").mkdir(parents=True)
    (installer.venv / "pyvenv.cfg").touch()  # what the script puts there before anything else
    done = installer.run()
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in installer.root.glob(".venv*")) == [".venv", ".venv.lock"]


def test_nothing_is_done_twice(installer: Installer) -> None:
    installer.run()
    assert installer.run().returncode == 0
    assert installer.calls() == []


def test_a_second_installation_waits_for_the_first(installer: Installer) -> None:
    """Also for a pip whose make was killed: it writes into the same folder."""
    with open(installer.root / ".venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = installer.start()
        assert second.stdout is not None
        assert "waiting for another installation" in second.stdout.readline()
        assert installer.calls() == []
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 0, output + errors
    assert installer.calls()[0] == "venv"


def test_a_copied_environment_is_made_anew(installer: Installer) -> None:
    installer.run()
    installer.stamp.rename(installer.venv / ".stamp-2")  # another checkout's name for it
    assert installer.run().returncode == 0
    assert installer.calls()[0] == "venv"


def test_a_folder_that_is_no_environment_is_left_alone(installer: Installer) -> None:
    installer.venv.mkdir()
    (installer.venv / "precious").touch()
    refused = installer.run()
    assert refused.returncode != 0
    assert "is no virtual environment" in refused.stderr
    assert (installer.venv / "precious").exists()


def test_unsuitable_python_is_named(installer: Installer) -> None:
    refused = installer.run(PYTHON="/nowhere/python9")
    assert refused.returncode != 0
    assert "PYTHON=/nowhere/python9 is no Python 3.11 or newer" in refused.stderr
    assert installer.calls() == []


def test_lost_symbolic_links_are_explained(installer: Installer) -> None:
    link = installer.root / "flowprefill_sglang" / "router"
    link.rmdir()
    link.write_text("../router")  # what git writes with core.symlinks=false
    refused = installer.run()
    assert refused.returncode != 0
    assert "core.symlinks" in refused.stderr
    assert installer.calls() == []

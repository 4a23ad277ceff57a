"""What a member leaves is removed however its owner ends: by whoever started it, or by a process that outlives both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flowprefill_testing.clusters import wait_until
from flowprefill_testing.servers import with_support

NOTED_WITHIN_S = 5.0
"""What a member has just made is not known yet to the one that clears it away."""
MEMBER = """
import mmap, os, subprocess, sys, time
from flowprefill_sglang.cluster.process import die_with_parent
die_with_parent()
path = f"/dev/shm/sglang_loads_of_test_{os.getpid()}"
with open(path, "wb") as file:
    file.truncate(4096)
with open(path, "r+b") as file:
    memory = mmap.mmap(file.fileno(), 4096)
stubborn = [sys.executable, "-c", "import time; time.sleep(600)"]
open(os.environ["TMPDIR"] + "/child", "w").write(str(subprocess.Popen(stubborn).pid))
print("memory:", path, flush=True)
time.sleep(600)
"""

OWNER = """
import sys
from flowprefill_sglang.cluster.member_process import MemberProcess, end_members
from flowprefill_sglang.cluster.members import Order
order = Order(
    name="decode-0", kind="decode", model_path=sys.argv[1], arguments=(), log_dir=None, program=("-c", sys.argv[2])
)
process = MemberProcess(order, "127.0.0.1", 1)
print(process.folder, flush=True)
sys.stdin.read()
end_members([process], ())
"""


class Owner:
    """A process that has started a member with shared memory and a child of its own."""

    def __init__(self, model: Path) -> None:
        (model / "config.json").write_text("{}")
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(model), MEMBER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **with_support()},
            text=True,
        )
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())
        log = self.folder / "decode-0.log"
        wait_until(lambda: "memory: " in log.read_text(), timeout_s=60)
        self.memory = Path(log.read_text().partition("memory: ")[2].strip())
        wait_until(lambda: len(self.helpers()) == 1, timeout_s=60)
        self.ready_at = time.time()

    def helpers(self) -> list[psutil.Process]:
        """Processes that are there for this member alone."""
        return [one for one in psutil.process_iter(["cmdline"]) if str(self.folder) in (one.info["cmdline"] or ())]


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    one = Owner(tmp_path)
    yield one
    one.process.kill()
    one.process.communicate()


def test_an_owner_that_ends_it_has_cleared_away(owner: Owner) -> None:
    assert owner.memory.exists()
    owner.process.communicate(timeout=60)
    assert owner.process.returncode == 0
    assert not owner.folder.exists()
    assert not owner.memory.exists()
    assert owner.helpers() == []


def test_what_is_left_of_a_member_whose_owner_hangs_is_cleared_away(owner: Owner) -> None:
    wait_until(lambda: time.time() > owner.ready_at + NOTED_WITHIN_S, timeout_s=60)
    owner.process.send_signal(signal.SIGSTOP)
    for process in psutil.Process(owner.process.pid).children(recursive=True):
        process.kill()
    wait_until(lambda: not owner.helpers(), timeout_s=60)
    assert not owner.folder.exists()
    assert not owner.memory.exists()


def test_what_is_left_of_a_killed_owner_is_cleared_away(owner: Owner) -> None:
    child = psutil.Process(int((owner.folder / "child").read_text()))
    wait_until(lambda: time.time() > owner.ready_at + NOTED_WITHIN_S, timeout_s=60)
    owner.process.kill()
    wait_until(lambda: not owner.memory.exists(), timeout_s=60)
    assert (owner.folder / "decode-0.log").exists(), "somebody may ask for its last words"
    wait_until(lambda: not owner.helpers(), timeout_s=60)
    assert not owner.folder.exists()
    assert not child.is_running()

"""A running cluster, as tests see it, and waiting for conditions."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

START_TIMEOUT_S = 240.0
PAGE_TOKENS = 16
CHUNK_TOKENS = 512
CONTEXT_TOKENS = 8_192


@dataclass(frozen=True)
class Cluster:
    """What ``--ready-file`` says, and where to look when something is wrong."""

    url: str
    workers: dict[str, dict]
    log_dir: Path
    process: subprocess.Popen
    ready_file: Path

    def logs(self, lines: int = 30) -> str:
        """The end of each log."""
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
            for log in sorted(self.log_dir.glob("*.log"))
        )


def wait_until(
    condition: Callable[[], object],
    process: subprocess.Popen | None = None,
    log: Path | None = None,
    timeout_s: float = START_TIMEOUT_S,
    pause_s: float = 0.1,
) -> None:
    """Wait for a condition; fail when it does not come true, or when the process it depends on has ended."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process is not None and process.poll() is not None:
            tail = log.read_text(errors="replace")[-4_000:] if log else ""
            pytest.fail(f"ended with status {process.returncode} while starting:\n{tail}")
        if time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-4_000:] if log else ""
            pytest.fail(f"not true after {timeout_s:.0f} s: {condition}\n{tail}")
        time.sleep(pause_s)


def answers(url: str) -> bool:
    """Whether GET ``url`` is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False

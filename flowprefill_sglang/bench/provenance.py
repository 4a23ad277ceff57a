"""What a result file must say about where it comes from, so that somebody else can repeat it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flowprefill_sglang import __version__

PACKAGES = ("sglang", "torch", "transformers", "pyzmq", "msgspec", "aiohttp")


def provenance(command: Sequence[str], now: datetime) -> dict[str, Any]:
    """A JSON object: commit, versions, hardware, command and time. ``now`` is an aware point in time."""
    return {
        "commit": _commit(Path(__file__).resolve().parents[2]),
        "versions": {"flowprefill-sglang": __version__, "python": platform.python_version()} | _package_versions(),
        "hardware": {
            "machine": platform.machine(),
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": f"{platform.system()} {platform.release()}",
        },
        "command": list(command),
        "started_at": now.astimezone(UTC).isoformat(timespec="seconds"),
    }


def without_folders(command: Sequence[str]) -> list[str]:
    """A command with its files' names alone: where they lie on this machine is nobody's business. URLs stay."""
    return [Path(word).name if "/" in word and "://" not in word else word for word in command]


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit(checkout: Path) -> str | None:
    """The checkout's commit, with ``+changes`` if files differ from it; None for an installed package."""
    if not (checkout / ".git").exists():
        return None
    git = ["git", "-C", str(checkout)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )

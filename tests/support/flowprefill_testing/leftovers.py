"""What processes hold on a machine that others use too, and what of it is still there when they should have ended."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
MAPPED = re.compile(r"(\d+) +/dev/shm/")
"""An inode in ``/proc/PID/maps``: a semaphore is mapped before it has its name."""


@dataclass
class Holdings:
    """Everything that outlives a process which does not clear it away."""

    processes: set[psutil.Process] = field(default_factory=set)
    shared_memory: set[Path] = field(default_factory=set)
    listening: set[tuple[str, int]] = field(default_factory=set)
    unix_sockets: set[Path] = field(default_factory=set)
    files: set[Path] = field(default_factory=set)
    """Open ones, and folders for temporary files, outside of this project and its environment."""

    def left(self) -> list[str]:
        """What is still there, in words."""
        found = [f"process {one}" for one in self.processes if one.is_running() and one.status() != "zombie"]
        for kind, paths in (("shared memory", self.shared_memory), ("socket", self.unix_sockets), ("file", self.files)):
            found += [f"{kind} {path}" for path in paths if path.exists()]
        return sorted(
            [*found, *(f"listens on {address}:{port}" for address, port in self.listening if heard(address, port))]
        )

    def left_after(self, longest_s: float) -> list[str]:
        """The same once nothing is left, or after this time."""
        deadline = time.monotonic() + longest_s
        while (found := self.left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found


def holdings_of(pids: Iterable[int], temporary: Path) -> Holdings:
    """Of these processes, all their children, and those that clear away behind them. ``temporary``: where their files
    go; those elsewhere are read only."""
    held = Holdings()
    for pid in pids:
        parent = psutil.Process(pid)
        held.processes |= {parent, *parent.children(recursive=True)}
    for process in held.processes:
        with suppress(psutil.NoSuchProcess, OSError):
            _add(held, process, temporary)
    folders = set(map(str, held.files))
    held.processes |= {one for one in psutil.process_iter(["cmdline"]) if folders & set(one.info["cmdline"] or ())}
    return held


def _add(held: Holdings, process: psutil.Process, temporary: Path) -> None:
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    inodes = set(map(int, MAPPED.findall(maps)))
    held.shared_memory |= {Path(entry) for entry in os.scandir(SHARED_MEMORY) if entry.inode() in inodes}
    names = {line[line.index("/") :] for line in maps.splitlines() if "/" in line}
    for number in os.listdir(f"/proc/{process.pid}/fd"):
        with suppress(OSError):
            names.add(os.readlink(f"/proc/{process.pid}/fd/{number}"))
    held.files |= {Path(name) for name in names if Path(name).is_relative_to(temporary) and _is_named(name)}
    own = process.environ().get("TMPDIR", "")
    if own and Path(own) != temporary:
        held.files.add(Path(own))
    for one in process.net_connections("all"):
        if one.family == socket.AF_UNIX and str(one.laddr).startswith("/"):
            held.unix_sockets.add(Path(str(one.laddr)))
        elif one.status == psutil.CONN_LISTEN:
            held.listening.add((one.laddr.ip, one.laddr.port))


def _is_named(name: str) -> bool:
    return not name.endswith(" (deleted)")


def heard(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    with suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False

"""What the kernel says of a group of processes: who lives, what memory they take, what they share (Linux)."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

_SHARED_MEMORY: Final = Path("/dev/shm")
_MAPPED: Final = re.compile(r"(\d+) +/dev/shm/")
"""An inode in ``/proc/PID/maps``: the name beside it is not always the one that the file has."""
_LEFT_BEHIND: Final = ("sglang_loads_", "sgl_shm_", "sem.mp-")
"""SGLang 0.5.23 removes the first two on its own CI only (``utils/stale_shm_cleanup.py``). Semaphores are for Python's
resource tracker to remove, which SGLang kills with all its children when it ends (``kill_process_tree``)."""


def processes_of(group: int) -> list[int]:
    """Ids of the processes of a group that live."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return []
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if _lives_in(group, folder)]


def _lives_in(group: int, folder: Path) -> bool:
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return False
    return int(fields[2]) == group and fields[0] not in "ZX"


def shared_memory_of(group: int) -> set[Path]:
    """Files in shared memory that a group of SGLang's processes has mapped, and does not remove at its end."""
    inodes: set[int] = set()
    for pid in processes_of(group):
        with contextlib.suppress(OSError):  # it has just ended
            inodes.update(map(int, _MAPPED.findall(Path(f"/proc/{pid}/maps").read_text())))
    if not inodes:
        return set()
    entries = os.scandir(_SHARED_MEMORY)
    return {Path(entry) for entry in entries if entry.name.startswith(_LEFT_BEHIND) and entry.inode() in inodes}


def memory_bytes(group: int) -> int:
    """Memory of this machine that a group takes; what processes share counts once."""
    return sum(_field_bytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss:") for pid in processes_of(group))


def available_bytes() -> int:
    """Memory that this machine has left."""
    return _field_bytes(Path("/proc/meminfo"), "MemAvailable:")


def _field_bytes(file: Path, field: str) -> int:
    """Of a line like ``MemAvailable: 12345 kB``; 0 where there is none."""
    try:
        rows = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(row[1]) * 1024 for row in rows if row[:1] == [field]), 0)

"""What the kernel says of a group of processes: who lives, what memory they take, what they share (Linux)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_SHARED_MEMORY: Final = "/dev/shm/"
_NAMED_BY_SGLANG: Final = ("sglang_loads_", "sgl_shm_")
"""SGLang 0.5.23 removes these only on its own CI (``utils/stale_shm_cleanup.py``)."""


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
    """Files in shared memory that a group of SGLang's processes has open, and does not remove at its end."""
    found: set[Path] = set()
    for pid in processes_of(group):
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:  # it has just ended, or closed one
            continue
        names = (link.removeprefix(_SHARED_MEMORY) for link in links if link.startswith(_SHARED_MEMORY))
        found |= {Path(_SHARED_MEMORY, name) for name in names if name.startswith(_NAMED_BY_SGLANG)}
    return found


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

"""The GPUs of this machine, divided among its members: whole ones, each with one member at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Final

from flowprefill_sglang.errors import StartupError

VARIABLE: Final = "CUDA_VISIBLE_DEVICES"
_COUNT_S: Final = 120.0
"""For importing torch from a slow disk."""
# torch.cuda.device_count() is what SGLang goes by. It honours CUDA_VISIBLE_DEVICES and asks NVML where it can. Where it
# cannot, it initialises CUDA's driver, which is nothing for a launcher, and torch takes seconds to import, and memory
# for good: so a process of its own counts. Without a driver there is nothing for torch to find. A torch for another
# make of GPU goes by variables of its own: there nothing is divided.
_COUNT: Final = """
import ctypes, sys
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    print(0)
    sys.exit()
import torch
print(torch.cuda.device_count() if torch.version.cuda else 0)
"""


def count_gpus() -> int:
    """How many NVIDIA GPUs SGLang would see if it were started here. Blocks, for seconds where there is a driver.

    Raises StartupError when torch cannot tell.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _COUNT], capture_output=True, text=True, timeout=_COUNT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise StartupError(f"torch has not counted this machine's GPUs in {_COUNT_S:g} s") from error
    last = (done.stdout.split() or [""])[-1]
    if done.returncode != 0 or not last.isdecimal():
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise StartupError(f"torch cannot count this machine's GPUs: {why}")
    return int(last)


def visible_gpus(listed: str | None, count: Callable[[], int] = count_gpus) -> tuple[str, ...]:
    """What ``CUDA_VISIBLE_DEVICES`` calls the GPUs that are there for members, in order: indices, UUIDs or MIG names.

    ``listed``: its value here, None where it is not set. ``count``: as CUDA takes the list, of which all is left out
    from the first entry that is not there. Raises what ``count`` raises.
    """
    found = count()
    if listed is None:
        return tuple(str(index) for index in range(found))
    names = [name.strip() for name in listed.split(",")]
    if found and names[0].startswith("MIG-"):  # CUDA shows a process one slice, however many are listed
        return tuple(dict.fromkeys(takewhile(lambda name: name.startswith("MIG-"), names)))
    return tuple(names[:found])


class Gpus:
    """Who has which. Takes no notice of what runs on them; not thread-safe."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        """``names``: as ``CUDA_VISIBLE_DEVICES`` has them, no two alike."""
        self._names = tuple(names)
        self._taken: dict[str, tuple[str, ...]] = {}

    def take(self, owner: str, count: int) -> tuple[str, ...] | None:
        """Give ``owner``, who has none, the first ``count`` that nobody has; None, and no one of them, where there are
        fewer."""
        assert owner not in self._taken
        taken = {name for names in self._taken.values() for name in names}
        free = [name for name in self._names if name not in taken]
        if len(free) < count:
            return None
        self._taken[owner] = tuple(free[:count])
        return self._taken[owner]

    def release(self, owner: str) -> None:
        """Others may have what ``owner`` had, if anything."""
        self._taken.pop(owner, None)

    def require_room(self, counts: Mapping[str, int], each: Mapping[str, int]) -> None:
        """Raise StartupError when ``counts`` members of each kind can never run at once. ``each``: GPUs that one of a
        kind takes."""
        if sum(number * each.get(kind, 0) for kind, number in counts.items()) <= len(self._names):
            return
        asked = " and ".join(
            f"{number} {kind} × {_gpus(each[kind])}" for kind, number in counts.items() if each.get(kind, 0)
        )
        advice = "; members share them with --share-gpus" if self._names else "; without GPUs, pass --device cpu"
        raise StartupError(
            f"this machine has no room for {asked}: {_gpus(len(self._names))} "
            f"{'is' if len(self._names) == 1 else 'are'} visible{advice}"
        )


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"

"""Room for Python's frames in one piece.

CPython (3.11 and later) keeps the frames of a thread, and of each greenlet, in chunks of 16 KiB. A call that does not
fit into the current chunk has a new one mapped by the system, and its return unmaps it. Where the end of a chunk comes
to lie just above the operators of a model, every operator pays for that: a forward pass takes up to 30% longer,
depending on how deep the stack happens to be where it begins (``benchmarks/frame_depth.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

ROOM_BYTES = 64 * 1024
"""Some 400 frames; SGLang's forward passes are about 60 deep."""
_SLOT_BYTES = 8


def _call(function: Callable[[], Any]) -> Any:
    return function()


_call_in_large_frame = FunctionType(_call.__code__.replace(co_stacksize=ROOM_BYTES // _SLOT_BYTES), globals())


def with_frame_room(function: Callable[[], None]) -> None:
    """Call ``function`` where the next ``ROOM_BYTES`` of frames lie in one chunk.

    It is called from a frame that claims so much for itself. A chunk is made for that, twice as large as needed since
    their sizes are powers of two, and the other half is the room. Memory that is not used is mapped and never touched.
    """
    _call_in_large_frame(function)

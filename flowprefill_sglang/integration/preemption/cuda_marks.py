"""Marks in a CUDA stream: events, behind the interface of ``prefill_worker.run_ahead``.

Everything is on the stream that is current when a mark is recorded. That is SGLang's one compute stream: FlowPrefill's
loop runs inside of ``Scheduler.schedule_stream``, and without overlap the forward passes do too. No call here waits for
the device as a whole.

Not run on a GPU so far. Written against PyTorch's ``torch.cuda.Event``: ``record`` enqueues, ``query`` asks the driver
and never waits, ``synchronize`` waits for this event alone and lets other threads of the process run, ``elapsed_time``
is in milliseconds and wants both events completed and made with ``enable_timing``.
"""

from __future__ import annotations

import torch


class CudaMarks:
    """``Marks`` of one CUDA device. Owned by the scheduler's thread."""

    def __init__(self, device: torch.device) -> None:
        """``device``: with its index. Raises ValueError for one that is not CUDA."""
        if device.type != "cuda":
            raise ValueError(f"marks are CUDA events, and {device} is no CUDA device")
        self._device = device

    def record(self) -> torch.cuda.Event:
        """An event behind everything launched so far. Each is a new one: the driver's own pool makes that cost less
        than keeping one here would, and one that is still asked about can never be recorded again by mistake."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def is_reached(self, mark: torch.cuda.Event) -> bool:
        """Whether everything before it has ended. Raises what a kernel before it has failed with."""
        return bool(mark.query())

    def wait(self, mark: torch.cuda.Event) -> None:
        """Return when it is reached."""
        mark.synchronize()

    def elapsed_s(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        """Device time between two reached marks, to half a microsecond."""
        return float(earlier.elapsed_time(later)) / 1_000

"""SGLang 0.5.23's own prefill scheduler under ``fcfs``: which tokens the next forward computes.

From ``PrefillAdder`` in ``sglang/srt/managers/schedule_policy.py``. Without chunks, requests join in order of arrival
until one does not fit the token budget; the first goes whatever its length. With chunks, a forward has
``chunk_tokens``; the prompt that was cut goes first, those behind it share what is left, and the last of them is cut
in turn, so at most one prompt is half done at a time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from flowprefill_sglang.core.prefill_cost import Extent
from flowprefill_sglang.prefill_worker.scheduler import Request


@dataclass(slots=True, kw_only=True)
class StockQueue:
    """SGLang's waiting queue and the prompt that it has cut."""

    batch_tokens: int
    chunk_tokens: int | None
    is_batching: bool = True
    waiting: deque[Request] = field(default_factory=deque)
    cut: Request | None = None

    def next_batch(self) -> tuple[list[Request], list[Extent]]:
        """Take the next forward's requests out, with what it computes of each; both empty when nothing waits."""
        requests: list[Request] = []
        extents: list[Extent] = []
        left = self.batch_tokens if self.chunk_tokens is None else self.chunk_tokens
        if self.cut is not None:
            request, self.cut = self.cut, None
            left -= self._take(request, left, requests, extents)
        while self.waiting and left > 0 and (self.is_batching or not requests):
            if self.chunk_tokens is None and requests and self.waiting[0].new_tokens >= left:
                break
            request = self.waiting.popleft()
            limit = request.new_tokens if self.chunk_tokens is None else left
            left -= self._take(request, limit, requests, extents)
        return requests, extents

    def _take(self, request: Request, limit: int, requests: list[Request], extents: list[Extent]) -> int:
        tokens = min(request.new_tokens, limit)
        requests.append(request)
        extents.append(Extent(tokens, request.cached_tokens))
        if tokens < request.new_tokens:
            self.cut = request
        return tokens

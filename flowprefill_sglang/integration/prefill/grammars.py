"""Requests that wait for their grammar to be compiled. SGLang 0.5.23 looks for those that are ready when it makes a
batch, which happens here only for a request that is in already."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING
from weakref import WeakSet

from flowprefill_sglang.integration.prefill.wakeup import Wakeup

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler


class Grammars:
    """Owned by the scheduler's thread."""

    def __init__(self, scheduler: Scheduler, wakeup: Wakeup) -> None:
        self._scheduler = scheduler
        self._wakeup = wakeup
        self._awaited: WeakSet[Future[object]] = WeakSet()

    def take_in(self) -> None:
        """Let in the requests whose grammar is compiled by now, and be woken when another one is."""
        scheduler, grammars = self._scheduler, self._scheduler.grammar_manager
        if not grammars.has_waiting_grammars():
            return
        for req in grammars.get_ready_grammar_requests():
            scheduler._add_request_to_queue(req)
        for req in grammars.grammar_queue:
            if isinstance(req.grammar, Future) and req.grammar not in self._awaited:
                self._awaited.add(req.grammar)
                req.grammar.add_done_callback(lambda _: self._wakeup.now_please())

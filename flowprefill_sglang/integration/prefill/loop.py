"""The event loop of a prefill worker's scheduler process, in place of SGLang 0.5.23's
``event_loop_normal_disagg_prefill``.

It runs on the process's main thread, which is also the greenlet hub of all tasks, and owns everything it touches. One
turn: take in what has happened, decide if something happened that calls for a decision, then run the chosen task until
it ends or an event stops it at a boundary. With nothing to run it sleeps until something happens.

What happens comes from two sides. SGLang's sockets bring requests, aborts and control requests; SGLang's own
``ingest_requests`` handles them (``control`` sees to those that must not meet a suspended task). The transfer
backend's threads report a decode instance that is ready for a request, and a handoff that has ended. ``wakeup.News``
hears of all of it and says when a running task should stop for it.

With tensor parallelism each rank runs this loop. What only one of them can know, clock readings and what has happened,
the leader says and the others take over (``prefill_worker.ranks``); from there on all compute the same, and a follower
sleeps where it waits for the leader's next word.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from sglang.srt.disaggregation.utils import is_aborted

from flowprefill_sglang.core.candidate import Candidate, Standing
from flowprefill_sglang.core.prefill_cost import Extent
from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.integration.prefill.batches import Batch, Begun, PrefillBatches
from flowprefill_sglang.integration.prefill.ended_handoffs import EndedHandoffs
from flowprefill_sglang.integration.prefill.grammars import Grammars
from flowprefill_sglang.integration.prefill.memory import PrefillMemory
from flowprefill_sglang.integration.prefill.reports import Reports
from flowprefill_sglang.integration.prefill.request_terms import as_request, terms_of, update_extent
from flowprefill_sglang.integration.prefill.retraction import Retraction
from flowprefill_sglang.integration.prefill.wakeup import Doorbell, News, Taken, Wakeup
from flowprefill_sglang.observe.events import Outcome, Trigger
from flowprefill_sglang.prefill_worker.admission import Room
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.frame_room import with_frame_room
from flowprefill_sglang.prefill_worker.journal import Journal
from flowprefill_sglang.prefill_worker.ranks import Ranks
from flowprefill_sglang.prefill_worker.reporter import SchedulerReporter
from flowprefill_sglang.prefill_worker.retraction import Outlook
from flowprefill_sglang.prefill_worker.run_ahead import RunAhead
from flowprefill_sglang.prefill_worker.scheduler import PrefillScheduler, Request, Task
from flowprefill_sglang.prefill_worker.settings import SchedulerSettings
from flowprefill_sglang.prefill_worker.task import ForwardTask, SharedState

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

TRANSPORT_TICK_S = 0.05
"""How often handoffs under way are polled while nothing runs: transports enforce their time-outs, and some report the
end of a transfer, only when polled. No decision is taken on it unless the poll brings news."""

HOUSEKEEPING_S = 30.0
"""How often an idle worker gets up for SGLang's own idle duties (metrics, leak check)."""

MAX_REFUSALS = 16
"""Waiting requests that a round tries to start before it settles for what is begun: memory that refused so many is
full, and trying hundreds costs more than it can win."""


class PrefillLoop:
    """Drives SGLang's scheduler with ours. Owned by the scheduler process's main thread, except for ``Wakeup``."""

    def __init__(
        self,
        scheduler: Scheduler,
        core: PrefillScheduler,
        *,
        gate: Gate,
        state: SharedState,
        reporter: SchedulerReporter,
        news: News,
        memory: PrefillMemory,
        settings: SchedulerSettings,
        device: RunAhead,
        ranks: Ranks,
    ) -> None:
        self._scheduler = scheduler
        self._ranks = ranks
        self._core = core
        self._gate, self._state, self._device = gate, state, device
        self._reports = Reports(reporter, gate, device)
        self._journal = Journal(self._reports.record)
        self._news = news
        self._memory = memory
        self._settings = settings
        self._batches = PrefillBatches(scheduler)
        self._retraction = Retraction(core, memory, self._batches)
        channels = scheduler.ipc_channels
        sockets = [s for s in (channels.recv_from_tokenizer, channels.recv_from_rpc) if s is not None]
        self._wakeup = Wakeup(sockets, gate, ranks=ranks)
        self._doorbell = Doorbell(sockets, news.message_came)
        self._handoffs = EndedHandoffs(scheduler, core, gate, news)
        self._grammars = Grammars(scheduler, self._wakeup)
        self._reqs: dict[Request, Req] = {}
        self._request_of: dict[Req, Request] = {}
        self._begun: dict[Task, Begun] = {}
        self._trigger: Trigger | None = None
        self._has_failure = False  # of a handoff, which no turn has looked at yet
        self._news_at: float | None = None  # when the first thing happened that this turn has taken in
        self._stopped_at = 0.0  # when the running task last gave the thread back
        self._building_s = 0.0  # of this round: SGLang making batches

    # ---- turns ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until SGLang is told to exit. What is still under way then is discarded."""
        self._news.listen(self._wakeup, self._ranks)
        self._ranks.listen(self._news.heard, self._news.rank_lost)
        try:
            with_frame_room(self._serve)
        finally:
            self._news.listen(None)
            for begun in self._begun.values():
                begun.forward.discard()
            self._doorbell.close()
            self._wakeup.close()

    def _serve(self) -> None:
        while not self._scheduler.gracefully_exit:
            self._turn()

    def _turn(self) -> None:
        scheduler = self._scheduler
        self._wakeup.clear()
        self._news_at = None
        taken = self._ranks.agree("turn", self._news.take())
        self._has_failure |= taken.has_failure
        self._take_in_ended_handoffs(taken)
        if taken.has_message or self._core.running is None:  # a task is stopped for a decode instance alone, too
            scheduler.ingest_requests()
        if scheduler._engine_paused:
            scheduler._record_scheduler_state_for_paused_engine()
            self._wakeup.wait(HOUSEKEEPING_S)
            return
        self._grammars.take_in()
        self._take_in_kv_events()
        scheduler.maybe_send_health_check_signal()
        if self._trigger is not None:
            self._round(self._trigger)
        elif self._core.running is not None:
            self._reports.send_if_due(time.monotonic(), self._core.running)
        if self._core.running is None:
            self._idle()
        else:
            self._advance(self._core.running)

    def _take_in_ended_handoffs(self, taken: Taken) -> None:
        """Before all else: a flush that came meanwhile would be refused for them, and requests need their metadata
        buffers to leave the bootstrap queue. SGLang leaves it out while it is paused; then the cache could not be
        flushed after a weight update either."""
        freed_at = self._handoffs.take_in(taken)
        if freed_at is not None:
            self._has_news(freed_at)
            self._trigger = Trigger.KV_POOL

    def _take_in_kv_events(self) -> None:
        scheduler, news = self._scheduler, self._news
        if self._has_failure:
            self._has_failure = False
            scheduler.resolve_waiting_queue_bootstrap()
            self.withdraw_what_is_gone()
        queue = scheduler.disagg_prefill_bootstrap_queue
        news.awaited = frozenset(req.bootstrap_room for req in queue.queue)
        if queue.queue:
            for req in queue.pop_bootstrapped():
                scheduler.waiting_queue.append(req)
                self._arrived(req)

    def _idle(self) -> None:
        scheduler = self._scheduler
        scheduler._sched_idled = True
        scheduler.on_idle()
        if self._news.is_memory_short and not scheduler.disagg_prefill_inflight_queue:
            # Nothing under way will free memory and tell us: look again, in case something else has freed it.
            self._trigger = Trigger.KV_POOL
        self._reports.send()
        is_polled = scheduler.disagg_prefill_bootstrap_queue.queue or scheduler.disagg_prefill_inflight_queue
        self._wakeup.wait(TRANSPORT_TICK_S if is_polled or self._core.waiting else HOUSEKEEPING_S)

    # ---- events -----------------------------------------------------------------------------------------------

    def _arrived(self, req: Req) -> None:
        now = self._ranks.now()
        terms = self._ranks.agree("terms", terms_of(req, now, self._settings.default_objective_s))
        req.init_next_round_input(self._scheduler.tree_cache, cow_mamba=False)
        request = as_request(req, terms)
        self._reqs[request] = req
        self._request_of[req] = request
        self._core.arrived(request)
        self._wakeup.pace.arrived(terms.objective_s)
        self._has_news(max(terms.sent_at, self._news.ready_at.pop(req.bootstrap_room, 0.0)))
        self._trigger = Trigger.ARRIVAL
        self._journal.arrived(request, terms.dispatch_rid, now)

    def _has_news(self, at: float) -> None:
        """Something happened at this time that may stop the running task."""
        if at and (self._news_at is None or at < self._news_at):
            self._news_at = at

    def withdraw_what_is_gone(self) -> None:
        """Forget the requests that SGLang has dropped or marked as aborted, and free what they hold at once.

        A request that shares a task with others that go on keeps its KV until the task ends: the forward pass writes
        to it.
        """
        waiting = set(self._scheduler.waiting_queue)
        now = self._ranks.now()
        for request, req in list(self._reqs.items()):
            if request.candidate.standing is Standing.WAITING and req not in waiting:
                self._withdraw(request, now)
            elif request.candidate.standing is Standing.HALF_PREFILLED and is_aborted(req):
                self._withdraw(request, now)
                self._batches.retire([req])
        for task, begun in list(self._begun.items()):
            if all(is_aborted(req) for req in begun.batch.reqs):
                self._core.discarded(task, now)
                del self._begun[task]
                begun.forward.discard()
                self._batches.retire(begun.batch.reqs)
                for request in task.requests:
                    self._ended(request, Outcome.ABORTED, now)
                self._trigger = self._trigger or Trigger.ABORT

    def _withdraw(self, request: Request, now: float) -> None:
        self._core.withdrawn(request)
        self._ended(request, Outcome.ABORTED, now)

    def _ended(self, request: Request, outcome: Outcome, now: float) -> None:
        del self._request_of[self._reqs.pop(request)]
        self._journal.ended(request, outcome, now)

    # ---- rounds -----------------------------------------------------------------------------------------------

    def _round(self, trigger: Trigger) -> None:
        began_at = self._ranks.now()
        self._trigger = None
        self._building_s = 0.0
        ranking, ran_before = self._core.ranking(began_at), self._core.running
        self._note_memory(is_short=self._run_first(ranking.order, began_at))
        ended_at = time.monotonic()
        self._journal.round(
            self._core,
            trigger,
            duration_s=ended_at - began_at - self._building_s,
            suspended_bytes=sum(begun.activation_bytes for begun in self._begun.values()),
            promoted=ranking.promoted,
            now=ended_at,
        )
        running = self._core.running
        self._reports.send_if_due(ended_at, running, has_started=running is not ran_before)

    def _run_first(self, order: Sequence[Candidate], now: float, *, may_retract: bool = True) -> bool:
        """Run the first of a ranking that memory admits. Whether it refused a better one."""
        room: Room | None = None  # asked for when something may start: in most rounds what runs goes on
        outlook: Outlook | None = None
        refusals, is_full = 0, False  # a promoted one that was refused must not be overtaken by smaller ones for ever
        for place, candidate in enumerate(order):
            task = self._core.task_of(candidate)
            if task is not None:
                self._go_on(task, now)
                break
            if candidate.standing is Standing.WAITING and (is_full or refusals >= MAX_REFUSALS):
                continue
            room = room or self._memory.room(self._core)
            if self._try_start(candidate, islice(order, place + 1, None), room, now):
                break
            if may_retract and self._begun:
                outlook = outlook or Outlook.of(order, now)
                undone = self._retraction.choose(outlook, candidate, room, self._begun)
                for task in undone:
                    if task is self._core.running:
                        self._preempt_for([self._core.request_of(candidate)])
                    self._retraction.undo(task, self._begun.pop(task))
                    self._journal.retracted(task, now)
                if undone:
                    return self._run_first(self._core.ranking(now).order, now, may_retract=False)
            refusals += 1
            is_full |= candidate.is_promoted
        return refusals > 0

    def _note_memory(self, *, is_short: bool) -> None:
        news = self._news
        news.is_memory_short = is_short
        if is_short and (self._handoffs.ended_at is not None or news.ended_at is not None):
            self._wakeup.now_please()  # it ended when nobody was in need

    def _go_on(self, task: Task, now: float) -> None:
        """Let a task that is under way run, the running one or a suspended one."""
        if task is self._core.running:
            return
        self._preempt_for(task.requests)
        self._journal.resumed(task, self._core.resumed(task, now), now)

    def _preempt_for(self, requests: Sequence[Request]) -> None:
        if self._core.running is None:
            return
        # It stopped before this round began, and what the round has taken since is not its running time.
        stopped_at = self._stopped_at
        blocking_s = max(0.0, stopped_at - (self._news_at or stopped_at))
        self._journal.preempted(self._core.preempted(stopped_at), requests, blocking_s, stopped_at)

    def _try_start(self, candidate: Candidate, others: Iterable[Candidate], room: Room, now: float) -> bool:
        """Start the forward pass of a request, with others if it is small; False when memory does not admit it."""
        head = self._core.request_of(candidate)
        is_begun = candidate.standing is Standing.HALF_PREFILLED
        if self._memory.refusal(room, head, is_begun=is_begun) is not None:
            return False
        if is_begun:
            requests = [head]
        else:
            kv_room = room.free_kv_tokens - room.claimed_kv_tokens - self._memory.kv_slots(head.cached_tokens)
            requests = self._core.batch_of(head, others, now, kv_room)
        reqs = [self._reqs[request] for request in requests]
        decided_at = time.monotonic()
        batch = self._batches.next_chunk(reqs[0]) if is_begun else self._batches.begin(reqs)
        self._building_s += time.monotonic() - decided_at
        if batch is None:
            return False
        self._start(batch)
        return True

    def _start(self, batch: Batch) -> None:
        requests = [self._request_of[req] for req in batch.reqs]
        now = self._ranks.now()
        self._preempt_for(requests)
        extents = []
        for request, req in zip(requests, batch.reqs, strict=True):
            update_extent(request, req)
            extents.append(Extent(req.extend_len, req.prefix_len))
        task = self._core.started(requests, extents, now)
        run = partial(self._scheduler.run_batch, batch.schedule_batch)
        activation_bytes = self._memory.activation_bytes(task.new_tokens, task.cached_tokens)
        self._begun[task] = Begun(batch, ForwardTask(run, self._gate, self._state), activation_bytes)
        self._journal.started(task, now)

    # ---- running ----------------------------------------------------------------------------------------------

    def _advance(self, task: Task) -> None:
        """Run a task until it ends or an event stops it."""
        begun = self._begun[task]
        self._ranks.confirm("run", (task.number, task.new_tokens, task.cached_tokens, begun.forward.suspensions))
        self._scheduler.cur_batch_for_debug = begun.batch.schedule_batch  # arms SGLang's watchdog
        self._device.runs(task.cost)
        has_ended = begun.forward.advance()
        self._stopped_at = self._ranks.agree("stopped", self._device.stopped(has_ended=has_ended))
        self._scheduler.cur_batch_for_debug = None
        if has_ended:
            del self._begun[task]
            self._finish(task, begun)

    def _finish(self, task: Task, begun: Begun) -> None:
        now = self._stopped_at
        self._core.finished(now)
        self._journal.finished(task, now)
        half_prefilled = self._batches.finish(begun.batch, begun.forward.result)
        for request, req in zip(task.requests, begun.batch.reqs, strict=True):
            if req is not half_prefilled:
                self._ended(request, Outcome.ABORTED if is_aborted(req) else Outcome.PREFILLED, now)
            elif is_aborted(req):
                self._withdraw(request, now)
                self._batches.retire([req])
        self._trigger = Trigger.COMPLETION

    def finish_what_is_begun(self, *, half_prefilled: bool) -> None:
        """Run every task under way to its end, without a round; with ``half_prefilled``, the rest of those prompts too.

        For control requests that no forward pass may straddle. New messages wait meanwhile, as they do in SGLang while
        a batch runs.
        """
        try:
            while (candidate := self._core.first_begun(half_prefilled=half_prefilled)) is not None:
                now = self._ranks.now()
                task = self._core.task_of(candidate)
                if task is not None:
                    self._go_on(task, now)
                elif not self._try_start(candidate, (), self._memory.room(self._core), now):
                    raise InternalError(f"request {self._core.request_of(candidate).rid} cannot get its next chunk")
                self._gate.clear()
                assert self._core.running is not None
                self._advance(self._core.running)
        finally:
            self._reports.send()  # there may be no round for long: a paused engine takes none

    def begun_reqs(self) -> list[Req]:
        """Every request that is in a task or half-prefilled."""
        in_tasks = [req for begun in self._begun.values() for req in begun.batch.reqs]
        half = [req for request, req in self._reqs.items() if request.candidate.standing is Standing.HALF_PREFILLED]
        return in_tasks + half

    def adapters_in_use(self) -> set[str | None]:
        """LoRA adapters, None for the base model, of every forward pass under way."""
        return {req.lora_id for begun in self._begun.values() for req in begun.batch.reqs}

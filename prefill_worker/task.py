"""A forward pass that can stop at an operator boundary, keep all it has computed, and go on later.

A task runs in a greenlet on the scheduler's own thread, a *carrier* (``carriers``). The *hub*, the greenlet that runs
the scheduler's loop, starts and resumes it with ``advance``; at a boundary with an event pending, control comes back to
the hub. Why greenlets and not threads: no locks around the engine's module-level state, a switch costs less than a
microsecond instead of ten, and a task can be ended cleanly where it stands.

What tasks share lies outside of them in module globals, attributes and thread-local modes. ``SharedState`` moves it:

::

    hub ──check; save hub's, restore task's──▶ task runs ──save task's──▶ hub ──restore hub's; check──▶

Context variables need no moving: each task runs in its own copy of the context that it was started in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import Generic, Protocol, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_sglang.prefill_worker.carriers import carriers

Result = TypeVar("Result")


class SharedState(Protocol):
    """What one forward pass leaves set outside of itself and the next would overwrite or misread."""

    def save(self) -> object:
        """The state as it is now. Later changes do not reach what was returned."""

    def restore(self, saved: object) -> None:
        """Put back what ``save`` returned."""

    def may_stop(self) -> bool:
        """Whether a task can be suspended at this very place; asked inside of it when an event is pending. False
        postpones the stop to a later boundary."""

    def check(self) -> None:
        """Raise InternalError if a mode of this thread is not the one that hub and tasks agreed on."""


class ForwardTask(Generic[Result]):
    """One batch's forward pass. Used by one thread, and by its hub only. Not reusable.

    A started task must be advanced to its end or discarded: a suspended one that is merely dropped keeps its frames,
    and the memory in them, for ever.
    """

    def __init__(self, run: Callable[[], Result], gate: Gate, state: SharedState) -> None:
        self._run = run
        self._gate = gate
        self._state = state
        self._carrier: greenlet | None = None
        self._hub = getcurrent()
        self._saved: object = None
        self._failure: BaseException | None = None
        self._results: list[Result] = []
        self.is_over = False
        """Ended, failed or discarded."""
        self.suspensions = 0
        """How often it was stopped at a boundary."""
        self.postponed = 0
        """Boundaries at which an event was pending and the task could not stop (see ``SharedState.may_stop``)."""

    @property
    def is_started(self) -> bool:
        """Whether ``advance`` has been called."""
        return self._carrier is not None or self.is_over

    @property
    def result(self) -> Result:
        """What the forward returned. InternalError before ``advance`` has returned True."""
        if not self._results:
            raise InternalError("a forward task that has not ended, or failed, has no result")
        return self._results[0]

    def advance(self) -> bool:
        """Start or resume. True when the forward has ended, False when it was suspended at a boundary.

        Raises what the forward raised; the task is then over. InternalError when it is over already, or when a mode of
        this thread has changed under it.
        """
        if self.is_over:
            raise InternalError("this forward task is over")
        self._state.check()
        return self._switch(to_end_it=False)

    def discard(self) -> None:
        """End a task that is not wanted any more: its ``finally`` blocks run, under its own state, and none of its
        operators. Nothing happens to one that is over. Raises what those blocks raise."""
        if self.is_over:
            return
        if self._carrier is None:
            self.is_over = True
            return
        self._switch(to_end_it=True)

    def _switch(self, *, to_end_it: bool) -> bool:
        """Change to the task and back, with the shared state: let it run, or throw GreenletExit into it."""
        state, carrier = self._state, self._carrier
        starts = carrier is None
        hubs = state.save()
        if carrier is None:
            carrier = self._carrier = carriers.take()
            carrier.gr_context = copy_context()
        else:
            saved, self._saved = self._saved, None
            state.restore(saved)
        carrier.parent = self._hub = getcurrent()  # where a stop, an end and an exception lead
        try:
            if to_end_it:
                carrier.throw()
            else:
                self._gate.open(self._suspend)
                carrier.switch(self._body) if starts else carrier.switch()
        finally:
            self._gate.close()
            if self.is_over:
                self._carrier = None
                carriers.give_back(carrier)
            if self.suspensions or not self.is_over:
                state.restore(hubs)  # else nothing came between: a forward leaves what it always leaves
        if self._failure is not None:
            try:
                raise self._failure
            finally:
                self._failure = None  # or frames and exception would hold one another
        state.check()
        return self.is_over

    def _body(self) -> None:
        try:
            self._results.append(self._run())
        except GreenletExit:
            raise  # a task that was discarded takes its carrier with it
        except BaseException as failure:  # for the hub, which raises it
            self._failure = failure
        finally:
            self.is_over = True

    def _suspend(self) -> None:
        """Called inside of the task, at a boundary."""
        if getcurrent() is not self._carrier or not self._state.may_stop():
            self.postponed += 1
            self._gate.cannot_stop()
            return
        self._saved = self._state.save()
        self.suspensions += 1
        self._hub.switch()

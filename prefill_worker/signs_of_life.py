"""Whether SGLang's other processes still work, as its HTTP process can know: questions, answers and a clock passed in.

The scheduler process may hang while the HTTP process answers and beats on. An idle scheduler sleeps, so its silence
alone says nothing. So it is asked: it takes the question in at its next operator boundary, or gets up for it. What it
reports unasked counts as an answer. Then only two things keep it silent for long: an operator, for which there is
patience, and a control request, which may load weights for minutes and is excused. The detokenizer process, through
which all answers go, is asked by itself.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

ASK_EVERY_S: Final = 5.0
"""Silence after which a process with requests in hand is asked. It costs the scheduler a stop of the running task."""
ASK_IDLE_EVERY_S: Final = 30.0
"""The same without requests: as often as an idle scheduler gets up by itself."""
LONGEST_GAP_S: Final = 5.0
"""Of the time between two looks, what counts: where it is longer, the process that looks was stopped or starved itself,
and has not read the answer yet."""


class Part(StrEnum):
    """A process of the worker beside the one that asks."""

    SCHEDULER = "scheduler"
    DETOKENIZER = "detokenizer"


class SignsOfLife:
    """Of one process. Owned by the link's event loop. ``now`` is a monotonic clock in seconds."""

    def __init__(self, *, patience_s: float, now: float) -> None:
        """``patience_s``: how long an answer may take."""
        self._patience_s = patience_s
        self._looked_at = now
        self._heard_at = now
        self._is_asked = False
        self.silent_s = 0.0
        """How long a question has waited for its answer; 0 while none does."""

    def heard(self, now: float) -> None:
        """The process has answered, or said something of its own."""
        self._heard_at = now
        self._is_asked, self.silent_s = False, 0.0

    def look(self, now: float, *, is_busy: bool, is_excused: bool) -> bool:
        """Whether to ask now; a question is under way from then on. To be called every second or so.

        ``is_busy``: requests are in its hands. ``is_excused``: it was given something that may take any time."""
        gap_s, self._looked_at = now - self._looked_at, now
        if is_excused:
            self._heard_at, self.silent_s = now, 0.0
        elif self._is_asked:
            self.silent_s += min(gap_s, LONGEST_GAP_S)
        elif now - self._heard_at >= (ASK_EVERY_S if is_busy else ASK_IDLE_EVERY_S):
            self._is_asked = True
            return True
        return False

    @property
    def is_hung(self) -> bool:
        """Whether to wait no longer."""
        return self.silent_s > self._patience_s

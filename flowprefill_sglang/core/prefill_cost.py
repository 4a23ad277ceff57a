"""How long one prefill forward takes on the device: the model behind every slack and every ``remaining_s``.

For a batch of requests with ``new`` prompt tokens to compute and ``cached`` tokens already in the KV cache::

    seconds = base + per_request·requests + short·min(N, knee) + long·max(0, N − knee)
            + pair·Σ new·(new + 2·cached)/2 + cached·Σ cached + cached_pair·Σ cached²/2         N = Σ new

The linear terms are the matrix products, ``pair`` is causal attention of the new tokens. The rest is what hardware
shows: a forward that takes the same time up to some length (weights are read, kernels are launched: a small ``short``
and a ``knee``); one attention call a request; and the cached prefix, which is gathered (``cached``) and, by SGLang's
torch-native attention, computed again as queries (``cached_pair``). All coefficients are 0 or more, so that a
prediction never falls when a batch grows.

A ``Predictor`` corrects the model by what forwards really take. Machines drift in more than one way: a busy host makes
every forward's overhead longer and leaves long matrix products as they were; a neighbour on the memory bus does the
opposite. So each of three parts has a factor of its own, and one measurement moves each factor by that part's share in
the prediction (normalised least mean squares, on logarithms). docs/profile.md compares it with one ratio for all and
with recursive least squares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgspec

MAX_CORRECTION: Final = math.log(32.0)
"""Either way: beyond it the model is of another machine, and only a new profile helps."""
MAX_STEP: Final = math.log(2.0)
"""No measurement counts as more than twice or less than half of what was predicted."""
MIN_STEP: Final = 0.03
"""An error this small is never cut: it is as good as a cost model gets."""
STEP_FACTOR: Final = 2.0
"""An error counts up to this many times the usual error. A stalled machine, or a first call that compiles something, is
not a trend; if it is one, the usual error grows with it and so does the step."""
USUAL_WEIGHT: Final = 0.1
"""Of one measurement in the usual error and in the usual shares: the last ten or so count."""


@dataclass(frozen=True, slots=True)
class Extent:
    """One request's part of a batch, in tokens."""

    new_tokens: int
    cached_tokens: int = 0
    """Tokens before the new ones whose KV is there already: a shared prefix, or the prompt's earlier chunks."""


class CostModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Coefficients of the module's formula, in seconds."""

    base_s: float
    request_s: float = 0.0
    short_token_s: float
    """A new token, as long as the batch has at most ``knee_tokens`` of them."""
    long_token_s: float
    """A new token beyond."""
    knee_tokens: int = 0
    pair_s: float
    """A (query, key) pair of causal attention whose query is a new token, over all layers."""
    cached_token_s: float = 0.0
    cached_pair_s: float = 0.0
    """A pair of which both are cached."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={getattr(self, name)}"
            for name in self.__struct_fields__
            if not 0 <= getattr(self, name) < math.inf
        ]
        if wrong:
            raise ValueError(f"costs must be finite and 0 or more: {', '.join(wrong)}")
        if self.base_s + self.short_token_s + self.long_token_s == 0:
            raise ValueError("a forward that costs nothing cannot be scheduled")

    def seconds(self, extents: Iterable[Extent]) -> float:
        """Predicted seconds of one forward of this batch on the device; 0 for an empty batch."""
        overhead, tokens, attention = self.parts(extents)
        return overhead + tokens + attention

    def parts(self, extents: Iterable[Extent]) -> tuple[float, float, float]:
        """The same in three parts, which slow down for reasons of their own: what a forward and its requests cost
        whatever their length, what grows with tokens, and what grows with pairs of tokens."""
        total = requests = 0
        tokens = attention = 0.0
        for extent in extents:
            new, cached = extent.new_tokens, extent.cached_tokens
            total += new
            requests += 1
            attention += self.pair_s * new * (0.5 * new + cached)
            if cached:
                tokens += self.cached_token_s * cached
                attention += self.cached_pair_s * 0.5 * cached * cached
        if not requests:
            return 0.0, 0.0, 0.0
        if total <= self.knee_tokens:
            tokens += self.short_token_s * total
        else:
            tokens += self.short_token_s * self.knee_tokens + self.long_token_s * (total - self.knee_tokens)
        return self.base_s + self.request_s * requests, tokens, attention


class Predictor:
    """Predicts forwards and learns from them. Owner: the worker's state machine, or the router for each worker."""

    def __init__(self, model: CostModel, weight: float = 0.2) -> None:
        """``weight``: of one measurement. 0.2: after a change half of the error is gone in five forwards, and noise of
        5% makes predictions 1% worse. Raises ValueError."""
        if not 0 < weight <= 1:
            raise ValueError(f"weight {weight} must be above 0 and at most 1")
        self.model = model
        self._weight = weight
        self._logs = [0.0, 0.0, 0.0]  # of the factors, in the order of CostModel.parts
        self._factors = (1.0, 1.0, 1.0)
        self._usual_error = 0.15  # of a model that was calibrated for two seconds; soon replaced
        self._usual_shares = [1 / 3, 1 / 3, 1 / 3]

    @property
    def ratio(self) -> float:
        """Measured over modelled seconds of batches like the last ones: 1 when the model needs no correction."""
        return 1 / sum(share / factor for share, factor in zip(self._usual_shares, self._factors, strict=True))

    def seconds(self, extents: Iterable[Extent]) -> float:
        """Predicted seconds of one forward of this batch, corrected; 0 for an empty batch."""
        overhead, tokens, attention = self.parts(extents)
        return overhead + tokens + attention

    def parts(self, extents: Iterable[Extent]) -> tuple[float, float, float]:
        """The same in the parts of ``CostModel.parts``."""
        overhead, tokens, attention = self.model.parts(extents)
        factors = self._factors
        return overhead * factors[0], tokens * factors[1], attention * factors[2]

    def observe_batch(self, extents: Iterable[Extent], measured_s: float) -> None:
        """Learn from one forward and how long it took on the device, without the time it was suspended. What is not
        positive and finite teaches nothing."""
        parts = self.parts(extents)
        predicted_s = sum(parts)
        if predicted_s > 0:
            self._learn([part / predicted_s for part in parts], predicted_s, measured_s)

    def _learn(self, shares: list[float], predicted_s: float, measured_s: float) -> None:
        if not (0 < predicted_s < math.inf and 0 < measured_s < math.inf):
            return
        error = math.log(measured_s / predicted_s)
        limit = min(MAX_STEP, max(MIN_STEP, STEP_FACTOR * self._usual_error))
        step = self._weight * max(-limit, min(limit, error)) / sum(share * share for share in shares)
        self._logs = [
            max(-MAX_CORRECTION, min(MAX_CORRECTION, log + step * share))
            for log, share in zip(self._logs, shares, strict=True)
        ]
        overhead, tokens, attention = map(math.exp, self._logs)
        self._factors = (overhead, tokens, attention)
        counted = min(abs(error), STEP_FACTOR * self._usual_error + 0.01)  # + 0.01: to grow from nothing
        self._usual_error += USUAL_WEIGHT * (counted - self._usual_error)
        self._usual_shares = [
            usual + USUAL_WEIGHT * (share - usual) for usual, share in zip(self._usual_shares, shares, strict=True)
        ]

"""Linear and expert layers by rows, on layers that stand for SGLang's."""

from __future__ import annotations

import sys
import types
from typing import Any, NamedTuple

import pytest
import torch

from flowprefill_sglang.integration.preemption import operator_boundaries
from flowprefill_sglang.integration.preemption.operator_boundaries import install
from flowprefill_sglang.integration.preemption.operator_work import Kind
from flowprefill_sglang.integration.preemption.sliced_operators import NEVER, SlicedOperators
from flowprefill_sglang.prefill_worker.boundaries import Gate


class StandardTopKOutput(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


class Engine:
    """A linear layer with boundaries around it, in a task that counts its stops."""

    def __init__(self, cls: type[torch.nn.Module], limit: int) -> None:
        self.gate = Gate()
        self.slices = SlicedOperators(self.gate)
        install(self.gate, self.slices)
        self.layer = cls()
        self.slices.set_limits({self.layer: limit})
        self.stops = 0
        self.gate.open(self._stopped)
        self.gate.raise_flag()

    def _stopped(self) -> None:
        self.stops += 1


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> type[torch.nn.Module]:
    class Linear(torch.nn.Module):
        calls: list[int]

        def __init__(self) -> None:
            super().__init__()
            self.calls = []

        def forward(self, x: Any, routing: Any = None, skip: bool = False, output_tensor: Any = None) -> Any:
            self.calls.append(len(x))
            if routing is not None:
                return x * routing.topk_weights
            return (2 * x, None) if not skip else (3 * x, None)

    module = types.ModuleType("upstream")
    module.Linear = Linear  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "upstream", module)
    monkeypatch.setattr(operator_boundaries, "OPERATORS", (("upstream.Linear", ("forward",)),))
    monkeypatch.setattr(operator_boundaries, "SLICED", {"upstream.Linear": Kind.LINEAR})
    return Linear


X = torch.arange(400.0).view(200, 2)


def test_a_long_call_is_cut_with_a_boundary_before_each_slice(linear: Any) -> None:
    engine = Engine(linear, 64)
    out, bias = engine.layer(X)
    assert torch.equal(out, 2 * X)
    assert bias is None
    assert engine.layer.calls == [64, 64, 72]
    assert (engine.stops, engine.gate.boundaries, engine.slices.slices) == (3, 3, 3)
    assert not engine.gate.is_closed


def test_a_short_call_is_one_operator(linear: Any) -> None:
    engine = Engine(linear, 64)
    engine.layer(X[:64])
    assert engine.layer.calls == [64]
    assert (engine.stops, engine.slices.slices) == (1, 0)


def test_nothing_is_cut_outside_of_a_task(linear: Any) -> None:
    engine = Engine(linear, 64)
    engine.gate.close()
    engine.layer(X)
    assert engine.layer.calls == [200]


def test_nothing_is_cut_once_it_is_off(linear: Any) -> None:
    engine = Engine(linear, 64)
    engine.slices.off()
    assert (engine.slices.is_on, engine.slices.shortest) == (False, NEVER)
    engine.layer(X)
    assert engine.layer.calls == [200]
    assert engine.slices.describe() == "no operator is sliced"


def test_options_reach_every_slice(linear: Any) -> None:
    assert torch.equal(Engine(linear, 64).layer(X, skip=True)[0], 3 * X)


def test_routing_is_cut_with_the_rows(linear: Any) -> None:
    engine = Engine(linear, 64)
    routing = StandardTopKOutput(torch.arange(200.0)[:, None], torch.zeros(200, 1))
    assert torch.equal(engine.layer(X, routing), X * routing.topk_weights)
    assert len(engine.layer.calls) == 3


@pytest.mark.parametrize("rows", [199, 400])
def test_routing_of_another_length_is_not_cut(linear: Any, rows: int) -> None:
    engine = Engine(linear, 64)
    routing = StandardTopKOutput(torch.ones(200, 1), torch.zeros(rows, 1))
    engine.layer(X, routing)
    assert engine.layer.calls == [200]


def test_an_output_of_the_caller_is_not_cut(linear: Any) -> None:
    engine = Engine(linear, 64)
    engine.layer(X, output_tensor=torch.empty_like(X))
    assert engine.layer.calls == [200]


def test_work_in_place_stays_in_place(linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "forward", lambda self, x: x.mul_(2))
    engine = Engine(linear, 64)
    x = X.clone()
    assert engine.layer(x).data_ptr() == x.data_ptr()
    assert torch.equal(x, 2 * X)


def test_rows_that_are_spread_over_ranks_run_whole(linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "forward", lambda self, x: x[: len(x) // 2])
    assert torch.equal(Engine(linear, 64).layer(X), X[:100])


def test_the_gate_is_open_again_after_a_slice_failed(linear: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x[0, 0] >= 128:
            raise RuntimeError("slice")
        return x

    monkeypatch.setattr(linear, "forward", fails)
    engine = Engine(linear, 64)
    with pytest.raises(RuntimeError, match="slice"):
        engine.layer(X)
    assert not engine.gate.is_closed

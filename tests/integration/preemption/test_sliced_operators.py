"""Linear, expert and element-wise layers by rows, on layers that stand for SGLang's."""

from __future__ import annotations

import sys
import types
from typing import Any, NamedTuple

import pytest
import torch

from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.errors import InternalError
from flowprefill_sglang.integration.preemption import operator_boundaries
from flowprefill_sglang.integration.preemption.attention_tiles import AttentionTiles
from flowprefill_sglang.integration.preemption.operator_boundaries import install, install_cuts
from flowprefill_sglang.integration.preemption.operator_work import Kind, Work
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
        install_cuts(self.gate, self.slices)
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
    monkeypatch.setattr(operator_boundaries, "ELEMENTWISE_CLASSES", ())
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


class Norm(torch.nn.Module):
    """As SGLang's norm on a GPU with a residual (both changed in place), and on a CPU."""

    def __init__(self, *, is_in_place: bool) -> None:
        super().__init__()
        self.is_in_place = is_in_place
        self.calls: list[int] = []

    def forward(self, x: Any, residual: Any = None, more: Any = None) -> Any:
        self.calls.append(len(x))
        if residual is None:
            return 2 * x
        if self.is_in_place:
            residual += x
            x.copy_(2 * residual)
            return x, residual
        return 2 * (x + residual), x + residual


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a norm in a task that cuts it to 64 rows."""
    module = types.ModuleType("upstream")
    cls = type("Norm", (Norm,), {})  # a class of its own to be wrapped, which inherits its forward as SGLang's do
    module.Norm = cls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "upstream", module)
    monkeypatch.setattr(operator_boundaries, "OPERATORS", ())
    monkeypatch.setattr(operator_boundaries, "ELEMENTWISE_CLASSES", ("upstream.Norm",))
    return lambda **options: Engine(lambda: cls(**options), 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_in_place", [False, True])
def test_a_norm_is_cut_with_its_residual(norms: Any, is_in_place: bool) -> None:
    engine = norms(is_in_place=is_in_place)
    x, residual = X.clone(), 3 * X
    out, total = engine.layer(x, residual)
    assert torch.equal(out, 8 * X)
    assert torch.equal(total, 4 * X)
    assert (out.data_ptr() == x.data_ptr()) == (total.data_ptr() == residual.data_ptr()) == is_in_place
    assert engine.layer.calls == [64, 64, 72]
    assert (engine.stops, engine.gate.boundaries) == (3, 3)
    assert torch.equal(engine.layer(X), 2 * X)
    assert torch.equal(engine.layer(X, residual=X)[0], 4 * X) or is_in_place


def test_a_short_norm_has_no_boundary(norms: Any) -> None:
    engine = norms(is_in_place=False)
    engine.layer(X[:64])
    assert engine.layer.calls == [64]
    assert (engine.stops, engine.gate.boundaries) == (0, 0)
    assert not hasattr(engine.layer.forward, "__flowprefill_gate__"), "it would be counted as an operator"


def test_a_norm_with_what_is_not_one_entry_a_row_is_not_cut(norms: Any) -> None:
    engine = norms(is_in_place=False)
    engine.layer(X, None, "positions in three dimensions")
    engine.layer(X, more=torch.ones(3, 200))
    engine.layer._quant_linear = torch.nn.Identity()
    engine.layer(X)
    assert engine.layer.calls == [200, 200, 200]
    assert engine.gate.boundaries == 0


def test_a_result_of_other_rows_is_an_error(norms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Norm, "forward", lambda self, x: x[:1])
    engine = norms(is_in_place=False)
    with pytest.raises(InternalError, match="one entry a row"):
        engine.layer(X)


def test_element_wise_layers_are_cut_as_the_layer_of_most_work() -> None:
    linear, large, norm = torch.nn.Linear(1, 1), torch.nn.Linear(2, 2), torch.nn.Identity()
    work = Work(
        rows={linear: 1e3, large: 4e3},
        kinds={linear: Kind.LINEAR, large: Kind.LINEAR, norm: Kind.ELEMENTWISE},
        attention=[],
        pair_flops=0.0,
        heads=1,
    )
    model = CostModel(base_s=0.0, short_token_s=0.0, long_token_s=5e-5, pair_s=0.0)
    slices = SlicedOperators(Gate())
    tiles = AttentionTiles(lambda: None, "TorchNativeAttnBackend")
    slices.set_costs(work, model, 0.0103, tiles, list(Kind))
    assert slices._limits == {linear: 1024, large: 256, norm: 256}
    slices.set_costs(work, model, 0.0103, tiles, [Kind.LINEAR])
    assert slices._limits == {linear: 1024, large: 256}

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowprefill_sglang.errors import InternalError, StartupError
from flowprefill_sglang.integration.preemption import operator_boundaries
from flowprefill_sglang.integration.preemption.operator_boundaries import ensure_boundaries, install
from flowprefill_sglang.prefill_worker.boundaries import Gate
from flowprefill_testing.sglang_process import facts_of


class Stops:
    def __init__(self, gate: Gate) -> None:
        self.count = 0
        gate.open(self)
        gate.raise_flag()

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An engine with three operators, one of them inside of another."""
    module = types.ModuleType("upstream")

    class Linear(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1

    class Special(Linear):
        def forward(self, x: Any) -> Any:
            return 2 * super().forward(x)

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = Linear()

        def forward(self, x: Any) -> Any:
            return self.linear(x)

        def replay(self, x: Any) -> Any:
            return self.linear(x)

    module.Linear, module.Special, module.Experts = Linear, Special, Experts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "upstream", module)
    operators = (("upstream.Linear", ("forward",)), ("upstream.Experts", ("forward", "replay", "not_there")))
    monkeypatch.setattr(operator_boundaries, "OPERATORS", operators)
    return module


def test_each_operator_is_one_boundary_whatever_it_is_made_of(upstream: Any) -> None:
    gate = Gate()
    wrapped = install(gate)
    assert [name.rpartition("<locals>.")[2] for name in wrapped] == [
        "Linear.forward",
        "Special.forward",
        "Experts.forward",
        "Experts.replay",
    ]
    stops = Stops(gate)
    x = torch.ones(1)
    assert upstream.Linear()(x) == 2
    assert upstream.Special()(x) == 4
    assert upstream.Experts()(x) == 2
    assert upstream.Experts().replay(x) == 2
    assert (stops.count, gate.boundaries) == (4, 4)


def test_the_gate_is_open_again_after_an_operator_failed(upstream: Any) -> None:
    gate = Gate()
    install(gate)
    stops = Stops(gate)
    with pytest.raises(TypeError):
        upstream.Linear()("not a number")
    upstream.Linear()(torch.ones(1))
    assert stops.count == 2


def test_installing_again_wraps_only_what_is_new(upstream: Any) -> None:
    gate = Gate()
    install(gate)
    assert install(gate) == []
    late = type("Late", (upstream.Linear,), {"forward": lambda self, x: x})
    assert [name.rpartition(".")[0].rpartition(".")[2] for name in install(gate)] == ["Late"]
    stops = Stops(gate)
    late()(torch.ones(1))
    assert stops.count == 1


def test_a_class_has_one_gate(upstream: Any) -> None:
    install(Gate())
    with pytest.raises(InternalError, match="another gate"):
        install(Gate())


@pytest.mark.parametrize("target", ["upstream.Gone", "no_such_module.Linear", "upstream.__name__"])
def test_a_missing_operator_class_stops_the_start(upstream: Any, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr(operator_boundaries, "OPERATORS", ((target, ("forward",)),))
    with pytest.raises(StartupError, match=target):
        install(Gate())


def model_of(*layers: torch.nn.Module) -> torch.nn.Module:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(layers)
    return model


def test_layers_without_an_operator_become_boundaries_as_a_whole(upstream: Any) -> None:
    gate = Gate()
    install(gate)
    model = model_of(upstream.Experts(), torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity()))
    assert ensure_boundaries(model, gate) == (3, 1)  # the experts, the linear layer in them, the second layer
    assert ensure_boundaries(model, gate) == (3, 0)
    stops = Stops(gate)
    for layer in model.layers:
        layer(torch.ones(1))
    assert stops.count == 2


def test_a_model_without_layers_and_operators_has_no_place_to_stop(upstream: Any) -> None:
    assert ensure_boundaries(torch.nn.Identity(), Gate()) == (0, 0)


@pytest.mark.parametrize("is_compiled_first", [True, False])
def test_compiled_code_is_not_stopped(upstream: Any, is_compiled_first: bool) -> None:
    gate = Gate()
    linear = upstream.Linear()
    install(gate)
    torch._dynamo.reset()
    compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(linear, backend="eager")
    if is_compiled_first:
        compiled(torch.ones(1))
    stops = Stops(gate)
    assert compiled(torch.ones(1)) == 2
    assert (stops.count, gate.boundaries) == (0, 0)


def test_sglang_has_every_operator_and_their_subclasses_are_found() -> None:
    pytest.importorskip("sglang", reason="the seam needs SGLang")
    facts = facts_of("""
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from flowprefill_sglang.integration.preemption.operator_boundaries import install
        from flowprefill_sglang.prefill_worker.boundaries import Gate

        facts["wrapped"] = install(Gate())
    """)
    wrapped = [name.removeprefix("sglang.srt.") for name in facts["wrapped"]]
    assert {
        "layers.radix_attention.RadixAttention.forward",
        "layers.linear.ReplicatedLinear.forward",
        "layers.linear.ColumnParallelLinear.forward",
        "layers.linear.RowParallelLinear.forward",
        "layers.moe.fused_moe_triton.layer.FusedMoE.forward",
        "lora.layers.ColumnParallelLinearWithLoRA.forward",
        "layers.logits_processor.LogitsProcessor.forward",
        "model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.execute",
    } <= set(wrapped)
    assert not any("vocab" in name.lower() or "LMHead" in name for name in wrapped)

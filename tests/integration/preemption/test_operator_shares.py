"""What each operator of a model is of a forward pass, on models made of SGLang's own attention class."""

from __future__ import annotations

import pytest

from flowprefill_testing.sglang_process import facts_of

pytest.importorskip("sglang", reason="the seam needs SGLang")

SCRIPT = """
    from types import SimpleNamespace
    import torch
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.radix_attention import RadixAttention
    from flowprefill_sglang.integration.preemption import operator_boundaries
    from flowprefill_sglang.integration.preemption.operator_shares import WHOLE, operator_shares
    from flowprefill_sglang.integration.preemption.operator_work import work_of
    from flowprefill_sglang.prefill_worker.boundaries import Gate

    class Linear(ReplicatedLinear):
        def forward(self, x):
            return super().forward(x)

    class Experts(FusedMoE):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.top_k, self.hidden_size, self.intermediate_size_per_partition = 2, 10, 20
            self.moe_runner_config = SimpleNamespace(is_gated=True)
            self.w13 = torch.nn.Parameter(torch.empty(8, 40, 10))  # of 8 experts, which no token meets all
            self.shared = Linear(10, 10, bias=False)  # inside of an operator, so no boundary
        def forward(self, x):
            return x

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.experts = Linear(10, 30, bias=False), Experts()
            self.attn = RadixAttention(1, 10, 1.0, 1, layer_id=0)

    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Parameter(torch.empty(1600))
        def forward(self, x):
            return x

    class Model(torch.nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = torch.nn.ModuleList(layers)

    import sys, types
    module = types.ModuleType("upstream")
    module.Linear, module.Experts = Linear, Experts
    sys.modules["upstream"] = module
    operator_boundaries.OPERATORS = (
        ("upstream.Linear", ("forward",)),
        ("upstream.Experts", ("forward",)),
        ("sglang.srt.layers.radix_attention.RadixAttention", ("forward",)),
    )
    gate, runner = Gate(), object()
    operator_boundaries.install(gate)
    model = Model([Layer(), Layer(), Foreign()])
    operator_boundaries.ensure_boundaries(model, gate)
    shares = operator_shares(model, runner)
    names = {id(m): n for n, m in model.named_modules()}
    facts["shares"] = {names.get(id(owner), "runner"): list(share) for owner, share in shares.items()}
    facts["rows"] = {names[id(layer)]: flops for layer, flops in work_of(model).rows.items()}
    facts["whole"] = list(WHOLE)
"""


def test_attention_is_shared_by_attention_operators_and_the_rest_by_operations() -> None:
    facts = facts_of(SCRIPT)
    shares, rows = facts["shares"], facts["rows"]
    met = {"qkv": 300.0, "experts": 3 * 10 * 20 * 2.0, "experts.shared": 100.0}
    assert rows == {f"layers.{layer}.{name}": 2 * weights for layer in (0, 1) for name, weights in met.items()}
    met["experts"] += met.pop("experts.shared")
    foreign = 1600.0
    total = 2 * sum(met.values()) + foreign
    expected = {"runner": (1.0, 1.0), "layers.2": (1 / 3, foreign / total)}
    for layer in (0, 1):
        expected |= {
            f"layers.{layer}.attn": (1 / 3, 0.0),
            f"layers.{layer}.qkv": (0.0, met["qkv"] / total),
            f"layers.{layer}.experts": (0.0, met["experts"] / total),
        }
    assert shares.keys() == expected.keys()
    for name, share in expected.items():
        assert shares[name] == pytest.approx(share), name

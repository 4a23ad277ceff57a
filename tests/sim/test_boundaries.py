"""Where a forward can be interrupted."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.sim.boundaries import Granularity, next_boundary_s
from flowprefill_sglang.sim.machine import Machine, Operator

MACHINE = Machine(
    name="m",
    cost=CostModel(base_s=1.0, short_token_s=0.0, long_token_s=0.0, pair_s=0.0),
    layers=2,
    operators=(Operator(name="linear", token_share=1.0), Operator(name="attention", pair_share=1.0)),
)
PARTS = (2.0, 4.0, 8.0)
"""Each layer: 2.5 s of linear, 4.5 s of attention, both with half a second of overhead."""


@pytest.mark.parametrize(
    ("executed_s", "operator", "layer"),
    [
        (0.0, 0.0, 0.0),
        (0.1, 2.5, 7.0),
        (2.5, 2.5, 7.0),
        (2.6, 7.0, 7.0),
        (7.0, 7.0, 7.0),
        (7.1, 9.5, inf),
        (9.6, inf, inf),
    ],
)
def test_the_next_boundary(executed_s: float, operator: float, layer: float) -> None:
    assert next_boundary_s(MACHINE, PARTS, executed_s, Granularity.OPERATOR) == pytest.approx(operator)
    assert next_boundary_s(MACHINE, PARTS, executed_s, Granularity.LAYER) == pytest.approx(layer)
    assert next_boundary_s(MACHINE, PARTS, executed_s, Granularity.WHOLE) == inf


@given(st.floats(0.0, 13.9), st.sampled_from([Granularity.OPERATOR, Granularity.LAYER]))
def test_it_is_never_before_now_and_is_a_fixed_point(executed_s: float, granularity: Granularity) -> None:
    boundary_s = next_boundary_s(MACHINE, PARTS, executed_s, granularity)
    assert boundary_s >= executed_s - 1e-8
    if boundary_s < inf:
        assert boundary_s - executed_s <= 7.0 + 1e-8
        assert next_boundary_s(MACHINE, PARTS, boundary_s, granularity) == pytest.approx(boundary_s)

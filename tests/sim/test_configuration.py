"""The names of scheduling configurations."""

from __future__ import annotations

import pytest

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.sim.boundaries import Granularity
from flowprefill_sglang.sim.configuration import parse


@pytest.mark.parametrize(
    ("text", "policy", "granularity", "chunk_tokens", "is_stock"),
    [
        ("feasible", "feasible", Granularity.OPERATOR, None, False),
        ("sedf@layer", "sedf", Granularity.LAYER, None, False),
        ("sedf@whole", "sedf", Granularity.WHOLE, None, False),
        ("sedf@chunk2048", "sedf", Granularity.WHOLE, 2048, False),
        ("fcfs", "fcfs", Granularity.WHOLE, None, True),
        ("fcfs@chunk512", "fcfs", Granularity.WHOLE, 512, True),
        ("fcfs@operator", "fcfs", Granularity.OPERATOR, None, False),
    ],
)
def test_names(text: str, policy: str, granularity: Granularity, chunk_tokens: int | None, is_stock: bool) -> None:
    found = parse(text)
    assert (found.name, found.policy, found.granularity, found.chunk_tokens) == (
        text,
        policy,
        granularity,
        chunk_tokens,
    )
    assert found.is_stock is is_stock


@pytest.mark.parametrize(
    "text",
    ["", "lifo", "sedf@", "sedf@chunk", "sedf@chunk0", "sedf@chunk-1", "sedf@Layer", "@layer", "sedf@layer@layer"],
)
def test_wrong_names(text: str) -> None:
    with pytest.raises(BadInput, match="expected POLICY"):
        parse(text)

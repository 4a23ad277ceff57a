from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.bench.curves import rate_curves, slo_scale_curves, to_document
from flowprefill_testing.loads import OBJECTIVES, record

RECORDS = [record("text", 0.05), record("text", 0.15), record("text", None), record("file", 0.5)]


def test_attainment_of_the_same_answers_under_other_objectives() -> None:
    everything, text, file = slo_scale_curves(RECORDS, OBJECTIVES, (0.4, 0.5, 1.0, 2.0))
    assert (everything.name, text.name, file.name) == ("all", "text", "file")
    assert text.attainment == pytest.approx((0, 1 / 3, 1 / 3, 2 / 3)), "the failed one is missed at every scale"
    assert file.attainment == (0, 1, 1, 1)
    assert everything.attainment == (0, 0.5, 0.5, 0.75)


def test_requests_without_a_record_are_missed() -> None:
    everything, text, _ = slo_scale_curves(RECORDS, OBJECTIVES, (2.0,), {"text": 4, "file": 4})
    assert text.attainment == (0.5,)
    assert everything.attainment == (3 / 8,)


@given(st.lists(st.tuples(st.sampled_from(["text", "file"]), st.none() | st.floats(0, 3)), min_size=1, max_size=30))
def test_looser_objectives_never_lose_a_request(rows: list[tuple[str, float | None]]) -> None:
    records = [record(*row) for row in rows]
    for curve in slo_scale_curves(records, OBJECTIVES):
        assert list(curve.attainment) == sorted(curve.attainment)
        assert all(0 <= share <= 1 for share in curve.attainment)
    at_one = slo_scale_curves(records, OBJECTIVES, (1.0,))[0].attainment[0]
    assert at_one == sum(OBJECTIVES[r.class_name].is_met_by(r) for r in records) / len(records)


def row(rate_rps: float, attained: int, cut_short: bool = False) -> dict[str, object]:
    return {
        "rate_rps": rate_rps,
        "requests": 10,
        "attained": attained,
        "cut_short": cut_short,
        "classes": {"text": {"requests": 10, "attained": attained}},
    }


def test_rates_are_put_in_order_and_equal_ones_pooled() -> None:
    everything, text = rate_curves([row(4, 6), row(2, 10), row(4, 8), row(8, 7, cut_short=True)])
    assert everything.x == (2, 4)
    assert everything.attainment == text.attainment == (1.0, 0.7)
    assert to_document([text]) == {"text": [[2, 1.0], [4, 0.7]]}
    assert rate_curves([]) == []

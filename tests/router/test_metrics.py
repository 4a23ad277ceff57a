"""Counting requests: by outcome, by answer, by tenant."""

from __future__ import annotations

import pytest

from flowprefill_sglang.router.exchange import Outcome
from flowprefill_sglang.router.metrics import (
    BUCKETS_S,
    MAX_TENANT_CHARACTERS,
    MAX_TENANTS,
    OTHER_TENANTS,
    RouterMetrics,
)
from flowprefill_sglang.router.objectives import CUSTOM, DEFAULT_CLASSES_MS


def test_every_class_has_its_series_from_the_start() -> None:
    metrics = RouterMetrics(DEFAULT_CLASSES_MS)
    for name in (*DEFAULT_CLASSES_MS, CUSTOM):
        assert metrics.registry.get_sample_value("flowprefill_ttft_slo_attained_total", {"class": name}) == 0
    with pytest.raises(KeyError):
        metrics.of_class("other")


def test_attainment_of_the_default_classes_can_be_read_from_the_buckets() -> None:
    assert {value / 1000 for value in DEFAULT_CLASSES_MS.values()} <= set(BUCKETS_S)
    assert list(BUCKETS_S) == sorted(set(BUCKETS_S))
    assert (BUCKETS_S[0], BUCKETS_S[-1]) == (0.001, 60.0)


def test_a_client_that_left_before_an_answer_counts_as_499() -> None:
    metrics = RouterMetrics([])
    metrics.ended(Outcome.CLIENT_GONE, 0)
    metrics.ended(Outcome.CLIENT_GONE, 200)
    metrics.ended(Outcome.SUCCEEDED, 200)
    assert metrics.responses == {499: 1, 200: 2}
    assert metrics.outcomes == {Outcome.CLIENT_GONE: 2, Outcome.SUCCEEDED: 1}
    assert not metrics.tenants


def test_tenants_are_capped() -> None:
    metrics = RouterMetrics([])
    for index in range(MAX_TENANTS + 500):
        metrics.ended(Outcome.SUCCEEDED, 200, f"tenant-{index}")
    metrics.ended(Outcome.SHED, 429, "tenant-0")
    metrics.ended(Outcome.SUCCEEDED, 200, "tenant-1499")
    assert len(metrics.tenants) == MAX_TENANTS + 1
    assert metrics.tenants["tenant-0"] == {Outcome.SUCCEEDED: 1, Outcome.SHED: 1}
    assert metrics.tenants[OTHER_TENANTS] == {Outcome.SUCCEEDED: 501}


def test_a_very_long_tenant_gets_no_label_of_its_own() -> None:
    metrics = RouterMetrics([])
    metrics.ended(Outcome.SUCCEEDED, 200, "x" * MAX_TENANT_CHARACTERS)
    metrics.ended(Outcome.SUCCEEDED, 200, "x" * (MAX_TENANT_CHARACTERS + 1))
    assert set(metrics.tenants) == {"x" * MAX_TENANT_CHARACTERS, OTHER_TENANTS}

"""Two results beside each other: what may be compared, and the ratios with their spread."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flowprefill_sglang.bench.goodput import Estimate
from flowprefill_sglang.bench.measurement_report import measurement_document
from flowprefill_sglang.bench.result_files import differences, read_result, remarks
from flowprefill_sglang.bench.result_ratios import compare, compare_max_goodput, comparison_table
from flowprefill_sglang.errors import BadInput
from flowprefill_testing.loads import measurement, result


def document(*repeats: list[float | None], max_rps: tuple[float, ...] = ()) -> dict[str, Any]:
    measured = measurement(*(result(ttfts) for ttfts in repeats))
    measured.found = [Estimate(rate_rps=rate, passed_rps=rate, is_bracketed=True) for rate in max_rps]
    about = {"workload": {"name": "t", "sha256": "a" * 64, "seed": 0}, "seed": 0, "hardware": {"cores": 2}}
    return json.loads(json.dumps(measurement_document(measured) | about))


FAST, SLOW = (
    document([0.02] * 10, [0.04] * 10, max_rps=(8, 6)),
    document([0.08] * 10, [0.08] * 5 + [0.2] * 5, max_rps=(2, 4)),
)


def test_ratios_are_of_medians_with_the_least_and_most_of_all_pairs() -> None:
    found = compare(FAST, SLOW)
    assert list(found) == ["all", "text"]
    p50 = found["text"]["ttft_p50_ms"]
    assert p50.value == pytest.approx(30 / 110)
    assert (p50.low, p50.high) == pytest.approx((20 / 140, 40 / 80))
    attainment = found["all"]["attainment"]
    assert (attainment.value, attainment.low, attainment.high) == pytest.approx((0.25, 0.0, 0.5))
    assert found["all"]["goodput_rps"].value > 1
    most = compare_max_goodput(FAST, SLOW)
    assert most is not None
    assert (most.value, most.low, most.high) == pytest.approx((7 / 3, 1.5, 4.0))


def test_a_result_against_itself_is_one() -> None:
    for quantities in compare(SLOW, SLOW).values():
        for key, compared in quantities.items():
            assert compared.value == pytest.approx(0 if key == "attainment" else 1)


def test_nothing_in_time_gives_no_ratio() -> None:
    nothing = document([None] * 3)
    goodput = compare(FAST, nothing)["all"]["goodput_rps"]
    assert goodput.to_document() == {"a": goodput.to_document()["a"], "b": 0.0, "value": None, "min": None, "max": None}
    assert compare_max_goodput(FAST, nothing) is None
    console = Console(file=io.StringIO(), width=100)
    console.print(comparison_table(compare(FAST, nothing), ("A", "B")))
    assert "–" in console.file.getvalue()


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("workload", "seed"), 1, "seed 0 against 1"),
        (("workload", "sha256"), "b" * 64, "sha256 aaaaaaaaaaaa against bbbbbbbbbbbb"),
        (("workload", "rate"), 3.0, "rate None against 3.0"),
        (("length_factor",), 0.5, "length factor 1.0 against 0.5"),
        (("classes", "text", "slo_ms"), 250.0, "objective of text 100.0 ms against 250.0 ms"),
        (("classes", "text", "count"), 4, "requests by class {'text': 10.0} against {'text': 2.0}"),
    ],
)
def test_another_load_is_told(path: tuple[str, ...], value: object, expected: str) -> None:
    other = copy.deepcopy(FAST)
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert differences(FAST, other) == [expected]
    assert differences(FAST, FAST) == []


def test_another_machine_is_remarked() -> None:
    assert remarks(FAST, FAST | {"hardware": {"cores": 8}}) == ["hardware: cores 2 against 8"]
    assert remarks(FAST, FAST) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not JSON"),
        ("[]", "is no result of 'flowprefill bench --json'"),
        ('{"workload": {}}', "is no result of 'flowprefill bench --json'"),
        ('{"client_late": true}', "has no result: the load client fell behind"),
    ],
)
def test_files_that_are_no_result(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=expected):
        read_result(path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_result(tmp_path / "absent")

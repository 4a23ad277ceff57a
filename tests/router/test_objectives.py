"""What a request asks for: where it may say so, who wins, and that nonsense is never dropped in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill_sglang.errors import BadInput
from flowprefill_sglang.router.objectives import (
    CUSTOM,
    DEFAULT_CLASS,
    DEFAULT_CLASSES_MS,
    LARGEST_SLO_MS,
    LEAST_SLO_MS,
    SLO_HEADERS,
    Intake,
    Terms,
)
from flowprefill_sglang.router.pd_fields import parse
from flowprefill_sglang.workload.classes import CLASSES

INTAKE = Intake(DEFAULT_CLASSES_MS, DEFAULT_CLASS)
HEADER_NAMES = [name.decode() for name in SLO_HEADERS]


def terms(headers: dict[str, str] | list[tuple[str, str]] = (), **body: Any) -> Terms:  # type: ignore[assignment]
    pairs = headers.items() if isinstance(headers, dict) else headers
    raw = [(name.encode(), value.encode("latin-1")) for name, value in pairs]
    return INTAKE.terms(raw, parse("/generate", json.dumps({"text": "x", **body}).encode()).terms)


def test_the_default_classes_are_the_papers_and_one_as_patient_as_any() -> None:
    paper = {one.name: 1000 * one.slo_s for one in CLASSES}
    assert {name: value for name, value in DEFAULT_CLASSES_MS.items() if name != DEFAULT_CLASS} == paper
    assert DEFAULT_CLASSES_MS[DEFAULT_CLASS] == max(paper.values())


@pytest.mark.parametrize("body", [{}, {"ttft_slo_ms": None, "service_tier": None, "priority": None}])
def test_a_request_that_says_nothing_has_the_default_class(body: dict) -> None:
    assert terms(**body) == Terms(ttft_slo_s=6.0, slo_class="standard")
    assert terms({"x-request-id": "1", "content-type": "application/json"}, **body) == terms()


@pytest.mark.parametrize("name", HEADER_NAMES)
def test_each_header_sets_the_objective(name: str) -> None:
    assert terms({name: "250"}) == Terms(ttft_slo_s=0.25, slo_class=CUSTOM)


@given(st.permutations(HEADER_NAMES), st.integers(1, 3), st.booleans())
def test_the_first_header_wins_in_whatever_order_they_come_and_any_wins_over_the_body(
    order: list[str], count: int, in_body: bool
) -> None:
    values = {name: str(100 * (index + 1)) for index, name in enumerate(HEADER_NAMES)}
    present = order[:count]
    body = {"ttft_slo_ms": 9.5} if in_body else {}
    found = terms([(name, values[name]) for name in present], **body)
    assert found.ttft_slo_s == float(values[min(present, key=HEADER_NAMES.index)]) / 1000


@given(st.floats(LEAST_SLO_MS, LARGEST_SLO_MS))
def test_every_objective_in_range_is_taken_as_it_is(slo_ms: float) -> None:
    assert terms(ttft_slo_ms=slo_ms).ttft_slo_s == slo_ms / 1000
    assert terms({"x-slo-ttft-ms": f"{slo_ms:.17f}"}).ttft_slo_s == slo_ms / 1000


@pytest.mark.parametrize("edge", [LEAST_SLO_MS, LARGEST_SLO_MS, 1, 3_600_000])
def test_the_edges_of_the_range_are_in_it(edge: float) -> None:
    assert terms(ttft_slo_ms=edge).ttft_slo_s == terms({"x-slo-ttft-ms": str(edge)}).ttft_slo_s == edge / 1000


HEADER_NONSENSE = [
    *("", " ", "abc", "nan", "NaN", "inf", "-inf", "Infinity", "-5", "-0", "0", "0.0", "0.999", "+5", "1e3", "0x10"),
    *(
        "250ms",
        "1_000",
        "1,000",
        "3600000.1",
        "3600001",
        "9" * 400,
        "[250]",
        "250 300",
        "٢٥٠",
        "½",
        "null",
        "true",
        ".",
    ),
]


@pytest.mark.parametrize("name", HEADER_NAMES)
@pytest.mark.parametrize("value", HEADER_NONSENSE)
def test_a_header_that_is_no_objective_is_refused_by_name_value_and_range(name: str, value: str) -> None:
    raw = [(name.encode(), value.encode())]
    with pytest.raises(BadInput) as caught:
        INTAKE.terms(raw)
    message = str(caught.value)
    assert message.startswith(f"{name}: {value.strip()[:80]!r} is no TTFT objective")
    assert "from 1 (1 ms) to 3600000 (1 h)" in message
    assert (caught.value.status, caught.value.code) == (400, "invalid_ttft_slo")
    assert len(message) < 300


BODY_NONSENSE = [0, -1, 0.99, 3_600_001, 10**30, 1e300, "250", "", "abc", True, False, [250], [], {}, {"ms": 250}]


@pytest.mark.parametrize("value", BODY_NONSENSE)
def test_a_body_that_has_no_objective_is_refused_by_name_value_and_range(value: Any) -> None:
    with pytest.raises(BadInput, match=r"^ttft_slo_ms: .* from 1 \(1 ms\) to 3600000 \(1 h\)$") as caught:
        terms(ttft_slo_ms=value)
    assert json.dumps(value) in str(caught.value)
    assert caught.value.status == 400


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_know_are_refused(value: str) -> None:
    with pytest.raises(BadInput):
        INTAKE.terms([], parse("/generate", b'{"text": "x", "ttft_slo_ms": %s}' % value.encode()).terms)


@given(st.one_of(st.text(), st.floats().map(str), st.integers().map(str)))
def test_a_header_is_either_refused_or_a_number_in_range(value: str) -> None:
    raw = value.encode()
    try:
        slo_s = INTAKE.terms([(b"x-slo-ttft-ms", raw)]).ttft_slo_s
    except BadInput:
        return
    assert slo_s == float(value) / 1000
    assert LEAST_SLO_MS <= float(value) <= LARGEST_SLO_MS


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=4))
def test_a_body_is_either_refused_or_a_number_in_range(value: Any) -> None:
    try:
        slo_s = terms(ttft_slo_ms=value).ttft_slo_s
    except BadInput:
        return
    assert slo_s == (6.0 if value is None else value / 1000)
    assert value is None or LEAST_SLO_MS <= value <= LARGEST_SLO_MS


def test_nonsense_is_refused_even_where_something_else_wins() -> None:
    for headers, body in (
        ({"x-sgl-ttft-slo-ms": "250", "x-slo-ttft-ms": "soon"}, {}),
        ({"x-sgl-ttft-slo-ms": "250"}, {"ttft_slo_ms": "soon"}),
        ({"x-sgl-ttft-slo-ms": "250", "x-slo-class": "soon"}, {}),
        ({"x-slo-class": "text"}, {"service_tier": "soon"}),
        ({"x-override-priority": "1"}, {"priority": "soon"}),
    ):
        with pytest.raises(BadInput, match="soon"):
            terms(headers, **body)


def test_a_header_that_comes_twice_is_a_list() -> None:
    with pytest.raises(BadInput, match="x-slo-ttft-ms: '250, 300'"):
        terms([("x-slo-ttft-ms", "250"), ("x-slo-ttft-ms", "300")])


# ---- classes ---------------------------------------------------------------------------------------------------------


def test_a_class_gives_its_objective_and_a_header_wins_over_the_body() -> None:
    assert terms(service_tier="search") == Terms(ttft_slo_s=4.0, slo_class="search")
    assert terms({"x-slo-class": "text"}) == Terms(ttft_slo_s=0.25, slo_class="text")
    assert terms({"x-slo-class": "text"}, service_tier="search").slo_class == "text"


def test_an_explicit_objective_wins_over_the_class_which_still_counts_it() -> None:
    assert terms({"x-slo-ttft-ms": "10"}, service_tier="search") == Terms(ttft_slo_s=0.01, slo_class="search")
    assert terms({"x-slo-class": "text"}, ttft_slo_ms=10) == Terms(ttft_slo_s=0.01, slo_class="text")


@pytest.mark.parametrize("name", ["auto", "default"])
def test_openais_own_values_mean_the_default_class(name: str) -> None:
    assert terms(service_tier=name) == terms({"x-slo-class": name}) == terms()
    assert Intake({"a": 5.0, "b": 7.0}, "b").terms([(b"x-slo-class", name.encode())]).slo_class == "b"


@pytest.mark.parametrize("value", ["flex", "", "Text", "text ", "x" * 500, 5, True, ["text"], {}])
def test_an_unknown_class_is_refused_by_name_value_and_the_known_ones(value: Any) -> None:
    with pytest.raises(BadInput) as caught:
        terms(service_tier=value)
    message = str(caught.value)
    assert message.startswith("service_tier: ")
    assert (value[:80] if isinstance(value, str) else json.dumps(value)) in message
    assert message.endswith("known: text, image, search, file, standard, auto, default")
    assert (caught.value.status, caught.value.code) == (400, "unknown_slo_class")
    if isinstance(value, str) and value.strip() == value:
        with pytest.raises(BadInput, match=r"^x-slo-class: "):
            terms({"x-slo-class": value})


# ---- priority and tenant ---------------------------------------------------------------------------------------------


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_priorities(of_header: int, of_body: int) -> None:
    only_body = terms(priority=of_body)
    assert (only_body.priority, only_body.header_priority) == (of_body, None)
    both = terms({"x-override-priority": str(of_header)}, priority=of_body)
    assert (both.priority, both.header_priority) == (of_header, of_header)
    assert (both.slo_class, both.ttft_slo_s) == ("standard", 6.0)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 1.5, "3", True, [1], {}])
def test_a_body_without_a_priority_is_refused(value: Any) -> None:
    with pytest.raises(BadInput, match=r"^priority: .* from -9223372036854775808 to 9223372036854775807$"):
        terms(priority=value)


@pytest.mark.parametrize("value", ["", "high", "1.5", "1e3", "+1", "--1", "1_0", str(2**63), "9" * 5000, "nan"])
def test_a_header_without_a_priority_is_refused(value: str) -> None:
    with pytest.raises(BadInput, match=r"^x-override-priority: .* from -9223372036854775808 to") as caught:
        terms({"x-override-priority": value})
    assert caught.value.code == "invalid_priority"


def test_the_tenant_is_a_label_and_nothing_else() -> None:
    assert terms({"x-llm-d-inference-fairness-id": " acme "}) == Terms(
        ttft_slo_s=6.0, slo_class="standard", tenant="acme"
    )
    assert INTAKE.terms([(b"x-llm-d-inference-fairness-id", b"\xff")]).tenant == "\ufffd"


def test_the_answers_header_shows_milliseconds() -> None:
    for slo_ms, shown in ((250, b"250"), (33.3, b"33.3"), (3_600_000, b"3600000"), (1.5, b"1.5")):
        assert terms(ttft_slo_ms=slo_ms).answer_header() == (b"x-flowprefill-ttft-slo-ms", shown)

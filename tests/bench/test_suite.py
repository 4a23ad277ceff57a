"""A suite over servers that compute prompts at known speeds."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from flowprefill_sglang.bench.suite import Contender, Suite, SuiteSettings
from flowprefill_sglang.bench.suite_report import (
    footnotes,
    markdown,
    rates_by_configuration,
    ratios_of,
    slo_scales_by_configuration,
    suite_document,
)
from flowprefill_sglang.bench.windows import cut_windows
from flowprefill_sglang.errors import OutOfCapacity
from flowprefill_sglang.workload.trace import TraceRequest
from flowprefill_testing.streaming_server import StreamingServer, served

TRACE = [
    TraceRequest(arrival_s=0.05 * n, input_tokens=20, output_tokens=1, class_name="text" if n % 4 else "search")
    for n in range(80)
]
SETTINGS = SuiteSettings(slo_ms={"text": 150.0, "search": 300.0}, probes=3, minutes=1.0)


@dataclass
class Server:
    """What a contender needs, around a stand-in."""

    url: str
    drains: int = 0

    async def drained(self) -> None:
        self.drains += 1

    def scheduler_cpu_s(self) -> float:
        return 0.0


async def measured(
    stand_ins: dict[str, StreamingServer], settings: SuiteSettings = SETTINGS
) -> tuple[Suite, list[str]]:
    said: list[str] = []
    async with AsyncExitStack() as stack, asyncio.timeout(120):
        contenders = [
            Contender(
                name=name,
                server=Server(await stack.enter_async_context(served(stand_in))),
                sends_priority=name == "priority",
            )
            for name, stand_in in stand_ins.items()
        ]
        suite = Suite(contenders=contenders, windows=cut_windows(TRACE, 2, 30), settings=settings, say=said.append)
        await suite.run()
        return suite, said


@pytest.fixture(scope="module")
def outcome() -> tuple[Suite, dict[str, StreamingServer]]:
    """The first server is twice as fast as the others."""
    stand_ins = {
        "flowprefill": StreamingServer(seconds_per_token=0.001),
        "fcfs": StreamingServer(seconds_per_token=0.002),
        "priority": StreamingServer(seconds_per_token=0.002),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowprefill_sglang.bench.offer.LATE_MS", 10_000.0)  # the machine of a test may be busy
        suite, _ = asyncio.run(measured(stand_ins))
    return suite, stand_ins


def test_the_faster_server_sustains_the_higher_rate(outcome: tuple[Suite, Any]) -> None:
    suite, _ = outcome
    assert 1.3 < ratios_of(suite)["flowprefill/fcfs"]["median"] < 3.2
    assert suite.capacity_rps == pytest.approx(25, rel=0.3)


def test_every_configuration_gets_the_same_prompts_in_turns(outcome: tuple[Suite, dict[str, StreamingServer]]) -> None:
    suite, stand_ins = outcome
    order = [(row["window"], row["probe"], row["configuration"]) for row in suite.rows]
    names = list(stand_ins)
    asked = [(w, p, name) for w in (0, 1) for p in range(SETTINGS.probes) for name in names]
    assert [turn for turn in order if turn[1] < SETTINGS.probes] == asked
    assert order == sorted(order, key=lambda turn: (turn[0], turn[1], names.index(turn[2])))
    texts = [
        Counter(body["text"] for body in server.bodies if body["rid"].startswith("suite"))
        for server in stand_ins.values()
    ]
    assert texts[0].keys() == texts[1].keys() == texts[2].keys()
    loads = Counter(name for _, _, name in order)
    assert {c.name: c.server.drains for c in suite.contenders} == {name: loads[name] + 2 for name in names}


def test_only_the_priority_server_is_told_priorities(outcome: tuple[Suite, dict[str, StreamingServer]]) -> None:
    _, stand_ins = outcome
    load = {n: [b for b in s.bodies if b["rid"].startswith("suite")] for n, s in stand_ins.items()}
    assert all("priority" not in body for name in ("flowprefill", "fcfs") for body in load[name])
    assert {body["priority"] for body in load["priority"]} == {0, 1}
    assert Counter(body["priority"] for body in load["priority"])[1] > len(load["priority"]) / 2, "text comes first"


def test_the_document_and_the_report(outcome: tuple[Suite, Any]) -> None:
    suite, _ = outcome
    document = json.loads(json.dumps(suite_document(suite), allow_nan=False))
    assert set(document["configs"]) == {"flowprefill", "fcfs", "priority"}
    for numbers in document["configs"].values():
        rates = numbers["max_goodput_rps"]
        assert rates["min"] <= rates["median"] <= rates["max"]
    assert set(document["ratios"]) == {"flowprefill/fcfs", "flowprefill/priority"}
    assert document["ratios"]["flowprefill/fcfs"] == document["ratio_spread"]["flowprefill/fcfs"]["median"]
    assert len(document["rows"]) == len(suite.rows) >= 18
    assert len(document["windows"]) == 2
    for curve in document["attainment_by_slo_scale"].values():
        assert [x for x, _ in curve] == [0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0]
    for curve in rates_by_configuration(suite):
        assert list(curve.attainment) == sorted(curve.attainment, reverse=True)
    assert {curve.name for curve in slo_scales_by_configuration(suite)} == set(document["configs"])
    trace = {"files": [{"file": "t", "sha256": "a" * 64}], "requests": 80, "length_scale": 1.0}
    about = {
        "flags": {name: ["--x"] for name in suite.found},
        "trace": trace | {"left_out_as_too_long": 0, "skipped_rows": 0},
        "command": ["flowprefill"],
        "commit": None,
        "hardware": {"cores": 2},
        "versions": {},
        "model": {"name": "tiny"},
        "placement": "not pinned",
    }
    text = markdown(suite, about, ["a.png"])
    assert "| `fcfs` | `--x` |" in text
    assert "![a.png](a.png)" in text
    assert "| text |" in text
    assert "Median (least–most) of 2 windows" in footnotes(suite)[0]


def test_a_suite_that_takes_too_long_leaves_windows_out() -> None:
    hurried = SuiteSettings(slo_ms=SETTINGS.slo_ms, probes=1, minutes=1e-6)
    suite, said = asyncio.run(measured({"flowprefill": StreamingServer(), "fcfs": StreamingServer()}, hurried))
    assert len(suite.windows) == 1
    assert any("window 1 is left out" in line for line in said)
    assert footnotes(suite)[0].startswith("One window")


def test_a_client_that_cannot_keep_up_ends_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowprefill_sglang.bench.offer.LATE_MS", -1.0)
    with pytest.raises(OutOfCapacity, match="requests/s to flowprefill"):
        asyncio.run(measured({"flowprefill": StreamingServer(), "fcfs": StreamingServer()}))

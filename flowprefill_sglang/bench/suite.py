"""Several configurations of one machine under the same load, in turns: which sustains the highest rate?

All configurations are up at once and one is under load at a time, probe by probe, so that a machine that is faster now
than then treats them alike. A repeat is another window of the trace: its lengths and the pattern of its arrivals are
the same for every configuration, and a probe plays it at another rate. When a window's searches are done, it is played
once more to each configuration, at one rate for all, until even an objective of twice the length is decided.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from flowprefill_sglang.bench.client import RequestRecord
from flowprefill_sglang.bench.curves import SLO_SCALES
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.goodput import TARGET, Estimate, GoodputSearch, Probe, estimate
from flowprefill_sglang.bench.objectives import (
    Objective,
    median_prompts,
    scaled_objectives,
    stated_objectives,
    unscaled_objectives,
)
from flowprefill_sglang.bench.offer import HOPELESS, Offered, in_time, offer
from flowprefill_sglang.bench.plan import PromptKind, plan_requests
from flowprefill_sglang.bench.probe import measure_isolated_ttft
from flowprefill_sglang.bench.windows import Window
from flowprefill_sglang.workload.trace import at_rate

ENDPOINT = ENDPOINTS["generate"]
ISOLATED_REPEATS = 5
FIRST_LOAD = 0.6
"""Where every configuration's first search starts, as a share of what the machine can compute."""
LEAST_LOAD = 0.05
"""The least rate that is tried, as such a share: a lower one takes many minutes, and is nobody's choice."""
EXPECTED_LOAD = 0.35
"""What is assumed of the rates that are tried, for the time that the measurement takes."""
LEAST_REQUESTS = 30
"""Of a window, however short the time: fewer say nothing about 90%."""
OVERRUN = 1.2
"""Windows are left out when they would take the measurement beyond this many times the minutes asked for."""


class SuiteServer(Protocol):
    """One configuration, up and running."""

    @property
    def url(self) -> str:
        """Where requests go."""
        ...

    async def drained(self) -> None:
        """Wait until nothing is under way, and empty the prefix cache."""
        ...

    def scheduler_cpu_s(self) -> float:
        """CPU seconds of its scheduler process so far."""
        ...


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What is measured."""

    name: str
    server: SuiteServer
    sends_priority: bool = False
    """Whether requests say SGLang's ``priority``: the tighter a class's objective, the higher."""


@dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """How to measure."""

    seed: int = 0
    prompts: PromptKind = "bytes"
    length_factor: float = 1.0
    """That the windows' lengths were scaled by, for the objectives."""
    target: float = TARGET
    probes: int = 4
    """Rates tried for each configuration and window, or more while they all pass or all fail."""
    minutes: float = 28.0
    """About how long to measure; decides how many of a window's requests are used."""
    slo_ms: Mapping[str, float] = field(default_factory=dict)
    slo_factor: float | None = None
    slo_scales: tuple[float, ...] = SLO_SCALES


@dataclass(kw_only=True)
class Suite:
    """One measurement, and what came out."""

    contenders: Sequence[Contender]
    windows: list[Window]
    settings: SuiteSettings
    say: Callable[[str], None]
    objectives: dict[str, Objective] = field(default_factory=dict)
    isolated_ttft_s: dict[str, list[float]] = field(default_factory=dict)
    capacity_rps: float = 0.0
    """The rate that would keep the machine busy, from the times of single requests."""
    found: dict[str, dict[int, Estimate]] = field(default_factory=dict)
    """By configuration and window."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Probes, as JSON objects."""
    fixed_rate: dict[int, float] = field(default_factory=dict)
    """The one rate of each window at which objectives of all lengths were decided."""
    fixed_rate_records: dict[str, list[RequestRecord]] = field(default_factory=dict)
    fixed_rate_requests: Counter[str] = field(default_factory=Counter)
    """Sent to each configuration at the fixed rates, by class."""

    async def run(self) -> None:
        """Everything. Raises PeerFault when a server breaks, OutOfCapacity when the client cannot keep up."""
        began_at = time.monotonic()
        self.found = {contender.name: {} for contender in self.contenders}
        self.fixed_rate_records = {contender.name: [] for contender in self.contenders}
        await self._set_objectives()
        self._fit_into_time()
        for done, window in enumerate(self.windows):
            minutes = (time.monotonic() - began_at) / 60
            if done and minutes * (1 + 1 / done) > OVERRUN * self.settings.minutes:
                self.say(f"window {window.number} is left out: {minutes:.0f} minutes have passed")
                self.windows = self.windows[:done]
                break
            await self._search(window)
            await self._play_at_one_rate(window)

    async def _set_objectives(self) -> None:
        """Of the windows' classes, scaled to this machine unless stated; single requests go to the last contender."""
        requests = [request for window in self.windows for request in window.requests]
        medians = median_prompts(requests)
        self.isolated_ttft_s = await measure_isolated_ttft(
            self.contenders[-1].server.url,
            medians,
            endpoint=ENDPOINT,
            model="",
            prompts=self.settings.prompts,
            seed=self.settings.seed,
            repeats=ISOLATED_REPEATS,
        )
        if self.settings.slo_factor is not None:
            chosen = unscaled_objectives(self.settings.slo_factor)
        else:
            scaled = {name: tokens for name, tokens in medians.items() if name not in self.settings.slo_ms}
            chosen = scaled_objectives(scaled, self.isolated_ttft_s, self.settings.length_factor)
        self.objectives = {n: o for n, o in (chosen | stated_objectives(self.settings.slo_ms)).items() if n in medians}
        for name, objective in self.objectives.items():
            alone_ms = 1_000 * median(self.isolated_ttft_s[name])
            self.say(f"{name:7} median {medians[name]} tokens, alone {alone_ms:.0f} ms: {objective.derivation()}")
        counts = Counter(request.class_name for request in requests)
        self.capacity_rps = len(requests) / sum(n * median(self.isolated_ttft_s[name]) for name, n in counts.items())

    def _fit_into_time(self) -> None:
        """As many requests a window as can be probed in the time given."""
        loads = (self.settings.probes + 1) * len(self.windows)
        per_request_s = len(self.contenders) / (self.capacity_rps * EXPECTED_LOAD)
        affordable = int(60 * self.settings.minutes / (loads * per_request_s))
        self.windows = [window.of_size(max(LEAST_REQUESTS, affordable)) for window in self.windows]
        self.say(f"busy at about {self.capacity_rps:.1f} requests/s; {len(self.windows[0].requests)} requests a window")

    async def _search(self, window: Window) -> None:
        searches = {}
        for contender in self.contenders:
            earlier = list(self.found[contender.name].values())
            guess_rps = earlier[-1].rate_rps if earlier else self.capacity_rps * FIRST_LOAD
            searches[contender.name] = GoodputSearch(
                guess_rps=guess_rps, target=self.settings.target, least_rps=self.capacity_rps * LEAST_LOAD
            )
        number = 0
        while any(not search.is_done(self.settings.probes) for search in searches.values()):
            for contender in self.contenders:
                search = searches[contender.name]
                if search.is_done(self.settings.probes):
                    continue
                rate_rps = search.next_rate()
                row = await self._probe(contender, window, number, rate_rps)
                search.probes.append(Probe(rate_rps=rate_rps, attained=row["attained"], requests=row["requests"]))
            number += 1
        for name, search in searches.items():
            self.found[name][window.number] = estimate(search.probes, self.settings.target)

    async def _probe(self, contender: Contender, window: Window, number: int, rate_rps: float) -> dict[str, Any]:
        cpu_before_s = contender.server.scheduler_cpu_s()
        hopeless = min(HOPELESS, 0.8 * self.settings.target)
        offered = await self._offer(contender, window, rate_rps, hopeless=hopeless)
        cpu_s = contender.server.scheduler_cpu_s() - cpu_before_s
        row = {
            "window": window.number,
            "probe": number,
            "configuration": contender.name,
            "rate_rps": round(rate_rps, 4),
            **offered.to_row(),
            "scheduler_cpu_s": round(cpu_s, 2),
        }
        self.rows.append(row)
        self.say(
            f"window {window.number} probe {number} {contender.name:24} {rate_rps:7.2f} requests/s  "
            f"in time {100 * row['attained'] / row['requests']:3.0f}%{' (cut short)' if row['cut_short'] else ''}  "
            f"{row['wall_s']:.0f} s"
        )
        return row

    async def _play_at_one_rate(self, window: Window) -> None:
        """The geometric middle of the highest and the least maximum, where the configurations differ most."""
        rates = [self.found[contender.name][window.number].rate_rps for contender in self.contenders]
        rate_rps = self.fixed_rate[window.number] = math.sqrt(min(rates) * max(rates))
        for contender in self.contenders:
            offered = await self._offer(contender, window, rate_rps, patience=max(1.0, *self.settings.slo_scales))
            self.fixed_rate_records[contender.name] += offered.records
            self.say(
                f"window {window.number}         {contender.name:24} {rate_rps:7.2f} requests/s  "
                f"in time {100 * offered.attained / len(offered.plan):3.0f}%  {offered.wall_s:.0f} s"
            )
        self.fixed_rate_requests += Counter(request.class_name for request in window.requests)

    async def _offer(
        self,
        contender: Contender,
        window: Window,
        rate_rps: float,
        *,
        hopeless: float | None = None,
        patience: float = 1.0,
    ) -> Offered:
        async def once() -> Offered:
            plan = plan_requests(
                at_rate(window.requests, rate_rps),
                run_id=f"suite-{uuid.uuid4().hex[:12]}",
                seed=self.settings.seed,
                endpoint=ENDPOINT,
                model="",
                prompts=self.settings.prompts,
                objectives=self.objectives,
                priorities=self._priorities() if contender.sends_priority else None,
            )
            offered = await offer(contender.server.url, plan, self.objectives, hopeless=hopeless, patience=patience)
            await contender.server.drained()
            return offered

        return await in_time(once, f"at {rate_rps:.2f} requests/s to {contender.name}")

    def _priorities(self) -> dict[str, int]:
        """The class with the tightest objective has the highest."""
        by_patience = sorted(self.objectives, key=lambda name: -self.objectives[name].slo_ms)
        return {name: priority for priority, name in enumerate(by_patience)}

"""What ``flowprefill bench`` does to one server: warm-up, repeats, loads at other rates, the search for max goodput.

One load runs at a time, each with content of its own, so that none finds the prompts of the one before in a prefix
cache. After a load whose late requests were given up, a short request is sent and awaited before the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flowprefill_sglang.bench.client import RequestRecord
from flowprefill_sglang.bench.endpoints import ENDPOINTS
from flowprefill_sglang.bench.experiment import ExperimentSettings, Prepared, Result, plan, prepare, run
from flowprefill_sglang.bench.goodput import TARGET, Estimate, GoodputSearch, Probe, estimate
from flowprefill_sglang.bench.offer import HOPELESS, in_time, offer
from flowprefill_sglang.bench.probe import warm_up
from flowprefill_sglang.bench.report import late_refusal
from flowprefill_sglang.errors import OutOfCapacity
from flowprefill_sglang.workload.trace import MIN_PROMPT_TOKENS, TraceRequest, mean_rate


class Progress(Protocol):
    """Shows somebody how far a load is."""

    def load(self, what: str, requests: int) -> Callable[[], None]:
        """A load begins; call the result once for each request that ended."""
        ...


@dataclass(kw_only=True)
class Measurement:
    """One server under one workload, load after load."""

    url: str
    settings: ExperimentSettings
    progress: Progress
    target: float = TARGET
    probes_per_search: int = 6
    warm_up_requests: int = 4
    results: list[Result] = field(default_factory=list)
    """One for each repeat."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Loads at other rates than the workload's own, as JSON objects."""
    found: list[Estimate] = field(default_factory=list)
    """Maximum goodput, one for each repeat."""
    prepared: Prepared = field(init=False)
    """Known after ``prepare``."""
    _loads: int = 0

    async def prepare(self, requests: Sequence[TraceRequest]) -> Prepared:
        """Fit the workload to the server, set objectives, and warm the server up. Raises PeerFault and BadInput."""
        self.prepared = await prepare(self.url, requests, self.settings)
        await self._send_alone(self.prepared.requests[: self.warm_up_requests])
        return self.prepared

    async def repeat(self, what: str) -> Result:
        """The workload at its own rate, every answer in full. Raises OutOfCapacity when the client fell behind."""
        advance = self.progress.load(what, len(self.prepared.requests))

        def on_record(record: RequestRecord) -> None:
            advance()

        result = await run(self.url, self.prepared, self.settings, on_record, number=self._next_load())
        self.results.append(result)
        if result.report.is_client_late:
            raise OutOfCapacity(late_refusal(result.report.late_p99_ms, f"in {what}"))
        return result

    async def at_rate(self, rate_rps: float, *, hopeless: float | None = None, repeat: int = 0) -> dict[str, Any]:
        """The workload at another rate, until every request is decided. Raises OutOfCapacity as ``repeat`` does."""
        what = f"at {rate_rps:.2f} requests/s"

        async def once() -> Any:  # Offered
            planned = plan(self.prepared, self.settings, number=self._next_load(), rate_rps=rate_rps)
            advance = self.progress.load(what, len(planned))
            offered = await offer(
                self.url,
                planned,
                self.prepared.objectives,
                hopeless=hopeless,
                headers=self.settings.headers,
                on_answer=lambda record: advance(),
            )
            await self._settle()
            return offered

        row = {"repeat": repeat, "rate_rps": round(rate_rps, 4)} | (await in_time(once, what)).to_row()
        self.rows.append(row)
        return row

    async def search(self, repeat: int) -> Estimate:
        """The highest rate with attainment at the target; the repeat's own load is the first probe."""
        report = self.results[repeat].report
        own_rps = mean_rate(self.prepared.requests)
        search = GoodputSearch(guess_rps=own_rps, target=self.target)
        search.probes.append(Probe(rate_rps=own_rps, attained=report.attained, requests=report.requests))
        while not search.is_done(self.probes_per_search + 1):
            rate_rps = search.next_rate()
            row = await self.at_rate(rate_rps, hopeless=min(HOPELESS, 0.8 * self.target), repeat=repeat)
            search.probes.append(Probe(rate_rps=rate_rps, attained=row["attained"], requests=row["requests"]))
        self.found.append(estimate(search.probes, self.target))
        return self.found[-1]

    def _next_load(self) -> int:
        self._loads += 1
        return self._loads

    async def _settle(self) -> None:
        """Until a short request gets its answer: a server then no longer works on what was given up."""
        await self._send_alone([TraceRequest(arrival_s=0.0, input_tokens=MIN_PROMPT_TOKENS, output_tokens=1)])

    async def _send_alone(self, requests: Sequence[TraceRequest]) -> None:
        await warm_up(
            self.url,
            requests,
            endpoint=ENDPOINTS[self.settings.endpoint],
            model=self.prepared.model.name,
            prompts=self.settings.prompts,
            seed=self.settings.seed,
            headers=self.settings.headers,
        )

"""One run of the demo: single requests that set the objectives, the load, and what the workers recorded meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flowprefill_sglang.bench.comparison import NAMES, Contestant
from flowprefill_sglang.bench.experiment import ExperimentSettings, Prepared, Result, prepare, run
from flowprefill_sglang.bench.objectives import REFERENCE, Objective
from flowprefill_sglang.bench.probe import fetch_engine_settings
from flowprefill_sglang.bench.recordings import Workers
from flowprefill_sglang.cluster.alive import while_alive
from flowprefill_sglang.cluster.launcher import ClusterSpec, LaunchEvent
from flowprefill_sglang.cluster.pool_starting import RunningPool, pool_here
from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.observe.recording import Recording
from flowprefill_sglang.workload.trace import TraceRequest

RECORDED_BEFORE_S = 5.0
"""Seconds of recording asked for beyond the load: what ran when it began belongs to the picture."""


@dataclass
class DemoRun:
    """The same requests on one server after another. The first one's objectives hold for all."""

    settings: ExperimentSettings
    requests: Sequence[TraceRequest]
    workload: str
    console: Console
    _objectives: dict[str, Objective] | None = field(default=None, init=False)

    async def on_server(self, url: str) -> Contestant:
        """Load a server that somebody else runs. One without recordings is as good. Raises PeerFault."""
        result = await self._load(url, "the server")
        try:
            recordings = await self._recordings(url, result)
        except PeerFault:  # some other SGLang server
            recordings = []
        return Contestant(scheduler=url, result=result, recordings=recordings)

    async def on_new_cluster(self, scheduler: str, spec: ClusterSpec) -> Contestant:
        """Bring a cluster with this prefill scheduler up, load it, and take it down again. Raises PeerFault when it
        breaks, StartupError when it does not come up."""
        spec = replace(spec, prefill_arguments=(*spec.prefill_arguments, "--prefill-scheduler", scheduler))
        name = NAMES[scheduler]
        self.console.print(
            f"[bold]{name}[/bold]: starting 1 router, {spec.prefill} prefill and {spec.decode} decode; "
            f"model {escape(spec.model_path.name)}",
            soft_wrap=True,
        )
        async with self._running(spec) as cluster:
            engine = await fetch_engine_settings(cluster.member_url("prefill-0"))
            self.console.print(f"  prefill workers run with {engine.flags()}", soft_wrap=True)
            result = await while_alive(cluster.watch(), self._load(cluster.url, name))
            recordings = await self._recordings(cluster.url, result)
        return Contestant(scheduler=scheduler, result=result, recordings=recordings, engine=engine)

    @contextlib.asynccontextmanager
    async def _running(self, spec: ClusterSpec) -> AsyncIterator[RunningPool]:
        async with contextlib.AsyncExitStack() as stack:
            with self.console.status("loading") as status:

                def show(event: LaunchEvent) -> None:
                    status.update(f"{event.elapsed_s:.0f} s: {event.name} {event.state}")
                    if event.state == "ready":
                        self.console.print(f"  {event.name:<10} ready  after {event.elapsed_s:.1f} s")

                cluster = await stack.enter_async_context(pool_here(spec, show, replaces=False))
            yield cluster

    async def _load(self, url: str, name: str) -> Result:
        with self.console.status("measuring single requests"):
            prepared = await prepare(url, self.requests, self.settings)
        if self._objectives is None:
            self._objectives = prepared.objectives
            self._print_plan(prepared)
        prepared = replace(prepared, objectives=self._objectives)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task(f"replaying on {escape(name)}", total=len(self.requests))
            return await run(url, prepared, self.settings, lambda record: progress.advance(bar))

    async def _recordings(self, url: str, result: Result) -> list[Recording]:
        return await Workers(url, api_key=self.settings.api_key).recordings(result.report.wall_s + RECORDED_BEFORE_S)

    def _print_plan(self, prepared: Prepared) -> None:
        requests, factor = prepared.requests, prepared.length_factor
        tokens = sum(r.input_tokens for r in requests)
        self.console.print(
            f"workload: {escape(self.workload)}: {len(requests)} requests in {requests[-1].arrival_s:.0f} s, "
            f"{tokens:,} prompt tokens, lengths × {factor:g}",
            soft_wrap=True,
        )
        measured = any(o.isolated_ttft_ms is not None for o in prepared.objectives.values())
        basis = f"what single requests take here / on {REFERENCE}" if measured else "the stated factor"
        self.console.print(f"TTFT objectives: the paper's × {basis}", soft_wrap=True)
        for class_name, objective in prepared.objectives.items():
            self.console.print(f"  {class_name:<7} {objective.derivation()}")

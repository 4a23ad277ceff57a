"""``flowprefill timeline``: watch a running cluster's prefill workers for some seconds and draw what ran when."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from flowprefill_sglang.bench.recordings import Workers
from flowprefill_sglang.bench.timeline_panels import (
    panel,
    recorded_requests,
    timeline_on,
    with_facts,
)
from flowprefill_sglang.bench.timeline_plot import check_suffix, draw_timeline, require_matplotlib
from flowprefill_sglang.bench.timeline_window import most_telling_window
from flowprefill_sglang.errors import BadInput, PeerFault
from flowprefill_sglang.flag_values import number
from flowprefill_sglang.observe import recording
from flowprefill_sglang.observe.recording import Recording

DEFAULT_URL = "http://127.0.0.1:30000"
MAX_SECONDS = 600.0
"""A worker's memory of its events holds minutes."""
MAX_ROWS = 60
"""Requests in a worker's panel, about a page."""


def add_timeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``timeline``."""
    parser.add_argument("--seconds", type=_seconds, required=True, metavar="S", help="how long to watch")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=".png, .svg or .pdf; .json for the events"
    )
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the router (default {DEFAULT_URL})")
    parser.add_argument("--api-key", default=None, metavar="KEY", help="bearer token of the router and the workers")


def _seconds(text: str) -> float:
    return number(text, f"a number of seconds above 0 and up to {MAX_SECONDS:g}", lambda v: 0 < v <= MAX_SECONDS)


def run_timeline(namespace: argparse.Namespace) -> int:
    """0 when the file was written; 1 when no worker answered, or when there was nothing to draw."""
    output: Path = namespace.output
    if not namespace.url.startswith(("http://", "https://")):
        raise BadInput(f"--url: expected an address like {DEFAULT_URL}, got {namespace.url!r}")
    if not output.absolute().parent.is_dir():
        raise BadInput(f"--output: the folder {output.parent} does not exist")
    if output.suffix != ".json":
        check_suffix("--output", output, also=(".json",))
        require_matplotlib()
    recordings = asyncio.run(_watch(namespace.url, namespace.api_key, namespace.seconds))
    lost = sum(one.lost for one in recordings)
    if lost:
        print(f"flowprefill timeline: {lost} events were lost on the way since the workers' start", file=sys.stderr)
    try:
        if output.suffix == ".json":
            return _write_events(output, recordings, namespace.seconds)
        return _draw(output, recordings, namespace.seconds)
    except OSError as error:
        raise BadInput(f"--output: cannot write {output}: {error.strerror or error}") from error


async def _watch(url: str, api_key: str | None, seconds: float) -> list[Recording]:
    workers = Workers(url, api_key=api_key)
    addresses = await workers.addresses()  # before the wait: a wrong address should be known at once
    if not addresses:
        raise PeerFault(f"the router at {url} is in touch with no prefill worker")
    with Console(stderr=True).status(f"watching {', '.join(addresses)} for {seconds:g} s"):
        await asyncio.sleep(seconds)
    return await workers.recordings(seconds)


def _write_events(output: Path, recordings: Sequence[Recording], seconds: float) -> int:
    encoded = b",\n".join(recording.encode(one) for one in recordings)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.write_bytes(b'{"seconds": %a, "workers": [\n%b\n]}\n' % (seconds, encoded))
    temporary.replace(output)
    events = sum(len(one.events) for one in recordings)
    print(f"{output}: {events} events of {len(recordings)} prefill workers in {seconds:g} s")
    return 0


def _draw(output: Path, recordings: Sequence[Recording], seconds: float) -> int:
    zero_unix_at = max(one.unix_now for one in recordings) - seconds
    timelines = [timeline_on(one, zero_unix_at) for one in recordings]
    requests = recorded_requests(timelines)
    panels = [
        panel(
            one.worker, [timeline], {span.rid: requests[span.rid] for span in timeline.requests if span.rid in requests}
        )
        for one, timeline in zip(recordings, timelines, strict=True)
    ]
    if not any(one.tasks for one in panels):
        names = ", ".join(one.worker for one in recordings)
        print(f"flowprefill timeline: no prefill in {seconds:g} s on {names}; nothing to draw", file=sys.stderr)
        return 1
    window = most_telling_window(panels, max_rows=MAX_ROWS)
    shown = f"{max(window.start_at, 0):.1f} s to {window.end_at:.1f} s of the {seconds:g} s watched"
    draw_timeline(
        output,
        with_facts(panels, window),
        window,
        title="Prefill tasks, one panel a worker" if len(panels) > 1 else f"Prefill tasks of {panels[0].title}",
        about=f"Shown: {shown}, the part with the most preemptions that fits {MAX_ROWS} lines.",
    )
    print(f"{output}: {shown}")
    return 0

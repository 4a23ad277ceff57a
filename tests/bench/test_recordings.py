from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from flowprefill_sglang.bench.recordings import Workers
from flowprefill_sglang.errors import PeerFault
from flowprefill_testing.recorded_workers import RecordedWorkers, one_prefill, served


def ask(workers: RecordedWorkers, question: Callable[[str], Any]) -> Any:
    async def main() -> Any:
        async with served(workers) as url, asyncio.timeout(60):
            return await question(url)

    return asyncio.run(main())


def test_every_prefill_workers_recording() -> None:
    workers = RecordedWorkers(one_prefill("a"), one_prefill("b"))
    first, second = ask(workers, lambda url: Workers(url + "/").recordings(2.5))
    assert (first.worker, second.worker) == ("prefill-0", "prefill-1")
    assert [event.rid for event in first.events if hasattr(event, "rid")] == ["a", "a"]
    assert sorted(workers.asked) == ["/0/flowprefill/timeline?seconds=3", "/1/flowprefill/timeline?seconds=3"]


@pytest.mark.parametrize("state", ["dead", "joining"])
def test_workers_that_are_out_of_touch_are_not_asked(state: str) -> None:
    assert ask(RecordedWorkers(one_prefill(), state=state), lambda url: Workers(url).recordings(1)) == []


def test_a_key_is_sent_to_the_router_and_to_the_workers() -> None:
    workers = RecordedWorkers(one_prefill(), api_key="secret")
    assert len(ask(workers, lambda url: Workers(url, api_key="secret").recordings(1))) == 1
    with pytest.raises(PeerFault, match="/workers answered with HTTP 401"):
        ask(workers, lambda url: Workers(url).recordings(1))


@pytest.mark.parametrize("listing", [[], {"workers": [{}]}, {"workers": 3}])
def test_another_kind_of_server_is_recognised(listing: Any) -> None:
    workers = RecordedWorkers()
    workers.listing = listing or [1]
    with pytest.raises(PeerFault, match="is not a FlowPrefill router's list of workers"):
        ask(workers, lambda url: Workers(url).addresses())


def test_no_server() -> None:
    with pytest.raises(PeerFault, match=r"no answer from http://127\.0\.0\.1:1/workers"):
        asyncio.run(Workers("http://127.0.0.1:1").addresses())

"""A prefill worker is killed: what it had in hand is retried or failed at once, and the other one serves on."""

import os
import signal
import threading

import pytest

from flowprefill_testing import prompts
from flowprefill_testing.clusters import Cluster, wait_until
from flowprefill_testing.http import generate, get, post

pytestmark = pytest.mark.cluster


def test_the_other_worker_takes_over(cluster: Cluster) -> None:
    outcomes: list[int] = []

    def ask(number: int) -> None:
        sampling = {"temperature": 0, "max_new_tokens": 4}
        status, _ = post(
            f"{cluster.url}/generate", {"input_ids": prompts.ids(4_000, number), "sampling_params": sampling}
        )
        outcomes.append(status)

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in asking:
        thread.start()
    wait_until(lambda: state_of(cluster, "prefill-1")["in_flight"] > 0, timeout_s=30)
    os.killpg(cluster.workers["prefill-1"]["pid"], signal.SIGKILL)
    for thread in asking:
        thread.join(60)
    assert len(outcomes) == 8, "every client was answered"
    assert set(outcomes) <= {200, 502}, outcomes
    assert outcomes.count(200) >= 4, "only what the dead worker held can fail"
    wait_until(lambda: state_of(cluster, "prefill-1").get("state") != "ready", timeout_s=15)
    for number in range(3):
        generate(cluster.url, input_ids=prompts.ids(100, number))


def state_of(cluster: Cluster, name: str) -> dict:
    _, document = get(f"{cluster.url}/workers")
    return next((worker for worker in document["workers"] if worker.get("name") == name), {})

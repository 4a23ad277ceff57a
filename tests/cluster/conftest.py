"""Real processes, started once for all tests of this folder: a whole cluster by ``flowprefill up``, and beside it one
stock SGLang engine with the same weights, whose answers are the truth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_sglang.workload.tiny_model import make_tiny_model
from flowprefill_testing.clusters import CHUNK_TOKENS, CONTEXT_TOKENS, PAGE_TOKENS, Cluster, answers, wait_until
from flowprefill_testing.direct import DirectWorkers, Pair

STRICT = {
    # SGLang then counts every KV slot, lock and request row whenever it is idle, and stops when one has leaked.
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, made for this session."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def _servers(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, str]]:
    directory = tmp_path_factory.mktemp("cluster")
    ready_file, log_dir = directory / "ready.json", directory / "logs"
    (stock_port,) = free_ports(1)
    temporary = directory / "tmp"
    temporary.mkdir()
    environment = {**os.environ, **STRICT, "TMPDIR": str(temporary)}
    flags = ["--model-path", str(model_path), "--context-length", str(CONTEXT_TOKENS), "--max-total-tokens", "40000"]
    stock_log = directory / "stock.log"
    up_log = directory / "up.log"
    with stock_log.open("wb") as stock_out, up_log.open("wb") as up_out:
        stock = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", *flags, "--port", str(stock_port)],
            stdout=stock_out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )
        layout = ["--page-size", str(PAGE_TOKENS), "--chunked-prefill-size", str(CHUNK_TOKENS)]
        files = ["--ready-file", str(ready_file), "--log-dir", str(log_dir)]
        command = ["up", "--prefill", "2", "--decode", "1", "--port", "0", *files, *flags, *layout]
        up = subprocess.Popen(
            [sys.executable, "-m", "flowprefill_sglang", *command],
            stdout=up_out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    stock_url = f"http://127.0.0.1:{stock_port}"
    try:
        wait_until(ready_file.exists, up, up_log)
        wait_until(lambda: answers(f"{stock_url}/health_generate"), stock, stock_log)
        document = json.loads(ready_file.read_text())
        workers = {worker["name"]: worker for worker in document["workers"]}
        yield Cluster(document["url"], workers, log_dir, up, ready_file), stock_url
    finally:
        for process in (up, stock):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in (up, stock):
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="session")
def cluster(_servers: tuple[Cluster, str]) -> Cluster:
    """One router, two prefill workers, one decode instance."""
    return _servers[0]


@pytest.fixture(scope="session")
def stock_url(_servers: tuple[Cluster, str]) -> str:
    """One stock SGLang engine, not disaggregated: no chunks, pages of one token."""
    return _servers[1]


@pytest.fixture(scope="session")
def _direct(cluster: Cluster, model_path: Path) -> Iterator[dict[str, Pair]]:
    """Two more prefill workers, which no router knows. They share the cluster's decode instance."""
    sizes = {
        "roomy": ["--max-total-tokens", "40000", "--max-blocking-ms", "2"],
        "tight": ["--max-total-tokens", "6600"],
    }
    sizes["tight"] += ["--chunked-prefill-size", "1024"]
    with DirectWorkers(model_path, cluster.log_dir, STRICT) as workers:
        for name, flags in sizes.items():
            workers.start(name, flags)
        yield {name: workers.pair(name, cluster.workers["decode-0"]["url"]) for name in sizes}


@pytest.fixture(scope="session")
def roomy(_direct: dict[str, Pair]) -> Pair:
    """A prefill worker that computes every prompt in one forward pass, and has memory for many; its long operators run
    in slices."""
    return _direct["roomy"]


@pytest.fixture(scope="session")
def tight(_direct: dict[str, Pair]) -> Pair:
    """A prefill worker with 6,600 KV slots, which computes a prompt in chunks of 1,024 tokens."""
    return _direct["tight"]


@pytest.fixture(autouse=True)
def _logs_of_a_failure(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails shows what the processes said."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before and "cluster" in request.fixturenames:
        print(request.getfixturevalue("cluster").logs())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that break the shared cluster come last, the one that ends it at the very end."""
    order = {"test_preemption_shutdown": 1, "test_worker_loss": 1, "test_shutdown": 2}
    items.sort(key=lambda item: order.get(item.path.stem, 0))

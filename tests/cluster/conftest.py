"""Real processes, started once for all tests of this folder: a whole cluster by ``flowprefill up``, and beside it one
stock SGLang engine with the same weights, whose answers are the truth."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_sglang.workload.tiny_model import make_tiny_model
from flowprefill_testing.clusters import CHUNK_TOKENS, CONTEXT_TOKENS, PAGE_TOKENS, Cluster, answers, wait_until
from flowprefill_testing.direct import DirectWorkers, Pair
from flowprefill_testing.servers import STOCK_SERVER, STRICT, end, environment, sizes, started_up, with_us


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, made for this session."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@dataclass
class Stock:
    """A stock engine that may still be starting."""

    url: str
    process: subprocess.Popen
    log: Path


@pytest.fixture(scope="session")
def _stock(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    directory = tmp_path_factory.mktemp("stock")
    (port,) = free_ports(1)
    log = directory / "stock.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *STOCK_SERVER, *sizes(model_path), "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**environment(directory), "OMP_NUM_THREADS": "1"},
        )
    yield Stock(f"http://127.0.0.1:{port}", process, log)
    end(process)


@pytest.fixture(scope="session")
def cluster(model_path: Path, tmp_path_factory: pytest.TempPathFactory, _stock: Stock) -> Iterator[Cluster]:
    """One router, two prefill workers, one decode instance. The stock engine starts at the same time."""
    layout = ["--page-size", str(PAGE_TOKENS), "--chunked-prefill-size", str(CHUNK_TOKENS)]
    flags = ["--prefill", "2", "--decode", "1", *sizes(model_path), *layout]
    with started_up(flags, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def stock_url(_stock: Stock) -> str:
    """One stock SGLang engine, not disaggregated: no chunks, pages of one token."""
    wait_until(lambda: answers(f"{_stock.url}/health_generate"), _stock.process, _stock.log)
    return _stock.url


@pytest.fixture(scope="module")
def wide(model_path: Path, tmp_path_factory: pytest.TempPathFactory, _stock: Stock) -> Iterator[Cluster]:
    """One router, two prefill workers and one decode instance, all of two tensor-parallel ranks."""
    layout = ["--page-size", str(PAGE_TOKENS), "--chunked-prefill-size", str(CONTEXT_TOKENS)]
    flags = ["--prefill", "2", "--decode", "1", "--tp-size", "2", *sizes(model_path), *layout]
    with started_up(flags, tmp_path_factory.mktemp("wide")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _direct(cluster: Cluster, model_path: Path) -> Iterator[dict[str, Pair]]:
    """Two more prefill workers, which no router knows. They share the cluster's decode instance."""
    flags_of = {
        "roomy": ["--max-total-tokens", "40000", "--max-blocking-ms", "2"],
        "tight": ["--max-total-tokens", "6600"],
    }
    flags_of["tight"] += ["--chunked-prefill-size", "1024"]
    with DirectWorkers(model_path, cluster.log_dir, {**STRICT, **with_us()}) as workers:
        for name, flags in flags_of.items():
            workers.start(name, flags)
        yield {name: workers.pair(name, cluster.workers["decode-0"]["url"]) for name in flags_of}


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
    if request.session.testsfailed > failed_before:
        for name in {"cluster", "wide"} & set(request.fixturenames):
            print(request.getfixturevalue(name).logs())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that break the shared cluster come last, the one that ends it at the very end."""
    order = {"test_preemption_shutdown": 1, "test_worker_loss": 1, "test_shutdown": 2}
    items.sort(key=lambda item: order.get(item.path.stem, 0))

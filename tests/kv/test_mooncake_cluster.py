"""Mooncake over TCP instead of the built-in backend, by one flag: SGLang's prefill and decode servers on a CPU."""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_sglang.workload.tiny_model import make_tiny_model
from flowprefill_testing import prompts
from flowprefill_testing.clusters import answers, wait_until
from flowprefill_testing.servers import STOCK_SERVER, with_us

pytestmark = pytest.mark.cluster

try:
    importlib.import_module("mooncake.engine")
except ImportError as error:
    pytest.skip(
        f"mooncake cannot be imported ({error}); it needs the system library libibverbs1 and "
        f"pip install mooncake-transfer-engine-non-cuda",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The three servers' URLs, and the bootstrap port under ``bootstrap``."""
    directory = tmp_path_factory.mktemp("mooncake")
    model = make_tiny_model(directory)
    ports = dict(zip(("single", "prefill", "decode", "bootstrap"), free_ports(4), strict=True))
    pd = ["--disaggregation-transfer-backend", "mooncake_tcp", "--disaggregation-bootstrap-port", ports["bootstrap"]]
    roles: dict[str, list[Any]] = {
        "single": [],
        "prefill": ["--disaggregation-mode", "prefill", "--disable-overlap-schedule", *pd],
        "decode": ["--disaggregation-mode", "decode", *pd],
    }
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, flags in roles.items():
            command = [sys.executable, *STOCK_SERVER, "--model-path", model, "--port", ports[name]]
            limits = ["--max-total-tokens", 20000, "--chunked-prefill-size", 512, "--skip-server-warmup"]
            with (directory / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(
                    [str(part) for part in [*command, *limits, *flags]],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, **with_us()},
                )
        found = {name: f"http://127.0.0.1:{ports[name]}" for name in roles}
        for name, process in processes.items():
            wait_until(lambda u=found[name]: answers(f"{u}/health"), process, Path(directory / f"{name}.log"))
        yield {**found, "bootstrap": str(ports["bootstrap"])}
    finally:
        for process in processes.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def generate(url: str, body: dict[str, Any]) -> list[int]:
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        output: list[int] = json.load(response)["output_ids"]
        return output


@pytest.mark.parametrize("tokens", [1, 511, 513, 1200])
@pytest.mark.parametrize("attempt", ["first", "cached"])
def test_answers_equal_a_single_server(urls: dict[str, str], tokens: int, attempt: str) -> None:
    body = {"input_ids": prompts.ids(tokens), "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
    room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": int(urls["bootstrap"])}
    paired = {**body, **room, "bootstrap_room": tokens * 10 + (attempt == "cached")}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        prefill = pool.submit(generate, urls["prefill"], paired)
        answer = generate(urls["decode"], paired)
        prefill.result()
    assert answer == generate(urls["single"], body)

"""The router's endpoints that are not inference."""

import http.client
import json
import threading
from urllib.parse import urlsplit

import pytest

from flowprefill_testing import prompts
from flowprefill_testing.clusters import Cluster, wait_until
from flowprefill_testing.http import generate, get, post, request

pytestmark = pytest.mark.cluster

JSON = {"content-type": "application/json"}


def test_health_and_readiness(cluster: Cluster) -> None:
    assert request("GET", f"{cluster.url}/health")[0] == 200
    assert request("GET", f"{cluster.url}/liveness")[0] == 200
    assert request("GET", f"{cluster.url}/readiness")[0] == 200
    assert request("GET", f"{cluster.url}/health_generate")[0] == 200


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info_is_the_engines(cluster: Cluster, stock_url: str, path: str) -> None:
    _, ours = get(f"{cluster.url}{path}")
    _, stock = get(f"{stock_url}/model_info")
    assert ours["model_path"] == stock["model_path"]
    assert ours["is_generation"] is True


def test_workers_lists_everyone(cluster: Cluster) -> None:
    _, document = get(f"{cluster.url}/workers")
    states = {worker["url"]: worker["state"] for worker in document["workers"]}
    expected = {worker["url"] for name, worker in cluster.workers.items() if name != "router"}
    assert states == dict.fromkeys(expected, "ready")


def test_flush_cache_reaches_every_server(cluster: Cluster) -> None:
    generate(cluster.url, input_ids=prompts.ids(640, 77))
    _wait_idle(cluster)
    servers = [name for name in cluster.workers if name != "router"]
    before = {name: _flushes(cluster, name) for name in servers}
    assert request("POST", f"{cluster.url}/flush_cache")[0] == 200
    wait_until(lambda: all(_flushes(cluster, name) > before[name] for name in servers), timeout_s=10)


def _flushes(cluster: Cluster, name: str) -> int:
    return (cluster.log_dir / f"{name}.log").read_text(errors="replace").count("Cache flushed successfully")


def test_abort_request_ends_it_on_both_sides(cluster: Cluster) -> None:
    rid = "to-be-aborted"
    outcome: list = []
    body = {
        "rid": rid,
        "input_ids": prompts.ids(200, 5),
        "sampling_params": {"temperature": 0, "max_new_tokens": 6_000, "ignore_eos": True},
    }
    asking = threading.Thread(target=lambda: outcome.append(post(f"{cluster.url}/generate", body)))
    asking.start()
    wait_until(lambda: _in_flight(cluster) > 0, timeout_s=30)
    assert request("POST", f"{cluster.url}/abort_request", json.dumps({"rid": rid}).encode(), JSON)[0] == 200
    asking.join(30)
    assert not asking.is_alive(), "the client of an aborted request is answered"
    _wait_idle(cluster)


def test_a_client_that_goes_away_frees_both_sides(cluster: Cluster) -> None:
    parts = urlsplit(cluster.url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    body = {
        "input_ids": prompts.ids(300, 6),
        "sampling_params": {"temperature": 0, "max_new_tokens": 6_000, "ignore_eos": True},
        "stream": True,
    }
    connection.request("POST", "/generate", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.read(20)
    response.close()
    connection.close()
    _wait_idle(cluster)
    generate(cluster.url, input_ids=prompts.ids(30, 6))


def _in_flight(cluster: Cluster) -> int:
    _, document = get(f"{cluster.url}/workers")
    return sum(worker["in_flight"] for worker in document["workers"])


def _wait_idle(cluster: Cluster) -> None:
    wait_until(lambda: _in_flight(cluster) == 0, timeout_s=30)

"""Nonsense gets a clear error; nothing hangs, nothing leaks, and the next good request works."""

import json
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import zmq

from flowprefill_sglang.wire.framing import decode_to_worker, encode
from flowprefill_sglang.wire.messages import PROTOCOL_VERSION, Hello, Limits, Refused
from flowprefill_testing import prompts
from flowprefill_testing.clusters import CONTEXT_TOKENS, Cluster, wait_until
from flowprefill_testing.http import generate, get, post, request

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def _the_next_good_request_works(cluster: Cluster):
    yield
    assert generate(cluster.url, input_ids=prompts.ids(20, 8))["meta_info"]["completion_tokens"] == 12
    wait_until(lambda: _in_flight(cluster) == 0, timeout_s=30)


def _in_flight(cluster: Cluster) -> int:
    _, document = get(f"{cluster.url}/workers")
    return sum(worker["in_flight"] for worker in document["workers"])


def message_of(document: object) -> str:
    assert isinstance(document, dict)
    error = document.get("error", document)
    return error["message"] if isinstance(error, dict) else str(error)


GREEDY = {"temperature": 0, "max_new_tokens": 4}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input_ids": [], "sampling_params": GREEDY}, "empty"),
        ({"input_ids": [5] * (CONTEXT_TOKENS + 10), "sampling_params": GREEDY}, "context"),
        ({"text": "x", "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
        ({"text": "x", "sampling_params": {"temperature": -1.0}}, "temperature"),
        ({"text": "x", "sampling_params": {"no_such_parameter": 1}}, "no_such_parameter"),
        ({"sampling_params": GREEDY}, "input_ids"),
    ],
    ids=["empty prompt", "too long", "negative max_new_tokens", "negative temperature", "unknown field", "no prompt"],
)
def test_a_wrong_generate_is_a_clear_4xx(cluster: Cluster, body: dict, words: str, streamed: bool) -> None:
    document = json.dumps({**body, "stream": streamed}).encode()
    status, _, answer = request("POST", f"{cluster.url}/generate", document, {"content-type": "application/json"})
    if streamed and status == 200:  # SGLang reports some errors inside the stream
        assert b'"error"' in answer, answer
    else:
        assert 400 <= status < 500, (status, answer)
    assert words in answer.decode().lower(), answer


def test_broken_json(cluster: Cluster) -> None:
    for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
        status, _, body = request("POST", f"{cluster.url}{path}", b'{"text": ', {"content-type": "application/json"})
        assert status == 400, (path, body)
        assert "json" in message_of(json.loads(body)).lower()


def test_json_that_is_no_object(cluster: Cluster) -> None:
    status, document = post(f"{cluster.url}/generate", [1, 2, 3])
    assert status == 400, document


def test_wrong_model(cluster: Cluster) -> None:
    status, document = post(f"{cluster.url}/v1/completions", {"model": "other", "prompt": "x", "max_tokens": 1})
    assert status == 404
    assert "other" in message_of(document)


def test_openai_prompt_longer_than_the_context(cluster: Cluster) -> None:
    _, models = get(f"{cluster.url}/v1/models")
    body = {"model": models["data"][0]["id"], "prompt": "x" * (CONTEXT_TOKENS + 10), "max_tokens": 1}
    status, document = post(f"{cluster.url}/v1/completions", body)
    assert 400 <= status < 500, document
    assert "context" in message_of(document).lower()


def test_body_over_the_size_limit(cluster: Cluster) -> None:
    """Said in the header or found while reading: either way a 413, and the router reads no more than it must."""
    parts = urlsplit(cluster.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(
            b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 99999999999\r\n\r\n"
        )
        assert b" 413 " in connection.recv(4096)


def test_unknown_path_and_method(cluster: Cluster) -> None:
    assert request("GET", f"{cluster.url}/no/such/path")[0] == 404
    assert request("GET", f"{cluster.url}/generate")[0] == 405


def _worker_port(cluster: Cluster) -> str:
    """The router's ZeroMQ address, as its command line has it."""
    words = Path(f"/proc/{cluster.workers['router']['pid']}/cmdline").read_text().split("\0")
    return words[words.index("--worker-bind") + 1]


def test_bytes_that_are_no_messages_on_the_worker_port(cluster: Cluster) -> None:
    address = _worker_port(cluster)
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:  # no ZeroMQ at all
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 64)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 1000
        stranger.connect(address)
        for frames in ([b""], [b"\xff" * 10], [b"\x80"], [b"x" * 70_000], [b"a"] * 50):
            stranger.send_multipart(frames)
        stranger.send_multipart(encode(hello(protocol=PROTOCOL_VERSION + 1)))
        assert stranger.poll(10_000), "the router still answers"


def hello(**changes: object) -> Hello:
    fields = {
        "protocol": PROTOCOL_VERSION,
        "name": "stranger",
        "incarnation": "x",
        "version": "0",
        "model": "m",
        "http_url": "http://127.0.0.1:1",
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": 1,
        "transfer_backend": "zmq",
        "limits": Limits(max_context_tokens=1, max_kv_tokens=1, page_tokens=1, max_running_requests=1),
    }
    return Hello(**{**fields, **changes})


def test_a_worker_of_another_protocol_version_is_refused(cluster: Cluster) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as worker:
        worker.linger = 0
        worker.connect(_worker_port(cluster))
        worker.send_multipart(encode(hello(protocol=PROTOCOL_VERSION + 1)))
        assert worker.poll(10_000)
        message, _ = decode_to_worker(worker.recv_multipart())
    assert isinstance(message, Refused)
    assert message.protocol == PROTOCOL_VERSION
    assert f"worker stranger (FlowPrefill 0) speaks version {PROTOCOL_VERSION + 1}" in message.reason
    assert "upgrade router" in message.reason
    _, document = get(f"{cluster.url}/workers")
    assert "stranger" not in {worker.get("name") for worker in document["workers"]}

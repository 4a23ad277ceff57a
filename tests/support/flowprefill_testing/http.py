"""A plain HTTP client for the cluster's tests: nothing of ours between the test and the wire."""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

TIMEOUT_S = 120


def request(method: str, url: str, body: bytes | None = None, headers: dict | None = None) -> tuple[int, dict, bytes]:
    """Status, headers in lower case, body."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    try:
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request(method, target, body, headers or {})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def post(url: str, document: object) -> tuple[int, object]:
    """Status and JSON answer of a JSON POST."""
    status, _, body = request("POST", url, json.dumps(document).encode(), {"content-type": "application/json"})
    return status, json.loads(body)


def get(url: str) -> tuple[int, object]:
    """Status and JSON answer of a GET."""
    status, _, body = request("GET", url)
    return status, json.loads(body)


def generate(url: str, **fields: object) -> dict:
    """A greedy ``/generate`` that has to succeed; ``max_new_tokens`` is a sampling parameter."""
    sampling = {"temperature": 0, "max_new_tokens": fields.pop("max_new_tokens", 12)}
    status, answer = post(f"{url}/generate", {"sampling_params": sampling, **fields})
    assert status == 200, answer
    return answer


def stream(url: str, document: dict) -> list[dict]:
    """The events of a streamed answer, in order, without the closing ``[DONE]``, which has to be there."""
    status, headers, body = request("POST", url, json.dumps(document).encode(), {"content-type": "application/json"})
    assert status == 200, body
    assert headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def at_once(function, arguments: list, workers: int = 16) -> list:
    """``function`` of each argument, many at a time, results in order."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, arguments))

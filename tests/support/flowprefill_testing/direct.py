"""Asking a prefill worker and a decode instance directly, without a router between: the test then decides which worker
gets a request, with which objective, and when the decode side says that it is ready."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from flowprefill_sglang.cluster.ports import free_ports
from flowprefill_testing.clusters import CONTEXT_TOKENS, PAGE_TOKENS, answers, wait_until
from flowprefill_testing.http import generate, get, post, request

NOBODY = "2.2.2.2"
"""SGLang's ``FAKE_BOOTSTRAP_HOST``."""
_rooms = itertools.count(random.getrandbits(60))  # a server remembers rooms that were never used up
_lock = threading.Lock()


@dataclass
class Answer:
    """What the two sides answered, or what they were asked so far."""

    rid: str
    prefill: Future[tuple[int, dict]]
    decode: Future[tuple[int, dict]]
    sent_at: float
    answered_at: float | None = None
    """When the decode side had answered; ``time.monotonic``."""

    @property
    def latency_s(self) -> float:
        """From sending until the decode side had answered; waits for it."""
        self.decode.result(180)
        assert self.answered_at is not None
        return self.answered_at - self.sent_at

    def whole(self) -> dict:
        """The decode side's answer with the prompt's logprobs of the prefill side; both have to succeed."""
        (prefill_status, prefill), (decode_status, decode) = self.prefill.result(180), self.decode.result(180)
        assert (prefill_status, decode_status) == (200, 200), (prefill, decode)
        for key in ("input_token_logprobs", "input_top_logprobs"):
            if key in prefill["meta_info"]:
                decode["meta_info"][key] = prefill["meta_info"][key]
        return decode


def expected(stock_url: str, input_ids: list[int]) -> list[int]:
    """What a stock server answers."""
    return generate(stock_url, input_ids=input_ids)["output_ids"]


def assert_right(answers: list[Answer], bodies: list[list[int]], stock_url: str) -> None:
    """Each one's answer is a stock server's to the same prompt; waits for all."""
    for answer, body in zip(answers, bodies, strict=True):
        assert answer.whole()["output_ids"] == expected(stock_url, body), len(body)


@dataclass
class Pair:
    """A prefill worker and a decode instance."""

    prefill_url: str
    bootstrap_port: int
    decode_url: str
    process: subprocess.Popen[bytes]
    """The prefill worker's."""

    def ask(
        self,
        input_ids: list[int],
        *,
        ttft_slo_ms: float = 60_000,
        name: str = "test",
        max_new_tokens: int = 12,
        decode_after: threading.Event | None = None,
        prefill_after: threading.Event | None = None,
        sampling: dict | None = None,
        **fields: object,
    ) -> Answer:
        """Send a greedy request, without waiting for its answer. One side is held back until an event is set."""
        with _lock:
            room = next(_rooms)
        rid = f"{name}-{uuid.uuid4().hex[:8]}"
        params = {"temperature": 0, "max_new_tokens": max_new_tokens, **(sampling or {})}
        body = {
            "rid": rid,
            "input_ids": input_ids,
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": room,
            **fields,
        }
        objective = {"custom_params": {"ttft_slo_ms": ttft_slo_ms}}
        answer = Answer(rid, Future(), Future(), time.monotonic())
        self._send(answer, "decode", decode_after, self.decode_url, {**body, "sampling_params": params})
        self._send(answer, "prefill", prefill_after, self.prefill_url, {**body, "sampling_params": params | objective})
        return answer

    def prefill_alone(self, input_ids: list[int], *, ttft_slo_ms: float, name: str, **fields: object) -> Answer:
        """Send the prefill side of a greedy request that is handed over to nobody, as SGLang's own warm-up is. The
        answer has one token, and never a decode side."""
        rid = f"{name}-{uuid.uuid4().hex[:8]}"
        with _lock:
            room = next(_rooms)
        answer = Answer(rid, Future(), Future(), time.monotonic())
        body = {
            "rid": rid,
            "input_ids": input_ids,
            "bootstrap_host": NOBODY,
            "bootstrap_room": room,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1, "custom_params": {"ttft_slo_ms": ttft_slo_ms}},
        }
        self._send(answer, "prefill", None, self.prefill_url, body | fields)
        return answer

    def _send(self, answer: Answer, side: str, after: threading.Event | None, url: str, body: dict) -> None:
        future: Future = getattr(answer, side)

        def send() -> None:
            try:
                if after is not None and not after.wait(60):
                    raise TimeoutError
                got = post(f"{url}/generate", body)
                if side == "decode":
                    answer.answered_at = time.monotonic()
                future.set_result(got)
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()

    def give_up(self, answer: Answer) -> None:
        """Abort the decode side of a request whose prefill side was refused: here no router does, and it would wait for
        its own time-out."""
        assert _control(self.decode_url, "/abort_request", {"rid": answer.rid})[0] == 200
        answer.decode.result(60)

    # ---- the worker's own endpoints -----------------------------------------------------------------------------

    def events(self, *answers: Answer) -> list[dict]:
        """The scheduler's events about these requests, oldest first."""
        _, document = get(f"{self.prefill_url}/flowprefill/timeline?seconds=300")
        rids = {answer.rid for answer in answers}
        return [event for event in document["events"] if {event.get("rid"), *event.get("rids", ())} & rids]

    def steps(self, *answers: Answer) -> list[tuple[str, str]]:
        """What happened to these requests and to which, by the names they were given, oldest first."""
        return [(e["type"], (e.get("rid") or e["rids"][0]).rpartition("-")[0]) for e in self.events(*answers)]

    def wait_for(self, kind: str, answer: Answer, times: int = 1) -> None:
        """Until the scheduler has reported this about a request: started, preempted, finished, …"""
        wait_until(
            lambda: sum(event["type"] == kind for event in self.events(answer)) >= times, timeout_s=60, pause_s=0.005
        )

    def load(self) -> dict:
        """What the worker says of its load."""
        _, document = get(f"{self.prefill_url}/v1/loads")
        return document["loads"][0]

    def control(self, path: str, document: object | None = None, method: str = "POST") -> tuple[int, str]:
        """One of SGLang's control requests to the prefill worker."""
        return _control(self.prefill_url, path, document, method)


def _control(url: str, path: str, document: object | None = None, method: str = "POST") -> tuple[int, str]:
    body = json.dumps(document).encode() if document is not None else b""
    status, _, answer = request(method, f"{url}{path}", body, {"content-type": "application/json"})
    return status, answer.decode()


class DirectWorkers:
    """Prefill workers of a test session, without a router; ended with it."""

    def __init__(self, model_path: Path, log_dir: Path, environment: dict[str, str]) -> None:
        self._model_path = model_path
        self._log_dir = log_dir
        self._environment = environment
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> DirectWorkers:
        return self

    def start(self, name: str, flags: list[str]) -> None:
        """Start one, without waiting for it."""
        http_port, bootstrap_port, no_router = free_ports(3)
        layout = ["--context-length", str(CONTEXT_TOKENS), "--page-size", str(PAGE_TOKENS), *flags]
        ports = ["--port", str(http_port), "--disaggregation-bootstrap-port", str(bootstrap_port)]
        ours = ["--name", name, "--router", f"tcp://127.0.0.1:{no_router}", "--model-path", str(self._model_path)]
        with (self._log_dir / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "flowprefill_sglang", "prefill", *ours, *layout, *ports],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self._environment, "OMP_NUM_THREADS": "1"},
            )
        self._ports[name] = (http_port, bootstrap_port)

    def pair(self, name: str, decode_url: str) -> Pair:
        """Wait until a worker serves, and pair it with a decode instance."""
        http_port, bootstrap_port = self._ports[name]
        url = f"http://127.0.0.1:{http_port}"
        wait_until(lambda: answers(f"{url}/health"), self._processes[name], self._log_dir / f"{name}.log")
        return Pair(url, bootstrap_port, decode_url, self._processes[name])

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

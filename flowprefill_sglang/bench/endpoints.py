"""The streaming endpoints that the load client speaks: how to ask, and what an event of the answer means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamEvent:
    """What one event said."""

    text: str
    """New text; for cumulative streams, all text so far (``Endpoint.cumulative``)."""
    has_token: bool
    output_tokens: int | None
    """Answer tokens so far, where the event says."""
    finish_reason: str | None
    error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """One HTTP endpoint."""

    path: str
    cumulative: bool
    """Whether each event repeats the text before it."""
    build_body: Callable[[str, str | list[int], int, str], dict[str, Any]]
    """``(rid, prompt text or token ids, output tokens, model) -> JSON body``.

    Of a greedy, streaming request whose answer has exactly that many tokens.
    """
    read_event: Callable[[dict[str, Any]], StreamEvent]
    takes_ids: bool = True
    """Whether a prompt may be token ids."""


def _generate_body(rid: str, prompt: str | list[int], output_tokens: int, model: str) -> dict[str, Any]:
    key = "text" if isinstance(prompt, str) else "input_ids"
    sampling = {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}
    return {"rid": rid, key: prompt, "sampling_params": sampling, "stream": True}


def _read_generate(event: dict[str, Any]) -> StreamEvent:
    meta = event.get("meta_info") or {}
    reason = meta.get("finish_reason") or {}
    text, tokens = event.get("text") or "", meta.get("completion_tokens")
    aborted = reason.get("message", "aborted") if reason.get("type") == "abort" else None
    return StreamEvent(
        text=text,
        has_token=bool(text or tokens),
        output_tokens=tokens,
        finish_reason=reason.get("type"),
        error=aborted or _error_of(event),
    )


def _completions_body(rid: str, prompt: str | list[int], output_tokens: int, model: str) -> dict[str, Any]:
    return {
        "rid": rid,
        "model": model,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _read_completions(event: dict[str, Any]) -> StreamEvent:
    choice = _first_choice(event)
    return _openai_event(event, choice, choice.get("text") or "")


def _chat_body(rid: str, prompt: str | list[int], output_tokens: int, model: str) -> dict[str, Any]:
    body = _completions_body(rid, "", output_tokens, model)
    del body["prompt"]
    return body | {"messages": [{"role": "user", "content": prompt}]}


def _read_chat(event: dict[str, Any]) -> StreamEvent:
    choice = _first_choice(event)
    delta = choice.get("delta") or {}
    return _openai_event(event, choice, (delta.get("reasoning_content") or "") + (delta.get("content") or ""))


def _first_choice(event: dict[str, Any]) -> dict[str, Any]:
    choices: list[dict[str, Any]] = event.get("choices") or [{}]
    return choices[0]


def _openai_event(event: dict[str, Any], choice: dict[str, Any], text: str) -> StreamEvent:
    reason = choice.get("finish_reason")
    return StreamEvent(
        text=text,
        has_token=bool(text),
        output_tokens=(event.get("usage") or {}).get("completion_tokens"),
        finish_reason=reason,
        error="aborted" if reason == "abort" else _error_of(event),
    )


def _error_of(event: dict[str, Any]) -> str | None:
    error = event.get("error")
    if error is None:
        return None
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or error)


ENDPOINTS = {
    "chat": Endpoint(
        path="/v1/chat/completions", cumulative=False, build_body=_chat_body, read_event=_read_chat, takes_ids=False
    ),
    "generate": Endpoint(path="/generate", cumulative=True, build_body=_generate_body, read_event=_read_generate),
    "completions": Endpoint(
        path="/v1/completions", cumulative=False, build_body=_completions_body, read_event=_read_completions
    ),
}


@dataclass(slots=True)
class AnswerReader:
    """Reads one streamed answer, event by event; knows when it is whole."""

    endpoint: Endpoint
    expected_tokens: int
    text: str = ""
    output_tokens: int | None = None
    has_token: bool = False
    _is_done: bool = False
    _error: str | None = None
    _finish_reason: str | None = None

    def read(self, data: bytes) -> None:
        """Take in the data of one event."""
        if data == b"[DONE]":
            self._is_done = True
            return
        try:
            event = msgspec.json.decode(data, type=dict[str, Any])
            read = self.endpoint.read_event(event)
        except (msgspec.DecodeError, AttributeError, TypeError) as error:
            self._error = self._error or f"an event is not what {self.endpoint.path} sends: {error}"
            return
        self.text = read.text if self.endpoint.cumulative and read.text else self.text + read.text
        self.has_token = self.has_token or read.has_token
        self.output_tokens = read.output_tokens if read.output_tokens is not None else self.output_tokens
        self._finish_reason = read.finish_reason or self._finish_reason
        self._error = self._error or read.error

    def error(self) -> str | None:
        """Why the answer, now that its stream has ended, is no success; None if it is one."""
        if self._error is not None:
            return self._error
        if not self._is_done:
            return "the stream ended before [DONE]"
        if not self.has_token:
            return "the stream has no token"
        if self.output_tokens is not None and self.output_tokens != self.expected_tokens:
            return f"{self.output_tokens} tokens instead of {self.expected_tokens} (finish: {self._finish_reason})"
        return None

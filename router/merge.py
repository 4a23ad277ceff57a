"""Prompt logprobs: only the prefill side computes them, only the decode side answers the client.

SGLang's decode side reports empty lists for the prompt (0.5.23). ``/generate``: every ``input_*`` entry of the prefill
side's ``meta_info`` goes in front of the decode side's, as SGLang's own gateways do for ``input_token_logprobs``.
``/v1/completions`` with ``echo`` and ``logprobs``: the prompt's part of each choice's ``logprobs`` does.
"""

from __future__ import annotations

from typing import Any

import msgspec

from flowprefill_sglang.errors import PeerFault
from flowprefill_sglang.router.first_event import first_document

Json = Any  # a decoded JSON document


class PrefillFacts(msgspec.Struct):
    """What an ordinary prefill answer tells the router."""

    prompt_tokens: int = 0


class _Meta(msgspec.Struct):
    meta_info: PrefillFacts | None = None
    usage: PrefillFacts | None = None


_facts = msgspec.json.Decoder(_Meta | list[_Meta])


def prompt_tokens(answer: bytes) -> int:
    """Prompt tokens that a prefill answer reports, all prompts of a batch together; 0 when it does not."""
    try:
        metas = _facts.decode(first_document(answer))
    except msgspec.DecodeError:
        return 0
    total = 0
    for meta in metas if isinstance(metas, list) else [metas]:
        facts = meta.meta_info or meta.usage
        total += facts.prompt_tokens if facts is not None else 0
    return total


class LogprobMerger:
    """Puts one prefill answer's prompt logprobs into the decode side's answer, or into each event of its stream."""

    def __init__(self, prefill_answer: bytes) -> None:
        if prefill_answer.startswith(b"data:"):
            self._prefill = _by_index(prefill_answer)
        else:
            document = _decode(prefill_answer)
            self._prefill = dict(enumerate(document if isinstance(document, list) else [document]))
        self._choices_done: set[int] = set()
        self._rest = b""

    def whole(self, answer: bytes) -> bytes:
        """A complete answer with the prompt's logprobs in it."""
        document = _decode(answer)
        if isinstance(document, list):
            for index, item in enumerate(document):
                self._merge(item, index)
        else:
            self._merge(document, 0)
        return msgspec.json.encode(document)

    def events(self, chunk: bytes) -> bytes:
        """Those events of a stream that are complete with this chunk; the rest is kept for the next."""
        *events, self._rest = (self._rest + chunk).split(b"\n\n")
        return b"".join(self._event(event) + b"\n\n" for event in events)

    def end(self) -> bytes:
        """What a stream left behind its last complete event."""
        return self._rest

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data:") or event[5:].strip() == b"[DONE]":
            return event
        document = _decode(event[5:])
        self._merge(document, document.get("index", 0) if isinstance(document, dict) else 0)
        return b"data: " + msgspec.json.encode(document)

    def _merge(self, document: Json, index: int) -> None:
        if not isinstance(document, dict):
            return
        if isinstance(meta := document.get("meta_info"), dict):
            _merge_meta(meta, self._prefill.get(index, {}).get("meta_info") or {})
        for choice in document.get("choices") or ():
            if choice["index"] not in self._choices_done:
                self._choices_done.add(choice["index"])
                _merge_choice(choice, self._prefill_choice(choice["index"]))

    def _prefill_choice(self, index: int) -> Json:
        for document in self._prefill.values():
            for choice in document.get("choices") or ():
                if choice["index"] == index:
                    return choice
        return {}


def _decode(document: bytes) -> Json:
    try:
        return msgspec.json.decode(document)
    except msgspec.DecodeError as error:
        raise PeerFault(f"an answer without valid JSON: {error}", code="bad_answer") from error


def _by_index(stream: bytes) -> dict[int, Json]:
    """The first event of each prompt of a stream; for completions, of each choice."""
    found: dict[int, Json] = {}
    for event in stream.split(b"\n\n"):
        if event.startswith(b"data:") and event[5:].strip() != b"[DONE]":
            document = _decode(event[5:])
            choices = document.get("choices")
            found.setdefault(choices[0]["index"] if choices else document.get("index", 0), document)
    return found


def _merge_meta(meta: Json, prefill: Json) -> None:
    for name, ours in prefill.items():
        if name.startswith("input_") and ours:
            theirs = meta.get(name)
            meta[name] = ours + theirs if isinstance(ours, list) and isinstance(theirs, list) else ours


def _merge_choice(choice: Json, prefill: Json) -> None:
    """Completions: tokens of the prompt first. The prefill side's own lists end with the first generated token."""
    ours, theirs = prefill.get("logprobs"), choice.get("logprobs")
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return
    for name, values in ours.items():
        if isinstance(values, list) and isinstance(theirs.get(name), list):
            theirs[name] = values[:-1] + theirs[name]

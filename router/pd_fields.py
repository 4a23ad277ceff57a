"""The only file that knows how SGLang wants prefill-decode fields in a request's body.

SGLang pairs the two halves of a request by ``bootstrap_host``, ``bootstrap_port`` and ``bootstrap_room``, and names it
by ``rid``. For a batch (several prompts in one body) each of these is a list with one entry a prompt
(``managers/io_struct.py: GenerateReqInput.normalize_batch_and_arguments``, SGLang 0.5.23).

The body itself is not rebuilt: it is read once, keeping only what the router needs, and the fields are spliced in
behind its opening brace. Only a body that already has one of these fields, or asks for several samples, is encoded
anew.

Several samples of one prompt (``n``): SGLang would give every sample the same room, so that they overwrite each other's
KV (``tokenizer_manager.py: _handle_batch_request``). ``/generate`` and ``/v1/completions`` take a batch, so the prompt
is repeated, each with a room of its own; ``/v1/chat/completions`` takes none, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from flowprefill_sglang.errors import BadInput, InternalError
from flowprefill_sglang.router.objectives import NOTHING_ASKED, BodyTerms

MAX_BATCH: Final = 4096
"""Prompts in one body, samples counted. A body of nothing but commas could otherwise ask for millions of rooms."""
_OWN_FIELDS: Final = ("rid", "bootstrap_host", "bootstrap_port", "bootstrap_room")

Raw = msgspec.Raw
_NONE: Final = (b"", b"null")


class _Body(msgspec.Struct):
    """The fields the router looks at, undecoded; all others are skipped."""

    model: Raw = Raw()
    rid: Raw = Raw()
    stream: Raw = Raw()
    text: Raw = Raw()
    input_ids: Raw = Raw()
    prompt: Raw = Raw()
    messages: Raw = Raw()
    n: Raw = Raw()
    sampling_params: Raw = Raw()
    return_logprob: Raw = Raw()
    logprob_start_len: Raw = Raw()
    logprobs: Raw = Raw()
    echo: Raw = Raw()
    bootstrap_host: Raw = Raw()
    bootstrap_port: Raw = Raw()
    bootstrap_room: Raw = Raw()
    ttft_slo_ms: Raw = Raw()
    service_tier: Raw = Raw()
    priority: Raw = Raw()


class _Samples(msgspec.Struct):
    n: Raw = Raw()


_body_decoder: Final = msgspec.json.Decoder(_Body)
_object_decoder: Final = msgspec.json.Decoder(dict[str, Any])
_list_decoder: Final = msgspec.json.Decoder(list[Raw])
_samples_decoder: Final = msgspec.json.Decoder(_Samples | list[_Samples])
_string_decoder: Final = msgspec.json.Decoder(str)
_rid_decoder: Final = msgspec.json.Decoder(str | list[str])
_encoder: Final = msgspec.json.Encoder()


@dataclass(slots=True, kw_only=True)
class ParsedRequest:
    """What the router has to know about a request."""

    path: str
    body: bytes
    model: str | None
    rid: str | list[str] | None
    """The client's own, if it gave one."""
    batch: int | None
    """Prompts in the body, samples counted; None when it is a single one."""
    samples: int
    """Samples of each prompt, already counted in ``batch``."""
    prompt_bytes: int
    """Length of the prompt, or the prompts, in the body."""
    exact_tokens: int | None
    """Tokens of the longest prompt, when the client sent token ids."""
    merges_logprobs: bool
    """Whether the answer needs the prompt's logprobs, which only the prefill side has."""
    has_own_fields: bool
    """The client sent some of the fields that the router sets."""
    terms: BodyTerms
    """What the body says of objective, class and priority. SGLang 0.5.23 reads ``priority`` and ignores the others, on
    every path, so they stay in the body."""

    @property
    def needs_prefill_while_streaming(self) -> bool:
        """Whether the prefill side has anything to do once the answer's stream has begun: the first token of a single
        prompt comes when all of its KV has been handed over, those of a batch one by one."""
        return self.batch is not None or self.merges_logprobs


def parse(path: str, body: bytes) -> ParsedRequest:
    """Read a request's body once. Raises BadInput when it is no JSON object, or what the router needs is malformed."""
    try:
        if not body.isascii():
            body.decode()  # the decoder skips what it is not asked for, unread
        fields = _body_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise BadInput(f"the body must be a JSON object: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"the body is not valid JSON: {error}") from error
    if path == "/generate":
        prompt, samples, merges = (
            fields.text,
            _generate_samples(fields.sampling_params),
            _is_true(fields.return_logprob),
        )
        prompt = fields.input_ids if _is_none(prompt) else prompt
    else:
        prompt, samples = fields.prompt, _positive_int(fields.n)
        merges = _is_true(fields.echo) and not _is_none(fields.logprobs)
        if path == "/v1/chat/completions":
            prompt, merges = fields.messages, False
            if samples > 1:
                raise BadInput(
                    "n > 1 is not available for chat completions with disaggregated prefill; send n requests instead",
                    code="unsupported_n",
                )
    batch, exact_tokens = (None, None) if path == "/v1/chat/completions" else _shape(bytes(prompt))
    if samples > 1:
        batch = (batch or 1) * samples
    if batch is not None and batch > MAX_BATCH:
        raise BadInput(f"{batch} prompts and samples in one request; at most {MAX_BATCH} are allowed")
    return ParsedRequest(
        path=path,
        body=body,
        model=_decode(_string_decoder, fields.model, "model"),
        rid=_rid(fields.rid, batch),
        batch=batch,
        samples=samples,
        prompt_bytes=len(bytes(prompt)),
        exact_tokens=exact_tokens,
        merges_logprobs=merges,
        has_own_fields=any(bytes(getattr(fields, name)) for name in _OWN_FIELDS),
        terms=_terms(fields),
    )


def rids(request: ParsedRequest, rid: str) -> list[str]:
    """The names SGLang will know the request's prompts by; ``rid`` is the router's own name for it."""
    if isinstance(request.rid, list):
        return request.rid
    base = request.rid or rid
    return [base] if request.batch is None else [f"{base}_{index}" for index in range(request.batch)]


def with_pd_fields(
    request: ParsedRequest,
    names: list[str],
    *,
    host: str,
    port: int,
    new_room: Callable[[], int],
    priority: int | None = None,
) -> bytes:
    """The body for both sides. ``new_room`` draws a bootstrap room: 63 random bits, never used twice. ``priority``: in
    place of the body's own, None to leave that as it is."""
    if len(names) != (request.batch or 1):
        raise InternalError(f"{len(names)} names for {request.batch or 1} prompts")
    own: dict[str, Any]
    if request.batch is None:
        own = {"rid": names[0], "bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": new_room()}
    else:
        own = {
            "rid": names,
            "bootstrap_host": [host] * request.batch,
            "bootstrap_port": [port] * request.batch,
            "bootstrap_room": [new_room() for _ in names],
        }
    if priority is not None:
        own["priority"] = priority
    if request.samples > 1 or request.has_own_fields or (priority is not None and request.terms.priority):
        return _encoder.encode(_one_sample_each(_object_decoder.decode(request.body), request) | own)
    inner = request.body[request.body.index(b"{") + 1 :]
    separator = b"" if inner.lstrip()[:1] == b"}" else b","
    return _encoder.encode(own)[:-1] + separator + inner


# ---- several samples of one prompt ---------------------------------------------------------------------------------

_PROMPTS: Final = ("text", "input_ids", "input_embeds", "prompt")
_MEDIA: Final = ("image_data", "video_data", "audio_data")
_PER_PROMPT: Final = (
    *_PROMPTS,
    *_MEDIA,
    "mm_hashes",
    "mm_content_hashes",
    "modalities",
    "lora_path",
    "extra_key",
    "cache_salt",
    "kv_hints",
    "return_hidden_states",
    "watermark",
    "sampling_params",
)
"""Fields that may be lists with one entry a prompt; SGLang repeats the same ones for several samples."""


def _one_sample_each(body: dict[str, Any], request: ParsedRequest) -> dict[str, Any]:
    if request.samples == 1:
        return body
    single = request.batch == request.samples and not _is_list_of_prompts(body)
    for name in _PER_PROMPT:
        value = body.get(name)
        if value is None:
            continue
        if single:
            if name in _PROMPTS or (name in _MEDIA and isinstance(value, list)):
                body[name] = [value] * request.samples
        elif isinstance(value, list):
            body[name] = [item for item in value for _ in range(request.samples)]
    for params in _as_list(body.get("sampling_params")):
        params.pop("n", None)
    body.pop("n", None)
    return body


def _is_list_of_prompts(body: dict[str, Any]) -> bool:
    prompt = next((body[name] for name in ("text", "input_ids", "prompt") if body.get(name) is not None), None)
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


# ---- reading single fields -----------------------------------------------------------------------------------------


def _terms(fields: _Body) -> BodyTerms:
    slo, tier, priority = bytes(fields.ttft_slo_ms), bytes(fields.service_tier), bytes(fields.priority)
    if not (slo or tier or priority):
        return NOTHING_ASKED
    return BodyTerms(ttft_slo_ms=slo, service_tier=tier, priority=priority)


def _is_none(raw: Raw) -> bool:
    return bytes(raw) in _NONE


def _is_true(raw: Raw) -> bool:
    """Whether a field, or any entry of it, is true. Fields of another type are for SGLang to judge."""
    return b"true" in bytes(raw)


def _positive_int(raw: Raw) -> int:
    text = bytes(raw)
    return int(text) if text.isdigit() else 1


def _generate_samples(sampling_params: Raw) -> int:
    if b'"n"' not in bytes(sampling_params):
        return 1
    try:
        params = _samples_decoder.decode(sampling_params)
    except msgspec.DecodeError:
        return 1  # not an object: SGLang says so
    if isinstance(params, list):
        return max((_positive_int(item.n) for item in params), default=1)
    return _positive_int(params.n)


def _shape(prompt: bytes) -> tuple[int | None, int | None]:
    """Number of prompts (None: a single one) and tokens of the longest, when the client sent token ids."""
    if not prompt.startswith(b"["):
        return None, None
    items = _list_decoder.decode(prompt)
    first = bytes(items[0])[:1] if items else b""
    if first == b"[":
        return len(items), max(bytes(item).count(b",") + 1 for item in items)
    if first == b'"':
        return len(items), None
    return None, len(items)


def _decode(decoder: msgspec.json.Decoder[str], raw: Raw, name: str) -> str | None:
    if _is_none(raw):
        return None
    try:
        return decoder.decode(raw)
    except msgspec.DecodeError as error:
        raise BadInput(f"{name}: {error}") from error


def _rid(raw: Raw, batch: int | None) -> str | list[str] | None:
    if _is_none(raw):
        return None
    try:
        rid: str | list[str] = _rid_decoder.decode(raw)
    except msgspec.DecodeError as error:
        raise BadInput(f"rid: {error}") from error
    if rid == "" or (isinstance(rid, list) and (len(rid) != batch or len(set(rid)) != len(rid) or "" in rid)):
        raise BadInput("rid must be a string that is not empty, or a list of different ones, one for each prompt")
    return rid

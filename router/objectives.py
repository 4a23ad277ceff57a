"""What a request asks of the scheduler: its TTFT objective, class, priority and tenant, read from headers and body.

Pure. The names are the field's own: of SGLang's gateway, the llm-d router and OpenAI (``service_tier``). A header wins
over the body, an explicit objective over a class, and whatever is given must make sense even where something else wins:
nonsense that is quietly dropped would leave a client with a promise that nobody made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from flowprefill_sglang.errors import BadInput

LEAST_SLO_MS: Final = 1.0
LARGEST_SLO_MS: Final = 3_600_000.0
"""An hour: longer than any prefill, short enough that a value in microseconds is noticed."""

DEFAULT_CLASSES_MS: Final[Mapping[str, float]] = {
    "text": 250.0,
    "image": 500.0,
    "search": 4_000.0,
    "file": 6_000.0,
    "standard": 6_000.0,
}
"""The paper's four classes with their objectives (FlowPrefill, arXiv:2602.16603, Llama-3-8B on one GPU), and one for
requests that say nothing. That one is as patient as the paper's most patient class, so that a request without an
objective does not go before one that has been promised something sooner."""
DEFAULT_CLASS: Final = "standard"
CUSTOM: Final = "custom"
"""Class of requests that name an objective and no class."""
NO_CLASS: Final = frozenset({"auto", "default"})
"""OpenAI's values of ``service_tier`` that leave the choice to the server."""

SLO_HEADERS: Final = (b"x-sgl-ttft-slo-ms", b"x-llm-d-slo-ttft-ms", b"x-slo-ttft-ms")
CLASS_HEADER: Final = b"x-slo-class"
PRIORITY_HEADER: Final = b"x-override-priority"
TENANT_HEADER: Final = b"x-llm-d-inference-fairness-id"
_HEADERS: Final = frozenset({*SLO_HEADERS, CLASS_HEADER, PRIORITY_HEADER, TENANT_HEADER})

_NUMBER: Final = re.compile(rb"[0-9]{1,20}(\.[0-9]{0,20})?")
_INTEGER: Final = re.compile(rb"-?[0-9]{1,19}")
_INT64: Final = range(-(2**63), 2**63)
_ABSENT: Final = (b"", b"null")
_SHOWN_CHARACTERS: Final = 80
_number_decoder: Final = msgspec.json.Decoder(float)
_integer_decoder: Final = msgspec.json.Decoder(int)
_string_decoder: Final = msgspec.json.Decoder(str)


class BodyTerms(msgspec.Struct, frozen=True, kw_only=True):
    """The body's fields as they stand there, in JSON; empty when absent."""

    ttft_slo_ms: bytes = b""
    service_tier: bytes = b""
    priority: bytes = b""


NOTHING_ASKED: Final = BodyTerms()


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for one request."""

    ttft_slo_s: float
    """From its receipt at the router to its first token."""
    slo_class: str
    """One of the configured classes, or ``custom``."""
    priority: int | None = None
    """Breaks ties, higher first; None when the client did not say."""
    header_priority: int | None = None
    """The same when a header said it: SGLang reads the body, so it has to be written there."""
    tenant: str = ""

    def answer_header(self) -> tuple[bytes, bytes]:
        """Tells the client which objective was applied."""
        return (b"x-flowprefill-ttft-slo-ms", b"%.10g" % (self.ttft_slo_s * 1000))


class Intake:
    """Reads requests' terms, given the classes that this router knows."""

    def __init__(self, classes_ms: Mapping[str, float], default: str) -> None:
        """``default``: a key of ``classes_ms``, the class of requests that say nothing."""
        self._classes_s = {name: value / 1000 for name, value in classes_ms.items()}
        self._default_class = default
        self._default = Terms(ttft_slo_s=self._classes_s[default], slo_class=default)

    def terms(self, headers: Iterable[tuple[bytes, bytes]], body: BodyTerms = NOTHING_ASKED) -> Terms:
        """One request's terms; header names in lower case. Raises BadInput naming the header or field, the value and
        what was expected."""
        given: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in _HEADERS:  # one that comes twice is one list (RFC 9110, section 5.3), which no value here may be
                given[name] = value if name not in given else given[name] + b", " + value
        if not given and body is NOTHING_ASKED:
            return self._default
        slo_ms, slo_class = _objective_ms(given, body), self._class(given, body)
        header_priority, priority = _priorities(given, body)
        return Terms(
            ttft_slo_s=self._classes_s[slo_class or self._default_class] if slo_ms is None else slo_ms / 1000,
            slo_class=slo_class or (self._default_class if slo_ms is None else CUSTOM),
            priority=priority if header_priority is None else header_priority,
            header_priority=header_priority,
            tenant=given.get(TENANT_HEADER, b"").decode("utf-8", "replace").strip(),
        )

    def _class(self, given: Mapping[bytes, bytes], body: BodyTerms) -> str | None:
        named = []
        if CLASS_HEADER in given:
            named.append(self._known(CLASS_HEADER.decode(), given[CLASS_HEADER].decode("utf-8", "replace").strip()))
        if body.service_tier not in _ABSENT:
            try:
                name = _string_decoder.decode(body.service_tier)
            except msgspec.DecodeError:
                raise self._unknown("service_tier", _shown(body.service_tier)) from None
            named.append(self._known("service_tier", name))
        return named[0] if named else None

    def _known(self, source: str, name: str) -> str:
        if name in NO_CLASS:
            return self._default_class
        if name not in self._classes_s:
            raise self._unknown(source, repr(name[:_SHOWN_CHARACTERS]))
        return name

    def _unknown(self, source: str, value: str) -> BadInput:
        known = ", ".join([*self._classes_s, *sorted(NO_CLASS)])
        return BadInput(f"{source}: {value} is no class of this router; known: {known}", code="unknown_slo_class")


def _objective_ms(given: Mapping[bytes, bytes], body: BodyTerms) -> float | None:
    """The explicit objective that counts; None without any."""
    values = []
    for name in SLO_HEADERS:
        if name in given:
            text = given[name].strip()
            values.append(_in_range(name.decode(), text, float(text) if _NUMBER.fullmatch(text) else None))
    if body.ttft_slo_ms not in _ABSENT:
        try:
            number: float | None = _number_decoder.decode(body.ttft_slo_ms)
        except msgspec.DecodeError:
            number = None
        values.append(_in_range("ttft_slo_ms", body.ttft_slo_ms, number))
    return values[0] if values else None


def _in_range(source: str, text: bytes, slo_ms: float | None) -> float:
    if slo_ms is None or not LEAST_SLO_MS <= slo_ms <= LARGEST_SLO_MS:
        raise BadInput(
            f"{source}: {_shown(text)} is no TTFT objective; expected a number of milliseconds from "
            f"{LEAST_SLO_MS:.0f} (1 ms) to {LARGEST_SLO_MS:.0f} (1 h)",
            code="invalid_ttft_slo",
        )
    return slo_ms


def _priorities(given: Mapping[bytes, bytes], body: BodyTerms) -> tuple[int | None, int | None]:
    """The header's and the body's."""
    from_header = from_body = None
    if PRIORITY_HEADER in given:
        text = given[PRIORITY_HEADER].strip()
        number = int(text) if _INTEGER.fullmatch(text) else None
        from_header = _int64(PRIORITY_HEADER.decode(), text, number)
    if body.priority not in _ABSENT:
        try:
            number = _integer_decoder.decode(body.priority)
        except msgspec.DecodeError:
            number = None
        from_body = _int64("priority", body.priority, number)
    return from_header, from_body


def _int64(source: str, text: bytes, number: int | None) -> int:
    if number is None or number not in _INT64:
        raise BadInput(
            f"{source}: {_shown(text)} is no priority; expected a whole number from {_INT64[0]} to {_INT64[-1]}",
            code="invalid_priority",
        )
    return number


def _shown(text: bytes) -> str:
    return repr(text.decode("utf-8", "replace")[:_SHOWN_CHARACTERS])

"""The file formats of SGLang's own ``bench_serving`` (0.5.23) that hold conversations and no times.

``sharegpt``: one JSON array of ``{"conversations": [{"from", "value"}, ...]}``. ``custom``: one such object a line,
with ``content`` or ``value``. ``openai``: one request a line, ``{"messages": [{"role", "content"}], "max_tokens"}``.

As SGLang does, only the first two turns of a conversation are used, and those with fewer turns or with less than two
tokens in either are left out. Unlike SGLang, rows keep the file's order, and only their lengths are used: prompts are
made up to these lengths as for every trace, so that a length scale can be applied and no text has to be sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import msgspec

from flowprefill_sglang.workload.formats.rows import BadRow, LeftOut, PositiveCount, decode_json
from flowprefill_sglang.workload.trace import TraceRequest

TokenCounter = Callable[[str], int]
CHARACTERS_PER_TOKEN = 4
"""Of English text with the vocabularies of today's models, about: where no tokenizer is given."""
DEFAULT_ANSWER_TOKENS = 256
"""SGLang's, for requests that do not say ``max_tokens``."""
_LEAST_TOKENS = 2


def tokens_by_characters(text: str) -> int:
    """An estimate of a text's length in tokens."""
    return round(len(text) / CHARACTERS_PER_TOKEN)


class _Turn(msgspec.Struct, frozen=True):
    value: str | None = None
    content: str | None = None

    @property
    def text(self) -> str:
        return self.content or self.value or ""


class _Conversation(msgspec.Struct, frozen=True):
    conversations: tuple[_Turn, ...] | None = None
    conversation: tuple[_Turn, ...] | None = None


class _Part(msgspec.Struct, frozen=True):
    text: str = ""  # empty for pictures and sounds, whose tokens the file does not tell


class _Message(msgspec.Struct, frozen=True):
    content: str | tuple[_Part, ...] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())


class _OpenAIRequest(msgspec.Struct, frozen=True):
    messages: tuple[_Message, ...]
    max_tokens: PositiveCount | None = None
    max_completion_tokens: PositiveCount | None = None


_conversation_decoder = msgspec.json.Decoder(_Conversation)
_openai_decoder = msgspec.json.Decoder(_OpenAIRequest)


def parse_conversation(row: str, count_tokens: TokenCounter) -> TraceRequest:
    """One conversation. Raises BadRow, LeftOut for one that SGLang leaves out."""
    decoded = decode_json(_conversation_decoder, row)
    turns = decoded.conversations if decoded.conversations is not None else decoded.conversation
    if turns is None:
        raise BadRow("expected `conversations`, a list of turns")
    if len(turns) < 2:
        raise LeftOut("a conversation of less than two turns")
    return _request(count_tokens(turns[0].text), count_tokens(turns[1].text))


def parse_openai(row: str, count_tokens: TokenCounter) -> TraceRequest:
    """One request; the chat template's own tokens are not counted. Raises BadRow, LeftOut."""
    decoded = decode_json(_openai_decoder, row)
    answer = decoded.max_completion_tokens or decoded.max_tokens or DEFAULT_ANSWER_TOKENS
    return _request(sum(count_tokens(message.text) for message in decoded.messages), max(answer, _LEAST_TOKENS))


def _request(input_tokens: int, output_tokens: int) -> TraceRequest:
    if min(input_tokens, output_tokens) < _LEAST_TOKENS:
        raise LeftOut(f"less than {_LEAST_TOKENS} tokens in the prompt or the answer")
    return TraceRequest(arrival_s=0.0, input_tokens=input_tokens, output_tokens=output_tokens)


def array_rows(data: bytes) -> Iterator[tuple[int, str]]:
    """The elements of a file that is one JSON array, each with the line on which it begins.

    Raises BadRow at a place that is not JSON, with the line in ``args``: where the next element begins is not known.
    """
    text, decoder = data.decode("utf-8-sig"), json.JSONDecoder()
    at, line = 0, 1

    def skip_blanks(characters: str) -> None:
        nonlocal at, line
        while at < len(text) and text[at] in characters:
            line += text[at] == "\n"
            at += 1

    def expect(character: str) -> None:
        nonlocal at
        if text[at : at + 1] != character:
            raise BadRow(f"expected {character!r} of one JSON array, got {text[at : at + 20]!r}", line)
        at += 1

    blanks = " \t\r\n"
    skip_blanks(blanks)
    expect("[")
    skip_blanks(blanks)
    while text[at : at + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadRow(f"not JSON: {error}", line) from error
        yield line, text[at:end]
        line += text.count("\n", at, end)
        at = end
        skip_blanks(blanks)
        if text[at : at + 1] != "]":
            expect(",")
            skip_blanks(blanks)

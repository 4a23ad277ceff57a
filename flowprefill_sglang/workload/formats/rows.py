"""What the formats share: the error for one row, and JSON rows checked field by field."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
PositiveCount = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]

Row = TypeVar("Row")


class BadRow(ValueError):
    """This line is no request; ``str`` says what was expected."""


class LeftOut(BadRow):
    """This line is well-formed and no request by its format's own rules; it is counted, not refused."""


def decode_json(decoder: msgspec.json.Decoder[Row], line: str) -> Row:
    """Decode one JSON line. Raises BadRow with the field that is wrong."""
    try:
        return decoder.decode(line)
    except msgspec.DecodeError as error:  # ValidationError, which names the field, is one too
        raise BadRow(str(error)) from error

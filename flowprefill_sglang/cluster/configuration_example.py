"""A complete, documented configuration file, made from the table of fields: what ``flowprefill config show`` prints."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Final

from flowprefill_sglang.cluster.configuration_fields import SECTION_TEXTS, SECTIONS, Field

_WIDTH: Final = 110
_HEAD: Final = """\
# A cluster of FlowPrefill, for: flowprefill up --config FILE
# Every field is here with its default, and each may be left out. Flags on the command line win over the file.
# Check a file with: flowprefill config check FILE
"""


def example_file() -> str:
    """The file's text, all fields at their defaults."""
    return "\n".join([_HEAD, *_lines()]) + "\n"


def _lines() -> Iterator[str]:
    for index, (section, fields) in enumerate(SECTIONS.items()):
        if index:
            yield ""
        yield f"# {SECTION_TEXTS[section]}"
        yield f"{section}:"
        for field in fields:
            yield from _field(field)


def _field(field: Field) -> Iterator[str]:
    comment = (
        f"{_sentence(field.text)} {_sentence(field.kind.expected)} Default: {written(field.default)}; {field.why}."
    )
    yield from textwrap.wrap(
        comment,
        _WIDTH,
        initial_indent="  # ",
        subsequent_indent="  # ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    if field.example:
        yield f"  # {field.name}: {field.example}"
    yield f"  {field.name}: {written(field.default)}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def written(value: Any) -> str:  # of any field's type
    """A default in YAML."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)

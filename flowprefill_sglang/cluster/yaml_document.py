"""A YAML file and where each of its values stands, so that an error can say file, line, field and value in one line.

What YAML lets pass and a person hardly means is refused here: a key that comes twice (YAML's loaders keep the last
one), and keys that are no text (``on:`` is read as true).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from flowprefill_sglang.errors import BadInput

FieldPath = tuple[str | int, ...]
"""Keys and list positions from the document's top, e.g. ``("router", "port")``."""

_SHOWN_CHARACTERS: Final = 80
_LARGEST_FILE_BYTES: Final = 1 << 20
_MOST_NODES: Final = 100_000
"""Aliases let a small file stand for a huge one."""


class YamlDocument:
    """A file that was read. Raises BadInput, in one line, when it cannot be, or is no YAML with text keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._nodes: dict[FieldPath, yaml.Node] = {}
        self._lines: dict[FieldPath, int] = {}  # of the keys, since a mapping's own place is its first line's
        text = _text(path)
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            if root is not None:
                self._note(root, (), ())
            self.content: Any = yaml.safe_load(text)  # of any type: a file may hold anything
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark is not None else ""
            said = " ".join(part for part in (error.context, error.problem) if part)
            raise BadInput(f"{path}{line}: this is no YAML: {said}") from error
        except RecursionError as error:
            raise BadInput(f"{path}: values are nested too deeply") from error
        except (yaml.YAMLError, ValueError) as error:  # characters that YAML forbids; numbers and dates that are none
            raise BadInput(f"{path}: this is no YAML: {' '.join(str(error).split())}") from error

    def wrong(self, where: FieldPath, expected: str) -> BadInput:
        """The error for the value at ``where``."""
        return BadInput(f"{self.at(where)}: expected {expected}, not {self.shown(where)}")

    def at(self, where: FieldPath) -> str:
        """File, line and field, e.g. ``cluster.yaml:3: router.port``."""
        line = f":{self._lines[where]}" if where in self._lines else ""
        return f"{self.path}{line}: {dotted(where)}" if where else f"{self.path}{line}"

    def shown(self, where: FieldPath) -> str:
        """The value as it is written, for a message."""
        node = self._nodes.get(where)
        if not isinstance(node, yaml.ScalarNode):
            return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        if not node.value and not node.style:
            return "nothing"
        text = repr(node.value) if node.style else node.value
        return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"

    def _note(self, node: yaml.Node, where: FieldPath, inside: tuple[yaml.Node, ...]) -> None:
        if node in inside or len(self._nodes) > _MOST_NODES:
            raise BadInput(f"{self.at(where)}: an alias (*name) stands for what it is in, or for too much")
        self._nodes.setdefault(where, node)
        if isinstance(node, yaml.ScalarNode):
            self._require_text(node)
        children: list[tuple[FieldPath, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                name, line = self._key(key, where), key.start_mark.line + 1
                child = (*where, name)
                if name in seen:
                    raise BadInput(f"{self.path}:{line}: {dotted(child)} comes twice, first in line {seen[name]}")
                seen[name] = self._lines[child] = line
                children.append((child, value))
        elif isinstance(node, yaml.SequenceNode):
            children = [((*where, position), value) for position, value in enumerate(node.value)]
        for child, value in children:
            self._note(value, child, (*inside, node))

    def _require_text(self, node: yaml.ScalarNode) -> None:
        """YAML's escapes can name halves of characters (surrogates), which no other program takes."""
        try:
            node.value.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{self.path}:{node.start_mark.line + 1}: {node.value!r} is no text") from error

    def _key(self, key: yaml.Node, where: FieldPath) -> str:
        if isinstance(key, yaml.ScalarNode):
            self._require_text(key)
        if isinstance(key, yaml.ScalarNode) and key.tag == "tag:yaml.org,2002:str":
            return str(key.value)
        if isinstance(key, yaml.ScalarNode) and key.tag == "tag:yaml.org,2002:merge":
            raise BadInput(
                f"{self.path}:{key.start_mark.line + 1}: merge keys (<<) are not taken; write the fields out"
            )
        said = f"{key.value} (quote it if it is meant)" if isinstance(key, yaml.ScalarNode) else "a list or mapping"
        place = f" in {dotted(where)}" if where else ""
        raise BadInput(f"{self.path}:{key.start_mark.line + 1}: expected a name{place}, not {said}")


def dotted(where: FieldPath) -> str:
    """A path as people write it."""
    return ".".join(part if part.isprintable() else repr(part) for part in map(str, where))


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    if len(data) > _LARGEST_FILE_BYTES:
        raise BadInput(f"{path} is over {_LARGEST_FILE_BYTES} bytes: that is no configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: this is no text in UTF-8: {error.reason} at byte {error.start}") from error

"""Where commands put their results: checked before the work, written in one step after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flowprefill_sglang.errors import BadInput


def check_folder(flag: str, path: Path | None) -> None:
    """Raise BadInput for a file in a folder that does not exist: now, not after minutes of work."""
    if path is not None and not path.absolute().parent.is_dir():
        raise BadInput(f"{flag}: the folder {path.parent} does not exist")
    if path is not None and path.is_dir():
        raise BadInput(f"{flag}: {path} is a folder, expected a file")


def make_folder(flag: str, path: Path) -> None:
    """Make the folder, if its parent exists. Raises BadInput when it cannot be made."""
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise BadInput(f"{flag}: the folder {path} cannot be made: {error.strerror}") from error


def write_json(path: Path, document: dict[str, Any]) -> None:
    """In one step, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)

"""Where cost models are kept: one JSON file for each model on each kind of hardware.

``flowprefill profile`` writes them, prefill workers read the one that is theirs. Its name is made of the two keys, and
both stand in the file, so that a file that was copied from another machine is refused and not believed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from flowprefill_sglang.core.prefill_cost import CostModel
from flowprefill_sglang.errors import StartupError

FOLDER_VARIABLE = "FLOWPREFILL_COST_DIR"
FORMAT = 1
"""Raised when the meaning of a field changes."""


class ModelKey(msgspec.Struct, frozen=True, kw_only=True):
    """What of a model decides how fast it is. Two fine-tunes of one base model share it."""

    architecture: str
    dtype: str
    kv_dtype: str
    tp_size: int
    attention_backend: str
    shape_digest: str
    """Of the names, shapes and types of one rank's parameters."""


class HardwareKey(msgspec.Struct, frozen=True, kw_only=True):
    """What computes."""

    device: str
    """In PyTorch's words: cpu, cuda, …"""
    name: str
    """As the device calls itself."""
    threads: int = 0
    """That PyTorch computes with; 0 where the device is no CPU."""


class CostFile(msgspec.Struct, frozen=True, kw_only=True):
    """The file. Fields beyond these are for people and may be anything."""

    format: int
    model: ModelKey
    hardware: HardwareKey
    coefficients: CostModel


def default_path(model: ModelKey, hardware: HardwareKey, environment: Mapping[str, str] = os.environ) -> Path:
    """The file of this model on this hardware: in ``$FLOWPREFILL_COST_DIR``, or ``~/.cache/flowprefill/cost``."""
    folder = environment.get(FOLDER_VARIABLE)
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    words = (model.architecture, hardware.name, f"tp{model.tp_size}")
    readable = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-")[:40] for word in words)
    digest = hashlib.sha256(msgspec.json.encode((model, hardware), order="sorted")).hexdigest()[:12]
    return (Path(folder) if folder else cache / "flowprefill" / "cost") / f"{readable}-{digest}.json"


def load(path: Path, model: ModelKey | None = None, hardware: HardwareKey | None = None) -> CostModel:
    """The cost model in a file, which must be of this ``model`` and ``hardware`` where they are given.

    Raises StartupError, which names the file and what is wrong with it or what differs.
    """
    advice = "make it anew with 'flowprefill profile', or remove it"
    try:
        content = msgspec.json.decode(path.read_bytes(), type=CostFile)
    except OSError as error:
        raise StartupError(f"cannot read the cost model {path}: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:  # ValueError: from CostModel, or no UTF-8
        raise StartupError(f"{path} is no cost model: {error}; {advice}") from error
    if content.format != FORMAT:
        raise StartupError(f"{path} has format {content.format}, this version reads {FORMAT}; {advice}")
    differences = [*_differences("model", content.model, model), *_differences("hardware", content.hardware, hardware)]
    if differences:
        raise StartupError(f"the cost model {path} was made for something else: {'; '.join(differences)}; {advice}")
    return content.coefficients


def save(path: Path, content: CostFile, more: Mapping[str, object] | None = None) -> None:
    """Write the file in one step, with its folder, and ``more`` JSON values beside its own. Raises StartupError when it
    cannot be written."""
    document = msgspec.to_builtins(content) | dict(more or {})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
        temporary.replace(path)
    except OSError as error:
        raise StartupError(f"cannot write the cost model {path}: {error.strerror}") from error


def _differences(what: str, found: msgspec.Struct, expected: msgspec.Struct | None) -> Iterator[str]:
    for name in () if expected is None else expected.__struct_fields__:
        if getattr(found, name) != getattr(expected, name):
            yield f"{what} {name} is {getattr(found, name)!r} there and {getattr(expected, name)!r} here"

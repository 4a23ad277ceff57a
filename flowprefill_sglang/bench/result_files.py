"""Results of ``flowprefill bench`` read back, and whether two of them may be compared. Pure, but for reading files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowprefill_sglang.errors import BadInput

MUST_AGREE = (
    "name",
    "sha256",
    "start_s",
    "duration_s",
    "limit",
    "class_by",
    "spread_ties",
    "rate",
    "rate_scale",
    "max_output_tokens",
    "seed",
    "prompts",
    "endpoint",
)
"""Keys of a result's workload without which two results are not about the same load."""
REQUIRED = ("workload", "repeats", "classes", "records", "client_late", "seed")


def read_result(path: Path) -> dict[str, Any]:
    """A result of ``bench``. Raises BadInput for another file, and for a result in which the client fell behind."""
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    if isinstance(document, dict) and document.get("client_late"):
        raise BadInput(f"{path} has no result: the load client fell behind")
    if not isinstance(document, dict) or any(key not in document for key in REQUIRED):
        raise BadInput(f"{path} is no result of 'flowprefill bench --json': expected its {', '.join(REQUIRED)}")
    return document


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Why the two are not about the same load with the same objectives; empty when they are."""
    found = [
        f"{key} {_brief(a['workload'].get(key))} against {_brief(b['workload'].get(key))}"
        for key in MUST_AGREE
        if a["workload"].get(key) != b["workload"].get(key)
    ]
    if a.get("length_factor") != b.get("length_factor"):
        found.append(f"length factor {a.get('length_factor')} against {b.get('length_factor')}")
    found += [
        f"objective of {name} {_of(a, name, 'slo_ms')} ms against {_of(b, name, 'slo_ms')} ms"
        for name in _names(a, b)
        if _of(a, name, "slo_ms") != _of(b, name, "slo_ms")
    ]
    counts = [
        {name: document["classes"][name]["count"] / len(document["repeats"]) for name in document["classes"]}
        for document in (a, b)
    ]
    if counts[0] != counts[1]:
        found.append(f"requests by class {counts[0]} against {counts[1]}")
    return found


def _brief(value: Any) -> str:  # a JSON value
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def remarks(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What else differs: it may be what is compared, or what explains the result."""
    found = []
    for key, what in (("model", "model"), ("hardware", "hardware"), ("versions", "versions"), ("commit", "commit")):
        if a.get(key) != b.get(key):
            found.append(f"{what}: {_short(a.get(key), b.get(key))}")
    return found


def _short(a: Any, b: Any) -> str:  # JSON values
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
        return ", ".join(f"{key} {a.get(key)} against {b.get(key)}" for key in keys)
    return f"{a} against {b}"


def _names(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [*a["classes"], *(name for name in b["classes"] if name not in a["classes"])]


def _of(document: Mapping[str, Any], name: str, key: str) -> Any:  # a JSON value
    return document["classes"].get(name, {}).get(key)

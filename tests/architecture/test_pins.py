"""One version of PyTorch, torchvision and SGLang: the requirement files state it, and documents repeat it right."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PINNED = ("sglang", "torch", "torchvision")
DOCUMENTS = sorted(
    file
    for pattern in ("*.md", "docs/*.md", "Makefile", "pyproject.toml", "requirements/*")
    for file in REPOSITORY.glob(pattern)
)
_REQUIREMENT = re.compile(r"\b(sglang|torch|torchvision)==(\d+(?:\.\d+)+)(?:\+\w+)?")
_IN_WORDS = re.compile(r"\b(SGLang|PyTorch) (\d+\.\d+\.\d+)")
_NAMES = {"SGLang": "sglang", "PyTorch": "torch"}


def mentions(text: str) -> list[tuple[str, str]]:
    """(package, version) for each ``package==version`` and each "SGLang 0.5.23" in a text."""
    return _REQUIREMENT.findall(text) + [(_NAMES[name], version) for name, version in _IN_WORDS.findall(text)]


def pins() -> dict[str, str]:
    """Version by package, from the files that `make venv` installs from."""
    files = (REPOSITORY / "requirements" / name for name in ("torch-cpu.txt", "sglang-cpu.txt"))
    return dict(found for file in files for found in _REQUIREMENT.findall(file.read_text()))


def test_each_package_is_pinned() -> None:
    assert set(pins()) == set(PINNED)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.relative_to(REPOSITORY).as_posix())
def test_documents_repeat_the_pins(document: Path) -> None:
    assert [(name, version) for name, version in mentions(document.read_text()) if pins()[name] != version] == []


def test_install_document_names_every_pin() -> None:
    assert set(mentions((REPOSITORY / "docs/install.md").read_text())) >= set(pins().items())


def test_the_seam_supports_the_pinned_sglang() -> None:
    source = (REPOSITORY / "flowprefill_sglang/integration/hooks.py").read_text()
    assert re.findall(r'^SUPPORTED_SGLANG = "(.*)"$', source, re.MULTILINE) == [pins()["sglang"]]


def test_mentions_are_seen() -> None:
    text = "torch==2.13.0+cpu, `sglang==0.5.23`; SGLang 0.4.1 and PyTorch 2.1.0"
    expected = [("torch", "2.13.0"), ("sglang", "0.5.23"), ("sglang", "0.4.1"), ("torch", "2.1.0")]
    assert mentions(text) == expected


def test_every_extra_has_its_file() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extras = project["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    assert set(extras) == {"cpu", "cuda", "dev", "mooncake", "plot", "ray"}
    for name, source in extras.items():
        assert source == {"file": [f"requirements/{name}.txt"]}
        assert (REPOSITORY / f"requirements/{name}.txt").is_file()

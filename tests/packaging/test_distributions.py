"""What is in the wheel and in the sdist."""

from __future__ import annotations

import stat
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

LINKED = ("kernels", "prefill_worker", "router")


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_holds_the_package_and_nothing_else(distributions) -> None:
    top = {name.split("/")[0] for name in files_of(distributions.wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"flowprefill_sglang"}


def test_wheel_holds_every_module_of_the_checkout(distributions, checkout: Path) -> None:
    own = {file.relative_to(checkout).as_posix() for file in (checkout / "flowprefill_sglang").rglob("*.py")}
    linked = {
        f"flowprefill_sglang/{file.relative_to(checkout).as_posix()}"
        for folder in LINKED
        for file in (checkout / folder).rglob("*.py")
    }
    expected = own | linked | {"flowprefill_sglang/py.typed"}
    assert expected - files_of(distributions.wheel) == set()
    for folder in LINKED:
        assert any(name.startswith(f"flowprefill_sglang/{folder}/") for name in files_of(distributions.wheel))


def test_wheel_holds_no_links(distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as archive:
        assert [entry.filename for entry in archive.infolist() if stat.S_ISLNK(entry.external_attr >> 16)] == []


def test_sdist_holds_no_links_and_builds_the_same_wheel(distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        assert [member.name for member in archive if not (member.isfile() or member.isdir())] == []
    assert files_of(distributions.wheel_from_sdist) == files_of(distributions.wheel)


def test_license_is_included(distributions) -> None:
    assert [name for name in files_of(distributions.wheel) if name.endswith(".dist-info/licenses/LICENSE")]
    assert metadata_of(distributions.wheel)["License-Expression"] == "Apache-2.0"


def test_requirements_follow_their_files(distributions, checkout: Path) -> None:
    metadata = metadata_of(distributions.wheel)
    required = metadata.get_all("Requires-Dist") or []
    assert set(metadata.get_all("Provides-Extra") or []) == {"cpu", "cuda", "dev", "mooncake", "plot", "ray"}
    assert [line for line in required if line.startswith("sglang==") and 'extra == "cuda"' in line]
    always = [line for line in required if "extra ==" not in line]
    assert always
    assert [line for line in always if line.startswith(("torch", "sglang"))] == []
    stated = [line.partition("#")[0].strip() for line in (checkout / "requirements/cpu.txt").read_text().splitlines()]
    assert sum('extra == "cpu"' in line for line in required) == len([line for line in stated if line])

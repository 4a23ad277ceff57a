"""The side folders are one set of files under two places, and nothing of ours takes the name ``kernels``."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LINKED = ("kernels", "prefill_worker", "router")


@pytest.mark.parametrize("name", LINKED)
def test_folder_is_linked_into_the_package(name: str) -> None:
    link = REPOSITORY / "flowprefill_sglang" / name
    assert link.is_symlink(), "a copy would be a second set of files that drifts apart"
    assert link.readlink() == Path("..") / name, "a link that names an absolute path breaks in every other checkout"
    assert link.resolve() == REPOSITORY / name


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a git checkout")
def test_links_and_their_folders_are_tracked() -> None:
    entries = subprocess.run(
        ["git", "ls-files", "--stage"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    modes = {path: line.split()[0] for line, path in (entry.split("\t", 1) for entry in entries)}
    for name in LINKED:
        assert modes.get(f"flowprefill_sglang/{name}") == "120000", f"{name} is not tracked as a symbolic link"
        assert any(path.startswith(f"{name}/") for path in modes), f"{name}/ is empty in git, so a clone has no folder"


def test_kernels_is_no_regular_package() -> None:
    # It would shadow Hugging Face's distribution `kernels` under `python -m …` from the checkout.
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()

"""Each way to install, each way to start Python, from the checkout and from elsewhere: every name is what it should be.

The trap: SGLang depends on Hugging Face's distribution ``kernels``, and the checkout has a folder of that name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

OURS = {
    "flowprefill_sglang": "__init__.py",
    "flowprefill_sglang.prefill_worker": "prefill_worker/__init__.py",
    "flowprefill_sglang.router": "router/__init__.py",
}
STARTS = ("script", "-m", "-c")
PROBE = Path(__file__).with_name("probe_imports.py")


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that has nothing to do with the checkout."""
    return tmp_path_factory.mktemp("elsewhere")


def probe(start: str, bin_folder: Path, cwd: Path, names: Sequence[str], run_command) -> dict[str, str | None]:
    """Where each name is imported from; the process itself and its spawned child must agree."""
    python: list[str | Path] = ["env", f"PYTHONPATH={PROBE.parent}", bin_folder / "python"]
    program: dict[str, list[str | Path]] = {
        "script": [PROBE],
        "-m": ["-m", PROBE.stem],
        "-c": ["-c", f"import {PROBE.stem}; {PROBE.stem}.main()"],
    }
    places = json.loads(run_command([*python, *program[start], *names], cwd))
    for name, (here, child) in places.items():
        assert here == child, f"{name} is another module in a spawned child"
    return {name: here for name, (here, _) in places.items()}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_names(place: str, start: str, environment, checkout: Path, elsewhere: Path, run_command) -> None:
    cwd = checkout if place == "checkout" else elsewhere
    found = probe(start, environment.bin, cwd, [*OURS, "flowprefill_sglang.kernels", "kernels"], run_command)
    # `-m` and `-c` put the working directory first on the path, and a script its own folder.
    from_checkout = place == "checkout" and start != "script"
    package = checkout / "flowprefill_sglang" if from_checkout else environment.package
    assert {name: found[name] for name in OURS} == {name: str(package / file) for name, file in OURS.items()}
    assert found["flowprefill_sglang.kernels"] == f"namespace:{package / 'kernels'}"
    assert found["kernels"] == str(distribution("kernels").locate_file("kernels/__init__.py"))


@pytest.mark.parametrize("start", STARTS)
def test_no_bare_names_are_installed(start: str, environment, elsewhere: Path, run_command) -> None:
    found = probe(start, environment.bin, elsewhere, ["router", "prefill_worker"], run_command)
    assert found == {"router": None, "prefill_worker": None}


@pytest.mark.parametrize("start", STARTS)
def test_without_the_other_kernels(
    start: str, lonely_environment, checkout: Path, elsewhere: Path, run_command
) -> None:
    """Where Hugging Face's distribution is missing, nothing of ours stands in for it."""
    assert probe(start, lonely_environment.bin, elsewhere, ["kernels"], run_command) == {"kernels": None}
    # From the checkout Python makes an empty namespace package of the folder: kernels/README.md says so.
    expected = None if start == "script" else f"namespace:{checkout / 'kernels'}"
    assert probe(start, lonely_environment.bin, checkout, ["kernels"], run_command) == {"kernels": expected}


def test_empty_namespace_has_nothing_to_use(lonely_environment, checkout: Path, run_command) -> None:
    code = "import kernels; print([name for name in vars(kernels) if not name.startswith('__')])"
    assert run_command([lonely_environment.bin / "python", "-c", code], checkout).strip() == "[]"


def test_entry_points(environment, elsewhere: Path, run_command) -> None:
    code = (
        "import json; from importlib.metadata import entry_points as e;"
        "print(json.dumps([[p.group, p.name, p.value] for g in ('sglang.srt.platforms', 'sglang.srt.plugins')"
        " for p in e(group=g) if p.dist.name == 'flowprefill-sglang']))"
    )
    assert sorted(json.loads(run_command([environment.bin / "python", "-c", code], elsewhere))) == [
        ["sglang.srt.platforms", "flowprefill_cpu", "flowprefill_sglang.integration.platform:activate"],
        ["sglang.srt.plugins", "flowprefill", "flowprefill_sglang.integration.plugin:register"],
    ]


@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_command_runs(place: str, environment, checkout: Path, elsewhere: Path, run_command) -> None:
    code = "from importlib.metadata import version; print(version('flowprefill-sglang'))"
    version = run_command([environment.bin / "python", "-c", code], elsewhere).strip()
    cwd = checkout if place == "checkout" else elsewhere
    assert version in run_command([environment.bin / "flowprefill", "version"], cwd)

"""A private copy of the checkout, the distributions built from it, and an environment for each way to install it.

Nothing here uses the network, and nothing is written to the checkout itself.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 300
MADE_BY_TOOLS = (".venv*", "__pycache__", "*.egg-info", "build", "dist", ".*_cache", ".hypothesis")
"""What is in a checkout and not in a clone; the short form of .gitignore for where there is no git."""


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """Standard output of a command that must succeed; its whole output is in the failure otherwise."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, f"{command} failed with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Distributions:
    wheel: Path
    sdist: Path
    wheel_from_sdist: Path


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A virtual environment that holds our package, installed in one ``way``."""

    way: str
    folder: Path
    package: Path
    """Where ``flowprefill_sglang`` is imported from, unless the working directory comes first on the path."""

    @property
    def bin(self) -> Path:
        return self.folder / "bin"


@pytest.fixture(scope="session")
def run_command() -> Callable[[Sequence[str | Path], Path], str]:
    return run


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone would hold, symbolic links kept."""
    copy = tmp_path_factory.mktemp("checkout") / "flowprefill"
    if not (REPOSITORY / ".git").exists():  # an unpacked archive
        shutil.copytree(REPOSITORY, copy, symlinks=True, ignore=shutil.ignore_patterns(*MADE_BY_TOOLS))
        return copy
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], REPOSITORY)
    for name in filter(None, listed.split("\0")):
        source, target = REPOSITORY / name, copy / name
        if source.is_file() or source.is_symlink():  # a file deleted but not yet committed is still listed
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return copy


@pytest.fixture(scope="session")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Built without isolation: the build requirement, setuptools, is in the development environment."""
    folder = tmp_path_factory.mktemp("distributions")
    build = [sys.executable, "-P", "-m", "build", "--no-isolation"]  # -P: `build` must not be a folder of the checkout
    run([*build, "--wheel", "--sdist", "--outdir", folder, checkout], folder)
    (sdist,) = folder.glob("*.tar.gz")
    unpacked = folder / "unpacked"
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    run([*build, "--wheel", "--outdir", folder / "from-sdist", source], folder)
    (wheel,) = folder.glob("*.whl")
    (wheel_from_sdist,) = (folder / "from-sdist").glob("*.whl")
    return Distributions(wheel=wheel, sdist=sdist, wheel_from_sdist=wheel_from_sdist)


def site_packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))


def make_environment(folder: Path, requirement: Sequence[str | Path], *, sees_dependencies: bool = True) -> None:
    """A fresh virtual environment with our package, and nothing else.

    Dependencies are found in the environment that runs the tests, through a path file. A path that is added so is only
    searched, its own path files are not executed, so that environment's installation of our package stays out of sight.
    """
    venv.create(folder, with_pip=False)
    if sees_dependencies:
        (site_packages(folder) / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-P", "-m", "pip", "--python", folder / "bin" / "python", "--quiet"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run([*pip, "install", *offline, *requirement], folder)


@pytest.fixture(scope="session", params=["wheel", "sdist", "editable"])
def environment(
    request: pytest.FixtureRequest,
    checkout: Path,
    distributions: Distributions,
    tmp_path_factory: pytest.TempPathFactory,
) -> Environment:
    way: str = request.param
    folder = tmp_path_factory.mktemp(way) / "venv"
    requirement: dict[str, list[str | Path]] = {
        "wheel": [distributions.wheel],
        "sdist": [distributions.sdist],
        "editable": ["--editable", checkout],
    }
    make_environment(folder, requirement[way])
    home = checkout if way == "editable" else site_packages(folder)
    return Environment(way=way, folder=folder, package=home / "flowprefill_sglang")


@pytest.fixture(scope="session")
def lonely_environment(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Our wheel and no other distribution at all: in particular no Hugging Face ``kernels``."""
    folder = tmp_path_factory.mktemp("lonely") / "venv"
    # Without its dependencies' path file there is no setuptools either; a wheel needs none.
    make_environment(folder, [distributions.wheel], sees_dependencies=False)
    return Environment(way="wheel", folder=folder, package=site_packages(folder) / "flowprefill_sglang")

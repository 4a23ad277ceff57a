"""Make SGLang find the plugin in a checkout that is not installed: its entry points, in a folder for PYTHONPATH."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tomllib
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def write_entry_points(folder: Path) -> Path:
    """A ``dist-info`` below ``folder`` with the name, version and entry points of ``pyproject.toml``."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    name = project["name"].replace("-", "_")
    target = folder / f"{name}-{project['version']}.dist-info"
    target.mkdir(parents=True, exist_ok=True)
    sections = (
        "\n".join([f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())])
        for group, entries in project["entry-points"].items()
    )
    (target / "entry_points.txt").write_text("\n\n".join(sections) + "\n")
    (target / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    return target


def child_environment(folder: Path) -> dict[str, str]:
    """This process's environment with the checkout on the path, and its entry points if nothing is installed."""
    paths = [str(CHECKOUT)]
    try:
        importlib.metadata.version("flowprefill-sglang")
    except importlib.metadata.PackageNotFoundError:
        write_entry_points(folder)
        paths.append(str(folder))
    before = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])])}


if __name__ == "__main__":  # python benchmarks/gpu/kit_entry_points.py FOLDER
    print(write_entry_points(Path(sys.argv[1])))

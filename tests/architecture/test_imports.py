"""Imports point one way, SGLang and its relatives stay at the seam, and long modules say why.

The rules are those of docs/design.md, "Who may import whom". They are read from the source with ``ast``, imports inside
functions and under ``TYPE_CHECKING`` included, so that a lazy import is no way around them.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "flowprefill_sglang"
REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / PACKAGE

BASE = {"core"}
WIRE = BASE | {"wire"}
MAY_IMPORT: dict[str, set[str]] = {
    # Pure values and decisions.
    "core": set(),
    # What travels between processes.
    "wire": BASE,
    # Leaves that a role may use.
    "observe": BASE,
    "workload": BASE,
    "kernels": BASE,
    # Roles: none knows another.
    "router": WIRE | {"observe"},
    "prefill_worker": WIRE | {"observe", "kernels"},
    "kv": WIRE | {"observe", "kernels"},
    # Roles on a virtual clock: the simulator runs the worker's state machine and the router's policies unchanged.
    "sim": BASE | {"workload", "router", "prefill_worker"},
    # A tool that drives the system from outside.
    "bench": BASE | {"workload", "observe"},
    # What puts roles together.
    "integration": WIRE | {"observe", "kernels", "kv", "prefill_worker"},
    "cluster": WIRE | {"observe", "workload", "router", "prefill_worker", "kv", "integration"},
    "cli": WIRE | {"observe", "workload", "router", "prefill_worker", "kv", "integration", "cluster", "bench", "sim"},
}
"""Rooms that a room may import beside itself. ``errors`` and the package's version are everybody's."""

MAY_IMPORT_ENGINE: dict[str, tuple[str, ...]] = {
    "sglang": ("integration/", "kv/"),
    "ray": ("cluster/ray_pool.py",),
    "triton": ("kernels/",),
    "flashinfer": ("kernels/",),
    "torch": ("integration/", "kv/", "kernels/", "prefill_worker/"),
    "safetensors": ("workload/tiny_model.py",),
    "psutil": ("integration/", "cluster/placement.py"),
    "tokenizers": ("workload/token_count.py",),
    "matplotlib": ("bench/",),  # the extra "plot"
    "scipy": ("sim/whole_jobs.py",),
}
"""Third-party packages that stay behind a seam, and the path prefixes below the package where they may be imported.

They come with SGLang and not with our own dependencies, so a router runs without them.
"""

MODULE_OF = {"pyyaml": "yaml", "pyzmq": "zmq", "prometheus-client": "prometheus_client"}
"""Import name of a distribution, where it is another one."""

LONG_MODULE_LINES = 400
REASON_FOR_LENGTH = f"over {LONG_MODULE_LINES} lines because"


class Import(NamedTuple):
    module: str
    """Absolute dotted name; for ``from a import b`` it is ``a.b``, since ``b`` may be a module."""
    line: int


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Every import in a module. ``package``: dotted name of the package that holds it, for relative imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield from (Import(f"{base}.{alias.name}", node.lineno) for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of the module at ``path`` (below the package, e.g. ``router/app.py``)."""
    room = path.split("/")[0] if "/" in path else None
    package = ".".join([PACKAGE, *path.split("/")[:-1]])
    found = []
    for imported in imports_of(source, package):
        top, _, rest = imported.module.partition(".")
        allowed_places = MAY_IMPORT_ENGINE.get(top)
        if allowed_places is not None and not path.startswith(allowed_places):
            found.append(f"{path}:{imported.line}: {top} may be imported only in {', '.join(allowed_places)}")
        if allowed_places is None and top not in {PACKAGE, *sys.stdlib_module_names, *declared()}:
            found.append(f"{path}:{imported.line}: {top} is not among pyproject.toml's dependencies")
        other = rest.split(".")[0]
        if top != PACKAGE or room is None or other not in MAY_IMPORT or other == room:
            continue
        if other not in MAY_IMPORT[room]:
            found.append(f"{path}:{imported.line}: {room} may not import {other}")
    return found


@cache
def declared() -> frozenset[str]:
    """Import names of the distributions that pyproject.toml requires."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = (re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in project["dependencies"])
    return frozenset(MODULE_OF.get(name, name) for name in names)


def modules() -> list[str]:
    """Paths of all modules below the package; the linked folders appear under their place in it."""
    rooms = [folder for folder in SOURCE.iterdir() if folder.is_dir()]  # rglob itself does not follow links
    files = [*SOURCE.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))]
    return sorted(file.relative_to(SOURCE).as_posix() for file in files)


def test_every_room_has_its_rule() -> None:
    rooms = {path.split("/")[0] for path in modules() if "/" in path}
    assert rooms <= set(MAY_IMPORT), "a new folder needs a line in MAY_IMPORT and in docs/design.md"
    assert {"core", "wire", "router", "prefill_worker"} <= rooms, "the walk over the source has lost folders"


@pytest.mark.parametrize("path", modules())
def test_imports_point_one_way(path: str) -> None:
    assert violations(path, (SOURCE / path).read_text()) == []


def test_rules_have_no_cycle() -> None:
    done: set[str] = set()
    while ready := {room for room, others in MAY_IMPORT.items() if room not in done and others <= done}:
        done |= ready
    assert done == set(MAY_IMPORT)


@pytest.mark.parametrize("path", modules())
def test_long_modules_say_why(path: str) -> None:
    source = (SOURCE / path).read_text()
    lines = source.count("\n")
    reason = ast.get_docstring(ast.parse(source)) or ""
    assert lines <= LONG_MODULE_LINES or REASON_FOR_LENGTH in " ".join(reason.split()), (
        f"{path} has {lines} lines; split it, or say in its docstring '{REASON_FOR_LENGTH} …'"
    )


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/slo.py", "from flowprefill_sglang.wire import messages"),
        ("core/slo.py", "from flowprefill_sglang import wire"),
        ("core/slo.py", "from ..wire.messages import Hello"),
        ("core/slo.py", "from .. import wire"),
        ("core/deep/slo.py", "from ...router import app"),
        ("router/app.py", "import flowprefill_sglang.prefill_worker.link"),
        ("router/app.py", "def later():\n    from flowprefill_sglang.kv import manager"),
        ("kv/sender.py", "from flowprefill_sglang.integration.plugin import register"),
        ("integration/plugin.py", "from flowprefill_sglang.cluster import launcher"),
        ("router/app.py", "import sglang"),
        ("prefill_worker/link.py", "from sglang.srt.server_args import ServerArgs"),
        ("errors.py", "import sglang.version"),
        ("cli/main.py", "import ray"),
        ("cluster/pool.py", "import ray"),
        ("integration/plugin.py", "import triton.language as tl"),
        ("kv/gather.py", "from flashinfer import page"),
        ("router/app.py", "import torch"),
        ("prefill_worker/link.py", "import fastapi"),
    ],
)
def test_checker_sees_wrong_imports(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/slo.py", "from flowprefill_sglang.errors import BadInput"),
        ("core/slo.py", "from .policy import edf"),
        ("router/app.py", "from flowprefill_sglang import __version__"),
        ("router/app.py", "from flowprefill_sglang.wire.messages import Hello"),
        ("cli/main.py", "from flowprefill_sglang.cluster.launcher import up"),
        ("integration/plugin.py", "from sglang.srt import server_args"),
        ("kernels/triton/attention.py", "import triton"),
        ("cluster/ray_pool.py", "import ray"),
        ("wire/socket.py", "import asyncio\nimport zmq.asyncio\nimport msgspec"),
    ],
)
def test_checker_lets_right_imports_pass(path: str, source: str) -> None:
    assert violations(path, source) == []

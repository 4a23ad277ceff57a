"""A model that one node of a Ray cluster does not have: the same path leads to another folder there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowprefill_testing.ray_pools import OBJECT_STORE_BYTES, RayPool, ray_nodes

pytest.importorskip("ray")
pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]
MODEL = Path("/proc/self/cwd/model")


@pytest.fixture
def nodes(model_path: Path, tmp_path: Path) -> Iterator[Any]:
    """Two nodes with room for a member each. A node's processes keep the folder in which it was started."""
    with ray_nodes(workers=0) as cluster, pytest.MonkeyPatch.context() as patch:
        for name in ("has", "lacks"):
            (tmp_path / name).mkdir()
            patch.chdir(tmp_path / name)
            cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
        (tmp_path / "has" / "model").symlink_to(model_path)
        yield cluster


def test_it_is_one_clear_line_and_nothing_is_left(nodes: Any, tmp_path: Path) -> None:
    def members() -> list[psutil.Process]:
        return [one for one in psutil.process_iter(["cmdline"]) if str(MODEL) in (one.info["cmdline"] or ())]

    pool = RayPool(nodes.address, MODEL, tmp_path)
    try:
        assert pool.process.wait(120) == 1
        said = pool.log.read_text().splitlines()[-1]
        assert said.startswith("flowprefill up: ")
        assert f"cannot start on node {nodes.address.partition(':')[0]}: no model at {MODEL}: it has no config" in said
        assert members() == []
        assert list(pool.temporary.iterdir()) == []
        assert not pool.ready_file.exists()
    finally:
        pool.clear_away()

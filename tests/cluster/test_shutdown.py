"""Ctrl-C ends ``flowprefill up`` cleanly: status, processes, files."""

import os
import signal

import pytest

from flowprefill_testing.clusters import Cluster, wait_until

pytestmark = pytest.mark.cluster


def test_ctrl_c_leaves_nothing(cluster: Cluster) -> None:
    groups = [worker["pid"] for worker in cluster.workers.values()]
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait(40) == 0
    assert not cluster.ready_file.exists()
    wait_until(lambda: not any(group_exists(group) for group in groups), timeout_s=15)
    assert not list((cluster.log_dir.parent / "tmp").glob("flowprefill-*")), "SGLang's sockets go with the cluster"


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True

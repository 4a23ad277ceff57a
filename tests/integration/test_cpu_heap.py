"""In a process of its own: the heap's settings cannot be taken back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from flowprefill_sglang.integration.cpu_heap import keep_memory

def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(megabytes * 2**18) for _ in range(3)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_memory()
faults(40)
print(faults(40))
"""


def faults(what: str) -> int:
    ran = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, check=True, timeout=120)
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has no such settings")
def test_memory_is_used_again_without_page_faults() -> None:
    assert faults("keep") < 500
    assert faults("leave") > 5_000, "without it this test shows nothing"

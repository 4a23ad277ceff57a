"""A thread that copies tensors does not outlive the interpreter."""

from __future__ import annotations

import subprocess
import sys
import textwrap

SCRIPT = """
    import threading
    import torch
    from flowprefill_sglang.kv.link_thread import LinkThread

    here, there, ends, copies = torch.zeros(200_000), torch.ones(200_000), threading.Event(), threading.Event()

    def copy():
        while not ends.is_set():
            here.copy_(there)
            copies.set()

    thread = LinkThread("copies", copy, ends.set)
    thread.start()
    copies.wait(10)
"""


def run(end: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT) + end], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


def test_it_ends_at_the_exit_of_the_interpreter() -> None:
    """An ordinary daemon thread would end the process with SIGABRT, nearly always."""
    assert run("") == (0, "")


def test_its_owner_can_end_it_before() -> None:
    assert run("ends.set(); thread.wait(); assert not thread.is_alive()") == (0, "")

"""Commands that end when their time is over, with all that they have started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


def status_within(seconds: float, command: Sequence[str], **options: Any) -> int | None:
    """The exit status of a command; None when it took longer and was killed. ``options``: of ``subprocess.Popen``.

    It leads a process group of its own, which is killed as a whole, on Ctrl-C too. Servers that ``flowprefill`` started
    in it are in groups of theirs, but end with the process that started them.
    """
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

"""Python processes of their own for tests of the seam: SGLang's hooks, platform and arguments are process-wide.

Most are forked from one process of the test session that has imported what SGLang imports from other projects, and
nothing of SGLang: that is most of the CPU time of importing SGLang.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import traceback
import types
from pathlib import Path
from typing import Any

from flowprefill_sglang.cluster.process import PARENT_VARIABLE, die_with_parent
from flowprefill_sglang.integration.platform import activate, has_accelerator
from flowprefill_testing.servers import with_support, with_us

TIMEOUT_S = 120
IMPORTED = (
    # By cost. What is missing here is imported by each script, and what SGLang no longer imports is imported in vain.
    "torch",
    "transformers.activations",
    "transformers.modeling_utils",
    "transformers.models",
    "transformers.loss.loss_utils",
    "scipy.optimize",
    "IPython.display",
    "triton",
    "torchvision.io",
    "openai.types.responses",
    "aiohttp",
    "fastapi",
    "gguf",
    "xgrammar",
    "compressed_tensors",
    "uvicorn",
)


def run_script(script: str, *, is_fresh: bool = False, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a script; SGLang's own import warnings are kept off its stderr.

    ``is_fresh``: nothing is imported before. Raises TimeoutExpired.
    """
    script = textwrap.dedent(script)
    if not (is_fresh or has_accelerator()):  # a process that has asked for CUDA should not be forked
        return _nursery().run(script, environ)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def facts_of(script: str, *, is_fresh: bool = False, **environ: str) -> dict[str, Any]:
    """What a script that ends well puts into its variable ``facts``."""
    done = run_script(
        "import json, sys\nfacts = {}\n" + textwrap.dedent(script) + '\nprint("\\nfacts=" + json.dumps(facts))',
        is_fresh=is_fresh,
        **environ,
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.rpartition("\nfacts=")[2])
    return facts


class _Nursery:
    """A process that forks one child for each line that it reads, one at a time; it ends with its standard input."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | with_support() | with_us(),
            start_new_session=True,
            text=True,
        )

    def run(self, script: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """One script. Raises TimeoutExpired, and RuntimeError when the nursery has ended; the next call has another."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with tempfile.TemporaryDirectory() as directory:
            out, err = Path(directory) / "out", Path(directory) / "err"
            out.touch()
            err.touch()
            task = {"script": script, "environ": os.environ | environ, "cwd": os.getcwd()}
            task |= {"out": str(out), "err": str(err)}
            print(json.dumps(task), file=stdin, flush=True)
            if not select.select([stdout], [], [], TIMEOUT_S)[0]:
                self.end()
                raise subprocess.TimeoutExpired(script, TIMEOUT_S, out.read_bytes(), err.read_bytes())
            status = stdout.readline()
            if not status:
                self.end()
                raise RuntimeError(f"the nursery ended with status {self._process.returncode}")
            return subprocess.CompletedProcess(script, int(status), out.read_text(), err.read_text())

    def end(self) -> None:
        """With what it has forked."""
        _nursery.cache_clear()
        atexit.unregister(self.end)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


@functools.cache
def _nursery() -> _Nursery:
    nursery = _Nursery()
    atexit.register(nursery.end)
    return nursery


def main() -> None:
    """Of the nursery."""
    die_with_parent()
    activate()  # as SGLang does before it imports torchvision or transformers
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_status_of(task))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _status_of(task: dict[str, Any]) -> int:
    """Run a task's script as ``python -c`` does, in this process; its exit status."""
    die_with_parent()
    for name, stream in zip((os.devnull, task["out"], task["err"]), (0, 1, 2), strict=True):
        descriptor = os.open(name, os.O_RDWR)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update(task["environ"])
    sys.argv = ["-c"]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(compile(task["script"], "<string>", "exec"), module.__dict__)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    main()

"""Python processes of their own for tests of the seam: SGLang's hooks, platform and arguments are process-wide."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any


def run_script(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a script; SGLang's own import warnings are kept off its stderr."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def facts_of(script: str, **environ: str) -> dict[str, Any]:
    """What a script that ends well puts into its variable ``facts``."""
    done = run_script(
        "import json, sys\nfacts = {}\n" + textwrap.dedent(script) + '\nprint("\\nfacts=" + json.dumps(facts))',
        **environ,
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.rpartition("\nfacts=")[2])
    return facts

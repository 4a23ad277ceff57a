"""Cold start: from ``flowprefill up`` to requests being accepted, and to the first answer; and how long Ctrl-C takes.

Each repeat starts a new cluster (1 router, 1 prefill worker, 1 decode instance, the tiny model) and ends it. "Cold"
means new processes; the files are in the page cache from the second repeat on, so every repeat is in the result.

    python benchmarks/cold_start.py --json result.json
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result

POLL_S = 0.02
TIMEOUT_S = 300.0


def main() -> int:
    """Run the repeats, print a table, write the raw rows."""
    parser = argparse.ArgumentParser(description="Cold start and shutdown of a whole cluster.")
    parser.add_argument("--json", type=Path, help="write provenance and raw rows here")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = [one_start() for _ in range(options.repeats)]
    print(f"{'seconds':<14}{'min':>8}{'median':>8}{'max':>8}")
    for key in rows[0]:
        values = [row[key] for row in rows]
        print(f"{key:<14}{min(values):8.1f}{statistics.median(values):8.1f}{max(values):8.1f}")
    if options.json:
        write_result(options.json, seed=None, measured={"rows": rows})
    return 0


def one_start() -> dict[str, float]:
    """Seconds until ready, until the first answer, and for the end. Raises RuntimeError when the cluster fails."""
    with tempfile.TemporaryDirectory() as directory:
        ready_file = Path(directory) / "ready.json"
        command = [sys.executable, "-m", "flowprefill_sglang", "up", "--port", "0", "--ready-file", str(ready_file)]
        started_at = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
            try:
                while not ready_file.exists():
                    if process.poll() is not None or time.monotonic() > started_at + TIMEOUT_S:
                        raise RuntimeError("the cluster did not become ready")
                    time.sleep(POLL_S)
                ready_s = time.monotonic() - started_at
                ask(json.loads(ready_file.read_text())["url"])
                answered_s = time.monotonic() - started_at
            finally:
                interrupted_at = time.monotonic()
                process.send_signal(signal.SIGINT)
                process.wait(60)
            if process.returncode != 0:
                raise RuntimeError(f"the cluster ended with status {process.returncode}")
            return {
                "ready_s": ready_s,
                "first_answer_s": answered_s,
                "shutdown_s": time.monotonic() - interrupted_at,
            }


def ask(url: str) -> None:
    """One short request; raises when it is not answered."""
    body = json.dumps({"text": "hello", "sampling_params": {"max_new_tokens": 2}}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()


if __name__ == "__main__":
    sys.exit(main())

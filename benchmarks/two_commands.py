"""Wall time of the README's two commands on a fresh clone: environment, ``make demo``, ``make test``.

Clones the checkout's HEAD into a temporary folder, makes the environment there from nothing, and runs both commands.
Environment and package caches of the user (pip's) are used as they are, as a second project on the machine would.

    python benchmarks/two_commands.py --json result.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from results_file import write_result

COMMANDS = (["make", "venv"], ["make", "demo"], ["make", "test"])


def main() -> int:
    """Run the commands; 0 only when all succeed."""
    parser = argparse.ArgumentParser(description="Wall time of make demo and make test on a fresh clone.")
    parser.add_argument("--json", type=Path, help="write provenance and times here")
    parser.add_argument("--keep-output", type=Path, help="append what the commands print to this file")
    options = parser.parse_args()
    checkout = Path(__file__).resolve().parents[1]
    rows = []
    with tempfile.TemporaryDirectory() as directory, Path(options.keep_output or "/dev/null").open("ab") as output:
        # Beside each other as in the checkout, so that tests find a folder of traces at the same relative place.
        clone = Path(directory) / "main"
        subprocess.run(["git", "clone", "--quiet", str(checkout), str(clone)], check=True)
        traces = checkout.parent / "shared"
        if traces.is_dir():
            (Path(directory) / "shared").symlink_to(traces)
        for command in COMMANDS:
            started_at = time.monotonic()
            done = subprocess.run(command, cwd=clone, stdout=output, stderr=subprocess.STDOUT, check=False)
            rows.append(
                {
                    "command": " ".join(command),
                    "wall_s": round(time.monotonic() - started_at, 1),
                    "status": done.returncode,
                }
            )
            print(f"{rows[-1]['command']:<12}{rows[-1]['wall_s']:8.1f} s   status {done.returncode}", flush=True)
    if options.json:
        write_result(options.json, seed=None, measured={"rows": rows})
    return 0 if all(row["status"] == 0 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Everything that wants a GPU, part by part: correctness, blocking, throughput, kernels, goodput.

    python benchmarks/gpu/run.py --out results/                      # on one NVIDIA GPU
    python benchmarks/gpu/run.py --out results/ --device cpu         # the same scripts on tiny shapes, to try them

A part runs in a process of its own, at most ``--minutes`` for all together and ten for each, and writes ``PART.json``.
One that is there already is kept, so that the command can be given again after time ran out; ``--again PART`` measures
it anew. ``README.md`` beside this file says what each part shows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kit_entry_points import CHECKOUT, child_environment
from kit_processes import status_within

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(CHECKOUT))  # where the package is not installed

PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "environment": ("part_environment.py", ()),
    "correctness-triton": ("part_correctness.py", ("--backend", "triton", "--layers", "8")),
    "correctness-flashinfer": ("part_correctness.py", ("--backend", "flashinfer", "--layers", "8")),
    "blocking": ("part_blocking.py", ("--layers", "8")),
    "throughput": ("part_throughput.py", ("--layers", "16")),
    "kernels": ("part_kernels.py", ()),
    "goodput": ("part_goodput.py", ()),
}
"""Script, and flags that come before the user's own."""
PART_S = 590.0
ENDING_S = 60.0
"""Of a part's time, for starting and for writing what it has."""


def main() -> int:
    """0 when every part that was asked for and can run has a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", default=",".join(PARTS), help="names with commas between (default: all)")
    parser.add_argument("--again", default="", help="parts to measure anew")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all parts (default 25)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options, passed_on = parser.parse_known_args()
    names, again = options.parts.split(","), set(filter(None, options.again.split(",")))
    unknown = {*names, *again} - PARTS.keys()
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    deadline_at = time.monotonic() + 60 * options.minutes
    states: dict[str, Any] = {}
    for name in ["environment", *(name for name in names if name != "environment")]:
        states[name] = run_part(name, options.device, out, name in again, deadline_at, passed_on)
        print(f"== {name}: {states[name]['state']}", flush=True)
        write_index(out, options.device, states)
    draw(out)
    return 0 if all(state["state"] in ("done", "kept", "cannot run") for state in states.values()) else 1


def run_part(
    name: str, device: str, out: Path, is_again: bool, deadline_at: float, passed_on: list[str]
) -> dict[str, Any]:
    """What became of it."""
    result = out / f"{name}.json"
    if result.exists() and not is_again:
        kept = json.loads(result.read_text()).get("device")
        if kept == device:
            return {"state": "kept"}
        return {"state": "refused", "why": f"{result.name} is of device {kept}: another --out, or --again {name}"}
    if name != "environment":
        why = json.loads((out / "environment.json").read_text())["cannot_run"].get(name)
        if why:
            return {"state": "cannot run", "why": why}
    seconds = min(PART_S, deadline_at - time.monotonic())
    if seconds < 2 * ENDING_S:
        return {"state": "no time left"}
    script, flags = PARTS[name]
    arguments = ["--json", str(result), "--device", device, *flags, *passed_on]
    arguments += ["--seconds", f"{seconds - ENDING_S:.0f}"]
    began = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        status = status_within(
            seconds,
            [sys.executable, str(HERE / script), *arguments],
            env=child_environment(out / "entry_points"),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if status is None:
        return {"state": "failed", "why": f"took more than {seconds:.0f} s; see {name}.log"}
    took_s = round(time.monotonic() - began, 1)
    if status:
        return {"state": "failed", "why": f"status {status}; see {name}.log", "took_s": took_s}
    return {"state": "done", "took_s": took_s}


def write_index(out: Path, device: str, states: dict[str, Any]) -> None:
    """Where the results come from, and what became of each part."""
    from flowprefill_sglang.bench.provenance import provenance, without_folders

    command = without_folders(["python", *sys.argv])
    document = {"device": device} | provenance(command, datetime.datetime.now(datetime.UTC)) | {"parts": states}
    (out / "index.json").write_text(json.dumps(document, indent=1) + "\n")


def draw(out: Path) -> None:
    """Pictures of what is there, if matplotlib is."""
    try:
        from kit_plots import draw_all
    except ImportError as error:
        print(f"no pictures: {error}")
        return
    for picture in draw_all(out):
        print(picture)


if __name__ == "__main__":
    sys.exit(main())

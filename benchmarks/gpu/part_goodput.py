"""``flowprefill bench suite`` at the paper's own objectives, on one GPU: FlowPrefill against one baseline at a time.

Three servers share the GPU, a decode instance and two prefill workers, so the baselines are measured one after another,
each beside FlowPrefill. A baseline that is done is not measured again when the part is repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from kit_models import TINY, model_folder

BASELINES = ("fcfs-2048", "fcfs", "fcfs-8192", "fcfs-512", "shortest-prefill-first", "hrrn", "priority")
TRACES = {"azure_llm_conv_2023.csv": "azure", "mooncake_conversation.jsonl": "mooncake"}
STARTING_S = 150
"""What a pair takes beside its probes: three servers start, and stop."""


def main() -> int:
    """0 when every baseline was measured that there was time for, and at least one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--traces", type=Path, help="folder of the traces of docs/benchmarks.md")
    parser.add_argument("--seed", type=int, default=1)
    options, _ = parser.parse_known_args()
    is_cuda = options.device == "cuda"
    folder = options.json.parent / "goodput"
    folder.mkdir(parents=True, exist_ok=True)
    trace_flags, trace = traces(options.traces, folder, options.seed)
    model = model_folder(options.model if is_cuda else TINY, options.json.parent / "models", options.layers)
    baselines = BASELINES if is_cuda else BASELINES[:1]
    deadline_at = time.monotonic() + options.seconds
    for place, baseline in enumerate(baselines):
        result = folder / f"{baseline}.json"
        left_s = deadline_at - time.monotonic()
        if result.exists() or (place and left_s < 2 * STARTING_S):
            continue
        flags = [*trace_flags, "--only", f"flowprefill,{baseline}", "--model-path", str(model)]
        flags += ["--json", str(result), "--log-dir", str(folder / f"logs-{baseline}"), "--seed", str(options.seed)]
        if is_cuda:
            # Two baselines in ten minutes; the others when the part is run again.
            minutes = max(1.0, (min(left_s, options.seconds / 2) - STARTING_S) / 60)
            flags += ["--slo-factor", "1", "--length-scale", "1", "--max-tokens", "30000", "--prompts", "ids"]
            flags += ["--windows", "1", "--minutes", f"{minutes:.2f}"]
            flags += ["--load-format", "dummy", "--device", "cuda", "--dtype", "bfloat16"]
            flags += ["--attention-backend", options.backend, "--sampling-backend", "pytorch"]
        else:
            flags += ["--quick", "--max-tokens", "2000", "--device", "cpu"]
        done = subprocess.run([sys.executable, "-m", "flowprefill_sglang", "bench", "suite", *flags])
        if done.returncode:
            print(f"{baseline}: the suite ended with status {done.returncode}; logs in {folder}", file=sys.stderr)
    results = {name: folder / f"{name}.json" for name in baselines}
    found = {name: json.loads(file.read_text()) for name, file in results.items() if file.exists()}
    missing = [name for name in baselines if name not in found]
    document = {"device": options.device, "model": model.name, "trace": trace, "missing": missing, "suites": found}
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if found else 1


def traces(folder: Path | None, made: Path, seed: int) -> tuple[list[str], str]:
    """Flags for the traces in a folder, or for a generated one, and what the result says of them."""
    if folder is not None:
        flags = []
        for name, format_name in TRACES.items():
            if not (folder / name).is_file():
                raise SystemExit(f"no trace at {folder / name}")
            flags += ["--trace", str(folder / name), "--format", format_name]
        return flags, "the Azure conversation and the Mooncake trace, merged"
    rng, at_s = random.Random(seed), 0.0
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for _ in range(600):
        at_s += rng.expovariate(4.0)
        tokens = rng.lognormvariate(6.9, 0.8) if rng.random() < 0.85 else rng.lognormvariate(9.3, 0.6)
        whole, part = divmod(at_s, 1.0)
        moment = (
            f"2026-01-01 {int(whole) // 3600:02}:{int(whole) // 60 % 60:02}:{int(whole) % 60:02}.{int(part * 1e6):06}"
        )
        lines.append(f"{moment},{max(16, int(tokens))},16")
    path = made / "generated.csv"
    path.write_text("\n".join(lines) + "\n")
    return [
        "--trace",
        str(path),
        "--format",
        "azure",
    ], "generated: log-normal chats of about 1,000 tokens, 15% about 11,000"


if __name__ == "__main__":
    sys.exit(main())

"""Maximum goodput on real traces: FlowPrefill against every scheduler of stock SGLang, in one run.

``flowprefill bench suite`` on the workload of this project's own claims, unless other traces are given: chats of the
Azure conversation trace and the long contexts of Mooncake's, merged by their own times. All other flags are the
suite's.

    python benchmarks/goodput.py --json result.json
    python benchmarks/goodput.py --trace AzureLLMInferenceTrace_conv.csv --format azure --json result.json
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flowprefill_sglang.cli.main import main as flowprefill

TRACES = {"azure_llm_conv_2023.csv": "azure", "mooncake_conversation.jsonl": "mooncake"}
"""File in the folder of traces, and its format."""
FOLDER = Path(os.environ.get("FLOWPREFILL_TRACES", Path(__file__).resolve().parents[2] / "shared" / "traces"))


def main(arguments: list[str]) -> int:
    """The suite's exit status. ``"--json" FILE`` keeps the result."""
    traces = []
    if "--trace" not in arguments and not {"-h", "--help"} & set(arguments):
        missing = [str(FOLDER / name) for name in TRACES if not (FOLDER / name).is_file()]
        if missing:
            print(f"no trace at {', '.join(missing)}: --trace, or FLOWPREFILL_TRACES for their folder", file=sys.stderr)
            return 2
        for name, format_name in TRACES.items():
            traces += ["--trace", str(FOLDER / name), "--format", format_name]
    return flowprefill(["bench", "suite", *traces, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

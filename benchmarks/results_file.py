"""How every benchmark here writes its result: where it comes from, then what it measured, raw rows included."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from flowprefill_sglang.bench.provenance import provenance, without_folders


def write_result(path: Path, *, seed: int | None, measured: dict[str, Any]) -> None:
    """One JSON object: commit, versions, hardware, the command (folders left out), the seed, and ``measured``.

    Rows are written one a line, so that a result can be read and compared in a diff.
    """
    document = (
        provenance(without_folders(["python", *sys.argv]), datetime.datetime.now(datetime.UTC))
        | {"seed": seed}
        | measured
    )
    document["ended_at"] = document.pop("started_at")  # results are written when all is measured
    rows = document.pop("rows")
    head = json.dumps(document, indent=1).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n')

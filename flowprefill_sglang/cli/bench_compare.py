"""``flowprefill bench compare A.json B.json``: what changed between two results of ``flowprefill bench``."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from flowprefill_sglang.bench.provenance import provenance
from flowprefill_sglang.bench.result_files import differences, read_result, remarks
from flowprefill_sglang.bench.result_ratios import compare, compare_max_goodput, comparison_table, in_words
from flowprefill_sglang.cli.results import check_folder, write_json
from flowprefill_sglang.errors import BadInput


def add_bench_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench compare``."""
    parser.add_argument("a", type=Path, metavar="A.json", help="a result of bench")
    parser.add_argument("b", type=Path, metavar="B.json", help="another, of the same load")
    parser.add_argument(
        "--anyway", action="store_true", help="compare even when loads or objectives differ, and say how they do"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios as JSON")


def run_bench_compare(namespace: argparse.Namespace) -> int:
    """0 when compared. Raises BadInput when the two are not about the same load."""
    check_folder("--json", namespace.json)
    a, b = read_result(namespace.a), read_result(namespace.b)
    unlike = differences(a, b)
    if unlike and not namespace.anyway:
        raise BadInput(f"not the same load, so there is nothing to compare (--anyway does it): {'; '.join(unlike)}")
    console = Console(soft_wrap=True)
    for difference in unlike:
        console.print(f"NOT THE SAME LOAD: {escape(difference)}", style="red")
    for remark in remarks(a, b):
        console.print(f"differs: {escape(remark)}", style="yellow")
    compared, max_goodput = compare(a, b), compare_max_goodput(a, b)
    console.print(comparison_table(compared, (escape(namespace.a.name), escape(namespace.b.name))))
    if max_goodput is not None:
        console.print(f"max goodput A/B: {in_words(max_goodput)}")
    repeats = [len(document["repeats"]) for document in (a, b)]
    if repeats == [1, 1]:
        console.print("one repeat each, so the spread is not known: --repeats 3 or more shows it", style="yellow")
    else:
        console.print(f"in brackets: least and most over all pairs of A's {repeats[0]} and B's {repeats[1]} repeats")
    if namespace.json is not None:
        document = {
            "a": namespace.a.name,
            "b": namespace.b.name,
            "differences": unlike,
            "spread": "least and most over all pairs of repeats",
            "compared": {
                name: {key: one.to_document() for key, one in quantities.items()}
                for name, quantities in compared.items()
            },
            "max_goodput": None if max_goodput is None else max_goodput.to_document(),
        }
        write_json(namespace.json, document | provenance(["flowprefill", *sys.argv[1:]], datetime.now(UTC)))
    return 0

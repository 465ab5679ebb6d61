"""Writes the rows of benchmark results as a table of a README, between two marks.

    python benchmarks/table.py benchmarks/results/decoding.json --readme decoding/README.md --mark "decoding results"

The marks are the lines `<!-- NAME -->` and `<!-- /NAME -->`. Columns that no row has are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sidtune.core.errors import DataError
from sidtune.metrics.report.readme_table import replace_table, signed

COLUMNS = {
    "name": "case",
    "baseline": "against",
    "ours_s": "ours, s",
    "baseline_s": "other, s",
    "ratio": "ratio",
    "flops_ratio": "FLOPs ratio",
    "quality": "NDCG@10 to reach",
    "ours_best": "our best NDCG@10",
    "equal": "equal",
    "possible": "work saved",
    "times_least": "ours over least work",
    "ours_peak_mb": "ours, peak MB",
    "baseline_peak_mb": "other, peak MB",
    "cache_prompt_mb": "prompt cache, MB",
    "cache_beams_mb": "beams' cache, MB",
    "cache_per_beam_mb": "copied per beam, MB",
    "levels": "codes per level",
    "collision_rate": "beyond one per code",
    "icr": "ICR",
    "cur_2": "CUR, 2 levels",
    "utilisation": "codes in use",
    "entropy": "entropy / max",
    "times_matrix": "ours, peak over the matrix",
    "relative_error": "error / variance",
    "neighbours_kept": "neighbours kept",
    "query_recall": "recall@10 by query codes",
    "seeds": "seeds",
    "ndcg": "NDCG@10",
    "ndcg_list": "NDCG of the list",
    "spread": "±",
    "difference": "minus residual_kmeans",
    "adjusted_p": "p",
}


def cell(name: str, value: Any) -> str:
    """One value as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in ("ratio", "flops_ratio"):
        return f"{value:.1f}×" if value >= 2 else f"{value:.2f}×"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(results: list[dict[str, Any]]) -> str:
    """GitHub table of all rows, and what they were measured on."""
    rows = [row for result in results for row in result["rows"]]
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = [
        "| " + " | ".join(COLUMNS[name] for name in names) + " |",
        "|" + "".join("---:|" if name not in ("name", "baseline", "equal") else "---|" for name in names),
    ]
    lines += ["| " + " | ".join(cell(name, row.get(name)) for name in names) + " |" for row in rows]
    machine = results[0]["machine"]
    measured = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items())
    return "\n".join([*lines, "", f"Measured with: {measured}."]) + "\n"


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of benchmarks, in the order of the rows")
    parser.add_argument("--readme", type=Path, required=True)
    parser.add_argument("--mark", required=True)
    options = parser.parse_args(argv)
    found = [json.loads(file.read_text("utf-8")) for file in options.results]
    made = signed({}, table(found), options.results[0])
    try:
        replace_table(options.readme, made, options.mark)
    except DataError as error:
        parser.error(str(error))
    return made


if __name__ == "__main__":
    print(main())

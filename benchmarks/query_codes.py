"""Queries and items in one code space, with and without core keywords, on the embedded shop: what is gained and what it costs.

    python benchmarks/query_codes.py [--quick] [--json FILE]

Per seed one ShopWorld, its split by time, and four tokenizers: TF-IDF vectors with and without fused keywords, codebooks
trained on items alone or on the training queries and the items. Test requests say how well the codes of a query find the
clicked items (`tokenizers/sids/query_recall.py`); the quality of the items' codes says what sharing the codebooks costs. It
compares methods, not speed: every value is a mean over seeds, and `..._sd` its standard deviation.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from sidtune.data_builders.mining.query_pairs import distinct_queries
from sidtune.data_builders.tables.store import load_folder
from sidtune.recipes.steps import build_data
from sidtune.tokenizers.encoders.base import make_encoder
from sidtune.tokenizers.keywords.mining import mine_pool
from sidtune.tokenizers.quantizers.base import make_quantizer
from sidtune.tokenizers.sids.learned import texts_of
from sidtune.tokenizers.sids.quality import sid_quality
from sidtune.tokenizers.sids.query_recall import query_item_recall, query_targets
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

SHOP = {"n_items": 2_000, "n_users": 1_000, "n_requests": 20_000}
QUICK = {"n_items": 400, "n_users": 150, "n_requests": 3_000}
QUANTIZER = {"head_sizes": [64, 32, 16], "tail_size": 32}
SMALL = {"head_sizes": [24, 12, 8], "tail_size": 8, "rotation_rounds": 5}
KS = (10, 100)
COLUMNS = {
    "encoder": "encoder",
    "codebooks": "codebooks of",
    "recall_10": "recall@10 by codes",
    "vectors_10": "by vectors",
    "recall_100": "recall@100 by codes",
    "vectors_100": "by vectors",
    "first_code": "first code shared",
    "first_chance": "by chance",
    "icr": "ICR",
    "relative_error": "error / variance",
}


def measure(folder: Path, options: dict[str, Any], seed: int) -> dict[tuple[str, str], dict[str, float]]:
    """The values of each of the four tokenizers on one data folder."""
    data = load_folder(folder)
    ids, texts, asked = (
        data.items["item_id"].to_pylist(),
        texts_of(data.items),
        distinct_queries(data.requests["train"]),
    )
    queries, rows, targets = query_targets(data.requests["test"], ids)
    made = {}
    for name in ("tfidf_svd", "keyword_fusion"):
        encoder: Any = make_encoder(name, {"seed": seed})
        if name == "keyword_fusion":
            encoder.use_pool(mine_pool(data))
        vectors = encoder.fit(texts).encode(texts)
        for trained, first in (("items", vectors[:0]), ("queries and items", encoder.encode(asked))):
            quantizer = make_quantizer("rq_opq", {**options, "seed": seed})
            codes = quantizer.fit_encode(np.concatenate([first, vectors]))[len(first) :]
            found = query_item_recall(
                encoder.encode(queries), vectors, quantizer, targets, KS, query_rows=rows, item_codes=codes
            )
            quality = sid_quality(SemanticIds(ids, codes, quantizer.level_sizes), vectors, quantizer, seed=seed)
            made[name, trained] = {
                **{f"recall_{k}": found.recall[k] for k in KS},
                **{f"vectors_{k}": found.vector_recall[k] for k in KS},
                "first_code": found.prefix_share[0],
                "first_chance": found.prefix_chance[0],
                "icr": quality.icr,
                "relative_error": quality.relative_error,
            }
    return made


def table(rows: list[dict[str, Any]]) -> str:
    """GitHub table: mean, and the standard deviation in brackets."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    for row in rows:
        cells = [f"`{row['encoder']}`", row["codebooks"]]
        cells += [f"{row[key]:.1%} ({100 * row[f'{key}_sd']:.1f})" for key in list(COLUMNS)[2:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shop and two seeds, seconds")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    shop, quantizer, seeds = (QUICK, SMALL, (0, 1)) if options.quick else (SHOP, QUANTIZER, (0, 1, 2))
    values: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
            build_data.main(build_data.Arguments(f"{scratch}/data", options=shop, seed=seed))
            for key, measured in measure(Path(scratch) / "data", quantizer, seed).items():
                values[key].append(measured)
    rows = []
    for (encoder, trained), measured in values.items():
        row: dict[str, Any] = {"name": f"{encoder}, {trained}", "encoder": encoder, "codebooks": trained}
        for key in measured[0]:
            column = [one[key] for one in measured]
            row |= {key: float(np.mean(column)), f"{key}_sd": float(np.std(column, ddof=1))}
        rows.append(row)
    print(table(rows))
    if options.json:
        machine = {"machine": platform.machine(), "python": platform.python_version(), "seeds": list(seeds)}
        options.json.write_text(json.dumps({"machine": machine, "shop": shop, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

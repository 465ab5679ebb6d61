"""Impressions collated in batches of 1,024, against `datasets` with a torch DataLoader on the same rows.

    python benchmarks/impressions.py [--quick] [--json FILE]

10 numeric and 5 categorical features and one history of 50 events, 20 candidates a request, rows in an order drawn at random. The
rival holds the same arrays flat, as a `Dataset` in torch format would be written by hand: histories stand once for a request there
too, and are looked up. Batches are compared first. The least work is the gathers alone, from arrays that are laid out for it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from sidtune.core.ragged import Ragged
from sidtune.data_builders.impressions.features import Feature
from sidtune.data_builders.impressions.table import Impressions

BATCH, PAGE, PAST = 1024, 20, 50


def table(requests: int, seed: int = 0) -> Impressions:
    draw = np.random.default_rng(seed)
    items, users, rows = 5000, 2000, requests * PAGE
    features, columns = [], {}
    for n in range(10):
        scope = ("item", "user", "request", "impression")[n % 4]
        size = {"item": items, "user": users, "request": requests, "impression": rows}[scope]
        features.append(Feature(f"n{n}", "numeric", scope))
        columns[f"n{n}"] = draw.random(size, np.float32)
    for n in range(5):
        scope = ("item", "user", "request", "item", "impression")[n]
        size = {"item": items, "user": users, "request": requests, "impression": rows}[scope]
        features.append(Feature(f"c{n}", "categorical", scope, 100))
        columns[f"c{n}"] = draw.integers(0, 100, size).astype(np.int32)
    features.append(Feature("history", "sequence", "request", items, most=PAST))
    lengths = draw.integers(PAST // 2, PAST * 2, requests)
    columns["history"] = Ragged(np.concatenate([[0], np.cumsum(lengths)]), draw.integers(0, items, int(lengths.sum())))
    return Impressions(
        pa.array([str(n) for n in range(requests)]), pa.array([str(n) for n in range(users)]),
        pa.array([str(n) for n in range(items)]), draw.integers(0, users, requests), np.arange(requests),
        np.arange(requests + 1) * PAGE, draw.integers(0, items, rows), np.tile(np.arange(PAGE, dtype=np.int32), requests),
        np.full(rows, np.nan, np.float32), {"click": (draw.random(rows) < 0.1).astype(np.float32)}, tuple(features), columns,
    )  # fmt: skip


def by_hand(one: Impressions) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """Flat columns of every impression, and the padded histories of the requests."""
    at = {"impression": np.arange(len(one)), "request": one.request_row, "item": one.item_row}
    at["user"] = one.user_row[one.request_row]
    flat = {f.name: one.columns[f.name][at[f.scope]] for f in one.features if f.kind != "sequence"}
    history, lengths = one.columns["history"], np.minimum(one.columns["history"].lengths, PAST)
    padded = np.zeros((len(lengths), PAST), np.int64)
    for row, length in enumerate(lengths):
        padded[row, :length] = history[row][-length:]
    flat |= {"request": one.request_row, "click": one.labels["click"]}
    return Dataset.from_dict(flat).with_format("torch"), padded, lengths


def theirs(data: Dataset, padded: np.ndarray, lengths: np.ndarray, order: np.ndarray, one: Impressions):
    """As a hand-written collator does it: a DataLoader's batches of the data set, histories looked up."""
    numeric = [f.name for f in one.of_kind("numeric")]
    coded = [f.name for f in one.of_kind("categorical")]
    past = torch.from_numpy(padded)
    for start in range(0, len(order), BATCH):
        rows = data[order[start : start + BATCH].tolist()]
        asked, own = torch.unique(rows["request"], return_inverse=True)
        yield {
            "numeric": torch.stack([rows[name] for name in numeric], 1),
            "categorical": torch.stack([rows[name] for name in coded], 1).long() + 1,
            "history": past[asked],
            "request": own,
            "label_click": rows["click"],
        }


def ours(one: Impressions, order: np.ndarray):
    for start in range(0, len(order), BATCH):
        yield {name: torch.from_numpy(value) for name, value in one.batch(order[start : start + BATCH]).items()}


def seconds(batches) -> float:
    begin = time.process_time()
    for _ in batches:
        pass
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    one = table(2_000 if options.quick else 20_000)
    order = np.random.default_rng(1).permutation(len(one))
    data = by_hand(one)
    few = order[: 8 * BATCH]
    equal = all(
        torch.equal(a[name], b[name]) if name != "history" else torch.equal(a[name], b[name][:, : a[name].shape[1]])
        for a, b in zip(ours(one, few), theirs(*data, few, one), strict=True)
        for name in ("numeric", "categorical", "history", "request", "label_click")
    )
    times = {"ours": [], "theirs": []}
    for _ in range(5):  # in turn, so that a busy machine hits both
        times["ours"].append(seconds(ours(one, order)))
        times["theirs"].append(seconds(theirs(*data, order, one)))
    mine, rival = min(times["ours"]), min(times["theirs"])
    row = {
        "name": f"{len(one):,} impressions in batches of {BATCH:,}",
        "baseline": "datasets, torch format, collated by hand",
        "ours_s": mine, "baseline_s": rival, "ratio": rival / mine, "equal": equal, "rows_per_second": round(len(one) / mine),
    }  # fmt: skip
    print(f"{row['rows_per_second']:,} rows/s of one core, {row['ratio']:.1f} times the other; batches equal: {equal}")
    if options.json:
        machine = {
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "torch_threads": 1,
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps({"machine": machine, "rows": [row]}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""Small sources in the layouts of the readers, made here; tests change or damage them."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any


def lines(path: Path, rows: list[Any]) -> None:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )


def office(folder: Path, rows: dict[str, list[tuple[str, list[int], int]]], items: dict | str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    catalogue = {str(n): {"title": f"t{n}", "description": "['d']", "brand": "", "categories": ""} for n in range(9)}
    text = items if isinstance(items, str) else json.dumps(catalogue | (items or {}))
    (folder / "X.item.json").write_text(text, encoding="utf-8")
    for part, table in rows.items():
        with (folder / f"X.{part}.csv").open("w", newline="", encoding="utf-8") as stream:
            out = csv.writer(stream)
            out.writerow(["user_id", "item_title", "history_item_id", "item_id"])
            out.writerows([user, f"title &amp; {item}", str(window), item] for user, window, item in table)
    return folder


def letter(folder: Path, sequences: Any, index: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "X.inter.json").write_text(json.dumps(sequences))
    if index is not None:
        (folder / "X.index.json").write_text(json.dumps(index))
    return folder


def qrels(folder: Path, train: str, test: str, queries: str = "red shoe\nblue hat\n") -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in (("train.qrels", train), ("test.qrels", test), ("query_text.txt", queries)):
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    return folder


PRODUCT = "\t".join(["{}", "name\x18{}", "b", "brand", "1", "c1", "2", "", "3", "c3", "4", "c4", "s"])


def jd(folder: Path, users: list[str], products: list[str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    lines(folder / "release_data.txt", users)
    lines(folder / "product_data.txt", products or [PRODUCT.format(n, n) for n in range(6)])
    return folder


def kuai(folder: Path, **change: list) -> Path:
    folder.mkdir(exist_ok=True)
    key = {"user_id": 1, "session_id": 7, "time_index": 50, "query": "hat", "split": "train"}
    seen = {"search_entrance": "mall", "recently_clicked_item_ids": [3, 4], "recently_purchased_item_ids": [4]}
    tables = {
        "users": [
            {"user_id": 1, "gender": "F", "age_bucket": "UNKNOWN", "fre_city": "Ulm"},
            {"user_id": 1},
            {"user_id": 2},
        ],
        "items": [
            {"item_id": n, "item_title": f"<b>item</b> {n}", "brand_name": "UNKNOWN", "category_level1_name": "c"}
            for n in (1, 2, 2, 3, 4)
        ],
        "recall": [
            {**key, "impressed_item_ids": [2, 1, 2, 9], "clicked_item_ids": [1, 9], "purchased_item_ids": [5]},
            {**key, "impressed_item_ids": [1], "clicked_item_ids": [], "purchased_item_ids": []},
            {**key, "user_id": 2, "time_index": 40, "query": "", "impressed_item_ids": [3]},
        ],
        "rank": [
            {**key, **seen, "target_item_id": 1, "target_item_price": 3.0, "is_clicked": 1, "is_purchased": 0},
            {
                **key,
                **seen,
                "time_index": 90,
                "split": "val",
                "target_item_id": 4,
                "target_item_price": 8,
                "is_clicked": 0,
            },
            {
                **key,
                **seen,
                "time_index": 90,
                "split": "val",
                "target_item_id": 1,
                "target_item_price": 2.5,
                "is_purchased": 1,
            },
        ],
    }
    for name, rows in (tables | change).items():
        lines(folder / f"{name}.jsonl", rows)
    return folder

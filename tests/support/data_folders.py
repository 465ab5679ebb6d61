"""A small sound shop, as rows, as a hand-made folder and as a built data folder; tests break one thing at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidtune.core.errors import DataError
from sidtune.core.folders import write_folder
from sidtune.data_builders.readers.own import read
from sidtune.data_builders.tables.schema import Tables, table_from_rows
from sidtune.data_builders.tables.splits import apply_split, item_statistics, training_cut
from sidtune.data_builders.tables.store import save_tables, split_names
from sidtune.data_builders.tables.validate import validate_folder

Rows = dict[str, list[dict[str, Any]]]


def sound_rows() -> Rows:
    """Four tables: 4 items, 3 users, 12 requests at times 10, 20, ..., one event for each."""
    items = [
        {
            "item_id": f"i{n}",
            "title": f"item number {n}",
            "brand": "Acme" if n % 2 else None,
            "category": ["tools", f"kind {n}"],
            "attributes": [{"name": "colour", "value": "red"}],
            "price": 1.5 * n,
            "exposures": 10,
            "clicks": n,
        }
        for n in range(4)
    ]
    users = [{"user_id": f"u{n}", "profile": [{"name": "place", "value": "Ulm"}]} for n in range(3)]
    requests, events = [], []
    for n in range(12):
        shown = [
            {"item_id": f"i{(n + k) % 4}", "position": k, "click": int(k == 0), "like": None, "order": 0, "dwell": 2.5}
            for k in range(2)
        ]
        requests.append(
            {
                "request_id": f"r{n}",
                "user_id": f"u{n % 3}",
                "time": 10 * (n + 1),
                "query": f"query {n % 5}" if n % 3 else None,
                "context": [{"name": "place", "value": "Köln"}],
                "candidates": shown,
            }
        )
        events.append(
            {
                "user_id": f"u{n % 3}",
                "item_id": f"i{n % 4}",
                "time": 10 * (n + 1) + 1,
                "action": "click",
                "query": None,
                "request_id": f"r{n}",
            }
        )
    return {"items": items, "users": users, "requests": requests, "events": events}


def tables_of(rows: Rows) -> Tables:
    return Tables(**{name: table_from_rows(name, rows[name]) for name in ("items", "users", "requests", "events")})


def write_jsonl(folder: Path, rows: Rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in table]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def write_parquet(folder: Path, rows: Rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in rows:
        pq.write_table(table_from_rows(name, rows[name]), folder / f"{name}.parquet")
    return folder


def build(source: str | Path, output: Path, **split: Any) -> Path:
    """The whole way of a hand-made folder into a data folder."""
    tables, record = apply_split(read(str(source)), **split)
    cut = training_cut(tables.requests, split_names(tables), record)
    tables.items = item_statistics(tables.items, tables.requests, tables.events, cut)
    with write_folder(output) as scratch:
        save_tables(tables, scratch, record, {"reader": "sidtune", "statistics_until": record["train_until"]})
    return output


def changed(rows: Rows, table: str, place: int, **values: Any) -> Rows:
    """A copy with values changed in one row; a `None` key deletion is written as `...`."""
    made = copy.deepcopy(rows)
    for key, value in values.items():
        if value is ...:
            made[table][place].pop(key, None)
        else:
            made[table][place][key] = value
    return made


def assert_refused(source: Path, tmp_path: Path, place: str, fix: str) -> None:
    """Report and reader say the same; the output does not come to exist, not even in part."""
    before = sorted(path.name for path in tmp_path.iterdir())
    report = [str(problem) for problem in validate_folder(source)]
    (line,) = [text for text in report if place in text] or [f"missing in {report}"]
    assert place in line and fix in line, line
    assert line.endswith(".") and line.count("\n") == 0 and len(line) < 400
    with pytest.raises(DataError) as caught:
        build(source, tmp_path / "out")
    assert place in str(caught.value) and caught.value.__cause__ is None
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def corrupt(source: Path, file: str, how: Callable[[bytes], bytes]) -> None:
    """Changes the bytes of a file."""
    path = source / file
    path.write_bytes(how(path.read_bytes()))


def swap_column(source: Path, file: str, column: str, array: pa.Array | None, new_name: str | None = None) -> None:
    """Replaces (or, with None, removes) a column of a parquet file."""
    table = pq.read_table(source / file)
    place = table.schema.get_field_index(column)
    table = table.remove_column(place)
    if array is not None:
        table = table.add_column(place, new_name or column, array)
    pq.write_table(table, source / file)

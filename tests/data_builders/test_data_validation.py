"""Malformed input: each fault ends in one clear sentence that names file, place and remedy, and nothing is written."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_folders import (
    assert_refused,
    build,
    corrupt,
    sound_rows,
    swap_column,
    tables_of,
    write_jsonl,
    write_parquet,
)
from malformed_tables import CONTENTS, NAN, TYPES, candidate, row

from sidtune.core.errors import DataError
from sidtune.data_builders.tables.schema import table_from_columns, table_from_rows
from sidtune.data_builders.tables.store import load_folder
from sidtune.data_builders.tables.validate import check_folder, check_tables, validate_folder, validate_tables


def test_the_sound_shop_has_no_problems(tmp_path):
    assert validate_folder(write_jsonl(tmp_path / "a", sound_rows())) == []
    assert validate_folder(write_parquet(tmp_path / "b", sound_rows())) == []
    assert validate_tables(tables_of(sound_rows())) == []
    check_folder(build(tmp_path / "a", tmp_path / "out"))


@pytest.mark.parametrize("name", [*CONTENTS, *TYPES])
def test_malformed_contents(name, tmp_path):
    change, place, fix = (CONTENTS | TYPES)[name]
    assert_refused(write_jsonl(tmp_path / "in", change(sound_rows())), tmp_path, place, fix)


def test_all_problems_come_at_once(tmp_path):
    rows = sound_rows()
    for change in (
        row("items", 3, price=NAN),
        row("events", 4, item_id="i77"),
        row("requests", 0, time=-5),
        candidate(click=2),
    ):
        rows = change(rows)
    source = write_jsonl(tmp_path / "in", rows)
    corrupt(source, "users.jsonl", lambda b: b + b"{\n" + b'{"user_id": 3}\n')
    problems = validate_folder(source)
    assert [(p.where, p.row, p.column) for p in problems] == [
        ("users.jsonl", 3, None),
        ("users.jsonl", 4, "user_id"),
        ("events.jsonl", 4, "item_id"),
        ("items.jsonl", 3, "price"),
        ("requests.jsonl", 0, "time"),
        ("requests.jsonl", 3, "candidates.click"),
    ]
    with pytest.raises(DataError, match="The data has 6 problems"):
        check_folder(source)


def test_a_million_bad_rows_are_one_readable_report():
    count = 1_000_000
    rows = sound_rows()
    tables = tables_of(rows)
    tables.events = table_from_columns(
        "events",
        {
            "user_id": pa.array(["nobody"]).take(pa.array(np.zeros(count, np.int64))),
            "item_id": pa.array(["i1"]).take(pa.array(np.zeros(count, np.int64))),
            "time": np.full(count, -1),
            "action": pa.array(["buy"]).take(pa.array(np.zeros(count, np.int64))),
        },
        count,
    )
    problems = validate_tables(tables)
    assert len(problems) == 18 and sum("999995 more rows" in problem.what for problem in problems) == 3
    with pytest.raises(DataError) as caught:
        check_tables(tables)
    assert len(str(caught.value)) < 5000


def test_wide_types_are_taken_without_loss(tmp_path):
    rows = sound_rows()
    source = write_parquet(tmp_path / "in", rows)
    table = pq.read_table(source / "events.parquet")
    table = table.set_column(2, "time", table["time"].cast(pa.int32()))
    table = table.set_column(0, "user_id", table["user_id"].cast(pa.large_string()))
    table = table.set_column(3, "action", table["action"].combine_chunks().dictionary_encode())
    pq.write_table(table, source / "events.parquet")
    shown = pa.array(
        [
            [{"position": c["position"], "item_id": c["item_id"], "click": bool(c["click"])} for c in r["candidates"]]
            for r in rows["requests"]
        ]
    )
    swap_column(source, "requests.parquet", "candidates", shown.cast(pa.large_list(shown.type.value_type)))
    folder = load_folder(build(source, tmp_path / "out"))
    assert folder.events.equals(table_from_rows("events", rows["events"]))
    first = folder.requests["train"]["candidates"][0].as_py()
    assert first[0] == {"item_id": "i0", "position": 0, "click": 1, "like": None, "order": None, "dwell": None}

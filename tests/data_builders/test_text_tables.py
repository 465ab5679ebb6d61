"""Tables that are text: CSV of one's own, CSV and JSON through the reader `hub`; and all problems of a folder at once."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from data_folders import Rows, assert_refused, changed, sound_rows, write_jsonl

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.readers.own import read
from sidtune.data_builders.registry import READERS
from sidtune.data_builders.tables.validate import validate_folder

WORDS = ["NA", "None", "null", "nan", "N/A", "", "007", "2020-01-01", "true", "1e5", "-"]


def write_csv(folder: Path, rows: Rows) -> Path:
    """Lists and objects as JSON, null as an empty cell."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in rows.items():
        header = list(dict.fromkeys(key for row in table for key in row))
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            out = csv.writer(stream)
            out.writerow(header)
            for row in table:
                cells = [row.get(key) for key in header]
                out.writerow(["" if c is None else json.dumps(c) if isinstance(c, list) else c for c in cells])
    return folder


def test_csv_and_json_lines_give_the_same_tables(tmp_path):
    one, two = (read(str(write(tmp_path / write.__name__, sound_rows()))) for write in (write_csv, write_jsonl))
    for name in ("items", "users", "requests", "events"):
        assert getattr(one, name).equals(getattr(two, name)), name


def test_csv_cells_are_what_their_column_wants(tmp_path):
    rows: Rows = {
        "items": [{"item_id": f"0{n}", "title": word, "price": "1.50"} for n, word in enumerate(WORDS)],
        "events": [{"user_id": "0", "item_id": "00", "time": str(n), "action": "order"} for n in range(3)],
    }
    tables = read(str(write_csv(tmp_path / "in", rows)))
    assert tables.items["title"].to_pylist() == [word or None for word in WORDS]
    assert tables.items["item_id"][7].as_py() == "07" and tables.items["price"].to_pylist() == [1.5] * len(WORDS)


CELLS = [
    ("items", 2, {"price": "cheap"}, "column 'price': has \"cheap\" where a number", "write a number or leave"),
    ("events", 1, {"time": "12.5"}, "column 'time': has \"12.5\" where an integer of 64", "write an integer"),
    ("items", 0, {"category": "tools"}, "column 'category': has \"tools\" where a list", "leave the cell empty"),
    ("requests", 4, {"candidates": '[{"item": "i1"}]'}, "column 'candidates': has", "write a list"),
    ("events", 0, {"item_id": "i9"}, "column 'item_id': unknown item 'i9'", "add it to items.csv"),
]


@pytest.mark.parametrize("table, row, change, place, fix", CELLS)
def test_csv_has_the_checks_of_the_other_files(table, row, change, place, fix, tmp_path):
    source = write_csv(tmp_path / "in", changed(sound_rows(), table, row, **change))
    assert_refused(source, tmp_path, f"{table}.csv, row {row}, {place}", fix)


def test_a_strange_column_of_a_csv_file_is_named(tmp_path):
    source = write_csv(tmp_path / "in", changed(sound_rows(), "items", 1, colour="red"))
    place = "items.csv, column 'colour': the column is not part of the schema"
    assert_refused(source, tmp_path, place, "rename or remove")


def test_damaged_csv(tmp_path):
    folder = write_csv(tmp_path / "in", sound_rows())
    (folder / "users.csv").write_text("user_id,profile\nu0\nu1,,\nu2,\n")
    (folder / "items.csv").write_bytes(b'item_id,title\ni0,"open\n')
    lines = [str(problem) for problem in validate_folder(folder)]
    assert len(lines) == 3 and lines[0].startswith("items.csv: the file is no CSV (unexpected end of data)")
    assert (
        lines[1].startswith("users.csv, row 0: the row has 1 fields, the header 2")
        and ", row 1: the row has 3" in lines[2]
    )


def test_a_missing_file_says_what_is_there(tmp_path):
    folder = write_csv(tmp_path / "in", sound_rows())
    (folder / "items.csv").rename(folder / "catalogue.tsv")
    place = f"items.parquet: the file is missing in {folder}, which holds catalogue.tsv, events.csv, requests.csv, users.csv"
    assert_refused(folder, tmp_path, place, "add items.parquet or items.jsonl or items.csv")


def test_a_wrong_type_hides_nothing_else(tmp_path):
    """Each file has a column of a wrong type and a wrong content elsewhere; ids first, and nothing that only follows."""
    rows = changed(sound_rows(), "items", 0, price="cheap", clicks=11)
    rows = changed(rows, "items", 1, item_id=5)
    rows = changed(rows, "events", 2, action=3, time=-1, request_id=None)
    rows = changed(rows, "events", 3, item_id="i77")  # items have an unread id, so nobody knows
    rows = changed(rows, "events", 4, user_id="u77", request_id=None)
    rows = changed(rows, "requests", 1, query=7)
    rows = changed(rows, "requests", 11, user_id="u78")
    rows = changed(rows, "events", 11, request_id=None)
    rows = changed(rows, "requests", 5, request_id="r4")
    found = [(p.where, p.row, p.column) for p in validate_folder(write_jsonl(tmp_path / "in", rows))]
    assert found == [
        ("items.jsonl", 1, "item_id"),
        ("requests.jsonl", 11, "user_id"),
        ("requests.jsonl", 5, "request_id"),
        ("events.jsonl", 4, "user_id"),
        ("events.jsonl", 5, "request_id"),
        ("items.jsonl", 0, "price"),
        ("events.jsonl", 2, "action"),
        ("requests.jsonl", 1, "query"),
        ("items.jsonl", 0, "clicks"),
        ("events.jsonl", 2, "time"),
    ]


# -- hub --------------------------------------------------------------------------------------------------------------


def hub(folder: Path, items: dict[str, Any], events: dict[str, Any] | None = None):
    options = {"items": {"data_files": "items.*", **items}, "cache_dir": str(folder / "cache")}
    return READERS.get("hub")(str(folder), **options, **({"events": events} if events else {}))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "tsv"])
def test_hub_keeps_ids_and_texts_of_text_files(kind, tmp_path):
    rows = [{"asin": f"{n:04d}", "name": word or None, "junk": n} for n, word in enumerate(WORDS)]
    path = tmp_path / f"items.{kind}"
    if kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            csv.writer(stream, delimiter="," if kind == "csv" else "\t").writerows(
                [["asin", "name", "junk"], *([row[key] or "" for key in row] for row in rows)]
            )
    else:
        text = json.dumps(rows, indent=1) if kind == "json" else "".join(json.dumps(row) + "\r\n" for row in rows)
        path.write_text(text, encoding="utf-8-sig")
    tables = hub(tmp_path, {"columns": {"item_id": "asin", "title": "name"}})
    assert tables.items["item_id"].to_pylist() == [row["asin"] for row in rows]
    assert tables.items["title"].to_pylist() == [row["name"] for row in rows]
    assert f"Columns of {tmp_path} (items) that are not used: junk." in tables.notes


def test_hub_drops_reaches_into_flattens_and_scales(tmp_path):
    item = {
        "id": 7,
        "title": ["red", None, "shoe"],
        "description": ["one", "two"],
        "more": {"brand": "B", "cents": 1250},
    }
    (tmp_path / "items.jsonl").write_text(json.dumps(item) + "\n" + json.dumps({"id": "08", "title": "plain"}) + "\n")
    stamps = [1_588_615_855_000, 1_588_615_855_999, 1_588_615_856_001]
    (tmp_path / "log.csv").write_text("who,what,ms\n" + "".join(f"0{n},08,{ms}\n" for n, ms in enumerate(stamps)))
    columns = {"item_id": "id", "description": None, "brand": "more.brand", "price": "more.cents"}
    log = {
        "data_files": "log.csv",
        "columns": {"user_id": "who", "item_id": "what", "time": "ms"},
        "scale": {"time": 0.001},
        "constants": {"action": "order"},
    }
    tables = hub(tmp_path, {"columns": columns, "flatten": ["title"], "scale": {"price": 0.01}}, log)
    assert [(r["item_id"], r["title"], r["description"], r["brand"], r["price"]) for r in tables.items.to_pylist()] == [
        ("7", "red shoe", None, "B", 12.5),
        ("08", "plain", None, None, None),
    ]
    assert tables.events["time"].to_pylist() == [ms // 1000 for ms in stamps]
    assert tables.events["user_id"].to_pylist() == ["00", "01", "02"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"columns": {"title": 5}}, "'columns' must be"),
        ({"columns": {"title": ["x"]}}, "'columns' must be"),
        ({"scale": {"time": "0.001"}}, "'scale' must be"),
        ({"scale": {"title": 2.0}}, "'scale' takes numeric columns and factors above 0, got title: 2.0"),
        ({"scale": {"price": 0.0}}, "factors above 0, got price: 0.0"),
        ({"flatten": ["price"]}, "'flatten' makes one text of a list, but 'price' is no text"),
        ({"flatten": ["titel"]}, "no column 'titel' in our schema .did you mean 'title'"),
    ]
    for options, text in wrong:
        with pytest.raises(ConfigError, match=text):
            hub(tmp_path, options)


def test_hub_leaves_out_ids_of_requests_that_the_source_lacks(tmp_path):
    rows = sound_rows()
    write_jsonl(tmp_path, {"items": rows["items"], "events": rows["events"]})
    tables = hub(tmp_path, {"data_files": "items.jsonl"}, {"data_files": "events.jsonl"})
    made = set(tables.requests["request_id"].to_pylist())
    assert len(made) == 9 and set(tables.events["request_id"].to_pylist()) == made | {None}
    assert "The source has no requests, so the request ids of its events are left out." in tables.notes


def test_hub_tells_all_problems_of_its_files(tmp_path):
    (tmp_path / "items.csv").write_text("item_id,title,price\n01,a,cheap\n01,b,2\n,c,3\n")
    (tmp_path / "log.csv").write_text("user_id,item_id,time,action\nu,99,soon,order\nu,01,-5,order\nu,01\n")
    with pytest.raises(DataError) as caught:
        hub(tmp_path, {}, {"data_files": "log.csv"})
    text = str(caught.value)
    assert "The data has 7 problems" in text
    for part in ("row 2: the row has 2 fields", "the id '01' is a duplicate", "the item id is null or blank", "unknown item '99'",
                 'has "cheap" where a number', 'has "soon" where an integer', "the time -5 is negative"):  # fmt: skip
        assert part in text, part
    (tmp_path / "items.csv").unlink()
    (tmp_path / "items.jsonl").write_text('{"item_id": "1"}\n{"item_id": \n')
    with pytest.raises(DataError, match="items.jsonl is wrong in line 2, because it is no JSON"):
        hub(tmp_path, {})
    (tmp_path / "items.jsonl").write_text(
        '{"item_id": "1", "title": 5}\n{"item_id": "2", "title": "x", "price": 1}\n[]\n'
    )
    with pytest.raises(DataError, match="items.jsonl is wrong in line 3, because it must be a mapping, got .."):
        hub(tmp_path, {})
    (tmp_path / "items.jsonl").write_text('{"item_id": "1", "title": 5.5}\n{"item_id": "2", "title": ["x"]}\n')
    with pytest.raises(DataError, match="column 'title': the type is binary, expected a text"):
        hub(tmp_path, {})

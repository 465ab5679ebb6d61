"""Damaged files and changed data folders: one clear sentence each, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from data_folders import assert_refused, build, corrupt, sound_rows, swap_column, write_jsonl, write_parquet

from sidtune.core.errors import DataError
from sidtune.data_builders.tables.store import load_folder
from sidtune.data_builders.tables.validate import check_folder, validate_folder

FILES = {
    "truncated parquet": (
        "parquet",
        lambda s: corrupt(s, "items.parquet", lambda b: b[: len(b) // 2]),
        "items.parquet: the file is not readable parquet",
        "write it again",
    ),
    "empty parquet file": (
        "parquet",
        lambda s: corrupt(s, "events.parquet", lambda b: b""),
        "events.parquet: the file is not readable parquet",
        "truncated",
    ),
    "text named parquet": (
        "parquet",
        lambda s: corrupt(s, "users.parquet", lambda b: b"item_id,title\n1,2\n"),
        "users.parquet: the file is not readable parquet",
        "no parquet at all",
    ),
    "damaged page": (
        "parquet",
        lambda s: corrupt(s, "events.parquet", lambda b: b[:4] + b"\xff" * 60 + b[64:]),
        "events.parquet: the file is not readable parquet",
        "write it again",
    ),
    "missing catalogue": (
        "jsonl",
        lambda s: (s / "items.jsonl").unlink(),
        "items.parquet: the file is missing in",
        "add items.parquet or items.jsonl",
    ),
    "two files of one table": (
        "jsonl",
        lambda s: shutil.copy(s / "items.jsonl", s / "items.parquet"),
        "items.jsonl: the table also stands in items.parquet",
        "keep one",
    ),
    "no UTF-8": (
        "jsonl",
        lambda s: corrupt(s, "items.jsonl", lambda b: b.replace(b"item number 2", b"caf\xe9")),
        "items.jsonl, row 2: line 3 is not UTF-8 text (byte 0xe9",
        "convert the file to UTF-8",
    ),
    "broken JSON line": (
        "jsonl",
        lambda s: corrupt(s, "events.jsonl", lambda b: b + b'{"user_id": "u1", '),
        "events.jsonl, row 12: line 13 is not valid JSON",
        "correct or remove the line",
    ),
    "list instead of object": (
        "jsonl",
        lambda s: corrupt(s, "users.jsonl", lambda b: b"\n" + b + b"[1]\n"),
        "users.jsonl, row 3: line 5 is not an object but [1]",
        "write one {...} a line",
    ),
    "key twice": (
        "jsonl",
        lambda s: corrupt(s, "users.jsonl", lambda b: b + b'{"user_id": "a", "user_id": "b"}\n'),
        "users.jsonl, row 3: line 4 is not valid JSON (the key 'user_id' stands twice)",
        "correct",
    ),
    "half a surrogate": (
        "jsonl",
        lambda s: corrupt(s, "items.jsonl", lambda b: b.replace(b"item number 2", b"\\ud800")),
        "column 'title': line 3 has",
        "write a text",
    ),
    "missing column": (
        "parquet",
        lambda s: swap_column(s, "events.parquet", "action", None),
        "events.parquet, column 'action': the column is missing",
        "add it (a text)",
    ),
    "extra column": (
        "parquet",
        lambda s: swap_column(s, "items.parquet", "title", pa.array(["x"] * 4), "titles"),
        "items.parquet, column 'titles': the column is not part of the schema (did you mean 'title'?)",
        "rename or remove it",
    ),
    "text times": (
        "parquet",
        lambda s: swap_column(s, "events.parquet", "time", pa.array(["1"] * 12)),
        "events.parquet, column 'time': the type is string, expected an integer of 64 bits",
        "write the column as int64",
    ),
    "timestamps": (
        "parquet",
        lambda s: swap_column(s, "events.parquet", "time", pa.array([0] * 12, pa.timestamp("ms"))),
        "events.parquet, column 'time': the type is timestamp[ms], expected an integer",
        "int64",
    ),
    "float labels": (
        "parquet",
        lambda s: swap_column(s, "requests.parquet", "candidates", pa.array([[{"item_id": "i1", "click": 0.5}]] * 12)),
        "requests.parquet, column 'candidates.click': the type is double",
        "write the column as int8",
    ),
    "wrong nested field": (
        "parquet",
        lambda s: swap_column(s, "requests.parquet", "candidates", pa.array([[{"item": "i1"}]] * 12)),
        "requests.parquet, column 'candidates.item': the field is not part of the schema (did you mean",
        "rename it",
    ),
    "candidates as text": (
        "parquet",
        lambda s: swap_column(s, "requests.parquet", "candidates", pa.array(["i1"] * 12)),
        "requests.parquet, column 'candidates': the type is string, expected a list",
        "write the column as list",
    ),
    "overflowing count": (
        "parquet",
        lambda s: swap_column(s, "items.parquet", "clicks", pa.array([2**64 - 1] * 4, pa.uint64())),
        "items.parquet, column 'clicks': a value does not fit int64",
        "correct the value",
    ),
    "unknown split file": (
        "jsonl",
        lambda s: ((s / "requests").mkdir(), shutil.move(s / "requests.jsonl", s / "requests" / "trian.jsonl")),
        "requests/trian.jsonl: 'trian' is no split (did you mean 'train'?)",
        "name the files train",
    ),
    "no train requests": (
        "jsonl",
        lambda s: ((s / "requests").mkdir(), shutil.move(s / "requests.jsonl", s / "requests" / "test.jsonl")),
        "requests: there are no train requests",
        "add earlier requests",
    ),
    "stated end": (
        "jsonl",
        lambda s: (s / "meta.json").write_text('{"end": 115}'),
        "events.jsonl, row 11, column 'time': the time 121 lies after the stated end 115",
        "correct the time",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_malformed_files(name, tmp_path):
    kind, damage, place, fix = FILES[name]
    write = write_jsonl if kind == "jsonl" else write_parquet
    source = write(tmp_path / "in", sound_rows())
    damage(source)
    assert_refused(source, tmp_path, place, fix)


def edit_meta(folder: Path, **values) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | values))


BUILT = {
    "statistics of the future": (
        lambda f: edit_meta(f, statistics_until=115),
        "meta.json, column 'statistics_until': the item counts reach to 115, after the training time ends at 110",
        "before train_until",
    ),
    "train request too late": (
        lambda f: edit_meta(f, split={"kind": "global_time", "train_until": 100, "valid_until": 120}),
        "requests/train.parquet, row 9, column 'time': time 100 is outside of the split's time (the beginning to",
        "split the requests",
    ),
    "moments out of order": (
        lambda f: edit_meta(f, split={"kind": "global_time", "train_until": 110, "valid_until": 90}),
        "meta.json, column 'split': valid_until 90 lies before train_until 110",
        "put the two moments in order",
    ),
    "unknown kind": (
        lambda f: edit_meta(f, split={"kind": "random"}),
        "meta.json, column 'split': the split is {'kind': 'random'}",
        "name a kind out of global_time",
    ),
    "text as time": (
        lambda f: edit_meta(f, statistics_until="100"),
        "meta.json, column 'statistics_until': the value is '100'",
        "write an integer time or null",
    ),
    "event after the end": (
        lambda f: edit_meta(f, end=100),
        "events.parquet, row 9, column 'time': the time 101 lies after the stated end 100",
        "correct the time",
    ),
    "request in two splits": (
        lambda f: shutil.copy(f / "requests/valid.parquet", f / "requests/test.parquet"),
        "requests/test.parquet, row 0, column 'request_id': the id 'r10' occurs in requests/valid.parquet too",
        "keep a request in one split",
    ),
    "missing split": (
        lambda f: (f / "requests/valid.parquet").unlink(),
        "valid.parquet: the file is missing",
        "add valid.parquet",
    ),
    "missing optional column": (
        lambda f: swap_column(f, "items.parquet", "brand", None),
        "items.parquet, column 'brand': the column is missing",
        "add it (a text)",
    ),
    "broken meta": (
        lambda f: (f / "meta.json").write_text("{"),
        "meta.json: the file is not readable JSON",
        "build the data folder again",
    ),
    "meta is a list": (
        lambda f: (f / "meta.json").write_text("[]"),
        "meta.json: the file holds no JSON object",
        "build the data folder again",
    ),
}


@pytest.mark.parametrize("name", BUILT)
def test_built_folders_that_were_changed(name, tmp_path):
    damage, place, fix = BUILT[name]
    folder = build(write_jsonl(tmp_path / "in", sound_rows()), tmp_path / "out")
    assert validate_folder(folder) == []
    damage(folder)
    lines = [str(problem) for problem in validate_folder(folder)]
    assert any(place in line and fix in line for line in lines), lines
    with pytest.raises(DataError):
        check_folder(folder)


def test_loading_checks_files_and_schemas(tmp_path):
    folder = build(write_jsonl(tmp_path / "in", sound_rows()), tmp_path / "out")
    swap_column(folder, "items.parquet", "price", pa.array(["1"] * 4))
    (folder / "requests" / "test.parquet").unlink()
    (folder / "meta.json").unlink()
    with pytest.raises(DataError) as caught:
        load_folder(folder)
    text = str(caught.value)
    assert "The data has 3 problems" in text
    for part in (
        "items.parquet, column 'price'",
        "test.parquet: the file is missing",
        "meta.json: the file is missing",
    ):
        assert part in text
    with pytest.raises(DataError, match="does not exist or is a file"):
        load_folder(tmp_path / "nowhere")

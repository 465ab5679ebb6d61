"""Damaged files and changed data folders: one clear sentence each, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from data_folders import assert_refused, build, sound_rows, swap_column, write_jsonl, write_parquet
from malformed_tables import FILES

from sidtune.core.errors import DataError
from sidtune.data_builders.tables.store import load_folder
from sidtune.data_builders.tables.validate import check_folder, validate_folder


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

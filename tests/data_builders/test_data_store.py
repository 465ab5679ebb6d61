"""Data folders: lossless round trip, readable by `datasets` as they stand, whole or not at all."""

from __future__ import annotations

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_folders import build, sound_rows, tables_of, write_jsonl, write_parquet

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import write_folder
from sidtune.data_builders.readers.own import read
from sidtune.data_builders.tables.schema import SCHEMAS, Tables
from sidtune.data_builders.tables.splits import apply_split
from sidtune.data_builders.tables.store import load_folder, save_tables

pytestmark = pytest.mark.medium


def test_round_trip_is_lossless(tmp_path):
    tables, split = apply_split(tables_of(sound_rows()))
    tables.counts["html_cleaned"] = 3
    tables.notes.append("A note.")
    with write_folder(tmp_path / "out") as scratch:
        save_tables(tables, scratch, split, {"reader": "test", "statistics_until": 110})
    loaded = load_folder(tmp_path / "out")
    for name in ("items", "users", "events"):
        assert getattr(loaded, name).equals(getattr(tables, name)), name
        assert getattr(loaded, name).schema.equals(SCHEMAS[name].arrow_schema, check_metadata=True)
    assert pa.concat_tables(loaded.requests.values()).equals(tables.requests)
    assert {part: table.num_rows for part, table in loaded.requests.items()} == {"train": 10, "valid": 1, "test": 1}
    meta = loaded.meta
    assert meta["split"] == {"kind": "global_time", "train_until": 110, "valid_until": 120}
    assert (meta["reader"], meta["statistics_until"], meta["end"]) == ("test", 110, 121)
    assert meta["counts"] == {"html_cleaned": 3} and meta["notes"] == ["A note."]
    assert meta["rows"]["requests_by_split"] == {"train": 10, "valid": 1, "test": 1}
    assert pq.ParquetFile(tmp_path / "out" / "items.parquet").metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("valid_share", [0.1, 0.0])
def test_load_dataset_reads_the_folder_as_it_stands(tmp_path, valid_share):
    from datasets import load_dataset

    out = build(write_jsonl(tmp_path / "in", sound_rows()), tmp_path / "out", valid_share=valid_share)
    files = {"train": str(out / "requests/train.parquet"), "test": str(out / "requests/test.parquet")}
    found = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "c"))
    assert found["train"].features == SCHEMAS["requests"]
    assert (found["train"].num_rows, found["test"].num_rows) == (10 + (valid_share == 0), 1)
    assert found["train"][1]["candidates"][0] == sound_rows()["requests"][1]["candidates"][0]
    for name in ("items", "users", "events"):
        found = load_dataset(str(out), name, split="train", cache_dir=str(tmp_path / "c"))
        assert found.features == SCHEMAS[name] and found.num_rows == len(sound_rows()[name])
    parts = load_dataset(str(out), "requests", cache_dir=str(tmp_path / "c"))
    assert {name: part.num_rows for name, part in parts.items()} == (
        {"train": 10, "validation": 1, "test": 1} if valid_share else {"train": 11, "test": 1}
    )
    assert load_folder(out).requests["valid"].num_rows == (valid_share > 0)


def test_jsonl_and_parquet_give_the_same_folder(tmp_path):
    one = load_folder(build(write_jsonl(tmp_path / "a", sound_rows()), tmp_path / "x"))
    two = load_folder(build(write_parquet(tmp_path / "b", sound_rows()), tmp_path / "y"))
    for name in ("items", "users", "events"):
        assert getattr(one, name).equals(getattr(two, name))
    assert one.requests == two.requests and one.meta == two.meta


def test_a_built_folder_can_be_read_again_with_its_split(tmp_path):
    out = build(write_jsonl(tmp_path / "in", sound_rows()), tmp_path / "out")
    tables = read(str(out))
    assert tables.split_of_request == ["train"] * 10 + ["valid", "test"]
    again = build(out, tmp_path / "again", kind="source")
    assert load_folder(again).meta["split"] == {"kind": "source", "train_until": 101, "valid_until": 111}
    assert load_folder(again).requests == load_folder(out).requests


def test_optional_tables_and_columns_may_be_absent(tmp_path):
    rows = sound_rows()
    del rows["users"]
    for event in rows["events"]:
        del event["query"]
    rows["requests"] = [
        {key: r[key] for key in ("request_id", "user_id", "time", "candidates")} for r in rows["requests"]
    ]
    tables = read(str(write_jsonl(tmp_path / "a", rows)))
    assert tables.users.to_pylist() == [{"user_id": f"u{n}", "profile": None} for n in range(3)]
    assert tables.counts == {"users_made_from_the_log": 3}
    assert tables.requests["query"].null_count == 12 and tables.events["query"].null_count == 12


def test_requests_are_made_from_events(tmp_path):
    rows = sound_rows()
    rows["events"] = [{**event, "request_id": None} for event in rows["events"]]
    del rows["requests"]
    source = write_jsonl(tmp_path / "a", rows)
    tables = read(str(source))
    assert tables.counts == {"requests_made_from_events": 9} and "has no requests" in tables.notes[0]
    assert tables.requests["request_id"].to_pylist() == [f"next-{n}" for n in range(3, 12)]
    assert tables.events["request_id"].to_pylist() == [None] * 3 + [f"next-{n}" for n in range(3, 12)]
    assert read(str(source), requests_from_events=False).requests.num_rows == 0
    loaded = load_folder(build(source, tmp_path / "out", kind="leave_one_out"))
    assert {part: table.num_rows for part, table in loaded.requests.items()} == {"train": 3, "valid": 3, "test": 3}
    # u0 acted at 11, 41, 71 and 101; training may see what lies before 71: i0 and i3 of u0.
    cut_counts = dict(zip(loaded.items["item_id"].to_pylist(), loaded.items["clicks"].to_pylist(), strict=True))
    assert cut_counts == {"i0": 2, "i1": 2, "i2": 1, "i3": 1} and loaded.meta["statistics_until"] is None


def test_nothing_half_written(tmp_path):
    tables, split = apply_split(tables_of(sound_rows()))
    wrong = {
        "no split yet": dataclasses.replace(tables, split_of_request=None),
        "12 requests but 1 split names": dataclasses.replace(tables, split_of_request=["train"]),
        "'users' has not the columns of its schema": dataclasses.replace(tables, users=tables.items),
    }
    for text, bad in wrong.items():
        with pytest.raises(DataError, match=text), write_folder(tmp_path / "out") as scratch:
            save_tables(bad, scratch, split, {})
    with pytest.raises(ValueError), write_folder(tmp_path / "out") as scratch:
        save_tables(tables, scratch, split, {"options": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_meta_is_plain_json(tmp_path):
    out = build(write_jsonl(tmp_path / "in", sound_rows()), tmp_path / "out")
    assert json.loads((out / "meta.json").read_text())["rows"]["events"] == 12


def test_reader_options_are_strict(tmp_path):
    source = str(write_jsonl(tmp_path / "in", sound_rows()))
    with pytest.raises(
        ConfigError, match="reader 'sidtune': unknown key 'request_from_events' \\(did you mean 'requests_from"
    ):
        read(source, request_from_events=True)
    with pytest.raises(ConfigError, match="must be true or false, got 'yes'"):
        read(source, requests_from_events="yes")
    assert isinstance(read(source), Tables)


@pytest.mark.slow
def test_a_million_interactions_fit_in_two_gigabytes(tmp_path):
    from sidtune.benchmarks import data_building

    shop = data_building.make_shop(1_000_000)
    (tmp_path / "parquet").mkdir()
    for name, table in shop.items():
        pq.write_table(table, tmp_path / "parquet" / f"{name}.parquet")
    result = data_building.whole_build(tmp_path / "parquet", tmp_path)
    assert result["events"] == 1_000_000 and result["peak_rss_mib"] < 2048 and result["rows_per_s"] > 0
    loaded = load_folder(tmp_path / "built-parquet")
    assert sum(table.num_rows for table in loaded.requests.values()) == 200_000


def test_the_benchmark_compares_equal_outputs():
    from sidtune.benchmarks import data_building

    rows = data_building.run(2_000, 1)
    assert [row["equal"] for row in rows] == [None, None, True, True, True]
    assert all(row["rows_per_s"] > 0 for row in rows)

"""Readers on small sources made here: edge cases that the real samples lack, and damaged sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data_folders import build, sound_rows, tables_of, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_folders import jd, kuai, letter, lines, office, qrels

from sidtune.core.errors import DataError, SidtuneError
from sidtune.data_builders.readers.letter import read_sid_index
from sidtune.data_builders.registry import READERS
from sidtune.data_builders.tables.history import History
from sidtune.data_builders.tables.schema import Tables
from sidtune.data_builders.tables.splits import apply_split
from sidtune.data_builders.tables.validate import validate_tables


def read(name: str, path: Path, **options: Any) -> Tables:
    tables = READERS.get(name)(str(path), **options)
    assert [str(p) for p in validate_tables(tables)] == []
    return tables


# -- amazon_sid -------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_amazon_sid_puts_windows_together(data, tmp_path):
    """Truth: a shop log of few items (so windows are full of repetitions), cut into windows as the publisher does."""
    window = data.draw(st.integers(1, 4))
    log = data.draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), min_size=8, max_size=30))
    first, second = sorted(data.draw(st.tuples(st.integers(0, 4), st.integers(5, 7))))
    past: dict[str, list[int]] = {}
    rows: dict[str, list] = {"valid": [], "test": []}
    for n, (user, item) in enumerate(log):
        mine = past.setdefault(user, [])
        if mine and n >= first:
            rows["valid" if n < second else "test"].append((user, mine[-window:], item))
        mine.append(item)
    if not rows["valid"] or not rows["test"]:
        return
    tables = read("amazon_sid", office(tmp_path / "in", rows), valid_share=0.3)
    assert tables.counts["histories_not_reproduced"] == 0 and tables.counts["windows_with_a_gap"] == 0
    items = tables.events["item_id"].to_pylist()
    history = History(tables.events)
    for user, found in zip(history.user_ids.to_pylist(), history.of_users(), strict=False):
        mine = [items[row] for row in found]
        assert [str(item) for item in past[user]][-len(mine) :] == mine
    _, split = apply_split(tables, "source")
    only_test = {user for user, _, _ in rows["test"]} - {user for user, _, _ in rows["valid"]}
    times = [e["time"] for e in tables.events.to_pylist() if e["user_id"] in only_test]
    assert all(time >= split["valid_until"] for time in times)


def test_amazon_sid_fills_gaps_and_adds_unknown_items(tmp_path):
    rows = {
        "valid": [("u", [1, 2], 3), ("u", [3, 4, 5], 6), ("v", [7], 8), ("u", [1], 77)],
        "test": [("u", [77], 88), ("w", [99], 1)],
    }
    tables = read("amazon_sid", office(tmp_path / "in", rows), valid_share=0.0)
    history = History(tables.events)
    items = np.array(tables.events["item_id"].to_pylist())
    found = dict(zip(history.user_ids.to_pylist(), (items[r].tolist() for r in history.of_users()), strict=True))
    assert found == {"u": ["1", "2", "3", "4", "5", "6", "1", "77", "88"], "v": ["7", "8"], "w": ["99", "1"]}
    assert tables.counts["windows_with_a_gap"] == 2 and tables.counts["windows_that_restart"] == 1
    assert tables.counts["histories_not_reproduced"] == 2, "windows shorter than what is known of the user"
    added = {row["item_id"]: row["title"] for row in tables.items.to_pylist()[9:]}
    assert added == {"77": "title & 77", "88": "title & 88", "99": None} and tables.counts["unknown_items_added"] == 3
    assert tables.split_of_request == ["train"] * 4 + ["test"] * 2


def test_amazon_sid_with_the_publishers_train_file(tmp_path):
    rows = {"train": [("u", [1], 2)], "valid": [("u", [1, 2], 3)], "test": [("u", [1, 2, 3], 4)]}
    folder = office(tmp_path / "in", rows, {"8": {"title": "<b>x</b>", "categories": "['a &gt; b', '']"}})
    tables = read("amazon_sid", folder)
    assert tables.split_of_request == ["train", "valid", "test"] and len(tables.notes) == 3
    last = tables.items.to_pylist()[8]
    assert (last["title"], last["category"], last["description"], last["brand"]) == ("x", ["a > b"], None, None)
    assert tables.counts["html_cleaned"] == 1 and tables.counts["empty_brands"] == 9


def test_amazon_sid_counts_items_that_stand_twice(tmp_path):
    text = '{"1": {"title": "first"}, "1": {"title": "second"}, "2": {"title": "b"}}'
    tables = read("amazon_sid", office(tmp_path / "in", {"valid": [("u", [1], 2)], "test": [("u", [1, 2], 1)]}, text))
    assert tables.items["title"].to_pylist() == ["first", "b"] and tables.counts["duplicate_items_dropped"] == 1


# -- letter -----------------------------------------------------------------------------------------------------------


def test_letter_small(tmp_path):
    index = {str(n): [f"<a_{n}>", "<b_0>"] for n in (0, 1, 2, 10)}
    tables = read("letter", letter(tmp_path / "in", {"u": [0, 1, 0, 2], "v": [2, 1], "w": []}, index), action="click")
    assert tables.items["item_id"].to_pylist() == ["0", "1", "2", "10"] and tables.counts["items_never_bought"] == 1
    assert tables.split_of_request == ["train", "valid", "test", "train"]
    assert set(tables.events["action"].to_pylist()) == {"click"} and tables.users.num_rows == 2
    assert read_sid_index(tmp_path / "in" / "X.index.json")["10"] == (10, 0)


# -- amazon_search ----------------------------------------------------------------------------------------------------


def test_amazon_search_small(tmp_path):
    train = "u_v_0 0 i1 1\nu_v_1 0 i1 1\nu_v_0 0 i2 1\nu_v_0 0 i2 1 \nw_1 0 i3 1\n"
    tables = read("amazon_search", qrels(tmp_path / "in", train, "w_0 0 i1 1\nw_1x_1 0 i2 1\n"))
    assert tables.counts["duplicate_lines_dropped"] == 1
    requests = tables.requests.to_pylist()
    shown = [(r["user_id"], r["query"], [c["item_id"] for c in r["candidates"]]) for r in requests]
    assert shown == [
        ("u_v", "red shoe", ["i1", "i2"]),
        ("u_v", "blue hat", ["i1"]),
        ("w", "blue hat", ["i3"]),
        ("w", "red shoe", ["i1"]),
        ("w_1x", "blue hat", ["i2"]),
    ]
    events = [(e["user_id"], e["item_id"], e["time"], e["request_id"]) for e in tables.events.to_pylist()]
    assert events[:3] == [("u_v", "i2", 0, "train-u_v_0"), ("u_v", "i1", 1, "train-u_v_1"), ("w", "i3", 2, "train-w_1")]
    assert [event[2] for event in events[3:]] == [4, 4]


# -- jdsearch ---------------------------------------------------------------------------------------------------------


def test_jdsearch_small(tmp_path):
    users = [
        # a search of two steps, a step without query, the same query an hour later, and a tie with the test query
        "q\x18t\t1_2_1\t3.0_0.0_1.0\tx\x18y_x\x18y_-1_x\x18y_z\t0_1_2_3_9\tCLICK_ORD_CART_FLW_CLICK\t0_5_5_4000_10_0",
        "q\t1\t0\t\t\t\t7",
    ]
    tables = read("jdsearch", jd(tmp_path / "in", users))
    requests = {r["request_id"]: r for r in tables.requests.to_pylist()}
    assert list(requests) == ["user-1-past-0", "user-1-past-3", "user-1-test", "user-2-test"]
    assert tables.split_of_request == ["train", "valid", "test", "test"]
    first = [(c["item_id"], c["click"], c["like"], c["order"]) for c in requests["user-1-past-0"]["candidates"]]
    assert first == [("0", 1, None, None), ("1", 1, None, 1)] and requests["user-1-past-0"]["query"] == "x y"
    assert [(c["item_id"], c["like"]) for c in requests["user-1-past-3"]["candidates"]] == [("3", 1)]
    test = [(c["item_id"], c["position"], c["click"], c["order"]) for c in requests["user-1-test"]["candidates"]]
    assert test == [("1", 0, 1, 1), ("2", 1, 0, 0)] and tables.counts["duplicate_candidates_dropped"] == 1
    assert tables.counts["requests_tied_with_the_split_dropped"] == 1 and tables.counts["unknown_items_added"] == 1
    assert tables.events["time"].to_pylist() == [0, 5, 10, 4010, 4020] and requests["user-2-test"]["time"] == 7
    assert tables.events["request_id"].to_pylist() == ["user-1-past-0"] * 2 + [None, "user-1-past-3", None]
    assert tables.items.to_pylist()[0]["title"] == "name 0" and tables.items["category"][0].as_py() == [
        "c1",
        "c3",
        "c4",
    ]
    apply_split(tables, "source")
    merged = read("jdsearch", tmp_path / "in", session_gap=10_000)
    assert "user-1-past-3" in merged.requests["request_id"].to_pylist(), "a step without query ends a search"


# -- kuaisearch -------------------------------------------------------------------------------------------------------


def test_kuaisearch_small(tmp_path):
    tables = read("kuaisearch", kuai(tmp_path / "in"))
    requests = tables.requests.to_pylist()
    assert [(r["request_id"], r["user_id"], r["time"], r["query"]) for r in requests] == [
        ("2-7-40", "2", 40, None),
        ("1-7-50", "1", 50, "hat"),
        ("1-7-90", "1", 90, "hat"),
    ]
    assert tables.split_of_request == ["train", "train", "valid"]
    assert [r["context"] for r in requests] == [
        None,
        [{"name": "entrance", "value": "mall"}],
        [{"name": "entrance", "value": "mall"}],
    ]
    shown = [[(c["item_id"], c["position"], c["click"], c["order"]) for c in r["candidates"]] for r in requests]
    assert shown == [
        [("3", 0, None, None)],
        [("2", 0, 0, 0), ("1", 1, 1, 0), ("9", 2, 1, 0)],
        [("4", 0, 0, None), ("1", 1, None, 1)],
    ]
    events = [(e["item_id"], e["time"], e["action"], e["request_id"]) for e in tables.events.to_pylist()]
    assert sorted(events[:3]) == [("3", 48, "click", None), ("4", 49, "click", None), ("4", 49, "order", None)]
    assert events[3:] == [("1", 50, "click", "1-7-50"), ("9", 50, "click", "1-7-50"), ("1", 90, "order", "1-7-90")]
    expected = {
        "duplicate_requests_dropped": 1,
        "requests_from_rank_only": 1,
        "purchased_items_not_shown": 1,
        "clicked_items_not_shown": 0,
        "duplicate_candidates_dropped": 1,
        "recent_lists_skipped": 1,
        "duplicate_items_dropped": 1,
        "duplicate_users_dropped": 1,
        "html_cleaned": 4,
        "unknown_items_added": 1,
        "unknown_users_added": 0,
    }
    assert {name: tables.counts[name] for name in expected} == expected
    items = {row["item_id"]: row for row in tables.items.to_pylist()}
    assert items["1"]["price"] == 2.5 and items["4"]["price"] == 8 and items["2"]["price"] is None
    assert (items["1"]["title"], items["1"]["brand"], items["1"]["category"]) == ("item 1", None, ["c"])
    assert tables.users["profile"][0].as_py() == [{"name": "gender", "value": "F"}, {"name": "city", "value": "Ulm"}]
    fewer = read("kuaisearch", tmp_path / "in", unknown="drop")
    assert [len(c) for c in fewer.requests["candidates"].to_pylist()] == [1, 2, 2]
    assert fewer.counts["candidates_of_unknown_items_dropped"] == 1 and fewer.counts["events_dropped"] == 1


# -- hub --------------------------------------------------------------------------------------------------------------


def test_hub_reads_what_we_wrote(tmp_path):
    out = build(write_jsonl(tmp_path / "in", sound_rows()), tmp_path / "out")
    tables = read("hub", out, cache_dir=str(tmp_path / "cache"))
    sound = tables_of(sound_rows())
    assert tables.split_of_request == ["train"] * 10 + ["valid", "test"]
    assert tables.requests.equals(sound.requests) and tables.events.equals(sound.events)


def test_hub_maps_foreign_columns(tmp_path):
    from datasets import Dataset, DatasetDict

    source = tmp_path / "shop"
    source.mkdir()
    lines(source / "products.jsonl", [{"asin": 10 + n, "product_title": f"t{n}", "stars": 4.5} for n in range(3)])
    reviews = {
        "reviewer": ["a", "a", "b", "b"],
        "asin": [10, 11, 10, 12],
        "ts": pa.array([1_500_000_000_999, 1_600_000_000_000] * 2, pa.timestamp("ms")).to_pylist(),
    }
    DatasetDict({"all": Dataset.from_dict(reviews)}).save_to_disk(str(tmp_path / "log"))
    options = {
        "items": {"data_files": "products.jsonl", "columns": {"item_id": "asin", "title": "product_title"}},
        "events": {
            "path": str(tmp_path / "log"),
            "split": "all",
            "columns": {"user_id": "reviewer", "item_id": "asin", "time": "ts"},
            "constants": {"action": "order"},
        },
        "cache_dir": str(tmp_path / "cache"),
    }
    tables = read("hub", source, **options)
    assert tables.items.to_pylist()[1]["item_id"] == "11" and tables.items["title"].to_pylist() == ["t0", "t1", "t2"]
    assert tables.events["time"].to_pylist() == [1_500_000_000, 1_600_000_000] * 2
    assert tables.users["user_id"].to_pylist() == ["a", "b"] and tables.counts["requests_made_from_events"] == 2
    assert tables.notes[0] == f"Columns of {source} (items) that are not used: stars."
    wrong: list[tuple[dict, str]] = [
        ({"items": {"columns": {"item": "asin"}}}, "there is no column 'item' in our schema \\(did you mean"),
        (
            {"items": {**options["items"], "columns": {"item_id": "azin"}}},
            "'azin' is not in the dataset \\(did you mean 'asin'",
        ),
        ({"items": {"data_file": "x"}}, "reader 'hub', items: unknown key 'data_file' \\(did you mean 'data_files'"),
        ({"items": None}, "the option 'items' is missing"),
        ({"items": {**options["items"], "splits": {"train": "x"}}}, "'splits' belongs to requests"),
        ({"items": {"data_files": "nothing.jsonl"}}, "The local dataset .* could not be loaded"),
        ({"events": {**options["events"], "columns": {"item_id": "asin"}}}, "column 'user_id': the column is missing"),
    ]
    for change, text in wrong:
        with pytest.raises(SidtuneError, match=text):
            read("hub", source, **(options | change))
    for path in ("./nowhere", "a/b/c", "/no/such/folder"):
        with pytest.raises(DataError, match="does not exist, and it is no Hugging Face id either"):
            READERS.get("hub")(path)

"""Readers of the real data sets against independent ways of reading the same files (needs SIDTUNE_DATA)."""

from __future__ import annotations

import ast
import csv
import functools
import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sidtune.data_builders.readers.letter import read_sid_index
from sidtune.data_builders.registry import READERS
from sidtune.data_builders.tables.history import History
from sidtune.data_builders.tables.schema import Tables
from sidtune.data_builders.tables.splits import apply_split, item_statistics, training_cut
from sidtune.data_builders.tables.store import split_names
from sidtune.data_builders.tables.validate import validate_tables

pytestmark = pytest.mark.medium


def histories(tables: Tables, max_len: int | None = None) -> list[list[str]]:
    """Item ids of the history of each request."""
    found = History(tables.events).before(tables.requests["user_id"], tables.requests["time"].to_numpy(), max_len)
    items = tables.events["item_id"].take(found.rows).to_pylist()
    return [items[a:b] for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]


def targets(tables: Tables) -> list[list[str]]:
    shown = tables.requests["candidates"].combine_chunks()
    items, offsets = shown.flatten().field("item_id").to_pylist(), shown.offsets.to_pylist()
    return [items[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


@functools.cache
def read(reader: str, folder: Path) -> Tables:
    """Tables of a source, read once for all tests; nobody changes them."""
    return READERS.get(reader)(str(folder))


@pytest.mark.parametrize(
    "reader, folder",
    [
        ("amazon_sid", "amazon_office"),
        ("letter", "instruments"),
        ("amazon_search", "amazon_search_cell_phones"),
        ("jdsearch", "jdsearch_sample"),
        ("kuaisearch", "kuaisearch_demo"),
    ],
)
def test_real_data_is_sound_and_does_not_leak(reader, folder, real_data):
    tables = read(reader, real_data / folder)
    assert validate_tables(tables) == []
    assert tables.notes and all(note.endswith(".") for note in tables.notes)
    tables, split = apply_split(tables, "source" if tables.split_of_request else "global_time")
    names = split_names(tables)
    cut = training_cut(tables.requests, names, split)
    history = History(tables.events)
    trainable = history.of_users(cut)
    test = tables.requests.filter(pa.array(names == "test"))
    owner = pc.list_parent_indices(test["candidates"].combine_chunks())
    answers = pc.list_flatten(test["candidates"].combine_chunks()).field("item_id")
    held_out = keys(test["user_id"].combine_chunks().take(owner), answers, test["time"].combine_chunks().take(owner))
    rows = tables.events.take(trainable.rows)
    assert len(rows) and len(held_out)
    assert not pc.any(pc.is_in(keys(rows["user_id"], rows["item_id"], rows["time"]), value_set=held_out)).as_py()
    counted = item_statistics(tables.items, tables.requests, tables.events, cut, "events")
    orders = pc.value_counts(rows["item_id"].filter(pc.equal(rows["action"], "order"))).to_pylist()
    found = zip(counted["item_id"].to_pylist(), counted["orders"].to_pylist(), strict=True)
    assert {item: n for item, n in found if n} == {row["values"]: row["counts"] for row in orders}


def keys(*columns):
    joined = pc.binary_join_element_wise(*(column.cast(pa.string()) for column in columns), "|")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def office_rows(folder, part):
    with (folder / f"Office_Products.{part}.csv").open(encoding="utf-8", newline="") as stream:
        return [
            (r["user_id"], [str(i) for i in ast.literal_eval(r["history_item_id"])], r["item_id"])
            for r in csv.DictReader(stream)
        ]


def test_amazon_office_reproduces_every_window(real_data):
    folder = real_data / "amazon_office"
    tables = read("amazon_sid", folder)
    rows = office_rows(folder, "valid") + office_rows(folder, "test")
    assert tables.requests["user_id"].to_pylist() == [user for user, _, _ in rows]
    assert targets(tables) == [[item] for _, _, item in rows]
    assert histories(tables, 10) == [window for _, window, _ in rows], "100 % of the published windows"
    full = histories(tables)
    assert all(len(window) == 10 or len(whole) == len(window) for whole, (_, window, _) in zip(full, rows, strict=True))
    assert tables.counts["histories_not_reproduced"] == tables.counts["windows_with_a_gap"] == 0
    assert tables.counts["html_cleaned"] == 65 and tables.counts["descriptions_not_a_list"] == 9
    assert [tables.split_of_request.count(part) for part in ("train", "valid", "test")] == [4379, 487, 4866]
    assert tables.items.num_rows == 3459 and tables.items["title"].null_count == 0


def test_amazon_office_training_sees_nothing_that_only_test_rows_show(real_data):
    folder = real_data / "amazon_office"
    tables, split = apply_split(read("amazon_sid", folder), "source")
    shown = defaultdict(Counter)
    for user, window, item in office_rows(folder, "valid"):
        shown[user] |= Counter(window)
        shown[user][item] += 1
    events = tables.events.to_pylist()
    known_users = set(shown)
    for event in events:
        if event["time"] < split["train_until"]:
            assert event["user_id"] in known_users and shown[event["user_id"]][event["item_id"]]
        if event["user_id"] not in known_users:
            assert event["time"] >= split["valid_until"]
    everything = READERS.get("amazon_sid")(str(folder), valid_share=0.0)
    assert apply_split(everything, "source")[1]["train_until"] == split["valid_until"]


def test_instruments_keeps_every_sequence(real_data):
    folder = real_data / "instruments"
    tables = read("letter", folder)
    sequences = json.loads((folder / "Instruments.inter.json").read_text())
    whole = History(tables.events).of_users(user_ids=list(sequences))
    items = tables.events["item_id"].take(whole.rows).to_pylist()
    assert items == [str(item) for sequence in sequences.values() for item in sequence]
    assert np.array_equal(whole.lengths, [len(sequence) for sequence in sequences.values()])
    names = np.array(tables.split_of_request)
    for part, place in (("test", -1), ("valid", -2)):
        chosen = tables.requests.filter(names == part)
        expected = {user: str(sequence[place]) for user, sequence in sequences.items()}
        found = [row[0]["item_id"] for row in chosen["candidates"].to_pylist()]
        assert dict(zip(chosen["user_id"].to_pylist(), found, strict=True)) == expected
    assert tables.requests.num_rows == 206_153 - 24_772 and tables.items["title"].null_count == 9922
    again, _ = apply_split(tables, "leave_one_out")
    assert again.split_of_request == tables.split_of_request


def test_published_sids_are_parsed(real_data):
    codes = read_sid_index(real_data / "instruments" / "Instruments.index.json")
    assert len(codes) == 9922 and codes["0"] == (128, 241, 146, 235) and {len(code) for code in codes.values()} == {4}
    office = read_sid_index(real_data / "amazon_office" / "Office_Products.index.json")
    assert len(office) == 3459 and office["0"] == (60, 159, 203)


def test_amazon_search_never_shows_an_answer_in_its_own_history(real_data):
    folder = real_data / "amazon_search_cell_phones"
    tables = read("amazon_search", folder)
    bought = defaultdict(set)
    with gzip.open(folder / "train.qrels.gz", "rt") as stream:
        for line in stream:
            key, _, item, _ = line.split()
            bought[key.rsplit("_", 1)[0]].add(item)
    found = histories(tables)
    for past, answers, user, part in zip(
        found, targets(tables), tables.requests["user_id"].to_pylist(), tables.split_of_request, strict=True
    ):
        assert not set(past) & set(answers) and set(past) <= bought[user] and len(past) == len(set(past))
        if part == "test":
            assert set(past) == bought[user]
    assert tables.split_of_request.count("train") == 114_177 and tables.split_of_request.count("test") == 665
    queries = gzip.decompress((folder / "query_text.txt.gz").read_bytes()).decode().splitlines()
    for n in (0, 5000, 114_800):
        request = tables.requests.slice(n, 1).to_pylist()[0]
        assert request["query"] == queries[int(request["request_id"].rsplit("_", 1)[1])]


def test_jdsearch_keeps_every_step(real_data):
    tables = read("jdsearch", real_data / "jdsearch_sample")
    path = real_data / "jdsearch_sample" / "user_behavior_data_sample.txt"
    lines = [line.split("\t") for line in path.read_text("utf-8").split("\n")[1:] if line]
    names = {"ORD": "order", "CART": "cart", "CLICK": "click", "FLW": "like"}
    steps = []
    for n, fields in enumerate(lines, 1):
        queries, items, types, gaps = (field.split("_") for field in fields[3:])
        now = 0
        for query, item, kind, gap in zip(queries, items, types, gaps, strict=False):
            now += int(gap)
            steps.append((f"user-{n}", item, now, names[kind], None if query == "-1" else query.replace("\x18", " ")))
        test = next(r for r in tables.requests.to_pylist() if r["request_id"] == f"user-{n}-test")
        assert test["time"] == now + int(gaps[-1]) and test["query"] == fields[0].replace("\x18", " ")
        assert [c["item_id"] for c in test["candidates"]] == fields[1].split("_")
        assert [c["position"] for c in test["candidates"]] == list(range(len(test["candidates"])))
        for candidate, label in zip(test["candidates"], map(float, fields[2].split("_")), strict=True):
            assert (candidate["click"], candidate["order"]) == (int(label >= 1), int(label == 3))
    columns = ("user_id", "item_id", "time", "action", "query")
    once = list(dict.fromkeys(steps))
    assert [tuple(row[c] for c in columns) for row in tables.events.to_pylist()] == once
    assert tables.counts["repeated_events_dropped"] == len(steps) - len(once) == 2
    past = {row["request_id"]: row for row in tables.requests.to_pylist()}
    for event in tables.events.to_pylist():
        if event["request_id"] is None:
            assert event["query"] is None
            continue
        request = past[event["request_id"]]
        assert request["query"] == event["query"] and request["time"] <= event["time"]
        (shown,) = [c for c in request["candidates"] if c["item_id"] == event["item_id"]]
        assert shown["order" if event["action"] == "order" else "click"] == 1
    assert Counter(tables.split_of_request) == {"train": 54, "valid": 2, "test": 3}
    assert tables.counts["unknown_items_added"] == 12


def test_kuaisearch_equals_a_plain_reading(real_data):
    folder = real_data / "kuaisearch_demo"
    tables = read("kuaisearch", folder)
    recall = [json.loads(line) for line in (folder / "recall.jsonl").read_text("utf-8").splitlines()]
    by_id = {row["request_id"]: row for row in tables.requests.to_pylist()}
    assert len(by_id) == len(recall) == 200
    logged = Counter()
    for line in recall:
        request = by_id[f"{line['user_id']}-{line['session_id']}-{line['time_index']}"]
        assert (request["query"], request["time"]) == (line["query"], line["time_index"])
        assert [c["item_id"] for c in request["candidates"]] == [str(i) for i in line["impressed_item_ids"]]
        for name, key in (("click", "clicked_item_ids"), ("order", "purchased_item_ids")):
            chosen = {str(i) for i in line[key]}
            assert {c["item_id"] for c in request["candidates"] if c[name]} == chosen
            logged[name] += len(chosen)
    tied = Counter(e["action"] for e in tables.events.to_pylist() if e["request_id"])
    assert tied == logged and tables.counts["events_from_recent_lists"] == 80
    first = next(row for row in tables.requests.to_pylist() if row["user_id"] == "1")
    assert first["context"] == [{"name": "entrance", "value": "mall"}]
    recent = next(h for h, r in zip(histories(tables), tables.requests.to_pylist(), strict=True) if r["user_id"] == "1")
    rank = json.loads((folder / "rank.jsonl").read_text("utf-8").split("\n")[0])
    lists = (rank["recently_clicked_item_ids"], rank["recently_purchased_item_ids"])
    assert [i for i in recent if recent] and Counter(recent) == Counter(str(i) for ids in lists for i in ids)
    assert recent[-1] == str(lists[0][-1]) and recent[-2] == str(lists[1][-1]), "orders come first within one second"
    assert tables.counts["unknown_items_added"] == 25_063 and tables.items.num_rows == 25_263
    prices = dict(zip(tables.items["item_id"].to_pylist(), tables.items["price"].to_pylist(), strict=True))
    assert prices[str(rank["target_item_id"])] == rank["target_item_price"]


def test_kuaisearch_can_drop_what_does_not_join(real_data):
    tables = READERS.get("kuaisearch")(str(real_data / "kuaisearch_demo"), unknown="drop")
    assert validate_tables(tables) == [] or tables.requests.num_rows == 0
    assert tables.items.num_rows == tables.users.num_rows == 200
    assert tables.counts["requests_dropped"] + tables.requests.num_rows == 200
    assert tables.counts["candidates_of_unknown_items_dropped"] == 25_428
    assert tables.counts["events_dropped"] + tables.events.num_rows == 682

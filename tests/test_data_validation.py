"""Malformed input: each fault ends in one clear sentence that names file, place and remedy, and nothing is written."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_folders import (
    Rows,
    assert_refused,
    build,
    changed,
    corrupt,
    sound_rows,
    swap_column,
    tables_of,
    write_jsonl,
    write_parquet,
)

from sidtune.core.errors import DataError
from sidtune.data_builders.tables.schema import table_from_columns, table_from_rows
from sidtune.data_builders.tables.store import load_folder
from sidtune.data_builders.tables.validate import check_folder, check_tables, validate_folder, validate_tables

NAN, INF = float("nan"), float("inf")


def candidate(n: int = 0, **values) -> Callable[[Rows], Rows]:
    """Changes candidate `n` of request 3."""

    def change(rows: Rows) -> Rows:
        made = copy.deepcopy(rows)
        made["requests"][3]["candidates"][n].update(values)
        return made

    return change


def row(table: str, place: int, **values) -> Callable[[Rows], Rows]:
    return lambda rows: changed(rows, table, place, **values)


def without(table: str) -> Callable[[Rows], Rows]:
    return lambda rows: {**rows, table: []}


# change, then what the report must say: file and place, what is wrong, what to do
CONTENTS = {
    "duplicate item id": (
        row("items", 2, item_id="i1"),
        "items.jsonl, row 2, column 'item_id': the id 'i1' is a duplicate",
        "keep one row per id",
    ),
    "duplicate user id": (
        row("users", 1, user_id="u0"),
        "users.jsonl, row 1, column 'user_id': the id 'u0' is a duplicate",
        "keep one row",
    ),
    "duplicate request id": (
        row("requests", 5, request_id="r1"),
        "requests.jsonl, row 5, column 'request_id': the id 'r1' is a duplicate",
        "keep one",
    ),
    "null item id": (
        row("items", 1, item_id=None),
        "items.jsonl, row 1, column 'item_id': the item id is null or blank",
        "name the item",
    ),
    "blank item id": (
        row("items", 1, item_id="  "),
        "items.jsonl, row 1, column 'item_id': the item id is null or blank",
        "remove the row",
    ),
    "no item ids at all": (
        lambda rows: {**rows, "items": [{"title": "x"}]},
        "items.jsonl, column 'item_id': the column is missing or empty",
        "give every row",
    ),
    "empty catalogue": (without("items"), "items.jsonl: the catalogue is empty", "add at least one item"),
    "NaN price": (
        row("items", 3, price=NAN),
        "items.jsonl, row 3, column 'price': the value is nan",
        "write a finite number",
    ),
    "infinite price": (
        row("items", 3, price=INF),
        "items.jsonl, row 3, column 'price': the value is inf",
        "null if unknown",
    ),
    "negative price": (
        row("items", 3, price=-0.5),
        "items.jsonl, row 3, column 'price': the value is -0.5",
        "0 or more",
    ),
    "negative count": (
        row("items", 0, orders=-1),
        "items.jsonl, row 0, column 'orders': the value is -1",
        "write a count of 0 or more",
    ),
    "clicks over exposures": (
        row("items", 0, clicks=11),
        "items.jsonl, row 0, column 'clicks': 11 clicks exceed 10 exposures",
        "same time",
    ),
    "null category part": (
        row("items", 0, category=["a", None]),
        "items.jsonl, row 0, column 'category': an entry of the list is null",
        "remove it",
    ),
    "attribute without name": (
        row("items", 2, attributes=[{"value": "red"}]),
        "items.jsonl, row 2, column 'attributes': an entry has no name",
        "name it",
    ),
    "profile without name": (
        row("users", 2, profile=[{"name": "", "value": "x"}]),
        "users.jsonl, row 2, column 'profile': an entry has no name",
        "name it",
    ),
    "context null entry": (
        row("requests", 2, context=[None]),
        "requests.jsonl, row 2, column 'context': an entry has no name",
        "remove it",
    ),
    "unknown item in a log": (
        row("events", 4, item_id="i77"),
        "events.jsonl, row 4, column 'item_id': unknown item 'i77'",
        "add it to items.jsonl",
    ),
    "unknown user in a log": (
        row("events", 4, user_id="u9"),
        "events.jsonl, row 4, column 'user_id': unknown user 'u9'",
        "add it to users.jsonl",
    ),
    "unknown user in a request": (
        row("requests", 4, user_id="u9"),
        "requests.jsonl, row 4, column 'user_id': unknown user 'u9'",
        "add it to users.jsonl",
    ),
    "request without a user": (
        row("requests", 4, user_id=...),
        "requests.jsonl, row 4, column 'user_id': the user id is null or blank",
        "name the user",
    ),
    "unknown item in candidates": (
        candidate(item_id="i77"),
        "requests.jsonl, row 3, column 'candidates.item_id': unknown item 'i77'",
        "remove the candidate",
    ),
    "candidate without item": (
        candidate(item_id=None),
        "requests.jsonl, row 3, column 'candidates.item_id': a candidate has no item_id",
        "name the item",
    ),
    "null candidate": (
        row("requests", 3, candidates=[None]),
        "requests.jsonl, row 3, column 'candidates': a candidate is null",
        "remove it",
    ),
    "label 2": (
        candidate(click=2),
        "requests.jsonl, row 3, column 'candidates.click': the label is 2",
        "write 1, 0, or null if unknown",
    ),
    "label -1": (
        candidate(1, order=-1),
        "requests.jsonl, row 3, column 'candidates.order': the label is -1",
        "write 1, 0",
    ),
    "negative dwell": (
        candidate(dwell=-1.0),
        "requests.jsonl, row 3, column 'candidates.dwell': the dwell time is -1.0",
        "seconds of 0 or more",
    ),
    "NaN dwell": (
        candidate(dwell=NAN),
        "requests.jsonl, row 3, column 'candidates.dwell': the dwell time is nan",
        "or null",
    ),
    "negative position": (
        candidate(position=-1),
        "requests.jsonl, row 3, column 'candidates.position': the position is -1",
        "count positions from 0",
    ),
    "duplicate position": (
        candidate(1, position=0),
        "requests.jsonl, row 3, column 'candidates.position': position 0 occurs twice",
        "own position",
    ),
    "item shown twice": (
        candidate(1, item_id="i3"),
        "requests.jsonl, row 3, column 'candidates.item_id': item 'i3' occurs twice",
        "one candidate per item",
    ),
    "negative time": (
        row("requests", 0, time=-5),
        "requests.jsonl, row 0, column 'time': the time -5 is negative",
        "seconds since 1970",
    ),
    "null time": (
        row("events", 0, time=None),
        "events.jsonl, row 0, column 'time': the time is null",
        "write an integer time",
    ),
    "milliseconds": (
        row("events", 11, time=1_700_000_000_000),
        "events.jsonl, row 11, column 'time': the time 1700000000000 is beyond the year 5000",
        "divide milliseconds by 1000",
    ),
    "future event": (
        row("events", 11, time=90_000_000_000),
        "events.jsonl, row 11, column 'time': the time 90000000000 lies after today",
        "correct the time",
    ),
    "unknown action": (
        row("events", 6, action="clik"),
        "events.jsonl, row 6, column 'action': unknown action 'clik' (did you mean 'click'?)",
        "use one of order, like, click",
    ),
    "null action": (
        row("events", 6, action=None),
        "events.jsonl, row 6, column 'action': unknown action None",
        "use one of",
    ),
    "blank query": (
        row("requests", 1, query=" "),
        "requests.jsonl, row 1, column 'query': the query is blank",
        "write null for a recommendation",
    ),
    "blank query of an event": (
        row("events", 1, query=""),
        "events.jsonl, row 1, column 'query': the query is blank",
        "write null",
    ),
    "event of no request": (
        row("events", 1, request_id="r99"),
        "events.jsonl, row 1, column 'request_id': unknown request 'r99'",
        "or write null",
    ),
    "event of another user": (
        row("events", 1, request_id="r2", time=99),
        "events.jsonl, row 1, column 'request_id': the event's user is not",
        "of this user",
    ),
    "event before its request": (
        row("events", 5, time=59),
        "events.jsonl, row 5, column 'time': the event is earlier than the request it belongs to",
        "correct the time",
    ),
    "nothing logged": (
        lambda rows: {**rows, "requests": [], "events": []},
        "requests: there are no requests and no events",
        "add requests",
    ),
}

# JSON lines that Arrow refuses: wrong types and keys, found line by line
TYPES = {
    "price as text": (
        row("items", 1, price="12.5"),
        "items.jsonl, row 1, column 'price': line 2 has \"12.5\" where a number belongs",
        "write a number or null",
    ),
    "time as text": (
        row("requests", 1, time="2020-01-01"),
        "requests.jsonl, row 1, column 'time': line 2 has \"2020-01-01\" where an integer of 64 bits belongs",
        "write an integer",
    ),
    "time with a fraction": (
        row("events", 2, time=1.5),
        "events.jsonl, row 2, column 'time': line 3 has 1.5 where an integer",
        "write an integer",
    ),
    "number as id": (
        row("users", 0, user_id=17),
        "users.jsonl, row 0, column 'user_id': line 1 has 17 where a text belongs",
        "write a text",
    ),
    "label too large": (
        candidate(click=300),
        "requests.jsonl, row 3, column 'candidates.click': line 4 has 300 where an integer of 8 bits belongs",
        "write an integer",
    ),
    "candidates no list": (
        row("requests", 0, candidates="i1,i2"),
        "requests.jsonl, row 0, column 'candidates': line 1 has \"i1,i2\" where a list with an object {item_id, pos",
        "write a list",
    ),
    "candidate no object": (
        row("requests", 0, candidates=["i1"]),
        "requests.jsonl, row 0, column 'candidates': line 1 has \"i1\" where an object {item_id",
        "write an object",
    ),
    "unknown nested key": (
        candidate(clicked=1),
        "column 'candidates.clicked': line 4 has the unknown key 'clicked' in 'candidates' (did you mean 'click'?)",
        "rename or remove the key",
    ),
    "attributes as object": (
        row("items", 0, attributes={"colour": "red"}),
        'items.jsonl, row 0, column \'attributes\': line 1 has {"colour": "red"} where a list',
        "write a list",
    ),
    "category as text": (
        row("items", 0, category="tools > saws"),
        "items.jsonl, row 0, column 'category': line 1 has \"tools > saws\" where a list with a text",
        "write a list",
    ),
    "unknown key": (
        row("items", 0, titel="x"),
        "items.jsonl, row 0, column 'titel': line 1 has the unknown key 'titel' (did you mean 'title'?)",
        "rename or remove the key",
    ),
}


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
        ("items.jsonl", 3, "price"),
        ("requests.jsonl", 0, "time"),
        ("requests.jsonl", 3, "candidates.click"),
        ("events.jsonl", 4, "item_id"),
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

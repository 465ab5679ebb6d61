"""Malformed tables and files, each with the place and the remedy that its report must name."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable

import pyarrow as pa
from data_folders import Rows, changed, corrupt, swap_column

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

"""The four typed tables every reader produces and every later step reads.

| table | one row is |
|---|---|
| items | a catalogue entry with text, price and counts up to `statistics_until` |
| users | a user with a profile |
| requests | a search (query set) or recommendation (query null) request, with what was shown and the feedback |
| events | one user action on one item; history is a view of the events before a request's time |

Times are integers in one monotone unit (seconds since 1970 where the source has them, otherwise a documented ordinal). A null
label means unknown and masks that task's loss; it never means 0. `events.request_id` (ours, nullable) ties an action to the
request it came from, so a turn of the history can be rendered exactly as it was when it was the target.

On disk a data folder is `items.parquet`, `users.parquet`, `events.parquet`, `requests/{train,valid,test}.parquet` and
`meta.json`, loadable by `load_dataset` as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from datasets import Features, List, Value

_NAME_VALUE = List({"name": Value("string"), "value": Value("string")})

ITEMS = Features(
    {
        "item_id": Value("string"),
        "title": Value("string"),
        "description": Value("string"),
        "brand": Value("string"),
        "category": List(Value("string")),
        "attributes": _NAME_VALUE,
        "price": Value("float64"),
        "image": Value("string"),
        "exposures": Value("int64"),
        "clicks": Value("int64"),
        "orders": Value("int64"),
    }
)
USERS = Features({"user_id": Value("string"), "profile": _NAME_VALUE})
CANDIDATE = {
    "item_id": Value("string"),
    "position": Value("int32"),
    "click": Value("int8"),
    "like": Value("int8"),
    "order": Value("int8"),
    "dwell": Value("float32"),
}
REQUESTS = Features(
    {
        "request_id": Value("string"),
        "user_id": Value("string"),
        "time": Value("int64"),
        "query": Value("string"),
        "context": _NAME_VALUE,
        "candidates": List(CANDIDATE),
    }
)
EVENTS = Features(
    {
        "user_id": Value("string"),
        "item_id": Value("string"),
        "time": Value("int64"),
        "action": Value("string"),
        "query": Value("string"),
        "request_id": Value("string"),
    }
)
SCHEMAS: dict[str, Features] = {"items": ITEMS, "users": USERS, "requests": REQUESTS, "events": EVENTS}
SPLITS = ("train", "valid", "test")


@dataclass
class Tables:
    """One data set in memory: Arrow tables in the schemas above.

    Attributes:
        items, users, requests, events: `pyarrow.Table`, columns and types exactly `SCHEMAS[name].arrow_schema`.
        split_of_request: optional per-request split name (`train`/`valid`/`test`), aligned with `requests`; a reader sets it
            only when its source prescribes the split.
        counts: what the reader did to dirty input, by name (for example `duplicate_items_dropped`).
        notes: facts about the source a user must know, in full sentences.
        clock: whether times of different users compare; otherwise they order the actions of one user only.
    """

    items: pa.Table
    users: pa.Table
    requests: pa.Table
    events: pa.Table
    split_of_request: list[str] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    clock: bool = True


def table_from_rows(name: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Builds a typed table from dictionaries; absent keys become null."""
    return pa.Table.from_pylist(rows, schema=SCHEMAS[name].arrow_schema)


def table_from_columns(name: str, columns: dict[str, Any], rows: int) -> pa.Table:
    """Builds a typed table from columns (arrays, lists or Arrow arrays of length `rows`); absent columns become null."""
    schema = SCHEMAS[name].arrow_schema
    return pa.table([typed(columns.get(column.name), column.type, rows) for column in schema], schema=schema)


def typed(value: Any, kind: pa.DataType, rows: int) -> Any:
    """A column of an Arrow type out of an array, a list or an Arrow array; None becomes `rows` nulls."""
    if value is None:
        return pa.nulls(rows, kind)
    return value.cast(kind) if isinstance(value, (pa.Array, pa.ChunkedArray)) else pa.array(value, type=kind)

"""Training tasks, one function each: tables → examples (columns task, pieces, learn, key).

| task | prompt | learned |
|---|---|---|
| `item_to_sid` | text of an item | its SID |
| `sid_to_item`, `sid_to_category` | SID | title, category path |
| `text_to_category` | text of an item without its category | category path |
| `query_to_sid`, `query_to_item_text` | query of a train request | SID, title of its strongest positive |
| `item_text_to_query` | text of that item | the query |
| `history_to_sid`, `request_to_sid`, `whole_history` | see `examples.py` | SIDs |

These are the alignment tasks of OneSearch (stage 1 to 3) without its keyword tasks. A text answer ends with the
tokenizer's eos; a SID answer does not, because its length is known. All catalogue items with a SID take part, also
those without a train event: their text is known before the test time. Items, queries and answers that are empty after
sanitising are skipped and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from sidtune.data_builders.prompts.serializer import ITEM_FIELDS
from sidtune.data_builders.tables.columns import one_array, rows_of
from sidtune.data_builders.tasks.behaviour import pieces_dataset
from sidtune.data_builders.tasks.input import TaskInput

Row = Mapping[str, Any]
# Prompt and answer of one row, or None to skip it.
Maker = Callable[[Row], "tuple[list[str], str] | None"]


def item_to_sid(data: TaskInput, limit: int | None = None) -> Dataset:
    """Text of an item → its SID."""

    def make(row: Row) -> tuple[list[str], str] | None:
        fields = _fields(row)
        if not _has_text(data, fields):
            return None
        return data.serializer.prompt("item_to_sid", **fields), data.sids[row["item_id"]]

    return _item_examples(data, "item_to_sid", limit, make)


def sid_to_item(data: TaskInput, limit: int | None = None) -> Dataset:
    """SID → title."""

    def make(row: Row) -> tuple[list[str], str] | None:
        if not data.serializer.field(row["title"], "title"):
            return None
        return data.serializer.prompt("sid_to_item", sid=data.sids[row["item_id"]]), data.serializer.answer(
            row["title"]
        )

    return _item_examples(data, "sid_to_item", limit, make)


def sid_to_category(data: TaskInput, limit: int | None = None) -> Dataset:
    """SID → category path, coarse to fine, joined by " / "."""

    def make(row: Row) -> tuple[list[str], str] | None:
        path = _category(data, row)
        prompt = data.serializer.prompt("sid_to_category", sid=data.sids[row["item_id"]])
        return (prompt, path) if path else None

    return _item_examples(data, "sid_to_category", limit, make)


def text_to_category(data: TaskInput, limit: int | None = None) -> Dataset:
    """Text of an item, without its category → category path."""

    def make(row: Row) -> tuple[list[str], str] | None:
        path, fields = _category(data, row), _fields(row, category=[])
        if not path or not _has_text(data, fields):
            return None
        return data.serializer.prompt("text_to_category", **fields), path

    return _item_examples(data, "text_to_category", limit, make)


def query_to_sid(data: TaskInput, limit: int | None = None) -> Dataset:
    """Query of a train request → SID of its strongest positive."""

    def make(query: str, row: Row) -> tuple[list[str], str]:
        return data.serializer.prompt("query_to_sid", query=query), data.sids[row["item_id"]]

    return _query_examples(data, "query_to_sid", limit, make)


def query_to_item_text(data: TaskInput, limit: int | None = None) -> Dataset:
    """Query of a train request → title of its strongest positive."""

    def make(query: str, row: Row) -> tuple[list[str], str] | None:
        if not data.serializer.field(row.get("title"), "title"):
            return None
        return data.serializer.prompt("query_to_item_text", query=query), data.serializer.answer(row["title"])

    return _query_examples(data, "query_to_item_text", limit, make)


def item_text_to_query(data: TaskInput, limit: int | None = None) -> Dataset:
    """Text of the strongest positive of a train request → the query."""

    def make(query: str, row: Row) -> tuple[list[str], str] | None:
        fields = _fields(row)
        if not _has_text(data, fields):
            return None
        return data.serializer.prompt("item_text_to_query", **fields), data.serializer.answer(query, "query")

    return _query_examples(data, "item_text_to_query", limit, make)


def _fields(row: Row, **changes: Any) -> dict[str, Any]:
    return {name: row.get(name) for name in ITEM_FIELDS} | changes


def _has_text(data: TaskInput, fields: Mapping[str, Any]) -> bool:
    clean = data.serializer.item_fields(fields)
    return any(clean[name] for name in ITEM_FIELDS if name != "price")


def _category(data: TaskInput, row: Row) -> str:
    levels = [data.serializer.field(level, "category") for level in row["category"] or ()]
    path = " / ".join(level for level in levels if level)
    return data.serializer.answer(path, "category_path") if path else ""


def _item_examples(data: TaskInput, task: str, limit: int | None, make: Maker) -> Dataset:
    known = rows_of(data.items["item_id"], data.sid_ids) >= 0
    table = data.items.select(["item_id", *ITEM_FIELDS])

    def made(rows: np.ndarray) -> list[tuple[list[str], str] | None]:
        batches = table.take(pa.array(rows)).to_batches(10_000)
        return [make(row) for batch in batches for row in batch.to_pylist()]

    rows, pairs = data.choose_made(task, np.flatnonzero(known), limit, "items_without_text", made)
    data.count(task, items_without_sid=int((~known).sum()))
    keys = one_array(data.items["item_id"].take(pa.array(rows)))
    return pieces_dataset(task, [[*prompt, answer] for prompt, answer in pairs], keys)


def _query_examples(
    data: TaskInput, task: str, limit: int | None, make: Callable[[str, Row], tuple[list[str], str] | None]
) -> Dataset:
    found = data.positives
    request, item = found.request[found.strongest], found.item[found.strongest]
    queries = one_array(data.requests["query"].take(pa.array(request)))
    asked = np.flatnonzero(queries.is_valid().to_numpy(zero_copy_only=False))
    row_of_item = rows_of(data.sid_ids, data.items["item_id"])
    items = data.items.select(["item_id", *ITEM_FIELDS])
    cache: dict[tuple[str, int], tuple[list[str], str] | None] = {}

    def made(places: np.ndarray) -> list[tuple[list[str], str] | None]:
        # Items repeat: each is read and each (query, item) rendered once.
        distinct, which = np.unique(item[places], return_inverse=True)
        known = items.take(pa.array(np.maximum(row_of_item[distinct], 0))).to_pylist()
        ids = data.sid_ids.take(pa.array(distinct)).to_pylist()
        rows = [row if row_of_item[d] >= 0 else {"item_id": i} for row, d, i in zip(known, distinct, ids, strict=True)]
        pairs = list(zip(queries.take(pa.array(places)).to_pylist(), which.reshape(-1).tolist(), strict=True))
        for query, n in dict.fromkeys(pairs):
            if (query, distinct[n]) not in cache:
                empty = not data.serializer.field(query, "query")
                cache[query, distinct[n]] = None if empty else make(query, rows[n])
        return [cache[query, distinct[n]] for query, n in pairs]

    chosen, pairs = data.choose_made(task, asked, limit, "requests_without_text", made)
    data.count(task, requests_without_query=int(found.strongest.sum()) - len(asked))
    keys = one_array(data.requests["request_id"].take(pa.array(request[chosen])))
    return pieces_dataset(task, [[*prompt, answer] for prompt, answer in pairs], keys)

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
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from sidtune.data_builders.prompts.serializer import ITEM_FIELDS
from sidtune.data_builders.tables.columns import one_array, rows_of
from sidtune.data_builders.tasks.behaviour import pieces_dataset
from sidtune.data_builders.tasks.input import TaskInput

Row = Mapping[str, Any]  # of the items table; of a request with a query, with that query as `query`


def item_to_sid(data: TaskInput, limit: int | None = None) -> Dataset:
    """Text of an item → its SID."""
    return _item_examples(data, "item_to_sid", limit, lambda row: _text(data, "item_to_sid", row), partial(_sid, data))


def sid_to_item(data: TaskInput, limit: int | None = None) -> Dataset:
    """SID → title."""
    return _item_examples(data, "sid_to_item", limit, partial(_sid_prompt, data, "sid_to_item"), partial(_title, data))


def sid_to_category(data: TaskInput, limit: int | None = None) -> Dataset:
    """SID → category path, coarse to fine, joined by " / "."""
    task = "sid_to_category"
    return _item_examples(data, task, limit, partial(_sid_prompt, data, task), partial(_category, data))


def text_to_category(data: TaskInput, limit: int | None = None) -> Dataset:
    """Text of an item, without its category → category path."""
    task = "text_to_category"
    return _item_examples(
        data, task, limit, lambda row: _text(data, task, {**row, "category": []}), partial(_category, data)
    )


def query_to_sid(data: TaskInput, limit: int | None = None) -> Dataset:
    """Query of a train request → SID of its strongest positive."""
    return _query_examples(data, "query_to_sid", limit, partial(_query, data, "query_to_sid"), partial(_sid, data))


def query_to_item_text(data: TaskInput, limit: int | None = None) -> Dataset:
    """Query of a train request → title of its strongest positive."""
    task = "query_to_item_text"
    return _query_examples(data, task, limit, partial(_query, data, task), partial(_title, data))


def item_text_to_query(data: TaskInput, limit: int | None = None) -> Dataset:
    """Text of the strongest positive of a train request → the query."""
    task = "item_text_to_query"
    return _query_examples(
        data, task, limit, partial(_text, data, task), lambda row: data.serializer.answer(row["query"], "query")
    )


def _text(data: TaskInput, task: str, row: Row) -> list[str]:
    """A prompt of the item's text, [] where it has none."""
    fields = {name: row.get(name) for name in ITEM_FIELDS}
    clean = data.serializer.item_fields(fields)
    some = any(clean[name] for name in ITEM_FIELDS if name != "price")
    return data.serializer.prompt(task, **fields) if some else []


def _sid_prompt(data: TaskInput, task: str, row: Row) -> list[str]:
    return data.serializer.prompt(task, sid=_sid(data, row))


def _query(data: TaskInput, task: str, row: Row) -> list[str]:
    return data.serializer.prompt(task, query=row["query"])


def _sid(data: TaskInput, row: Row) -> str:
    return data.sids[row["item_id"]]


def _title(data: TaskInput, row: Row) -> str:
    title = row.get("title")
    return data.serializer.answer(title) if data.serializer.field(title, "title") else ""


def _category(data: TaskInput, row: Row) -> str:
    levels = [data.serializer.field(level, "category") for level in row["category"] or ()]
    path = " / ".join(level for level in levels if level)
    return data.serializer.answer(path, "category_path") if path else ""


def _pair(row: Row, prompt: Callable[[Row], list[str]], answer: Callable[[Row], str]) -> list[str] | None:
    """Prompt and answer as the pieces of an example, None where one of them is empty."""
    before, after = prompt(row), answer(row)
    return [*before, after] if before and after else None


def _item_examples(
    data: TaskInput, task: str, limit: int | None, prompt: Callable[[Row], list[str]], answer: Callable[[Row], str]
) -> Dataset:
    known = rows_of(data.items["item_id"], data.sid_ids) >= 0
    table = data.items.select(["item_id", *ITEM_FIELDS])

    def made(rows: np.ndarray) -> list[list[str] | None]:
        batches = table.take(pa.array(rows)).to_batches(10_000)
        return [_pair(row, prompt, answer) for batch in batches for row in batch.to_pylist()]

    rows, examples = data.choose_made(task, np.flatnonzero(known), limit, "items_without_text", made)
    data.count(task, items_without_sid=int((~known).sum()))
    return pieces_dataset(task, examples, one_array(data.items["item_id"].take(pa.array(rows))))


def _query_examples(
    data: TaskInput, task: str, limit: int | None, prompt: Callable[[Row], list[str]], answer: Callable[[Row], str]
) -> Dataset:
    found = data.positives
    request, item = found.request[found.strongest], found.item[found.strongest]
    queries = one_array(data.requests["query"].take(pa.array(request)))
    asked = np.flatnonzero(queries.is_valid().to_numpy(zero_copy_only=False))
    row_of_item = rows_of(data.sid_ids, data.items["item_id"])
    items = data.items.select(["item_id", *ITEM_FIELDS])
    cache: dict[tuple[str, int], list[str] | None] = {}

    def made(places: np.ndarray) -> list[list[str] | None]:
        # Items repeat: each is read and each (query, item) rendered once.
        distinct, which = np.unique(item[places], return_inverse=True)
        known = items.take(pa.array(np.maximum(row_of_item[distinct], 0))).to_pylist()
        ids = data.sid_ids.take(pa.array(distinct)).to_pylist()
        rows = [row if row_of_item[d] >= 0 else {"item_id": i} for row, d, i in zip(known, distinct, ids, strict=True)]
        pairs = list(zip(queries.take(pa.array(places)).to_pylist(), which.reshape(-1).tolist(), strict=True))
        for query, n in dict.fromkeys(pairs):
            if (query, distinct[n]) not in cache:
                some = data.serializer.field(query, "query")
                cache[query, distinct[n]] = _pair({**rows[n], "query": query}, prompt, answer) if some else None
        return [cache[query, distinct[n]] for query, n in pairs]

    chosen, examples = data.choose_made(task, asked, limit, "requests_without_text", made)
    data.count(task, requests_without_query=int(found.strongest.sum()) - len(asked))
    return pieces_dataset(task, examples, one_array(data.requests["request_id"].take(pa.array(request[chosen]))))

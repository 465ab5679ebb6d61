"""Features of a post-ranking request as words: what a text-only prompt says, and what feature adaptation asks for.

Own design; the paper only says that categories are spelled out and numbers are written as meaning and value. A
categorical field is the labels of its columns above 0.5, a numeric field is one pair per column (`"mean rating"`,
`"3.6"`); vectors and ids have no words and are left out, as is whatever is missing. Texts are not neutralised here:
whoever puts them in a prompt does that (`sanitizer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from sidtune.core.errors import DataError
from sidtune.data_builders.post_ranking.columns import REQUEST_SCHEMA
from sidtune.data_builders.post_ranking.schema import PostRankField, PostRankRequest, PostRankTable

Pairs = list[tuple[str, str]]


def field_texts(fields: Sequence[PostRankField], values: Mapping[str, np.ndarray | None]) -> Pairs:
    """(name, value) pairs of one user or item, in the order of the fields; `values`: field → (dim,) array or None."""
    pairs: Pairs = []
    for one in fields:
        value = values.get(one.name)
        if value is None or not one.labels:
            continue
        if one.kind == "categorical":
            chosen = [label for label, part in zip(one.labels, value, strict=True) if part > 0.5]
            pairs += [(one.name, ", ".join(chosen))] if chosen else []
        elif one.kind == "numeric":
            pairs += [(label, f"{float(part):.1f}") for label, part in zip(one.labels, value, strict=True)]
    return pairs


def render_request(request: PostRankRequest) -> str:
    """A request in words, without any vector: query, user, history and candidates by number, one line each."""

    def said(pairs: Sequence[tuple[str, str]]) -> str:
        return "; ".join(f"{name}: {value}" for name, value in pairs)

    lines = [f"Query: {request.query}"] if request.query else []
    if request.user_text:
        lines.append(f"User: {said(request.user_text)}")
    lines += [f"History: {said(pairs)}" for pairs in request.history_texts if pairs]
    lines += [f"{n}: {said(pairs)}" for n, pairs in enumerate(request.item_texts)]
    return "\n".join(lines)


def request_of(table: PostRankTable, row: int, max_history: int | None = None) -> PostRankRequest:
    """One row of a table as a request of its own, texts included. Raises DataError on a row out of range."""
    batch = table.batch([row], max_history)
    user_row = int(table.user_rows[row])

    def own(values: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray], at: tuple[int, ...]) -> dict:
        return {name: value[at] if present[name][at] else None for name, value in values.items()}

    user = own(batch.user_fields, batch.user_present, (0,))
    items = [own(batch.item_fields, batch.item_present, (0, n)) for n in range(batch.item_mask.shape[1])]
    past = [own(batch.history_fields, batch.history_present, (0, n)) for n in range(batch.history_mask.shape[1])]
    item_fields = table.fields_of("item")

    def item_text(rows: np.ndarray, values: list[dict]) -> list[Pairs]:
        extra = table.item_texts
        return [
            [*(extra[item] if len(extra) else ()), *field_texts(item_fields, one)]
            for item, one in zip(rows.tolist(), values, strict=True)
        ]

    extra = table.user_texts[user_row] if len(table.user_texts) and user_row >= 0 else ()
    columns = table.requests.slice(row, 1)
    return PostRankRequest(
        request_id=columns["request_id"][0].as_py(),
        query=columns["query"][0].as_py(),
        query_vector=batch.query[0] if batch.query_present[0] else None,
        user=user,
        candidates=items,
        item_ids=[table.item_ids[item] for item in batch.item_rows[0]],
        relevance=batch.relevance[0],
        history=past,
        user_text=[*extra, *field_texts(table.fields_of("user"), user)],
        item_texts=item_text(batch.item_rows[0], items),
        init_scores=batch.init_score[0],
        history_texts=item_text(batch.history_rows[0], past),
        sources=table.sources,
    )


def table_from_requests(
    requests: Sequence[PostRankRequest],
    fields: Sequence[PostRankField],
    d_q: int,
    splits: Sequence[str] | None = None,
) -> PostRankTable:
    """A table of requests that carry their own features (small or own data; every feature is stored per request).

    Args:
        requests: any number.
        fields: the fields; their `dynamic` is set, because nothing says that an item's features stay the same.
        d_q: width of the query vectors.
        splits: split name of each request; default all `test`.

    Raises:
        DataError: a vector of the wrong width, or relevance of the wrong length.
    """
    fields = tuple(replace(one, dynamic=True) for one in fields)
    ids: dict[str, int] = {}
    rows, flat, past, queries = [], [], [], []
    for number, one in enumerate(requests):
        if len(one.relevance) != len(one.item_ids) or len(one.candidates) != len(one.item_ids):
            raise DataError(
                f"The request '{one.request_id}' has {len(one.item_ids)} item ids, {len(one.candidates)} candidates "
                f"and {len(one.relevance)} relevances; give one of each for each candidate."
            )
        scores = one.init_scores if one.init_scores is not None else np.full(len(one.item_ids), np.nan)
        listed = [
            {"item_row": ids.setdefault(item, len(ids)), "init_score": _number(s), "relevance": _number(r)}
            for item, s, r in zip(one.item_ids, scores, one.relevance, strict=True)
        ]
        flat += one.candidates
        past += one.history
        before = [ids.setdefault(f"history:{number}:{place}", len(ids)) for place in range(len(one.history))]
        split = splits[number] if splits is not None else "test"
        rows.append((one.request_id, split, one.query, number, None, listed, before))
        queries.append({"query": one.query_vector})
    names = REQUEST_SCHEMA.names
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=REQUEST_SCHEMA)
    matrices = {"query": _stack(queries, "query", d_q)}
    of_scope = {"request": [one.user for one in requests], "candidate": flat, "history": past}
    for one in fields:
        matrices |= {f"{scope}/{one.name}": _stack(of_scope[scope], one.name, one.dim) for scope in one.scopes}
    return PostRankTable(table, list(ids), [], fields, matrices)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _stack(values: Sequence[Mapping[str, np.ndarray | None]], name: str, dim: int) -> np.ndarray:
    """(rows, dim) float32 of one field, NaN where missing."""
    out = np.full((len(values), dim), np.nan, dtype=np.float32)
    for row, one in enumerate(values):
        vector = one.get(name)
        if vector is None:
            continue
        vector = np.asarray(vector, dtype=np.float32)
        if vector.shape != (dim,):
            raise DataError(f"The post-ranking field '{name}' must have {dim} numbers, got shape {vector.shape}.")
        out[row] = vector
    return out

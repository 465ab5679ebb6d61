"""Impressions as post-ranking requests: each page a list in its order, with what a post-ranker reads. Our choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from sidtune.core.errors import DataError, nearest
from sidtune.core.ragged import Ragged
from sidtune.data_builders.impressions.features import Feature
from sidtune.data_builders.impressions.table import Impressions
from sidtune.data_builders.post_ranking.columns import REQUEST_SCHEMA
from sidtune.data_builders.post_ranking.schema import PostRankField, PostRankTable
from sidtune.data_builders.post_ranking.text_hashing import hashed_bag

_D_Q, _MOST_VALUES = 64, 64
_KINDS = {"numeric": "numeric", "categorical": "categorical", "vector": "text_vector", "sid": "sid"}


def lists_of(
    impressions: Impressions, split: str = "train", *, label: str = "click", query_vectors: np.ndarray | None = None
) -> PostRankTable:
    """One post-ranking request for each request that lists candidates.

    Args:
        split: name of the split that the rows get.
        label: label that becomes the relevance; unknown stays unknown.
        query_vectors: (R, d_q) of the requests; default hashed words of the feature `query`.

    Features become fields of the same name: of items and users static, of requests and impressions dynamic (which a history then
    lacks). Categorical ones become one-hot columns where they have at most 64 values; lists and texts are left out, but the
    sequence `history` is the history and `title` says what an item is.

    Raises:
        DataError: no such label, or an item that stands twice on a page.
    """
    if label not in impressions.labels:
        raise DataError(f"The impressions have no label '{label}': {nearest(label, impressions.labels)}")
    kept = np.flatnonzero(np.diff(impressions.offsets) > 0)
    one = impressions if len(kept) == len(impressions.time) else impressions.take(kept)
    fields, matrices = [], {}
    past = one.columns.get("history", Ragged(np.zeros(len(one.time) + 1, np.int64), np.zeros(0, np.int64)))
    for feature in one.features:
        matrix = _matrix(feature, one.columns[feature.name])
        if matrix is None:
            continue
        dynamic, side = feature.scope in ("request", "impression"), "item"
        side = "user" if feature.scope in ("user", "request") else side
        labels = feature.values if feature.kind == "categorical" else ()
        found = PostRankField(
            feature.name, _KINDS[feature.kind], side, matrix.shape[1], labels, dynamic, feature.sources
        )
        fields.append(found)
        matrices[f"{found.scopes[0]}/{found.name}"] = matrix
        if feature.scope == "impression":
            matrices[f"history/{found.name}"] = np.full((len(past.rows), matrix.shape[1]), np.nan, np.float32)
    queries = one.columns.get("query", pa.nulls(len(one.time), pa.string())).cast(pa.string())
    matrices["query"] = hashed_bag(queries.to_pylist(), _D_Q) if query_vectors is None else query_vectors[kept]
    titles = one.columns["title"].to_pylist() if "title" in one.columns else []
    return PostRankTable(
        _requests(one, split, queries, one.labels[label], past), one.item_ids.to_pylist(), one.user_ids.to_pylist(),
        tuple(fields), {name: np.ascontiguousarray(value, np.float32) for name, value in matrices.items()},
        [[("title", title)] if title else [] for title in titles], notes=[f"Logged pages; the relevance is '{label}'."],
    )  # fmt: skip


def _requests(one: Impressions, split: str, queries: pa.Array, label: np.ndarray, past: Ragged) -> pa.Table:
    scores = np.where(one.position >= 0, 1.0 / (1.0 + np.maximum(one.position, 0)), np.nan).astype(np.float32)
    kind = REQUEST_SCHEMA.field("candidates").type.value_type
    flat = [pa.array(one.item_row, pa.int64()), *(pa.array(v, pa.float32(), mask=np.isnan(v)) for v in (scores, label))]
    listed = pa.ListArray.from_arrays(
        pa.array(one.offsets, pa.int32()), pa.StructArray.from_arrays(flat, fields=list(kind))
    )
    history = pa.ListArray.from_arrays(pa.array(past.offsets, pa.int32()), pa.array(past.rows, pa.int64()))
    users = pa.array(one.user_row, pa.int64(), mask=one.user_row < 0)
    columns: list[Any] = [one.request_ids, pa.array([split] * len(one.time)), queries]
    columns += [pa.array(np.arange(len(one.time))), users, listed, history]
    return pa.table(columns, schema=REQUEST_SCHEMA)


def _matrix(feature: Feature, column: Any) -> np.ndarray | None:
    """The feature as a matrix, a row with NaN where it is unknown; None for what a post-ranker does not read."""
    if feature.kind == "numeric":
        return column[:, None]
    if feature.kind == "vector":
        return column
    if feature.kind == "sid":
        return np.where((column >= 0).all(axis=1, keepdims=True), column, np.nan).astype(np.float32)
    if feature.kind != "categorical" or feature.size > _MOST_VALUES:
        return None
    return np.where((column >= 0)[:, None], column[:, None] == np.arange(feature.size), np.nan).astype(np.float32)

"""Post-ranking requests as columns: the schema of `PostRankTable.requests`, and lists of one length in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

REQUEST_SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("split", pa.string()),
        ("query", pa.string()),
        ("query_row", pa.int64()),
        ("user_row", pa.int64()),
        (
            "candidates",
            pa.list_(
                pa.struct([("item_row", pa.int64()), ("init_score", pa.float32()), ("relevance", pa.float32())]),
            ),
        ),
        ("history", pa.list_(pa.int64())),
    ]
)


def request_table(
    ids: Any,
    splits: Any,
    queries: Any,
    query_rows: Any,
    user_rows: Any,
    candidates: tuple[np.ndarray, np.ndarray, np.ndarray],
    history: tuple[np.ndarray, np.ndarray],
) -> pa.Table:
    """R requests as columns of `REQUEST_SCHEMA`.

    Args:
        ids, splits, queries, query_rows, user_rows: (R,) columns, Arrow arrays or what makes them.
        candidates: item rows, scores and relevances, (R, n) each; NaN = unknown.
        history: (R + 1,) offsets, and the item rows end to end.
    """
    items, scores, relevance = candidates
    kind = REQUEST_SCHEMA.field("candidates").type.value_type
    labels = pa.array(relevance.ravel(), pa.float32(), mask=np.isnan(relevance.ravel()))
    flat = [pa.array(items.ravel(), pa.int64()), pa.array(scores.ravel(), pa.float32()), labels]
    listed = pa.StructArray.from_arrays(flat, fields=list(kind))
    places = pa.array(np.arange(len(items) + 1) * items.shape[1], pa.int32())
    past = pa.ListArray.from_arrays(pa.array(history[0], pa.int32()), pa.array(history[1], pa.int64()))
    columns = [ids, splits, queries, query_rows, user_rows, pa.ListArray.from_arrays(places, listed), past]
    return pa.table(columns, schema=REQUEST_SCHEMA)

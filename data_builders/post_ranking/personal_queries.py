"""Query vectors that know the user: query, profile and recent history side by side.

A Query-Instructed Adapter reads an item in the light of `x_q`, "the query embedding from the ranking stage" (LLM4PR, arXiv
2411.01178), and of nothing else: what `x_q` does not hold cannot instruct it. The ranking stages of search engines have
personal query vectors; where ours has the words of a query only, the adapter cannot see what the user likes, and the language model
has to find it out by itself. `personal_queries` builds such a vector from what the request holds, without training anything:

    x_q = [query ; user fields ; mean of the history's item fields]

numeric fields standardised, missing values zero. The paper does not say what its embedding holds, so this is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from sidtune.data_builders.post_ranking.schema import PostRankTable

_ROWS_AT_ONCE = 4096


def personal_queries(
    table: PostRankTable, rows: Sequence[int] | np.ndarray, max_history: int | None = None
) -> PostRankTable:
    """The same requests with a personal query vector each.

    Args:
        table: the requests. rows: training rows, whose statistics standardise numeric fields.
        max_history: latest history items that count, default all.

    Returns:
        A table with `d_q` = that of `table` + width of all user fields + width of all item fields. Every request has a vector
        of its own, also where it had none.
    """
    scale = table.statistics(np.asarray(rows, dtype=np.int64))
    starts = range(0, len(table), _ROWS_AT_ONCE)
    parts = [_vectors(table, np.arange(s, min(s + _ROWS_AT_ONCE, len(table))), scale, max_history) for s in starts]
    place = table.requests.schema.get_field_index("query_row")
    numbers = pa.array(np.arange(len(table)), table.requests.schema.field("query_row").type)
    requests = table.requests.set_column(place, table.requests.schema.field("query_row"), numbers)
    return replace(table, requests=requests, matrices={**table.matrices, "query": np.concatenate(parts)})


def _vectors(table: PostRankTable, rows: np.ndarray, scale: dict, max_history: int | None) -> np.ndarray:
    """(B, d) float32."""
    batch = table.batch(rows, max_history)

    def standard(side: str, values: dict, present: dict) -> list[np.ndarray]:
        made = []
        for one in table.fields_of(side):
            value = values[one.name]
            if (side, one.name) in scale:
                mean, spread = scale[side, one.name]
                value = (value - mean) / spread * present[one.name][..., None]
            made.append(value)
        return made

    parts = [batch.query, *standard("user", batch.user_fields, batch.user_present)]
    weight = batch.history_mask / np.maximum(batch.history_mask.sum(axis=1, keepdims=True), 1)
    past = standard("item", batch.history_fields, batch.history_present)
    parts += [np.einsum("bh,bhd->bd", weight, value) for value in past]
    return np.concatenate(parts, axis=1).astype(np.float32)

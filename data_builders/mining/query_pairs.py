"""Which items people clicked for which query: pairs of query text and item, read from requests.

The one place that decides what a query is (white space squeezed, case kept) and which feedback ties it to an item, so
that keyword pools, query codes and recall all speak of the same pairs. Our choice; OneSearch only says "clicked
query-item pairs".
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def squeezed(text: str | None) -> str:
    """A text with runs of white space as one blank and none at the ends; null becomes ""."""
    return " ".join((text or "").split())


def squeezed_column(texts: pa.ChunkedArray) -> pa.Array:
    """`squeezed` of every text of a column, each distinct one looked at once."""
    coded = texts.combine_chunks().dictionary_encode()
    distinct = [*map(squeezed, coded.dictionary.to_pylist()), ""]
    return pa.array(distinct, pa.string()).take(pc.fill_null(coded.indices, len(distinct) - 1))


def distinct_queries(requests: pa.Table) -> list[str]:
    """The queries of a table in the REQUESTS schema, each once, in order of first appearance; requests without a query
    give none."""
    queries = pc.unique(squeezed_column(requests.column("query"))).to_pylist()
    return [query for query in queries if query]


def query_item_pairs(requests: pa.Table) -> tuple[pa.Array, pa.Array]:
    """Every clicked or ordered candidate of every request with a query; an unknown label (null) does not count.

    Args:
        requests: table in the REQUESTS schema, for example the training split.

    Returns:
        Query texts (P,) and item ids (P,), one entry per occurrence, in the order of the requests.
    """
    queries, column = squeezed_column(requests.column("query")), requests.column("candidates").combine_chunks()
    # Flattened lists and their parents leave null lists out alike.
    flat, parents = column.flatten(), pc.list_parent_indices(column)
    positive = np.zeros(len(flat), dtype=bool)
    for name in ("click", "order"):
        label = pc.fill_null(pc.struct_field(flat, name), 0)
        positive |= label.to_numpy(zero_copy_only=False) > 0
    asked = queries.take(parents)
    keep = pa.array(positive & pc.not_equal(asked, "").to_numpy(zero_copy_only=False))
    return asked.filter(keep), pc.struct_field(flat, "item_id").filter(keep)

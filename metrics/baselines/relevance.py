"""Relevance of logged requests: which items of the catalogue the user acted on.

An item is relevant to a request when one of the chosen labels of its candidate is 1. A null label is unknown and makes an
item neither relevant nor irrelevant; since the whole catalogue is ranked, only the relevant ones matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import ConfigError, nearest
from sidtune.metrics.baselines.tables import item_rows
from sidtune.metrics.ranking import Relevance

LABELS = ("click", "like", "order")


def check_labels(labels: Sequence[str]) -> None:
    """Raises ConfigError for no label at all, or one that candidates do not have."""
    for label in labels:
        if label not in LABELS:
            raise ConfigError(f"labels: there is no feedback '{label}': {nearest(str(label), LABELS)}")
    if not labels:
        raise ConfigError(f"labels must name at least one of {', '.join(LABELS)}.")


def relevance_of(requests: pa.Table, items: pa.Table, labels: Sequence[str] = LABELS) -> Relevance:
    """Relevant item rows of each request, (R,) ragged; an item that stands twice in one page counts once.

    Args:
        requests: R requests in our schema.
        items: items table; its row order numbers the items.
        labels: labels that make an item relevant when they are 1.

    Raises:
        DataError: a relevant candidate is not in the catalogue.
    """
    check_labels(labels)
    lists = requests["candidates"].combine_chunks()
    flat = lists.flatten()
    owner = np.repeat(
        np.arange(len(lists)), pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    )
    relevant = np.zeros(len(flat), dtype=bool)
    for label in labels:
        relevant |= pc.fill_null(pc.equal(flat.field(label), 1), False).to_numpy(zero_copy_only=False)
    rows = item_rows(flat.field("item_id").filter(pa.array(relevant)), items, "the candidates")
    pairs = np.unique(owner[relevant] * np.int64(max(1, items.num_rows)) + rows)
    owner, rows = np.divmod(pairs, max(1, items.num_rows))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=requests.num_rows))])
    return Relevance(offsets.astype(np.int64), rows.astype(np.int64))

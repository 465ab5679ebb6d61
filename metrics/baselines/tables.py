"""From the four tables to item rows and training counts: what slices and baselines both need.

Counts are of the past only: `training_events` keeps what lies before the held-out requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import DataError
from sidtune.data_builders.tables.past import Folder, past_events


def item_rows(ids: Any, items: pa.Table, what: str) -> np.ndarray:
    """Row of each item id in the items table.

    Args:
        ids: (n,) item ids; Arrow array, list or string array.
        items: items table; its row order numbers the items.
        what: what the ids belong to, for the message.

    Returns:
        (n,) int64.

    Raises:
        DataError: an id is null or not in the catalogue.
    """
    ids = _strings(ids)
    found = pc.index_in(ids, value_set=_strings(items["item_id"]))
    # A null id would match a null in the value set; item ids are never null there.
    if found.null_count:
        first = int(np.argmax(found.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(
            f"{found.null_count} item ids of {what} are not in the catalogue (the first is {ids[first].as_py()!r}); "
            "add the items or leave these rows out."
        )
    return found.to_numpy().astype(np.int64)


def training_events(folder: Folder) -> pa.Table:
    """Events that training may see, see `past_events`. Raises DataError when there are none."""
    events = past_events(folder)
    if not events.num_rows:
        raise DataError("No event lies before the valid and test requests; baselines and slices need training events.")
    return events


def event_counts(events: pa.Table, items: pa.Table) -> np.ndarray:
    """(N,) float64 number of events of each item. Raises DataError for an event of an item outside the catalogue."""
    rows = item_rows(events["item_id"], items, "the events")
    return np.bincount(rows, minlength=items.num_rows).astype(np.float64)


def popularity_order(counts: np.ndarray, items: pa.Table) -> np.ndarray:
    """(N,) int64 item rows by falling count, then by rising item id: how every tie in this project breaks."""
    ids = _strings(items["item_id"])
    by_id = np.empty(len(ids), dtype=np.int64)
    by_id[pc.sort_indices(ids).to_numpy()] = np.arange(len(ids))
    return np.lexsort((by_id, -np.asarray(counts)))


def _strings(values: Any) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if not isinstance(values, pa.Array):
        values = pa.array(values, pa.string())
    return values.cast(pa.string())

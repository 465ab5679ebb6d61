"""What lies before the held-out requests of a data folder: its events, and how popular they made each item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from sidtune.data_builders.tables.columns import rows_of
from sidtune.data_builders.tables.splits import training_cut


class Folder(Protocol):
    """The part of a loaded data folder that is read here (see `store.py`)."""

    items: pa.Table
    events: pa.Table
    requests: Mapping[str, pa.Table]
    meta: dict[str, Any]


def past_events(folder: Folder) -> pa.Table:
    """Events that training may see: those strictly before the cut of the split (see `splits.training_cut`)."""
    held = [folder.requests[name] for name in ("valid", "test") if name in folder.requests]
    if not held:
        return folder.events
    late = pa.concat_tables(table.select(["user_id", "time"]) for table in held)
    cut = training_cut(late, np.full(late.num_rows, "test"), folder.meta.get("split") or {})
    return folder.events.filter(pa.array(folder.events["time"].to_numpy() < cut.of(folder.events["user_id"])))


def past_popularity(folder: Folder) -> np.ndarray:
    """(N,) float64 popularity of the items before the split, by which items of one code stand.

    Clicks; where no item has any, as in logs of purchases, orders; where none has these either, past events of any action.
    """
    for name in ("clicks", "orders"):
        counts = np.nan_to_num(folder.items[name].to_numpy(zero_copy_only=False).astype(np.float64))
        if counts.any():
            return counts
    rows = rows_of(past_events(folder)["item_id"], folder.items["item_id"])
    return np.bincount(rows[rows >= 0], minlength=folder.items.num_rows).astype(np.float64)

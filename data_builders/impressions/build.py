"""Impressions of any data folder whose requests list candidates: the simulated shop's, and those of every reader with feedback.

What a feature says was known before its request: histories by `History`, counts of the log strictly before its second. Counts of
the items table end at the split's cut and would show a training request its own answer, so they are no features here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import DataError
from sidtune.core.ragged import Ragged
from sidtune.data_builders.impressions.features import Feature
from sidtune.data_builders.impressions.table import Impressions
from sidtune.data_builders.tables.columns import encode, one_array, rows_of
from sidtune.data_builders.tables.history import ACTIONS, History
from sidtune.data_builders.tables.store import DataFolder

LABELS = ("click", "like", "order", "dwell")


def impressions_of(
    data: DataFolder, split: str = "train", *, history: int = 50, propensity: np.ndarray | None = None
) -> Impressions:
    """The impressions of a split with everything that its tables say.

    Args:
        history: latest events before each request in the sequences `history` (items) and `history_action`.
        propensity: (N,) P(seen) of each candidate in order, where it is known or estimated.

    Features: numeric `price`, `past_clicks`, `past_exposures`, `history_length`; categorical `item`, `brand`, `category_<level>`,
    `user`, `profile_<name>`, `context_<name>`; texts `title` and `query`; and the sequences. Dwell is a label in the unit of the
    data. Our choice.

    Raises:
        DataError: no request of the split lists a candidate, or `propensity` has another length.
    """
    requests = data.requests[split]
    lists = one_array(requests["candidates"])
    lists = lists if lists.null_count == 0 else pc.if_else(pc.is_null(lists), pa.scalar([], lists.type), lists)
    flat = pc.list_flatten(lists)
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy())]).astype(np.int64)
    if not len(flat):
        raise DataError(f"No request of the split '{split}' lists candidates, so there are no impressions.")
    if propensity is not None and len(propensity) != len(flat):
        raise DataError(f"There are {len(flat)} impressions but {len(propensity)} propensities; give one each.")
    item_ids, user_ids = one_array(data.items["item_id"]), one_array(data.users["user_id"])
    item = rows_of(flat.field("item_id"), item_ids)
    if (item < 0).any():
        raise DataError(f"{int((item < 0).sum())} candidates are not in the items table; run validate.check_folder.")
    time = requests["time"].to_numpy()
    user = rows_of(one_array(requests["user_id"]), user_ids)
    position = pc.fill_null(flat.field("position"), -1).to_numpy(zero_copy_only=False).astype(np.int32)
    made = _Columns()
    _of_items(made, data.items)
    _of_users(made, data.users)
    _of_requests(made, data, requests, item_ids, history)
    exposures, clicks = _past_counts(data, item, np.repeat(time, np.diff(offsets)), item_ids)
    made.add(Feature("past_exposures", "numeric", "impression"), np.log1p(exposures).astype(np.float32))
    made.add(Feature("past_clicks", "numeric", "impression"), np.log1p(clicks).astype(np.float32))
    return Impressions(
        one_array(requests["request_id"]), user_ids, item_ids, user, time, offsets, item, position,
        np.full(len(item), np.nan, np.float32) if propensity is None else np.asarray(propensity, np.float32),
        {name: _floats(flat.field(name)) for name in LABELS if flat.field(name).null_count < len(flat)},
        tuple(made.features), made.columns,
    )  # fmt: skip


class _Columns:
    """Features with their arrays, in the order they were added."""

    def __init__(self) -> None:
        self.features: list[Feature] = []
        self.columns: dict[str, Any] = {}

    def add(self, feature: Feature, column: Any) -> None:
        self.features.append(feature)
        self.columns[feature.name] = column

    def coded(self, name: str, scope: str, column: Any) -> None:
        """A text column as codes by first occurrence; nothing where it is empty."""
        codes, values = encode(column)
        if len(values):
            named = tuple(values.to_pylist())
            self.add(Feature(name, "categorical", scope, len(named), values=named), codes.astype(np.int32))

    def pairs(self, prefix: str, scope: str, column: Any) -> None:
        """A column of (name, value) lists as one categorical feature for each name."""
        lists = one_array(column)
        owner = pc.list_parent_indices(lists).to_numpy().astype(np.int64)
        flat = pc.list_flatten(lists)
        names, known = encode(flat.field("name"))
        for number, name in enumerate(known.to_pylist()):
            mine = np.flatnonzero(names == number)[::-1]  # the first of a repeated name stays
            codes, values = encode(flat.field("value").take(pa.array(mine)))
            if len(values):
                column = np.full(len(lists), -1, np.int32)
                column[owner[mine]] = codes
                named = tuple(values.to_pylist())
                self.add(Feature(f"{prefix}_{name}", "categorical", scope, len(named), values=named), column)


def _of_items(made: _Columns, items: pa.Table) -> None:
    rows = np.arange(items.num_rows, dtype=np.int32)
    made.add(Feature("item", "categorical", "item", max(len(rows), 1)), rows)
    made.coded("brand", "item", items["brand"])
    paths = one_array(items["category"])
    for level in range(int(pc.max(pc.list_value_length(paths)).as_py() or 0)):
        deep = pc.greater(pc.fill_null(pc.list_value_length(paths), 0), level)
        path = pc.list_slice(pc.if_else(deep, paths, None), 0, level + 1)
        made.coded(f"category_{level + 1}", "item", pc.binary_join(path, "\x1f"))
    if items["price"].null_count < len(items):
        made.add(Feature("price", "numeric", "item"), np.log1p(np.maximum(_floats(items["price"]), 0)))
    made.add(Feature("title", "text", "item"), one_array(items["title"]))


def _of_users(made: _Columns, users: pa.Table) -> None:
    rows = np.arange(users.num_rows, dtype=np.int32)
    made.add(Feature("user", "categorical", "user", max(len(rows), 1)), rows)
    made.pairs("profile", "user", users["profile"])


def _of_requests(made: _Columns, data: DataFolder, requests: pa.Table, item_ids: Any, most: int) -> None:
    time, events = requests["time"].to_numpy(), data.events
    found = History(events).before(requests["user_id"], time, most)
    items = rows_of(one_array(events["item_id"]), item_ids)[found.rows]
    actions = rows_of(one_array(events["action"]), pa.array(ACTIONS, pa.string()))[found.rows]
    made.add(Feature("history", "sequence", "request", max(len(item_ids), 1), most=most), Ragged(found.offsets, items))
    named = {"size": len(ACTIONS), "values": ACTIONS, "most": most}
    made.add(Feature("history_action", "sequence", "request", **named), Ragged(found.offsets, actions))
    made.add(Feature("history_length", "numeric", "request"), np.log1p(found.lengths).astype(np.float32))
    made.pairs("context", "request", requests["context"])
    made.add(Feature("query", "text", "request"), one_array(requests["query"]))


def _past_counts(data: DataFolder, item: np.ndarray, time: np.ndarray, item_ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """How often each item was shown, and clicked, by requests of all splits strictly before a time (N,)."""
    shown, seen, clicked = [], [], []
    for requests in data.requests.values():
        lists = one_array(requests["candidates"])
        flat, owner = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy().astype(np.int64)
        shown.append(rows_of(flat.field("item_id"), item_ids))
        seen.append(requests["time"].to_numpy()[owner])
        clicked.append(pc.fill_null(pc.equal(flat.field("click"), 1), False).to_numpy(zero_copy_only=False))
    rows, times, click = (np.concatenate(part) for part in (shown, seen, clicked))
    moments = np.unique(times)
    step = len(moments) + 1
    key, until = rows * step + np.searchsorted(moments, times), item * step + np.searchsorted(moments, time)
    first = item * step
    counts = []
    for one in (np.sort(key), np.sort(key[click])):
        counts.append(np.searchsorted(one, until) - np.searchsorted(one, first))
    return counts[0], counts[1]


def _floats(column: Any) -> np.ndarray:
    return pc.fill_null(one_array(column).cast(pa.float32()), np.nan).to_numpy(zero_copy_only=False)

"""Requests and events of the simulated shop as typed tables, built column by column without a Python object per row.

Own design; no paper.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from sidtune.data_builders.shop_world.catalogue import ShopCatalogue, item_ids
from sidtune.data_builders.shop_world.config import ShopWorldConfig
from sidtune.data_builders.shop_world.logging_policy import Log
from sidtune.data_builders.shop_world.requests import Requests, context_lists
from sidtune.data_builders.shop_world.users import user_ids
from sidtune.data_builders.tables.schema import table_from_columns
from sidtune.data_builders.tables.splits import candidate_lists

_ACTIONS = ("click", "like", "order")


def request_table(
    config: ShopWorldConfig, catalogue: ShopCatalogue, requests: Requests, log: Log, ids: pa.Array, queries: pa.Array
) -> pa.Table:
    """The requests table: one row per request in order of time, candidates in order of position (from 0)."""
    n, size = log.item.shape
    like = log.like.ravel()
    dwell = log.dwell.ravel()
    parts = {
        "item_id": pa.array(item_ids(config), type=pa.string()).take(pa.array(log.item.ravel())),
        "position": np.tile(np.arange(size), n),
        "click": log.click.ravel(),
        "like": pa.array(like, mask=like < 0),
        "order": log.order.ravel(),
        "dwell": pa.array(dwell, mask=np.isnan(dwell)),
    }
    columns = {
        "request_id": ids,
        "user_id": pa.array(user_ids(config), type=pa.string()).take(pa.array(requests.user)),
        "time": requests.time,
        "query": queries,
        "context": context_lists(config, catalogue, requests),
        "candidates": candidate_lists(parts, np.arange(n + 1) * size),
    }
    return table_from_columns("requests", columns, n)


def event_table(config: ShopWorldConfig, requests: Requests, log: Log, ids: pa.Array, queries: pa.Array) -> pa.Table:
    """The events table: clicks, known likes and orders, in order of (request, position, click < like < order)."""
    happened = np.stack([log.click == 1, log.like == 1, log.order == 1], axis=2)
    row, position, action = np.nonzero(happened)
    at = pa.array(row)
    columns = {
        "user_id": pa.array(user_ids(config), type=pa.string()).take(pa.array(requests.user[row])),
        "item_id": pa.array(item_ids(config), type=pa.string()).take(pa.array(log.item[row, position])),
        "time": requests.time[row],
        "action": pa.array(_ACTIONS).take(pa.array(action)),
        "query": queries.take(at),
        "request_id": ids.take(at),
    }
    return table_from_columns("events", columns, len(row))

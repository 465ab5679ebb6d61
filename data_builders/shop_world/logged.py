"""The log of the simulated shop: what its pages showed and what people did there, in chunks with a random stream each.

Own design; no paper. `world` is a `ShopWorld`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sidtune.data_builders.shop_world.catalogue import stream
from sidtune.data_builders.shop_world.crowding import crowding
from sidtune.data_builders.shop_world.examining import sampled_clicks
from sidtune.data_builders.shop_world.logging_policy import LOG_CHUNK, Log, LogDraws, log_draws
from sidtune.data_builders.shop_world.noise import TINY

LOG_DWELL_CAP = float(np.log(1e6))


def logged(world: Any) -> Log:
    """The logged pages and feedback."""
    pool = world.ranker.order.shape[1]
    parts = [
        _chunk(world, rows, log_draws(world.config, chunk, len(rows), pool)) for chunk, rows in enumerate(_rows(world))
    ]
    return Log(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _rows(world: Any) -> list[np.ndarray]:
    n = world.config.n_requests
    return [np.arange(first, min(first + LOG_CHUNK, n)) for first in range(0, n, LOG_CHUNK)]


def _chunk(world: Any, rows: np.ndarray, draws: LogDraws) -> tuple[np.ndarray, ...]:
    item, dials = _pages(world, rows, draws), world.phenomena
    attraction, like_p, order_p, dwell_mean = world._feedback(rows, item)
    meant, noise = np.ones(1), np.zeros(1, dtype=bool)
    if dials.feed_noise:
        share = world.noise_share(rows, attraction)
        noise = stream(world.config, "market-noise", int(rows[0]) // LOG_CHUNK).random(item.shape) < share
        meant = np.maximum(1.0 - share, TINY)
    ordered = (draws.order < order_p / meant) & ~noise
    click = _clicks(world, rows, item, attraction, ordered, draws.click)
    like = (click & (draws.like < like_p / meant) & ~noise).astype(np.int8)
    like[draws.like_known < world.config.like_unknown_share] = -1
    log_dwell = dwell_mean - dials.noise_dwell * noise + world.config.dwell_sigma * draws.dwell
    dwell = np.exp(np.minimum(log_dwell, LOG_DWELL_CAP))
    dwell[~click] = np.nan
    return item, click.astype(np.int8), like, (click & ordered).astype(np.int8), dwell.astype(np.float32)


def _pages(world: Any, rows: np.ndarray, draws: LogDraws) -> np.ndarray:
    """(n, page_size) item rows that the production system showed."""
    size = world.config.page_size
    rank = np.empty((len(rows), size), dtype=np.int64)
    for layout, wanted in zip(world.layouts, (False, True), strict=True):
        part = world.requests.is_recommendation[rows] == wanted
        rank[part] = layout.draw(draws.keys[part], size)
    return np.take_along_axis(world.ranker.order[world.ranker.query_of[rows]], rank, axis=1)


def level_of_noise(world: Any) -> float:
    """ā of `feed_noise`: the mean attraction of what logged feed pages showed, weighed by examination."""
    total, looks, pool = 0.0, 0.0, world.ranker.order.shape[1]
    for chunk, rows in enumerate(_rows(world)):
        feed = world.requests.is_recommendation[rows]
        items = _pages(world, rows, log_draws(world.config, chunk, len(rows), pool))[feed]
        attraction = world._alone(rows[feed], items, world._taste(rows[feed], items))
        total += float((world.examination * attraction).sum())
        looks += float((world.examination * (attraction > 0.0)).sum())
    return total / looks if looks else 0.0


def _clicks(
    world: Any, rows: np.ndarray, items: np.ndarray, attraction: np.ndarray, orders: np.ndarray, coins: np.ndarray
) -> np.ndarray:
    """(n, k) clicks of the log on a chunk that begins at `rows[0]`; `coins` are those of the items."""
    dials = world.phenomena
    if not dials.new_readers:
        return coins < world.examination * attraction
    draw = stream(world.config, "market-log", int(rows[0]) // LOG_CHUNK)
    kinds, look, stop = draw.random(len(rows)) < dials.cascade, draw.random(items.shape), draw.random(items.shape)
    return sampled_clicks(
        attraction * crowding(world.catalogue, items, dials), orders, world.examination, kinds, look, stop, coins,
        stop_after_click=dials.stop_after_click, stop_after_order=dials.stop_after_order, fatigue=dials.click_fatigue,
    )  # fmt: skip

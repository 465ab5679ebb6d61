"""The best list of a request in the market. Own design; `specs/market.md` 7.

Where items do not interact, clicks are best sorted by attraction, for position and cascade readers alike. Other values under a
cascade: by adjacent exchange, with a constant chance g to go on, sorting by v / (1 − g + g η a) is optimal; with the real, varying
chances that order is improved by swaps of neighbours until none helps. Where items interact: greedily, place by place, then by
swaps of any two places, called the best found; `Market.upper_bound` says how much better another list could be at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sidtune.data_builders.shop_world.logging_policy import best

_POOL = 40  # candidates beyond the places that a list with interactions is chosen from
_CELLS = 1 << 21
_ROUNDS = 20


def ideal_lists(market: Any, rows: np.ndarray, k: int, value: str) -> np.ndarray:
    """(n, k) item rows; see the module's text."""
    step = max(1, _CELLS // market.world.config.n_items)
    parts = [_ideal(market, rows[first : first + step], k, value) for first in range(0, len(rows), step)]
    return np.concatenate(parts) if parts else np.zeros((0, k), np.int64)


def _ideal(market: Any, rows: np.ndarray, k: int, value: str) -> np.ndarray:
    dials, worth = market.phenomena, market.worth(rows, value)
    plain = best(worth, k)
    if not dials.page_interacts and (value == "click" or dials.cascade == 0.0):
        return plain
    if not dials.page_interacts:
        x = market.world.examination[:k]
        g = float((x[1:] / x[:-1]).mean()) if k > 1 else 0.0
        attraction = market.feedback(rows, np.arange(worth.shape[1])[None, :])[0]
        index = best(worth / (1.0 - g + g * dials.stop_after_click * attraction + 1e-12), k)
        starts = [_swapped(market, rows, one, value, near=True) for one in (plain, index)]
        totals = np.stack([market.total(rows, one, value) for one in starts])
        return np.stack(starts)[totals.argmax(axis=0), np.arange(len(rows))]
    pool = best(worth, min(k + _POOL, worth.shape[1]))
    return _swapped(market, rows, _greedy(market, rows, pool, k, value), value, near=False)


def _greedy(market: Any, rows: np.ndarray, pool: np.ndarray, k: int, value: str) -> np.ndarray:
    """Fills places from the top, each by the item of the pool (n, C) that adds most to the list so far."""
    chosen = np.full((len(rows), k), -1, np.int64)
    for place in range(k):
        gain = np.full(pool.shape, -np.inf)
        for c in range(pool.shape[1]):
            new = ~(chosen == pool[:, c : c + 1]).any(axis=1)
            trial = chosen.copy()
            trial[new, place] = pool[new, c]
            gain[new, c] = market.total(rows[new], trial[new, : place + 1], value)
        chosen[:, place] = pool[np.arange(len(rows)), gain.argmax(axis=1)]
    return chosen


def _swapped(market: Any, rows: np.ndarray, lists: np.ndarray, value: str, near: bool) -> np.ndarray:
    """Swaps two places, neighbours or any, wherever it helps, until none does."""
    lists, k = lists.copy(), lists.shape[1]
    now = market.total(rows, lists, value)
    pairs = [(a, b) for a in range(k) for b in range(a + 1, a + 2 if near else k) if b < k]
    for _ in range(_ROUNDS):
        moved = False
        for a, b in pairs:
            trial = lists.copy()
            trial[:, [a, b]] = trial[:, [b, a]]
            then = market.total(rows, trial, value)
            better = then > now + 1e-12
            lists[better], now = trial[better], np.where(better, then, now)
            moved |= bool(better.any())
        if not moved:
            break
    return lists

"""Noise in the feed: clicks that nothing in the item caused. Own design; sheet `specs/market.md` 3.2.

    P(click at k) = e_k ((1 − ν) A + ν ā)        ā = Σ e A / Σ e over the logged feed pages, one number a world
    P(noise | click) = ν ā / ((1 − ν) A + ν ā)   such a click is short (log dwell − δ_n); no like, no order (our choice)

So the rate of clicks of the logged feed stays. Searches have no noise, nor have items before their launch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sidtune.data_builders.shop_world.world import ShopWorld

TINY = 1e-12


def mean_of_feed(world: ShopWorld, pages: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """ā from logged pages: request rows (n,) and the items shown to them (n, page_size), piece by piece."""
    total = looks = 0.0
    for rows, items in pages:
        feed = world.requests.is_recommendation[rows]
        attraction = world.alone(rows[feed], items[feed])
        total += float((world.examination * attraction).sum())
        looks += float((world.examination * (attraction > 0.0)).sum())
    return total / looks if looks else 0.0


def _in_feed(world: ShopWorld, rows: np.ndarray, attraction: np.ndarray) -> np.ndarray:
    return world.requests.is_recommendation[rows, None] & (attraction > 0.0)


def mixed(world: ShopWorld, rows: np.ndarray, attraction: np.ndarray) -> np.ndarray:
    """Attraction (n, k) of `rows` (n,) with its noise; the same array without `feed_noise`."""
    part = world.phenomena.feed_noise
    if not part:
        return attraction
    noisy = (1.0 - part) * attraction + part * world.noise_level
    return np.where(_in_feed(world, rows, attraction), noisy, attraction)


def noise_share(world: ShopWorld, rows: np.ndarray, attraction: np.ndarray) -> np.ndarray:
    """P(noise | click) in the shape of `attraction` (n, k), which holds its noise already."""
    part = world.phenomena.feed_noise
    if not part:
        return np.zeros_like(attraction)
    feed = _in_feed(world, rows, attraction)
    return np.where(feed, part * world.noise_level / np.where(feed, attraction, 1.0), 0.0)

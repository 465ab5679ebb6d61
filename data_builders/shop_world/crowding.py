"""What other items on a page leave of an item's attraction: satiation and neighbours. Own design; `specs/market.md` 3.5."""

from __future__ import annotations

import numpy as np

from sidtune.data_builders.shop_world.catalogue import ShopCatalogue
from sidtune.data_builders.shop_world.dials import Phenomena

# Weights of what two items can have in common; they add up to 1.
WEIGHTS = {"brand": 0.35, "colour": 0.25, "style": 0.2, "material": 0.1, "leaf": 0.1}


def alike(catalogue: ShopCatalogue, items: np.ndarray) -> np.ndarray:
    """(n, K, K) weighted share of properties that items (n, K) have in common; 0 with an empty place (-1)."""
    held = np.maximum(items, 0)
    made = np.zeros((*items.shape, items.shape[1]))
    for name, weight in WEIGHTS.items():
        value = getattr(catalogue, name)[held]
        made += weight * (value[:, :, None] == value[:, None, :])
    there = items >= 0
    return made * (there[:, :, None] & there[:, None, :])


def crowding(catalogue: ShopCatalogue, items: np.ndarray, dials: Phenomena) -> np.ndarray | float:
    """(n, K) S_k N_k, what is left of each place; 1.0 where both dials are 0."""
    if max(dials.satiation, dials.interaction) == 0.0:
        return 1.0
    shared, left = alike(catalogue, items), np.ones(items.shape)
    for k in range(1, items.shape[1]) if dials.satiation else ():
        left[:, k] = (1.0 - dials.satiation * shared[:, k, :k]).prod(axis=1)
    if dials.interaction:
        beside = shared[:, np.arange(items.shape[1] - 1), np.arange(1, items.shape[1])]
        near = np.zeros(items.shape)
        near[:, :-1] += beside
        near[:, 1:] += beside
        left *= 1.0 - 0.5 * dials.interaction * near
    return left

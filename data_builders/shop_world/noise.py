"""Noise in the feed: clicks that nothing in the item caused. Own design; sheet `specs/market.md` 3.2.

    P(click at k) = e_k ((1 − ν) A + ν ā)        ā = Σ e A / Σ e over the logged feed pages, one number a world
    P(noise | click) = ν ā / ((1 − ν) A + ν ā)   such a click is short (log dwell − δ_n); no like, no order (our choice)

So the rate of clicks of the logged feed stays. Searches have no noise, nor have items before their launch.
"""

from __future__ import annotations

import numpy as np

TINY = 1e-12


def mixed(attraction: np.ndarray, feed: np.ndarray, part: float, level: float) -> np.ndarray:
    """Attraction (n, k) with its noise: `part` is ν, `level` ā, `feed` (n,) says which requests are of the feed."""
    return np.where(feed[:, None] & (attraction > 0.0), (1.0 - part) * attraction + part * level, attraction)


def noise_share(attraction: np.ndarray, feed: np.ndarray, part: float, level: float) -> np.ndarray:
    """P(noise | click) in the shape of `attraction` (n, k), which holds its noise already."""
    noisy = feed[:, None] & (attraction > 0.0)
    return np.where(noisy, part * level / np.where(noisy, attraction, 1.0), 0.0)

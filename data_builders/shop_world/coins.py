"""Coins of the market: uniform numbers that are a function of what they decide, not of the order in which they are drawn.

    u = mix(mix(mix(seed, purpose) + a C1) + (b + 1) C2) >> 11, times 2^-53        mix: the finaliser of splitmix64

So two lists shown to one request flip the same coins (common random numbers): attraction, order and like belong to (request, item)
and stay with an item that moves; examination belongs to (request, place). Own design after counter-based generators.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import ndtri

PURPOSES = (
    "attraction", "order", "like", "noise", "watch", "examination", "stop", "examiner", "like_known", "return",
)  # fmt: skip
_C1, _C2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def coins(seed: int, purpose: str, a: Any, b: Any = 0) -> np.ndarray:
    """Uniform numbers in [0, 1) of the broadcast shape of `a` and `b`, whole numbers of at least 0.

    >>> first = coins(7, "attraction", [[3]], [[10, 11]])
    >>> bool(first[0, 1] == coins(7, "attraction", 3, 11)), first.shape
    (True, (1, 2))
    """
    with np.errstate(over="ignore"):
        start = _mix(np.atleast_1d(np.uint64(seed)) + np.uint64(PURPOSES.index(purpose) + 1) * _C1)
        first = _mix(start + np.asarray(a).astype(np.uint64) * _C1)
        last = _mix(first + (np.asarray(b).astype(np.uint64) + np.uint64(1)) * _C2)
    shape = np.broadcast_shapes(np.shape(a), np.shape(b))
    return ((last >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


def normals(seed: int, purpose: str, a: Any, b: Any = 0) -> np.ndarray:
    """Standard normal numbers: the inverse normal distribution of `coins`."""
    return ndtri(np.maximum(coins(seed, purpose, a, b), 2.0**-54))

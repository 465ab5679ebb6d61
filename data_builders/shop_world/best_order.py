"""Best order of a list whose value is a sum over places and over neighbours, found exactly.

Own design. The value of an order o of n items, with weights w_0..w_{n-1} of the places, is

    U(o) = sum_k w_k a[o_k] − (c / 2) sum_k s[o_k, o_{k+1}] (w_k a[o_k] + w_{k+1} a[o_{k+1}])

(a = attraction, s = similarity, c = interaction): each item loses the share c s / 2 of its clicks to each neighbour it
resembles. Because only neighbours interact, the best order of n items is found exactly by dynamic programming over
(set of items placed, last item), n^2 2^n steps instead of n!; `EXACT_UP_TO` items at most.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from sidtune.core.errors import DataError

EXACT_UP_TO = 12
_BLOCK = 1 << 21


def order_value(
    attraction: np.ndarray, similarity: np.ndarray, weights: np.ndarray, interaction: float, order: np.ndarray
) -> np.ndarray:
    """Value of each place of an order; its sum is U.

    Args:
        attraction: (B, n). similarity: (B, n, n) symmetric, in [0, 1]. weights: (n,). interaction: c, in [0, 1].
        order: (B, m) places of the items shown, m <= n, without repeats.

    Returns:
        (B, m) float64: w_k a[o_k] (1 − c / 2 (s to the item before + s to the item after)).
    """
    own = np.take_along_axis(attraction, order, axis=1)
    row = np.arange(len(order))[:, None]
    beside = similarity[row, order[:, :-1], order[:, 1:]]
    loss = np.zeros(order.shape)
    loss[:, :-1] += beside
    loss[:, 1:] += beside
    return weights[: order.shape[1]] * own * (1.0 - 0.5 * interaction * loss)


def best_order(attraction: np.ndarray, similarity: np.ndarray, weights: np.ndarray, interaction: float) -> np.ndarray:
    """(B, n) the best order of at most `EXACT_UP_TO` items; arguments as in `order_value`.

    Raises:
        DataError: more items, or shapes that do not fit.
    """
    n = attraction.shape[1]
    if similarity.shape != (len(attraction), n, n) or len(weights) < n:
        raise DataError(
            f"For {n} items the similarity must have shape ({len(attraction)}, {n}, {n}) and at least {n} weights, "
            f"got {similarity.shape} and {len(weights)}."
        )
    if n > EXACT_UP_TO:
        raise DataError(
            f"The best order is found exactly, for at most {EXACT_UP_TO} items, got {n}; give fewer candidates."
        )
    step = max(1, _BLOCK // (2**n * n * 4))
    parts = [
        _exact(attraction[at : at + step], similarity[at : at + step], weights, interaction)
        for at in range(0, len(attraction), step)
    ]
    return np.concatenate(parts) if parts else np.empty((0, n), dtype=np.int64)


def _exact(attraction: np.ndarray, similarity: np.ndarray, weights: np.ndarray, interaction: float) -> np.ndarray:
    B, n = attraction.shape
    value = np.full((B, 1 << n, n), -np.inf)
    came_from = np.zeros((B, 1 << n, n), dtype=np.int8)
    bits = 1 << np.arange(n)
    value[:, bits, np.arange(n)] = weights[0] * attraction
    for k in range(1, n):
        before, after = weights[k - 1] * attraction, weights[k] * attraction
        gain = after[:, None, :] - 0.5 * interaction * similarity * (before[:, :, None] + after[:, None, :])
        sets = np.array([sum(1 << i for i in chosen) for chosen in combinations(range(n), k + 1)])
        for last in range(n):
            here = sets[(sets >> last) & 1 == 1]
            arriving = value[:, here ^ (1 << last), :] + gain[:, None, :, last]
            came_from[:, here, last] = arriving.argmax(axis=2)
            value[:, here, last] = arriving.max(axis=2)
    order = np.empty((B, n), dtype=np.int64)
    row, full = np.arange(B), np.full(B, (1 << n) - 1)
    order[:, -1] = value[row, full].argmax(axis=1)
    for k in range(n - 1, 0, -1):
        last = order[:, k]
        order[:, k - 1] = came_from[row, full, last]
        full = full ^ (1 << last)
    return order


def random_value(attraction: np.ndarray, similarity: np.ndarray, weights: np.ndarray, interaction: float) -> np.ndarray:
    """(B,) mean of U over all n! orders, in closed form: every ordered pair of items is equally often neighbours at
    every pair of places."""
    n = attraction.shape[1]
    weights = weights[:n]
    alone = weights.mean() * attraction.sum(axis=1)
    if n < 2:
        return alone
    off = similarity * (1.0 - np.eye(n))
    pairs = (off * attraction[:, :, None]).sum(axis=(1, 2))
    return alone - 0.5 * interaction * pairs * (weights[:-1].sum() + weights[1:].sum()) / (n * (n - 1))

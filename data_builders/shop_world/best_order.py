"""Best order of a list whose value is a sum over places and over neighbours: exact for short lists, beam above.

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


def best_order(
    attraction: np.ndarray, similarity: np.ndarray, weights: np.ndarray, interaction: float, beam: int = 64
) -> np.ndarray:
    """(B, n) the best order: exact up to `EXACT_UP_TO` items, else beam search refined by swaps.

    Args:
        attraction, similarity, weights, interaction: as in `order_value`.
        beam: width of the beam of longer lists.

    Raises:
        DataError: shapes that do not fit.
    """
    n = attraction.shape[1]
    if similarity.shape != (len(attraction), n, n) or len(weights) < n:
        raise DataError(
            f"For {n} items the similarity must have shape ({len(attraction)}, {n}, {n}) and at least {n} weights, "
            f"got {similarity.shape} and {len(weights)}."
        )
    if n > EXACT_UP_TO:
        return beam_order(attraction, similarity, weights, interaction, beam)
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


def beam_order(
    attraction: np.ndarray, similarity: np.ndarray, weights: np.ndarray, interaction: float, beam: int = 64
) -> np.ndarray:
    """(B, n) a good order: left-to-right beam search from the best prefix values, then swaps of any two places as long
    as one helps. Not proved best; never worse than the order by attraction."""
    B, n = attraction.shape
    sorted_order = np.argsort(-attraction, axis=1, kind="stable")
    made = _beam(attraction, similarity, weights, interaction, beam)
    both = [sorted_order, made]
    values = np.stack([order_value(attraction, similarity, weights, interaction, one).sum(axis=1) for one in both])
    best = np.where((values[1] >= values[0])[:, None], made, sorted_order)
    return _swaps(attraction, similarity, weights, interaction, best) if n > 1 and B else best


def _beam(
    attraction: np.ndarray, similarity: np.ndarray, weights: np.ndarray, interaction: float, beam: int
) -> np.ndarray:
    B, n = attraction.shape
    row = np.arange(B)[:, None]
    order = np.argsort(-attraction, axis=1, kind="stable")[:, : min(beam, n), None]
    value = weights[0] * attraction[row, order[:, :, 0]]
    for k in range(1, n):
        last = order[:, :, -1]
        before, after = weights[k - 1] * attraction[row, last], weights[k] * attraction
        beside = similarity[row, last]
        step = after[:, None, :] - 0.5 * interaction * beside * (before[:, :, None] + after[:, None, :])
        total = value[:, :, None] + step
        used = np.zeros(total.shape, bool)
        np.put_along_axis(used, order, True, axis=2)
        total[used] = -np.inf
        flat = total.reshape(B, -1)
        keep = np.argsort(-flat, axis=1, kind="stable")[:, : min(beam, flat.shape[1])]
        value = np.take_along_axis(flat, keep, axis=1)
        parent, item = keep // n, keep % n
        order = np.concatenate([np.take_along_axis(order, parent[..., None], axis=1), item[..., None]], axis=2)
    return order[:, 0]


def _swaps(
    attraction: np.ndarray, similarity: np.ndarray, weights: np.ndarray, interaction: float, order: np.ndarray
) -> np.ndarray:
    """Best swap of two places for every list at once, until none helps any list."""
    B, n = order.shape
    pairs = np.array(list(combinations(range(n), 2)))
    places = np.tile(np.arange(n), (len(pairs), 1))
    np.put_along_axis(places, pairs, pairs[:, ::-1].copy(), axis=1)
    for _ in range(4 * n):
        tried = order[:, places].reshape(-1, n)
        many = [np.repeat(one, len(pairs), axis=0) for one in (attraction, similarity)]
        value = order_value(*many, weights, interaction, tried).sum(axis=1).reshape(B, -1)
        now = order_value(attraction, similarity, weights, interaction, order).sum(axis=1)
        chosen = value.argmax(axis=1)
        better = value[np.arange(B), chosen] > now + 1e-12
        if not better.any():
            break
        order = np.where(better[:, None], np.take_along_axis(order, places[chosen], axis=1), order)
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

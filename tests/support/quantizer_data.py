"""Vectors that the quantizer tests share, and brute-force oracles."""

from __future__ import annotations

import numpy as np


def power_law(count: int, dims: int = 64, centres: int = 512, seed: int = 42) -> np.ndarray:
    """The power-law mixture of the OneSearch sheet: centres of spread 5, shares `rank^-1.5`, noise 0.5."""
    draw = np.random.default_rng(seed)
    means = 5.0 * draw.normal(size=(centres, dims))
    share = 1.0 / np.arange(1, centres + 1) ** 1.5
    which = draw.choice(centres, size=count, p=share / share.sum())
    return (means[which] + 0.5 * draw.normal(size=(count, dims))).astype(np.float32)


def clusters(count: int = 1200, dims: int = 20, seed: int = 0) -> np.ndarray:
    """Overlapping clusters."""
    draw = np.random.default_rng(seed)
    means = draw.normal(size=(40, dims))
    return (means[draw.integers(0, 40, size=count)] + 0.4 * draw.normal(size=(count, dims))).astype(np.float32)


def nearest_by_hand(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Argmin of float64 squared distances, one row at a time; ties to the lowest index."""
    wide = centroids.astype(np.float64)
    return np.array([((wide - point.astype(np.float64)) ** 2).sum(axis=1).argmin() for point in points])


def own_share(codes: np.ndarray) -> float:
    """ICR by dictionary."""
    rows = [tuple(code) for code in codes.tolist()]
    counts: dict[tuple[int, ...], int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    return sum(counts[row] == 1 for row in rows) / len(rows)


def relative_error(vectors: np.ndarray, rebuilt: np.ndarray) -> float:
    """Squared error over variance."""
    wide = vectors.astype(np.float64)
    return float(((wide - rebuilt) ** 2).sum() / ((wide - wide.mean(axis=0)) ** 2).sum())

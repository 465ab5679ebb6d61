"""Does an encoder put the right items near? Recall of held-out pairs over the whole catalogue.

An anchor (a query, or an item) ranks all items by cosine; a pair counts when its item is among the first k. Items whose cosines
are equal count with the chance they have in a random order of these items, so that neither row order nor luck matters. Our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sidtune.core.errors import ConfigError, DataError
from sidtune.metrics.statistics.bootstrap import paired_bootstrap

_CELLS = 1 << 24
_TIE = 1e-6  # cosines closer than this are equal: float32 sums differ by as much


def pair_hits(
    anchor_vectors: np.ndarray, item_vectors: np.ndarray, pairs: np.ndarray, k: int = 10, among_items: bool = False
) -> np.ndarray:
    """(P,) float64 in [0, 1]: for each pair the chance that its item is among the k nearest of its anchor.

    Args:
        anchor_vectors: (A, d). item_vectors: (N, d). Neither needs length 1; a zero vector has cosine 0 with everything.
        pairs: (P, 2) rows of anchors and items.
        k: cut-off, at least 1.
        among_items: anchors are items themselves (the same rows); an anchor is not ranked for itself.

    Raises:
        ConfigError: k below 1. DataError: shapes that do not fit, or a row out of range.
    """
    if k < 1:
        raise ConfigError(f"k of recall must be 1 or more, got {k}.")
    a, b = _unit(anchor_vectors), _unit(item_vectors)
    fits = pairs.ndim == 2 and pairs.shape[1] == 2 and a.shape[1] == b.shape[1]
    if not fits or (len(pairs) and (pairs.min() < 0 or (pairs.max(axis=0) >= [len(a), len(b)]).any())):
        raise DataError(f"Pairs must be (P, 2) rows of {a.shape} anchors and {b.shape} items of one width.")
    order = np.argsort(pairs[:, 0], kind="stable")
    hits = np.empty(len(pairs))
    for start in range(0, len(order), step := max(1, _CELLS // max(len(b), 1))):
        part = order[start : start + step]
        anchors, place = np.unique(pairs[part, 0], return_inverse=True)
        similarity = a[anchors] @ b.T
        if among_items:
            similarity[np.arange(len(anchors)), anchors] = -np.inf
        rows = similarity[place]
        target = rows[np.arange(len(part)), pairs[part, 1]][:, None]
        before = (rows > target + _TIE).sum(axis=1)
        tied = (np.abs(rows - target) <= _TIE).sum(axis=1)
        hits[part] = np.clip((k - before) / np.maximum(tied, 1), 0.0, 1.0)
    return hits


def compare_recall(
    hits: dict[str, np.ndarray], anchors: np.ndarray, first: str, second: str, samples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Mean hits of every encoder, and `second` minus `first` with a paired bootstrap interval over anchors.

    Args:
        hits: encoder → (P,) hits of the same pairs. anchors: (P,) the anchor of each pair.

    Returns:
        JSON-ready `pairs`, `anchors`, `recall`, and `difference`, `low`, `high`, `p_value` (null with fewer than two anchors).
    """
    many = len(np.unique(anchors))
    row: dict[str, Any] = {"pairs": len(anchors), "anchors": many}
    row["recall"] = {name: float(values.mean()) if len(values) else None for name, values in hits.items()}
    found = None
    if many >= 2:
        found = paired_bootstrap(hits[second], hits[first], samples=samples, seed=seed, clusters=anchors.tolist())
    for name in ("difference", "low", "high", "p_value"):
        row[name] = None if found is None else float(getattr(found, name))
    return row


def recall_to_markdown(rows: Sequence[dict[str, Any]], k: int, names: Sequence[str]) -> str:
    """A table of rows of `compare_recall` that also have `pairs_of` (what the pairs are)."""
    lines = [
        "| held-out pairs | pairs | "
        + " | ".join(f"{name} recall@{k}" for name in names)
        + " | last minus first [95 %] |",
        "|---|---:|" + "---:|" * (len(names) + 1),
    ]
    for row in rows:
        cells = ["" if row["recall"][name] is None else f"{row['recall'][name]:.4f}" for name in names]
        change = "" if row["low"] is None else f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
        lines.append(f"| {row['pairs_of']} | {row['pairs']:,} | " + " | ".join(cells) + f" | {change} |")
    return "\n".join(lines)


def _unit(vectors: np.ndarray) -> np.ndarray:
    if vectors.ndim != 2:
        raise DataError(f"Vectors must have two dimensions, got the shape {vectors.shape}.")
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(length > 0, length, 1.0)).astype(np.float32)

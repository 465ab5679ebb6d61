"""Nearest centroid of every point, exactly: float32 products propose, float64 decides where rounding could matter.

`argmin_j ||x - c_j||² = argmax_j (x·c_j - ||c_j||² / 2)`. The products come from one matrix multiplication per block of points; two
reductions find the best score and the second best. A row whose two lie within the rounding of float32 is in doubt: all centroids
within that distance of its best are compared in float64, and ties go to the lowest index. Codes therefore depend neither on batch,
thread count nor on saving and loading.

Our choice; a search for two neighbours with faiss finds the same rows in doubt, but costs more than the search for one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

_SCORES = 1 << 22  # float32 scores held at once: 16 MiB; in smaller blocks the multiplication is slower
_ROWS = 4096  # rows of points multiplied at once, at most
_CACHED = 1 << 18  # scores that the reductions read at a time: 1 MiB, which stay in cache
_NUMBERS = 1 << 16  # float64 numbers held at once when rows in doubt are decided: 512 KiB, which stay in cache
_PAIRS = 1 << 20  # candidates of rows in doubt held at once
_NEVER = float("-inf")


def nearest_centroids(
    points: np.ndarray,
    centroids: np.ndarray,
    *,
    exact: Callable[[np.ndarray], np.ndarray] | None = None,
    lengths: np.ndarray | None = None,
) -> np.ndarray:
    """Index of the nearest centroid of each point under the exact squared distance; ties go to the lowest index.

    Args:
        points, centroids: (n, d) and (k, d) float32.
        exact: for points that are themselves rounded results: row numbers → those points (m, d) in float64.
        lengths: (n,) lengths of what `points` were computed from, from which their rounding follows; default their own.

    Returns:
        (n,) int64.
    """
    count, dims = points.shape
    best = np.zeros(count, dtype=np.int64)
    if len(centroids) == 1 or not count:
        return best
    own = row_lengths(points) if lengths is None else lengths
    wide = centroids.astype(np.float64)
    squares = np.einsum("kd,kd->k", wide, wide)
    margin = rounding(own, float(np.sqrt(squares.max())), dims)
    turned, half = np.ascontiguousarray(centroids.T), (squares * 0.5).astype(np.float32)
    block, step = (max(1, numbers // len(centroids)) for numbers in (_SCORES, _CACHED))
    block = min(block, _ROWS, count)
    buffer = np.empty((block, len(centroids)), dtype=np.float32)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    held = 0
    for start in range(0, count, block):
        part = points[start : start + block]
        products = np.matmul(part, turned, out=buffer[: len(part)])
        for begin in range(0, len(part), step):
            scores, place = products[begin : begin + step], start + begin
            scores -= half
            chosen = scores.argmax(axis=1)
            best[place : place + len(scores)] = chosen
            row, column = _in_doubt(scores, chosen, margin[place : place + len(scores)])
            pairs.append((row + place, column))
            held += len(row)
            if held > _PAIRS:
                _decide(best, pairs, points, wide, exact)
                pairs, held = [], 0
    _decide(best, pairs, points, wide, exact)
    return best


def rounding(lengths: np.ndarray, longest: float, dims: int) -> np.ndarray:
    """(n,) how far two scores of a point of these lengths may be apart in float32 where they are equal, at most.

    A score is a sum of d products, at most `lengths * longest`, less half a square. Roundings of such a sum add up to 8 √d of
    them but once in 10^13 pairs (Higham and Mary 2019), not to the worst case d.
    """
    unit = np.finfo(np.float32).eps / 2
    return (4 * np.sqrt(dims) + 4) * unit * (lengths + longest) ** 2


def _in_doubt(scores: np.ndarray, chosen: np.ndarray, margin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row, centroid), in this order, of the rows whose second best score comes within `margin` of the best."""
    places = np.arange(len(scores))
    top = scores[places, chosen]
    scores[places, chosen] = _NEVER
    second = torch.from_numpy(scores).amax(dim=1).numpy()  # with vector instructions, which numpy's max has not
    doubt = np.flatnonzero(~(top - second > margin))
    scores[doubt, chosen[doubt]] = top[doubt]
    near = ~(scores[doubt] < (top - margin)[doubt, None].astype(np.float32))
    row, column = np.divmod(np.flatnonzero(near.ravel()), scores.shape[1])
    return doubt[row], column


def _decide(
    best: np.ndarray,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    points: np.ndarray,
    centroids: np.ndarray,
    exact: Callable[[np.ndarray], np.ndarray] | None,
) -> None:
    """Sets `best` of the rows in doubt to the nearest of their candidates, in float64; pairs (row, centroid) come sorted."""
    if not pairs:
        return
    rows, columns = (np.concatenate(side) for side in zip(*pairs, strict=True))
    if len(rows) > 16 * (1 + np.count_nonzero(np.diff(rows))):
        # Many equal centroids, as where a level has more codes than distinct residuals: the first of each is enough.
        _, first, group = np.unique(centroids, axis=0, return_index=True, return_inverse=True)
        kept = first[group.reshape(-1)][columns] == columns
        rows, columns = rows[kept], columns[kept]
    distances = np.empty(len(rows))
    step = max(1, _NUMBERS // centroids.shape[1])
    for start in range(0, len(rows), step):
        row, column = rows[start : start + step], columns[start : start + step]
        named, place = np.unique(row, return_inverse=True)
        wide = points[named].astype(np.float64) if exact is None else exact(named)
        left = wide[place.reshape(-1)] - centroids[column]
        # Sums the squared differences themselves, in an order of the width alone, so equal centroids get equal distances.
        distances[start : start + step] = np.square(left, out=left).sum(axis=1)
    begin = np.flatnonzero(np.diff(rows, prepend=-1))
    if not len(begin):
        return
    lowest = np.repeat(np.minimum.reduceat(distances, begin), np.diff(np.append(begin, len(rows))))
    nearest = np.flatnonzero(distances == lowest)
    row, place = np.unique(rows[nearest], return_index=True)
    best[row] = columns[nearest[place]]


def row_lengths(points: np.ndarray) -> np.ndarray:
    """(n,) Euclidean lengths of points (n, d), without the copy that `np.linalg.norm` makes."""
    return np.sqrt(np.einsum("nd,nd->n", points, points))

"""Pairs that belong together, mined from a log: ItemCF, Swing, and the filter by similarity of a base encoder.

A log is a binary matrix of *owners* (rows) and *things* (columns). Items that the same users chose give item pairs (owners =
users, things = items); queries that led to the same items give query pairs (owners = items, things = queries). OneSearch (section
3.1.1) mines its positives "with ItemCF and Swing" and keeps a pair only if the base encoder's cosine is above 0.6; it gives no
formulas, so these are the textbook ones:

    ItemCF   s(i, j) = |U_i ∩ U_j| / sqrt(|U_i| |U_j|)
    Swing    s(i, j) = sum over u < v in U_i ∩ U_j of w_u w_v / (alpha + |I_u ∩ I_v|),   w_u = 1 / sqrt(|I_u|)

with U_i the owners of thing i and I_u the things of owner u. ItemCF: Sarwar et al. 2001.
Swing: Yang et al. 2020 (arXiv 2010.05525); their sum names every pair of owners twice and an owner with himself, ours each pair
once, which leaves the order of things alone but for the term of the owner with himself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from sidtune.core.errors import ConfigError, DataError

_CELLS = 1 << 24  # cells of a block of rows
_OWNER_PAIRS = 1 << 21  # pairs of owners held at once


@dataclass(frozen=True)
class Pairs:
    """Pairs of row numbers; mined ones are grouped by `left`, best first.

    Attributes:
        left, right: (P,) int64 rows.
        score: (P,) float64, what the method says.
        support: (P,) int64, how many owners have both.
    """

    left: np.ndarray
    right: np.ndarray
    score: np.ndarray
    support: np.ndarray

    def __len__(self) -> int:
        return len(self.left)

    def take(self, which: np.ndarray) -> Pairs:
        """The chosen pairs, by a mask or by place."""
        return Pairs(self.left[which], self.right[which], self.score[which], self.support[which])

    def rows(self) -> np.ndarray:
        """(P, 2) int64."""
        return np.stack([self.left, self.right], axis=1)


def interaction_matrix(owners: np.ndarray, things: np.ndarray, n_owners: int, n_things: int) -> sp.csr_matrix:
    """(n_owners, n_things) binary float64 matrix: 1 where the owner has the thing, however often.

    Args:
        owners, things: (E,) int64 rows, one entry per event.

    Raises:
        DataError: lengths differ, or a row is out of range.
    """
    owners, things = np.asarray(owners, dtype=np.int64), np.asarray(things, dtype=np.int64)
    if owners.shape != things.shape or owners.ndim != 1:
        raise DataError(f"Owners and things must be lists of one length, got {owners.shape} and {things.shape}.")
    for what, rows, count in (("owner", owners, n_owners), ("thing", things, n_things)):
        if len(rows) and not (rows.min() >= 0 and rows.max() < count):
            raise DataError(f"A row of the {what}s lies outside [0, {count}); number the {what}s from 0.")
    matrix = sp.csr_matrix((np.ones(len(owners)), (owners, things)), shape=(n_owners, n_things))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def item_cf(matrix: sp.csr_matrix, k: int = 20, min_support: int = 2) -> Pairs:
    """The `k` most similar things of each thing by ItemCF.

    Args:
        matrix: binary, of `interaction_matrix`.
        k: pairs per anchor, at most; ties by the other's row.
        min_support: fewest owners that have both, at least 1.

    Raises:
        ConfigError: k or min_support below 1.
    """
    _check(k, min_support)
    norms = np.sqrt(np.asarray(matrix.sum(axis=0)).ravel())
    by_thing = matrix.T.tocsr()
    count = matrix.shape[1]
    parts = []
    for start in range(0, count, step := max(1, _CELLS // max(count, 1))):
        seen = (by_thing[start : start + step] @ matrix).tocoo()
        left, right = seen.row.astype(np.int64) + start, seen.col.astype(np.int64)
        score = seen.data / (norms[left] * norms[right])
        parts.append(_best(Pairs(left, right, score, np.rint(seen.data).astype(np.int64)), k, min_support))
    return _joined(parts)


def swing(matrix: sp.csr_matrix, alpha: float = 1.0, k: int = 20, min_support: int = 2, max_owners: int = 300) -> Pairs:
    """The `k` most similar things of each thing by Swing.

    The sum runs over pairs of owners, so a thing of n owners costs n²/2. `max_owners` bounds it: of a thing with more, only
    the owners with the fewest things take part (ties by row), who weigh most in the exact sum. |I_u ∩ I_v|, w and the
    support are those of the whole matrix. With `max_owners` at or above the largest number of owners the result is exact.

    Args:
        matrix: binary, of `interaction_matrix`.
        alpha: smoothing of the formula, above 0.
        k, min_support: as in `item_cf`. A Swing score needs two owners in any case.
        max_owners: owners per thing that take part, at least 2.

    Raises:
        ConfigError: an option out of range.
    """
    _check(k, min_support)
    if not (alpha > 0 and max_owners >= 2):
        raise ConfigError(f"Swing needs alpha above 0 and max_owners of 2 or more, got {alpha} and {max_owners}.")
    sizes = np.asarray(matrix.sum(axis=1)).ravel()
    weight = 1.0 / np.sqrt(np.maximum(sizes, 1.0))
    kept = _capped(matrix, sizes, max_owners)
    total = sp.csr_matrix((matrix.shape[1], matrix.shape[1]))
    for first, second in _owner_pairs(kept):
        both = kept[first].multiply(kept[second]).tocsr()
        overlap = np.asarray(matrix[first].multiply(matrix[second]).sum(axis=1)).ravel()
        total = total + both.T @ (sp.diags(weight[first] * weight[second] / (alpha + overlap)) @ both)
    found = total.tocoo()
    left, right = found.row.astype(np.int64), found.col.astype(np.int64)
    apart = left != right
    left, right, score = left[apart], right[apart], found.data[apart]
    return _best(Pairs(left, right, score, _support(matrix, left, right)), k, min_support)


def merged(*mined: Pairs) -> Pairs:
    """Union of pairs of one kind without regard to direction: `left < right`, each pair once, in order of rows.

    A pair that several inputs hold keeps the score of the first of them; the support is the largest.
    """
    whole = _joined(list(mined))
    left, right = np.minimum(whole.left, whole.right), np.maximum(whole.left, whole.right)
    pairs, first, group = np.unique(np.stack([left, right], axis=1), axis=0, return_index=True, return_inverse=True)
    support = np.zeros(len(pairs), dtype=np.int64)
    np.maximum.at(support, group.ravel(), whole.support)
    return Pairs(pairs[:, 0], pairs[:, 1], whole.score[first], support)


def counted(left: np.ndarray, right: np.ndarray, k: int | None = None, min_support: int = 1) -> Pairs:
    """Distinct pairs of an event list, score and support = how often they occur; the `k` most frequent of each `left`.

    Args:
        left, right: (E,) int64 rows. k: None keeps all. min_support: fewest occurrences.
    """
    _check(1 if k is None else k, min_support)
    events = np.stack([np.asarray(left, dtype=np.int64), np.asarray(right, dtype=np.int64)], axis=1)
    pairs, times = np.unique(events, axis=0, return_counts=True)
    found = Pairs(pairs[:, 0], pairs[:, 1], times.astype(np.float64), times.astype(np.int64))
    return _best(found, len(found) if k is None else k, min_support, apart=False)


def cosines(left: np.ndarray, right: np.ndarray, vectors_left: np.ndarray, vectors_right: np.ndarray) -> np.ndarray:
    """(P,) float64 cosine of row `left` of one matrix and row `right` of the other; 0 where a vector is zero.

    Raises:
        DataError: the matrices have different widths, or a row is outside its matrix.
    """
    if vectors_left.ndim != 2 or vectors_right.ndim != 2 or vectors_left.shape[1] != vectors_right.shape[1]:
        raise DataError(f"Vectors must be (n, d) of one width, got {vectors_left.shape} and {vectors_right.shape}.")
    for rows, vectors in ((left, vectors_left), (right, vectors_right)):
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(vectors)):
            raise DataError(f"A pair names a row outside the {len(vectors)} vectors; encode every text that occurs.")
    found = np.empty(len(left))
    for start in range(0, len(left), step := max(1, _CELLS // max(vectors_left.shape[1], 1))):
        part = slice(start, start + step)
        a, b = vectors_left[left[part]].astype(np.float64), vectors_right[right[part]].astype(np.float64)
        length = np.sqrt(np.einsum("nd,nd->n", a, a) * np.einsum("nd,nd->n", b, b))
        found[part] = np.einsum("nd,nd->n", a, b) / np.where(length > 0, length, 1.0)
    return found


def keep_similar(
    pairs: Pairs, vectors_left: np.ndarray, vectors_right: np.ndarray, threshold: float = 0.6
) -> tuple[Pairs, np.ndarray]:
    """The pairs whose base cosine is above `threshold` (OneSearch: 0.6), and the cosines of all pairs given.

    Args:
        pairs: `left` names rows of `vectors_left` (n, d), `right` rows of `vectors_right` (m, d).
        threshold: in [-1, 1]; -1 keeps all but exactly opposite ones.

    Raises:
        ConfigError: threshold out of range. DataError: as `cosines`.
    """
    if not -1 <= threshold <= 1:
        raise ConfigError(f"The threshold is a cosine in [-1, 1], got {threshold}.")
    values = cosines(pairs.left, pairs.right, vectors_left, vectors_right)
    return pairs.take(values > threshold), values


def _check(k: int, min_support: int) -> None:
    if k < 1 or min_support < 1:
        raise ConfigError(f"k and min_support of mined pairs must be 1 or more, got {k} and {min_support}.")


def _best(pairs: Pairs, k: int, min_support: int, apart: bool = True) -> Pairs:
    """The k best of each `left` with enough support; with `apart` no pair of a row with itself."""
    keep = pairs.support >= min_support
    pairs = pairs.take(keep & (pairs.left != pairs.right) if apart else keep)
    order = np.lexsort((pairs.right, -pairs.score, pairs.left))
    pairs = pairs.take(order)
    starts = np.flatnonzero(np.r_[True, pairs.left[1:] != pairs.left[:-1]]) if len(pairs) else np.empty(0, np.int64)
    rank = np.arange(len(pairs)) - np.repeat(starts, np.diff(np.r_[starts, len(pairs)]))
    return pairs.take(rank < k)


def _joined(parts: list[Pairs]) -> Pairs:
    kinds = {"left": np.int64, "right": np.int64, "score": np.float64, "support": np.int64}
    return Pairs(
        *(np.concatenate([np.empty(0, kind), *(getattr(p, name) for p in parts)]) for name, kind in kinds.items())
    )


def _capped(matrix: sp.csr_matrix, sizes: np.ndarray, max_owners: int) -> sp.csr_matrix:
    """The matrix with at most `max_owners` owners in each column, those with the fewest things."""
    entries = matrix.tocoo()
    order = np.lexsort((entries.row, sizes[entries.row], entries.col))
    counts = np.bincount(entries.col, minlength=matrix.shape[1])
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = order[rank < max_owners]
    return sp.csr_matrix((np.ones(len(chosen)), (entries.row[chosen], entries.col[chosen])), shape=matrix.shape)


def _owner_pairs(kept: sp.csr_matrix) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(first, second) owner rows, first < second, of all pairs that share two things or more, in pieces."""
    work = np.cumsum(kept @ np.asarray(kept.sum(axis=0)).ravel())  # at most so many partners up to each owner
    transposed, start = kept.T.tocsr(), 0
    while start < kept.shape[0]:
        reached = work[start - 1] if start else 0.0
        stop = max(start + 1, int(np.searchsorted(work, reached + _OWNER_PAIRS, side="right")))
        shared = (kept[start:stop] @ transposed).tocoo()
        first, second = shared.row.astype(np.int64) + start, shared.col.astype(np.int64)
        wanted = (second > first) & (shared.data > 1.5)
        if wanted.any():
            yield first[wanted], second[wanted]
        start = stop


def _support(matrix: sp.csr_matrix, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(P,) how many owners have both things."""
    by_thing = matrix.T.tocsr()
    parts = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(left), _OWNER_PAIRS // 8):
        part = slice(start, start + _OWNER_PAIRS // 8)
        both = by_thing[left[part]].multiply(by_thing[right[part]]).sum(axis=1)
        parts.append(np.rint(np.asarray(both).ravel()).astype(np.int64))
    return np.concatenate(parts)

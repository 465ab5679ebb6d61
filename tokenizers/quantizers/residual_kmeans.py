"""Residual k-means: level by level, k-means on what the levels before left over (OneSearch, section 3.1.3).

Level l: `a_l = argmin_j ||r_{l-1} - C_l[j]||²`, `r_l = r_{l-1} - C_l[a_l]`, `r_0` = the item vector; 25 Lloyd
iterations of `faiss.Kmeans` per level, as in the released code.

Where it differs from the paper and its code (our choices):
- Repeated residuals are merged into one weighted point before training. The objective is the same, but a pile of equal
  points (duplicate items, residuals that became zero) can no longer take several centroids.
- A level with at least as many codes as distinct residuals needs no k-means: every distinct residual is its own
  centroid, the remaining codes repeat centroid 0 and are never assigned. One warning says so.
- Assignment is exact (`nearest_centroids.py`), so codes depend neither on batch, thread count nor on saving and loading.
- New vectors are encoded with the frozen codebooks, which the released code cannot do.
- Training holds the vectors and one residual, which every level changes in place; encoding goes block by block.
- The paper's third-level balancing and OPQ levels are quantizers of their own: `balanced_kmeans.py`, `rq_opq.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.letters import check_sizes
from sidtune.tokenizers.quantizers.base import Quantizer
from sidtune.tokenizers.quantizers.nearest_centroids import nearest_centroids
from sidtune.tokenizers.vectors import check_vectors

_COLUMNS = 3  # first columns that sort distinct rows
_ROWS = 2048  # rows hashed, compared or subtracted at once


@dataclass
class ResidualKMeansConfig:
    """Options of `ResidualKMeans`.

    Attributes:
        level_sizes: codes per level. Default (256, 256, 256), the size of most published SIDs.
        iterations: Lloyd iterations per level (paper code: 25).
        seed: seed of every level; the same seed, vectors and thread count give the same codebooks.
        normalize_residuals: scale every residual to length 1 before the next level (an option of the paper's code,
            off). Decoding then uses the mean residual lengths of the training vectors, so it is worse than without.
        max_points_per_centroid: at most this many training vectors per centroid are drawn (paper code: 10000).
        restarts: best of this many k-means runs per level (faiss `nredo`).
        chunk_size: rows per block when encoding; memory only, codes do not depend on it.
    """

    level_sizes: Sequence[int] = (256, 256, 256)
    iterations: int = 25
    seed: int = 0
    normalize_residuals: bool = False
    max_points_per_centroid: int = 10_000
    restarts: int = 1
    chunk_size: int = 65_536

    def __post_init__(self) -> None:
        self.level_sizes = check_sizes(self.level_sizes)
        check_range(self, 1, "iterations", "max_points_per_centroid", "restarts", "chunk_size", most=2**31)
        check_range(self, 0, "seed", most=2**31 - 1 - len(self.level_sizes))


def _unit_rows(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    lengths[lengths == 0] = 1.0
    return points / lengths, lengths


def training_rows(count: int, size: int, max_points_per_centroid: int, seed: int) -> np.ndarray | None:
    """The rows that faiss draws from `count` points to train `size` centroids, or None where it takes all of them."""
    import faiss

    most = size * max_points_per_centroid
    if count <= most:
        return None
    order = np.empty(count, dtype=np.int32)
    faiss.rand_perm(faiss.swig_ptr(order), count, seed)
    return order[:most]


def merged(points: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Distinct rows of points (n, d) float32 and how often each occurs.

    Returns:
        `(points, None)`, without a copy, when no row occurs twice; else `(distinct, counts)`, rows in ascending order.
    """
    keys = np.concatenate([_row_hashes(points[i : i + _ROWS]) for i in range(0, len(points), _ROWS)])
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    if not len(same):
        return points, None
    for i in range(0, len(same), _ROWS):
        part = same[i : i + _ROWS]
        if (points[order[part]] != points[order[part + 1]]).any():  # two rows of one hash: sort all rows themselves
            distinct, counts = np.unique(points, axis=0, return_counts=True)
            return distinct, counts
    starts = np.setdiff1d(np.arange(len(points)), same + 1, assume_unique=True)
    rows, counts = order[starts], np.diff(np.append(starts, len(points)))
    place = _ascending(points, rows)
    return points[rows[place]], counts[place]


def _ascending(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Order of distinct rows: by their first columns, which nearly always decide; by all where they do not."""
    front = points[rows, : min(_COLUMNS, points.shape[1])]
    place = np.lexsort(front.T[::-1])
    front = front[place]
    if (front[1:] != front[:-1]).any(axis=1).all():
        return place
    return np.unique(points[rows], axis=0, return_index=True)[1]


def _row_hashes(points: np.ndarray) -> np.ndarray:
    """(n,) uint64, equal for equal rows; adding zero makes -0.0 equal to 0.0."""
    words = np.pad(points + np.float32(0), ((0, 0), (0, points.shape[1] % 2))).view(np.uint64)
    factors = np.random.default_rng(0).integers(0, 2**63, words.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return np.einsum("nd,d->n", words, factors)


def train_centroids(
    points: np.ndarray,
    size: int,
    *,
    seed: int,
    iterations: int = 25,
    restarts: int = 1,
    max_points_per_centroid: int = 10_000,
) -> tuple[np.ndarray, int]:
    """k-means of faiss on points (n, d) float32, repeated points merged into weighted ones.

    With more than `size * max_points_per_centroid` points it trains on the same draw as faiss would.

    Returns:
        `(centroids (size, d) float32, distinct)`: with `distinct`, the number of distinct points, at most `size`, every
        point is a centroid and the rest repeat the first.
    """
    import faiss

    rows = training_rows(len(points), size, max_points_per_centroid, seed)
    distinct, counts = merged(points if rows is None else points[rows])
    if rows is not None and len(distinct) <= size:
        distinct, counts = merged(points)
    if len(distinct) <= size:
        distinct = np.unique(distinct, axis=0)
        return np.concatenate([distinct, np.repeat(distinct[:1], size - len(distinct), axis=0)]), len(distinct)
    kmeans = faiss.Kmeans(
        points.shape[1],
        size,
        niter=iterations,
        nredo=restarts,
        seed=seed,
        max_points_per_centroid=max_points_per_centroid,
        min_points_per_centroid=1,
    )
    kmeans.train(distinct, weights=None if counts is None else counts.astype(np.float32))
    centroids = np.ascontiguousarray(kmeans.centroids, dtype=np.float32)
    dead = ~np.isfinite(centroids).all(axis=1)
    centroids[dead] = distinct[:1]
    return centroids, len(distinct)


def subtracted(points: np.ndarray, book: np.ndarray, codes: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
    """`points - book[codes]`, block by block, written to `into` (may be `points` itself) or a new array."""
    result = np.empty_like(points) if into is None else into
    for i in range(0, len(points), _ROWS):
        np.subtract(points[i : i + _ROWS], book[codes[i : i + _ROWS]], out=result[i : i + _ROWS])
    return result


class ResidualKMeans(Quantizer):
    """Residual k-means quantizer.

    Attributes:
        notes: after `fit`, one sentence per level that was larger than its number of distinct residuals.
    """

    name: ClassVar[str] = "residual_kmeans"
    config_class: ClassVar[type] = ResidualKMeansConfig

    def __init__(self, config: ResidualKMeansConfig | None = None) -> None:
        super().__init__(config)
        self.notes: list[str] = []
        self._codebooks: list[np.ndarray] = []
        self._scales = np.ones(self.depth, dtype=np.float32)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        return tuple(self.config.level_sizes)

    @property
    def dims(self) -> int | None:
        return self._codebooks[0].shape[1] if self._codebooks else None

    @property
    def codebooks(self) -> list[np.ndarray]:
        self._require_fit()
        return self._codebooks

    def fit_encode(self, vectors: np.ndarray) -> np.ndarray:
        codes = self._learn(vectors)[0]
        if self.notes:
            warnings.warn(" ".join(self.notes), stacklevel=2)
        return codes

    def _learn(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes and last residual of the training; `notes` are left to the caller."""
        residual = check_vectors(vectors)
        self.notes, codebooks = [], []
        codes = np.empty((len(residual), self.depth), dtype=np.int32)
        lengths = np.ones((len(residual), 1), dtype=np.float64)
        scales = np.ones(self.depth, dtype=np.float32)
        for level, size in enumerate(self.level_sizes):
            scales[level] = lengths.mean()
            centroids, codes[:, level] = self._fit_level(residual, level, size, codes[:, :level])
            codebooks.append(centroids)
            # The first residual is the caller's array; the later ones are our own and change in place.
            residual = subtracted(residual, centroids, codes[:, level], None if level == 0 else residual)
            if self.config.normalize_residuals:
                residual, step = _unit_rows(residual)
                lengths *= step
        self._codebooks, self._scales = codebooks, scales
        return codes, residual

    def _train_level(self, residual: np.ndarray, level: int, size: int) -> np.ndarray:
        config = self.config
        centroids, distinct = train_centroids(
            residual,
            size,
            seed=config.seed + level,
            iterations=config.iterations,
            restarts=config.restarts,
            max_points_per_centroid=config.max_points_per_centroid,
        )
        if distinct < size:
            self.notes.append(
                f"Level {level + 1} of the residual k-means has {size} codes but only {distinct} distinct "
                f"vectors to cover, so {size - distinct} codes stay unused; lower level_sizes[{level}]."
            )
        return centroids

    def _fit_level(self, residual: np.ndarray, level: int, size: int, before: np.ndarray) -> tuple[Any, np.ndarray]:
        """`(codebook (size, d), codes (n,))` of one level; `before` (n, level) are the codes of the levels above."""
        centroids = self._train_level(residual, level, size)
        return centroids, self._assign(residual, centroids)

    def _assign(self, residual: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        step = self.config.chunk_size
        parts = [nearest_centroids(residual[i : i + step], centroids) for i in range(0, len(residual), step)]
        return np.concatenate(parts)

    def _encode(self, vectors: np.ndarray) -> np.ndarray:
        return self._walk(vectors)[0]

    def residual(self, vectors: np.ndarray, depth: int | None = None) -> np.ndarray:
        """What is left of vectors (n, d) after `depth` levels (default: all), float32 (n, d).

        Without `normalize_residuals`, vectors = decode(encode(vectors)) + residual(vectors) up to float32 rounding.
        """
        self._require_fit()
        return self._walk(check_vectors(vectors, self.dims), depth)[1]

    def _walk(self, residual: np.ndarray, depth: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Codes and what is left of checked vectors."""
        depth = self.depth if depth is None else depth
        if not 0 <= depth <= self.depth:
            raise ConfigError(f"depth must lie in [0, {self.depth}], got {depth}.")
        codes = np.empty((len(residual), depth), dtype=np.int32)
        for level in range(depth):
            chosen = self._assign(residual, self._codebooks[level])
            codes[:, level] = chosen
            residual = subtracted(residual, self._codebooks[level], chosen, None if level == 0 else residual)
            if self.config.normalize_residuals:
                residual = _unit_rows(residual)[0]
        return codes, residual

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        """Sum of the chosen centroids."""
        total = np.zeros((len(codes), self.dims or 0), dtype=np.float32)
        for level in range(codes.shape[1]):
            total += self._scales[level] * self._codebooks[level][codes[:, level]]
        return total

    def _tensors(self) -> dict[str, np.ndarray]:
        return {f"level_{n}": book for n, book in enumerate(self._codebooks)} | {"scales": self._scales}

    def _set_tensors(self, tensors: dict[str, Any]) -> None:
        names = [f"level_{n}" for n in range(self.depth)]
        self._lacks(tensors, *names, "scales")
        books = [check_vectors(tensors[name], what=f"centroids of {name}") for name in names]
        for name, book, size in zip(names, books, self.level_sizes, strict=True):
            if len(book) != size or book.shape[1] != books[0].shape[1]:
                raise DataError(
                    f"The saved tensor '{name}' has shape {book.shape}, expected ({size}, {books[0].shape[1]}) from "
                    "the config beside it; write the quantizer folder again."
                )
        self._codebooks, self._scales = books, np.asarray(tensors["scales"], dtype=np.float32)

"""Product quantization of item vectors, with a learned rotation (OPQ) or without (PQ).

The vector is cut into M parts (after a rotation R that makes the parts easy to code), each part has its own codebook of
k-means centroids: `a_m = argmin_j ||(R x)_m - C_m[j]||²`, `x̂ = Rᵀ [C_1[a_1], ..., C_M[a_M]]`. PQ: Jégou et al. 2011; OPQ:
Ge et al. 2013; R and the codebooks are trained by faiss (`OPQMatrix`, `ProductQuantizer`).

Where it differs from its sources (our choices):
- Assignment is exact: the rotation runs in float32, rows whose two nearest centroids lie within its rounding are rotated
  and compared again in float64, ties go to the lowest index. Codes depend neither on batch nor on thread count.
- A width that M does not divide is padded with zeros.
- Parts with fewer distinct vectors than codes make each of them a centroid; faiss would refuse.
- The prefix of a code decodes to the mean for the parts that are missing; the levels of a product code have no order, so
  its prefixes mean little. Use it as the tail of a residual quantizer (`rq_opq.py`), or alone for comparison.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.letters import check_sizes
from sidtune.tokenizers.quantizers.base import Quantizer
from sidtune.tokenizers.quantizers.nearest_centroids import nearest_centroids, row_lengths
from sidtune.tokenizers.quantizers.residual_kmeans import train_centroids, training_rows
from sidtune.tokenizers.vectors import check_vectors

_TURNED = 32  # rows of one product in float64


def _turned(points: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """(m, w) float64 products of points (m, d) with a part (w, d) of the rotation.

    In blocks of one size, the last one filled up with zeros: a product adds in an order that follows from its size, so a point has
    the same numbers whatever stands beside it.
    """
    blocks = np.zeros((-(-len(points) // _TURNED), _TURNED, points.shape[1]))
    blocks.reshape(-1, points.shape[1])[: len(points)] = points
    return (blocks @ turn.T).reshape(-1, len(turn))[: len(points)]


@dataclass
class ProductQuantizerConfig:
    """Options of `ProductQuantizer`.

    Attributes:
        parts: number of parts M, one SID level each.
        codes_per_part: codes of each part, a power of two.
        rotate: learn the rotation (OPQ); false is plain PQ.
        rotation_rounds: rounds of alternating rotation and codebooks (faiss: 50).
        iterations: Lloyd iterations per part (faiss: 25).
        max_points_per_centroid: at most this many training vectors per centroid are drawn (faiss: 256).
        seed: of the k-means starts. faiss draws the training subset of its rotation with a seed of its own.
        chunk_size: rows per block when encoding; memory only.
    """

    parts: int = 4
    codes_per_part: int = 256
    rotate: bool = True
    rotation_rounds: int = 50
    iterations: int = 25
    max_points_per_centroid: int = 256
    seed: int = 1234
    chunk_size: int = 65_536

    def __post_init__(self) -> None:
        names = ("parts", "rotation_rounds", "iterations", "max_points_per_centroid", "chunk_size")
        check_range(self, 1, *names, most=2**31)
        check_range(self, 0, "seed", most=2**31 - 1)
        size = self.codes_per_part
        if not 2 <= size <= 65_536 or size & (size - 1):
            raise ConfigError(f"codes_per_part must be a power of two in [2, 65536], got {size}.")
        check_sizes((size,) * self.parts)


class ProductQuantizer(Quantizer):
    """PQ and OPQ.

    Attributes:
        rotation: (parts * width, d) float32, orthonormal columns; the identity (padded) without `rotate`.
        notes: after `fit`, one sentence per part with fewer distinct vectors than codes.
    """

    name: ClassVar[str] = "product_quantizer"
    config_class: ClassVar[type] = ProductQuantizerConfig

    def __init__(self, config: ProductQuantizerConfig | None = None) -> None:
        super().__init__(config)
        self.notes: list[str] = []
        self.rotation = np.zeros((0, 0), dtype=np.float32)
        self._centroids = np.zeros((0, 0, 0), dtype=np.float32)  # (M, k, width)
        self._means = np.zeros((0, 0), dtype=np.float32)  # (M, width): mean reconstruction of the training vectors

    @property
    def level_sizes(self) -> tuple[int, ...]:
        return (self.config.codes_per_part,) * self.config.parts

    @property
    def dims(self) -> int | None:
        return self.rotation.shape[1] if len(self._centroids) else None

    @property
    def codebooks(self) -> list[np.ndarray]:
        """Per part (k, d): the centroids minus the part's mean, turned back into the space of the vectors."""
        self._require_fit()
        width = self._centroids.shape[2]
        turned = [
            (self._centroids[m] - self._means[m]) @ self.rotation[m * width : (m + 1) * width]
            for m in range(self.config.parts)
        ]
        return [np.ascontiguousarray(book, dtype=np.float32) for book in turned]

    def fit_encode(self, vectors: np.ndarray) -> np.ndarray:
        vectors = check_vectors(vectors)
        dims, parts = vectors.shape[1], self.config.parts
        if parts > dims:
            raise ConfigError(f"{parts} parts need vectors of at least {parts} dimensions, got {dims}; lower parts.")
        width = -(-dims // parts)
        self.notes = []
        rotation = np.eye(parts * width, dims, dtype=np.float32)
        if self.config.rotate and len(np.unique(vectors[: 4 * self.config.codes_per_part], axis=0)) > 1:
            rotation = self._train_rotation(vectors, parts, width)
        self.rotation = np.ascontiguousarray(rotation)
        self._centroids = np.stack(self._train_parts(vectors, width))
        self._means = np.zeros((parts, width), dtype=np.float32)
        codes = self.encode(vectors)
        shares = [np.bincount(codes[:, m], minlength=self.config.codes_per_part) / len(codes) for m in range(parts)]
        self._means = np.stack([shares[m] @ self._centroids[m].astype(np.float64) for m in range(parts)]).astype(
            np.float32
        )
        if self.notes:
            warnings.warn(" ".join(self.notes), stacklevel=2)
        return codes

    def _train_parts(self, vectors: np.ndarray, width: int) -> list[np.ndarray]:
        """Codebooks of all parts, from the rows that faiss would draw; from all rows when these repeat too much."""
        config = self.config
        rows = training_rows(len(vectors), config.codes_per_part, config.max_points_per_centroid, config.seed)
        for drawn in ([] if rows is None else [vectors[rows]]) + [vectors]:
            self.notes, turned = [], drawn @ self.rotation.T
            books = [self._train_part(turned, m, width) for m in range(config.parts)]
            if not self.notes:
                break
        return books

    def _train_rotation(self, vectors: np.ndarray, parts: int, width: int) -> np.ndarray:
        import faiss

        # faiss needs more rows than codes; on a small catalogue the rotation is trained for fewer codes.
        bits = min(self.config.codes_per_part.bit_length() - 1, max(1, len(vectors).bit_length() - 2))
        if len(vectors) < 4:
            return np.eye(parts * width, vectors.shape[1], dtype=np.float32)
        spare = parts * width - vectors.shape[1]
        padded = np.pad(vectors, ((0, 0), (0, spare))) if spare else vectors
        matrix = faiss.OPQMatrix(parts * width, parts)
        inner = faiss.ProductQuantizer(parts * width, parts, bits)
        matrix.pq, matrix.niter = inner, self.config.rotation_rounds
        inner.cp.min_points_per_centroid = 1
        matrix.train(padded)
        turn = faiss.vector_to_array(matrix.A).reshape(parts * width, parts * width)
        return turn[:, : vectors.shape[1]]

    def _train_part(self, turned: np.ndarray, part: int, width: int) -> np.ndarray:
        config = self.config
        book, distinct = train_centroids(
            np.ascontiguousarray(turned[:, part * width : (part + 1) * width]),
            config.codes_per_part,
            seed=config.seed,
            iterations=config.iterations,
            max_points_per_centroid=config.max_points_per_centroid,
        )
        if distinct < config.codes_per_part:
            self.notes.append(
                f"Part {part + 1} of the product quantizer has {config.codes_per_part} codes but only {distinct} "
                "distinct vectors to cover; lower codes_per_part."
            )
        return book

    def _encode(self, vectors: np.ndarray) -> np.ndarray:
        turned, width = vectors @ self.rotation.T, self._centroids.shape[2]
        lengths = row_lengths(vectors)
        codes = np.empty((len(vectors), self.config.parts), dtype=np.int32)
        for m in range(self.config.parts):
            turn = self.rotation[m * width : (m + 1) * width].astype(np.float64)
            part = np.ascontiguousarray(turned[:, m * width : (m + 1) * width])

            def exact(rows: np.ndarray, turn: np.ndarray = turn) -> np.ndarray:
                return _turned(vectors[rows].astype(np.float64), turn)

            codes[:, m] = nearest_centroids(part, self._centroids[m], exact=exact, lengths=lengths)
        return codes

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        """Parts beyond the given columns are at their mean."""
        parts = [
            self._centroids[m][codes[:, m]] if m < codes.shape[1] else np.tile(self._means[m], (len(codes), 1))
            for m in range(self.config.parts)
        ]
        return (np.concatenate(parts, axis=1) @ self.rotation).astype(np.float32)

    def _tensors(self) -> dict[str, np.ndarray]:
        return {"rotation": self.rotation, "centroids": self._centroids, "means": self._means}

    def _set_tensors(self, tensors: dict[str, Any]) -> None:
        self._lacks(tensors, "rotation", "centroids", "means")
        rotation, centroids, means = tensors["rotation"], tensors["centroids"], tensors["means"]
        shape = (self.config.parts, self.config.codes_per_part)
        if (
            centroids.ndim != 3
            or centroids.shape[:2] != shape
            or means.shape != (shape[0], centroids.shape[2])
            or rotation.ndim != 2
            or len(rotation) != shape[0] * centroids.shape[2]
        ):
            raise DataError(
                f"The saved product quantizer has centroids {centroids.shape} and rotation {rotation.shape}, expected "
                f"{shape[0]} parts of {shape[1]} codes as in its config; write the folder again."
            )
        self.rotation, self._centroids, self._means = rotation, centroids, means

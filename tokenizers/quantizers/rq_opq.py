"""RQ-OPQ: residual k-means with decreasing codebooks, a balanced third level and OPQ tail codes (OneSearch, KHQE).

The head (4096-1024-512 codes) says what the item shares with others, from coarse to fine; the tail, two OPQ codes of the
last residual, tells items apart: `x̂ = Σ_l C_l[a_l] + Rᵀ [T_1[o_1], T_2[o_2]]`. Queries and items go through the same
codebooks: train on both, stacked, and `encode` a query when it comes.

The tail levels share one letter in the paper (`<d_17><d_300>`: the second code is shifted by the size of the first);
`shared_letter` makes SIDs of that form. Codes are the same either way, and so is the number of tokens.

Where it differs from the released code (our choices):
- New vectors are encoded with frozen codebooks (nearest centroid per level, then the tail); the release cannot.
- The tail's rotation and codebooks are trained without the single inverted list of `OPQ2,IVF1,PQ2x8`; that centroid is only
  a shift, and the reconstruction error is the same (test).
- With `balance` the tail is trained on the residuals of the balanced codes, and new vectors take the nearest centroid.
- Prefixes of the head decode as in residual k-means; one tail code alone adds its own half.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from sidtune.core.config import check_types
from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.letters import LETTERS, check_sizes
from sidtune.tokenizers.quantizers.balanced_kmeans import BalancedKMeans, BalancedKMeansConfig
from sidtune.tokenizers.quantizers.base import Quantizer
from sidtune.tokenizers.quantizers.product_quantizer import ProductQuantizer, ProductQuantizerConfig
from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from sidtune.tokenizers.vectors import check_vectors


@dataclass
class RqOpqConfig:
    """Options of `RqOpq`.

    Attributes:
        head_sizes: codes of the residual levels (OneSearch: 4096, 1024, 512). Choose the first well below the number of
            items: for 10⁴ items (256, 128, 64) is enough.
        balance: balance of the last head level, see `balanced_kmeans.py`; `none` is plain residual k-means.
        tail_parts: number of tail codes (OneSearch: 2).
        tail_size: codes of each tail level, a power of two (OneSearch: 256).
        rotate: OPQ; false is a plain product quantizer.
        rotation_rounds: rounds of alternating rotation and tail codebooks (faiss: 50); most of the training time.
        iterations: Lloyd iterations of every codebook.
        max_points_per_centroid: training vectors drawn per head centroid (released code: 10000).
        tail_points_per_centroid: training residuals drawn per tail centroid (faiss: 256).
        shared_letter: write the tail codes with one letter, the second numbered on from the first, as the paper does;
            default: one letter per level. Changes the text of the tokens alone.
        seed: of all codebooks.
        chunk_size: rows per block when encoding; memory only.
    """

    head_sizes: Sequence[int] = (4096, 1024, 512)
    balance: Literal["equal_size", "private_code", "private_prefix", "none"] = "equal_size"
    tail_parts: int = 2
    tail_size: int = 256
    rotate: bool = True
    rotation_rounds: int = 50
    iterations: int = 25
    max_points_per_centroid: int = 10_000
    tail_points_per_centroid: int = 256
    shared_letter: bool = False
    seed: int = 0
    chunk_size: int = 65_536

    def __post_init__(self) -> None:
        self.head_sizes = tuple(self.head_sizes)
        check_types(type(self), vars(self), "Options of RQ-OPQ")
        head, tail = self.head_config(), self.tail_config()
        check_sizes((*head.level_sizes, *(tail.codes_per_part,) * tail.parts))

    def head_config(self) -> ResidualKMeansConfig:
        """Options of the head; raises ConfigError on a wrong value."""
        shared: dict[str, Any] = {
            "level_sizes": self.head_sizes,
            "iterations": self.iterations,
            "seed": self.seed,
            "max_points_per_centroid": self.max_points_per_centroid,
            "chunk_size": self.chunk_size,
        }
        if self.balance == "none":
            return ResidualKMeansConfig(**shared)
        return BalancedKMeansConfig(**shared, balance=self.balance)

    def tail_config(self) -> ProductQuantizerConfig:
        """Options of the tail; raises ConfigError on a wrong value."""
        return ProductQuantizerConfig(
            parts=self.tail_parts,
            codes_per_part=self.tail_size,
            rotate=self.rotate,
            rotation_rounds=self.rotation_rounds,
            iterations=self.iterations,
            max_points_per_centroid=self.tail_points_per_centroid,
            seed=self.seed,
            chunk_size=self.chunk_size,
        )


class RqOpq(Quantizer):
    """Residual k-means head and OPQ tail.

    Attributes:
        head: `ResidualKMeans` or `BalancedKMeans`.
        tail: `ProductQuantizer` of the head's residuals.
    """

    name: ClassVar[str] = "rq_opq"
    config_class: ClassVar[type] = RqOpqConfig

    def __init__(self, config: RqOpqConfig | None = None) -> None:
        super().__init__(config)
        kind = ResidualKMeans if self.config.balance == "none" else BalancedKMeans
        self.head: ResidualKMeans = kind(self.config.head_config())
        self.tail = ProductQuantizer(self.config.tail_config())

    @property
    def level_sizes(self) -> tuple[int, ...]:
        return self.head.level_sizes + self.tail.level_sizes

    @property
    def dims(self) -> int | None:
        return self.head.dims if self.tail.dims is not None else None

    @property
    def codebooks(self) -> list[np.ndarray]:
        return self.head.codebooks + self.tail.codebooks

    def level_letters(self) -> str | None:
        """`abcdd` with `shared_letter`, else None: one letter per level."""
        if not self.config.shared_letter:
            return None
        letters = LETTERS[: self.head.depth + 1]
        return letters[:-1] + letters[-1] * self.tail.depth

    def fit_encode(self, vectors: np.ndarray) -> np.ndarray:
        vectors = check_vectors(vectors)
        if self.config.tail_parts > vectors.shape[1]:
            raise ConfigError(
                f"{self.config.tail_parts} tail codes need vectors of at least as many dimensions, got {vectors.shape[1]}."
            )
        codes, residual = self.head._learn(vectors)
        if self.head.notes:
            warnings.warn(" ".join(self.head.notes), stacklevel=2)
        return np.concatenate([codes, self.tail.fit_encode(residual)], axis=1)

    def _encode(self, vectors: np.ndarray) -> np.ndarray:
        codes, residual = self.head._walk(vectors)
        return np.concatenate([codes, self.tail._encode(residual)], axis=1)

    def residual(self, vectors: np.ndarray, depth: int | None = None) -> np.ndarray:
        """What is left of vectors (n, d) after `depth` head levels (default: all of the head), float32 (n, d)."""
        return self.head.residual(vectors, depth)

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        split = self.head.depth
        vectors = self.head._decode(codes[:, :split])
        # A head prefix decodes without the tail, whose mean is a rounding error on training residuals.
        return vectors if codes.shape[1] <= split else vectors + self.tail._decode(codes[:, split:])

    def _tensors(self) -> dict[str, np.ndarray]:
        parts = {f"head.{key}": value for key, value in self.head._tensors().items()}
        return parts | {f"tail.{key}": value for key, value in self.tail._tensors().items()}

    def _set_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        for part, target in (("head.", self.head), ("tail.", self.tail)):
            target._set_tensors({key[len(part) :]: value for key, value in tensors.items() if key.startswith(part)})
        if self.head.dims != self.tail.dims:
            raise DataError(
                f"The saved head has {self.head.dims} dimensions and the tail {self.tail.dims}; they are of two runs."
            )

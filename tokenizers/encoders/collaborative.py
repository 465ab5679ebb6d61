"""Item vectors from the log alone: items are near each other when the same users took them. For catalogues without words.

With C(i, j) the users who took both i and j, the vectors are the truncated SVD of the positive pointwise mutual information

    max(0, log(C(i, j) · ΣC / (C(i) · C(j)))),   C(i) = Σ_j C(i, j), C(i, i) = 0,

scaled by the square roots of the singular values (Levy and Goldberg 2014, "Neural word embedding as implicit matrix factorization",
the symmetric variant), rows of length 1. Only events before the cut of the split are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from sidtune.core.config import check_range
from sidtune.core.errors import DataError
from sidtune.core.folders import read_json, write_json
from sidtune.data_builders.mining.pairs import interaction_matrix
from sidtune.data_builders.tables.history import encode
from sidtune.tokenizers.encoders.base import TENSOR_FILE, Encoder
from sidtune.tokenizers.vectors import load_tensors, unit_rows


@dataclass
class CollaborativeConfig:
    """Options of `CollaborativeEncoder`.

    Attributes:
        dims: columns of the vectors.
        actions: events that count.
        max_items: of a user with more events the latest so many count, so that one robot does not make the matrix dense.
        iterations, seed: of the randomised SVD.
    """

    dims: int = 64
    actions: list[str] = field(default_factory=lambda: ["click", "like", "order"])
    max_items: int = 200
    iterations: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, 1, "dims", "iterations")
        check_range(self, 2, "max_items")


class CollaborativeEncoder(Encoder):
    """Vectors of who took what. Give it the log by `use_log` before `fit`; texts are not looked at.

    An item that no user took together with another one has no vector of its own: it gets the mean of all, and `empty_texts`
    counts it.
    """

    name: ClassVar[str] = "collaborative"
    config_class: ClassVar[type] = CollaborativeConfig
    remedy: ClassVar[str] = "Give the items titles and use an encoder of texts, or precomputed vectors."

    def __init__(self, config: CollaborativeConfig | None = None) -> None:
        super().__init__(config)
        self._events: pa.Table | None = None
        self._rows: dict[str, int] = {}
        self._vectors = np.zeros((0, 0), dtype=np.float32)

    def use_log(self, events: pa.Table) -> None:
        """The log to learn from, in the EVENTS schema; only what training may see (`tables.past.past_events`)."""
        self._events = events

    def fit(self, texts: Sequence[str]) -> Self:
        """Learns the vectors. Raises DataError without a log, or where no two items have a user in common."""
        if self._events is None:
            raise DataError("The collaborative encoder learns from a log; call use_log(events) before fit.")
        matrix, ids = self._matrix(self._events)
        shared = (matrix.T @ matrix).tocsr()
        shared.setdiag(0)
        shared.eliminate_zeros()
        if not shared.nnz:
            raise DataError(
                f"No user took two items by {', '.join(self.config.actions)}; give item texts or precomputed vectors instead."
            )
        kept = np.flatnonzero(np.diff(shared.indptr))
        self._vectors = self._projected(_positive_information(shared[kept][:, kept]))
        self._rows = {ids[row]: place for place, row in enumerate(kept)}
        return self

    def _matrix(self, events: pa.Table) -> tuple[sp.csr_matrix, list[str]]:
        """(users, items) binary matrix of the latest items of each user, and the ids of its columns."""
        events = events.filter(pc.is_in(events["action"], value_set=pa.array(self.config.actions)))
        users, names = encode(events["user_id"])
        items, ids = encode(events["item_id"])
        latest = np.lexsort((-events["time"].to_numpy(), users))
        first = np.searchsorted(users[latest], np.arange(len(names)))
        chosen = latest[np.arange(len(latest)) - first[users[latest]] < self.config.max_items]
        return interaction_matrix(users[chosen], items[chosen], len(names), len(ids)), ids.to_pylist()

    def _projected(self, weights: sp.csr_matrix) -> np.ndarray:
        from sklearn.utils.extmath import randomized_svd

        rank, config = min(self.config.dims, weights.shape[0]), self.config
        left, sizes, _ = randomized_svd(weights, rank, n_iter=config.iterations, random_state=config.seed)
        vectors = unit_rows(left * np.sqrt(sizes))
        return np.pad(vectors, ((0, 0), (0, config.dims - rank))).astype(np.float32)

    def encode(self, texts: Sequence[str], item_ids: Sequence[str] | None = None) -> np.ndarray:
        """Vectors (n, dims) float32 of the items `item_ids`. Raises DataError without ids, or before `fit`."""
        if item_ids is None or len(item_ids) != len(texts):
            raise DataError("The collaborative encoder needs the item id of each text; it knows items, not words.")
        if not len(self._vectors):
            raise DataError("This collaborative encoder is not fitted yet; call use_log and fit, or load a saved one.")
        rows = np.array([self._rows.get(item_id, -1) for item_id in item_ids], dtype=np.int64)
        self.empty_texts = int((rows < 0).sum())
        fallback = unit_rows(self._vectors.mean(axis=0, keepdims=True)).astype(np.float32)
        return np.concatenate([self._vectors, fallback])[rows]

    def _save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        write_json(folder / "ids.json", list(self._rows))
        save_file({"vectors": self._vectors}, folder / TENSOR_FILE)

    def _load(self, folder: Path) -> None:
        ids, vectors = read_json(folder / "ids.json"), load_tensors(folder / TENSOR_FILE).get("vectors")
        if vectors is None or not isinstance(ids, list) or vectors.shape != (len(ids), self.config.dims):
            raise DataError(f"Ids, vectors and config in {folder} do not fit together; write the folder again.")
        self._vectors, self._rows = vectors, {item_id: row for row, item_id in enumerate(ids)}


def _positive_information(shared: sp.csr_matrix) -> sp.csr_matrix:
    """Positive pointwise mutual information of a symmetric matrix of counts without empty rows."""
    sums = np.asarray(shared.sum(axis=1)).ravel()
    found = shared.tocoo()
    values = np.log(found.data * sums.sum() / (sums[found.row] * sums[found.col]))
    kept = values > 0
    return sp.csr_matrix((values[kept], (found.row[kept], found.col[kept])), shape=shared.shape)

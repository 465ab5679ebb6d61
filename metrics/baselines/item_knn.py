"""Item-kNN: recommends what users with a similar history clicked (Sarwar et al. 2001, shrinkage as in Bell and Koren).

With c_ij the number of users who have both items and n_i the number who have item i (each counted once per user),

    similarity(i, j) = c_ij / (sqrt(n_i * n_j) + shrinkage),  i != j
    score(j | history) = sum of similarity(i, j) over the distinct items i of the history that have j as a neighbour

Differs from the original: no rating means, as feedback is implicit. The query is not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from sidtune.core.errors import ConfigError
from sidtune.metrics.baselines.base import _BLOCK, Baseline, _binary, _sorted_entries
from sidtune.metrics.baselines.tables import item_rows
from sidtune.metrics.ranking import Relevance


class ItemKNN(Baseline):
    """Item-item collaborative filtering on users' training events.

    Args:
        neighbours: similar items kept for each item; None keeps all.
        shrinkage: added to the denominator; large values distrust pairs seen few times.
        exclude_seen: as in `Baseline`.
    """

    def __init__(self, neighbours: int | None = 100, shrinkage: float = 10.0, exclude_seen: bool | None = None) -> None:
        super().__init__(exclude_seen)
        if neighbours is not None and (not isinstance(neighbours, int) or neighbours < 1):
            raise ConfigError(f"neighbours of item_knn must be a positive integer or null, got {neighbours!r}.")
        if not shrinkage >= 0:
            raise ConfigError(f"shrinkage of item_knn must be at least 0, got {shrinkage!r}.")
        self.neighbours, self.shrinkage = neighbours, shrinkage

    def _fit(self, items: pa.Table, events: pa.Table, requests: pa.Table | None) -> None:
        users = pc.dictionary_encode(events["user_id"].combine_chunks())
        known = users.is_valid().to_numpy(zero_copy_only=False)
        user = pc.fill_null(users.indices, 0).to_numpy(zero_copy_only=False).astype(np.int64)[known]
        item = item_rows(events["item_id"], items, "the events")[known]
        matrix = sp.csr_matrix((np.ones(len(user)), (user, item)), shape=(len(users.dictionary), self.items))
        matrix.sum_duplicates()
        matrix.data[:] = 1.0
        self.similarity = self._similarity(matrix)

    def _similarity(self, matrix: sp.csr_matrix) -> sp.csr_matrix:
        """(N, N) similarities of the neighbours of each item (row), in chunks of rows."""
        norms = np.sqrt(np.asarray(matrix.sum(axis=0)).ravel())
        by_item = matrix.T.tocsr()
        step = max(1, _BLOCK // self.items)
        parts = []
        for start in range(0, self.items, step):
            together = (by_item[start : start + step] @ matrix).tocoo()
            row = together.row + start
            value = together.data / (norms[row] * norms[together.col] + self.shrinkage)
            value[row == together.col] = 0.0
            chunk = sp.csr_matrix((value, (together.row, together.col)), shape=together.shape)
            owner, item, _, kept = _sorted_entries(chunk, self.place, self.neighbours or self.items)
            parts.append(sp.csr_matrix((kept, (owner, item)), shape=chunk.shape))
        return sp.vstack(parts, format="csr")

    @property
    def numbers(self) -> int:
        """Similarities that it keeps."""
        return int(self.similarity.nnz)

    def _scores(self, queries: Sequence[str | None], history: Relevance) -> tuple[sp.csr_matrix, None]:
        return (_binary(history, self.items) @ self.similarity).tocsr(), None

"""What a search returns, and how it becomes ranked items.

Order of the result, our choice and the same everywhere: leaves by score, falling, and equal scores by leaf number (the
lexicographic rank of their codes); items that share a leaf have equal scores and follow `SemanticIds.paths()`:
popularity falling, then item id rising. So a ranking is a function of the scores alone.

How exact it is: the first k items are those of an exhaustive ranking as far as the beams are (the true best leaves, and
enough of them to fill k). Items excluded here use up beams; to search as if they did not exist, filter the trie as well
(`SidTrie.restrict` for all requests, `sidtune.decoding.filters.ItemFilter` for each), which stays exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.ragged import Ragged, owners

if TYPE_CHECKING:
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds


@dataclass(frozen=True)
class BeamOutput:
    """The best leaves of each prompt.

    Attributes:
        leaves: (B, K) int64, leaf numbers of the trie, best first, distinct; -1 where there are fewer than K leaves.
        scores: (B, K) float32 log-probabilities (natural logarithm), falling; -inf where the leaf is -1.
    """

    leaves: Tensor
    scores: Tensor


@dataclass(frozen=True)
class LeafItems(Ragged):
    """Leaf -> item rows, in expansion order. Make it once per catalogue and pass it to every `rank_items`.

    Attributes:
        offsets: (M + 1,) int64; leaf m owns `rows[offsets[m] : offsets[m + 1]]`.
        rows: (N,) int64 item rows.
    """

    @classmethod
    def from_semantic_ids(cls, sids: SemanticIds) -> LeafItems:
        _, offsets, rows = sids.paths()
        return cls(np.asarray(offsets, dtype=np.int64), np.asarray(rows, dtype=np.int64))

    @cached_property
    def leaf_of(self) -> np.ndarray:
        """(N,) int64 leaf of each item row; -1 for what stands behind the last leaf, out of reach."""
        found = np.full(len(self.rows), -1, dtype=np.int64)
        found[self.rows[: self.offsets[-1]]] = owners(self.offsets)
        return found


def rank_items(
    beam: BeamOutput,
    sids: SemanticIds | LeafItems,
    k: int,
    *,
    exclude: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best items of every request.

    Args:
        beam: leaves (B, K) and scores; the leaves of a row must be distinct, -1 is skipped.
        sids: the catalogue whose trie was searched, or its `LeafItems`.
        k: items per request, at least 1.
        exclude: item rows that request b must not get: an object with `offsets (B + 1,)` and `rows`, or B sequences of
            rows. They are taken out before anything is counted.

    Returns:
        rows: (B, k) int64 item rows, best first, distinct, -1 where the beams hold fewer items.
        scores: (B, k) float32, the score of the item's leaf, -inf where the row is -1.

    Raises:
        ConfigError: k below 1. DataError: leaves or exclusions that do not fit.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1, got {k}; raise it.")
    items = sids if isinstance(sids, LeafItems) else LeafItems.from_semantic_ids(sids)
    leaves, scores = _sorted_beams(beam, len(items.offsets) - 1)
    requests = len(leaves)
    hidden_request, hidden_row = _excluded(exclude, requests)
    takes = _takes(leaves, items.offsets, k, np.bincount(hidden_request, minlength=requests))
    place = _ragged_arange(takes.ravel())
    slot = np.repeat(np.arange(takes.size), takes.ravel())
    request = slot // leaves.shape[1]
    row = items.rows[items.offsets[leaves.ravel()[slot]] + place]
    # The pairs (request, row) of what is hidden, as one number each.
    hidden = (hidden_request * len(items.rows) + hidden_row)[(hidden_row >= 0) & (hidden_row < len(items.rows))]
    keep = ~np.isin(request * len(items.rows) + row, hidden)
    request, row, slot = request[keep], row[keep], slot[keep]
    rank = _ragged_arange(np.bincount(request, minlength=requests))
    keep = rank < k
    out_rows = np.full((requests, k), -1, dtype=np.int64)
    out_scores = np.full((requests, k), -np.inf, dtype=np.float32)
    out_rows[request[keep], rank[keep]] = row[keep]
    out_scores[request[keep], rank[keep]] = scores.ravel()[slot[keep]]
    return out_rows, out_scores


def _sorted_beams(beam: BeamOutput, num_leaves: int) -> tuple[np.ndarray, np.ndarray]:
    leaves, scores = beam.leaves.cpu().numpy(), beam.scores.float().cpu().numpy()
    if leaves.ndim != 2 or leaves.shape != scores.shape:
        raise DataError(
            f"Beams must be two arrays (B, K) of one shape, got {leaves.shape} and {scores.shape}; fix them."
        )
    if leaves.size and int(leaves.max()) >= num_leaves:
        raise DataError(
            f"The beams name leaf {int(leaves.max())} but the catalogue has {num_leaves} distinct SIDs; "
            "rank with the SIDs the trie was made from."
        )
    order = np.lexsort((leaves, -scores, leaves < 0))
    return np.take_along_axis(leaves, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _excluded(exclude: Any, requests: int) -> tuple[np.ndarray, np.ndarray]:
    """Two flat arrays, the request and the item row of every exclusion."""
    if exclude is None:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    if hasattr(exclude, "offsets") and hasattr(exclude, "rows"):
        lengths, rows = np.diff(exclude.offsets), np.asarray(exclude.rows, dtype=np.int64)
    elif isinstance(exclude, Sequence):
        lengths = np.array([len(part) for part in exclude], dtype=np.int64)
        parts = [np.asarray(part, dtype=np.int64) for part in exclude]
        rows = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    else:
        raise DataError(
            f"`exclude` must have `offsets` and `rows`, or be a list of item rows per request, got "
            f"{type(exclude).__name__}; pass one of these."
        )
    if len(lengths) != requests:
        raise DataError(f"`exclude` has {len(lengths)} requests but the beams {requests}; pass one entry each.")
    return np.repeat(np.arange(requests), lengths), rows


def _takes(leaves: np.ndarray, offsets: np.ndarray, k: int, hidden_count: np.ndarray) -> np.ndarray:
    """How many items of each leaf (B, K) can matter; bounds the work when a leaf holds much of the catalogue."""
    safe = np.maximum(leaves, 0)
    held = np.where(leaves >= 0, offsets[safe + 1] - offsets[safe], 0)
    before = np.minimum(held, k).cumsum(axis=1) - np.minimum(held, k)
    # Each exclusion removes one item, so this many in front fill the list whatever is excluded.
    return np.minimum(held, k + hidden_count[:, None]) * (before < k + hidden_count[:, None])


def _ragged_arange(lengths: np.ndarray) -> np.ndarray:
    """0 .. n-1 for each n of `lengths`, one after another."""
    ends = lengths.cumsum()
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)

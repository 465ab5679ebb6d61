"""What every baseline shares, and the simplest one: popularity.

A baseline is fitted on training data only and ranks the whole catalogue:

    ItemKNN().fit(folder.items, training_events(folder)).rank(requests, k=10)  # (R, 10) item rows

Ranking is deterministic. Items are ordered by score; equal scores are ordered by popularity, then by item id; items
without a score follow by popularity. So each list is full unless the catalogue (less the excluded items) is smaller
than k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.ragged import Ragged
from sidtune.metrics.baselines.tables import event_counts, item_rows, popularity_order
from sidtune.metrics.ranking import Relevance

_BLOCK = 1 << 20  # scores held at once
_DENSE = 1 / 16  # from this share of scored items on, partial sorting of whole rows beats sorting the scored ones
_RARE_REPEATS = 0.01


@dataclass(frozen=True)
class BaselineRequests:
    """Requests as a baseline sees them.

    Attributes:
        queries: R texts; None is a recommendation without a query.
        history: item rows of each user before the request, oldest first; anything with `offsets` (R + 1,) and `rows`.
    """

    queries: Sequence[str | None]
    history: Ragged

    @classmethod
    def from_events(cls, queries: Any, history: Ragged, events: pa.Table, items: pa.Table) -> BaselineRequests:
        """From a history of event rows (`History.before`) to one of item rows.

        Args:
            queries: R queries; an Arrow column or a list.
            history: ragged rows of the `events` table.
            events, items: tables of the data folder.
        """
        queries = queries.to_pylist() if hasattr(queries, "to_pylist") else list(queries)
        wanted = np.asarray(history.rows, dtype=np.int64)
        used, place = np.unique(wanted, return_inverse=True)
        rows = item_rows(events["item_id"].take(pa.array(used)), items, "the history")
        return cls(queries, Relevance(np.asarray(history.offsets, dtype=np.int64), rows[place.reshape(-1)]))

    def __len__(self) -> int:
        return len(self.queries)


class Baseline:
    """Base of the baselines: fitting of the popularity order, checks, chunking, and filling of short lists.

    A subclass sets up its model in `_fit` and returns sparse scores in `_scores`.

    Args:
        exclude_seen: never rank an item of the user's history. None decides by the training events, so that no baseline
            wastes places: exclude when fewer than 1 in 100 of them repeats an item for the same user at another time.

    Attributes:
        excludes: what was decided, set by `fit`.
    """

    def __init__(self, exclude_seen: bool | None = None) -> None:
        self.exclude_seen = exclude_seen

    def fit(self, items: pa.Table, events: pa.Table, requests: pa.Table | None = None) -> Baseline:
        """Learns from training data.

        Args:
            items: items table; its row order numbers the items.
            events: *training* events (see `tables.training_events`).
            requests: training requests; no baseline here needs them.

        Returns:
            self.

        Raises:
            DataError: an empty catalogue, or an event with an item outside it.
        """
        if not items.num_rows:
            raise DataError("The catalogue is empty; a baseline needs at least one item.")
        self.items = items.num_rows
        self.counts = event_counts(events, items)
        self.order = popularity_order(self.counts, items)
        self.place = np.empty(self.items, dtype=np.int64)
        self.place[self.order] = np.arange(self.items)
        self.excludes = repeat_share(events) < _RARE_REPEATS if self.exclude_seen is None else self.exclude_seen
        self._fit(items, events, requests)
        return self

    def rank(self, requests: BaselineRequests, k: int) -> np.ndarray:
        """(R, k) int64 item rows, best first; -1 only where nothing is left to rank.

        Raises:
            SidtuneError: not fitted, k below 1, history rows outside the catalogue, lengths that differ.
        """
        if not isinstance(k, int) or k < 1:
            raise ConfigError(f"k must be a positive integer, got {k!r}.")
        history = self._checked(requests)
        ranked = np.full((len(requests), k), -1, dtype=np.int64)
        for start, stop, scores, banned in self._chunks(requests, history):
            ranked[start:stop] = top_rows(scores, banned, self.order, self.place, k)
        return ranked

    def shares(self, requests: BaselineRequests, candidates: np.ndarray) -> np.ndarray:
        """What share of all scores of a request each candidate has: a distribution over the catalogue (our choice).

        A request that scores nothing shares by popularity. Items that `rank` would not rank have no share.

        Args:
            requests: R requests. candidates: (R, C) item rows, -1 for an empty place.

        Returns:
            (R, C) float64; 0 at empty places. Over the whole catalogue each row sums to 1, or to 0 where nothing is left.

        Raises:
            SidtuneError: not fitted, candidates or history rows outside the catalogue, lengths that differ.
        """
        history = self._checked(requests)
        if candidates.shape[0] != len(requests) or candidates.max(initial=-1) >= self.items:
            raise DataError(
                f"Candidates must be {len(requests)} rows of items below {self.items}, got the shape {candidates.shape} "
                f"and the item {candidates.max(initial=-1)}."
            )
        found = np.zeros(candidates.shape)
        for start, stop, scores, banned in self._chunks(requests, history):
            found[start:stop] = _shares(scores, banned, self.counts, candidates[start:stop])
        return found

    @property
    def numbers(self) -> int:
        """Learned numbers that it keeps, popularity counts apart."""
        return 0

    def _checked(self, requests: BaselineRequests) -> Relevance:
        if not hasattr(self, "order"):
            raise ConfigError("This baseline is not fitted; call fit(items, events) first.")
        return _check_requests(requests, self.items)

    def _chunks(
        self, requests: BaselineRequests, history: Relevance
    ) -> Iterator[tuple[int, int, sp.csr_matrix | None, sp.csr_matrix | None]]:
        """First and last + 1 request of each chunk, its scores, and the items not to rank."""
        step = max(1, min(_BLOCK // self.items, 4096))
        for start in range(0, len(requests), step):
            stop = min(start + step, len(requests))
            part = _part(history, start, stop)
            scores, banned = self._scores(requests.queries[start:stop], part)
            yield start, stop, scores, _binary(part, self.items) if self.excludes else banned

    def _fit(self, items: pa.Table, events: pa.Table, requests: pa.Table | None) -> None:
        pass

    def _scores(
        self, queries: Sequence[str | None], history: Relevance
    ) -> tuple[sp.csr_matrix | None, sp.csr_matrix | None]:
        """Scores (r, N) of a chunk, absent = no score, and the items not to rank, (r, N) non-zero; None for none."""
        return None, None


class Popularity(Baseline):
    """Ranks all items by training events, the same list for everyone."""


def repeat_share(events: pa.Table) -> float:
    """Share of the events of known users that repeat a (user, item) pair at another time; 1.0 without such events.

    Several actions of one user on one item at one time count as one event.
    """
    known = events.select(["user_id", "item_id", "time"]).filter(pc.is_valid(events["user_id"]))
    if not known.num_rows:
        return 1.0
    moments = known.group_by(["user_id", "item_id", "time"]).aggregate([]).num_rows
    pairs = known.group_by(["user_id", "item_id"]).aggregate([]).num_rows
    return (moments - pairs) / moments


def _shares(
    scores: sp.csr_matrix | None, banned: sp.csr_matrix | None, counts: np.ndarray, candidates: np.ndarray
) -> np.ndarray:
    """`Baseline.shares` of one chunk: scores and banned (r, N), counts (N,), candidates (r, C)."""
    shape, items = (len(candidates), len(counts)), np.maximum(candidates, 0)
    scores = without(scores if scores is not None else sp.csr_matrix(shape), banned)
    values, totals = _entries(scores, items), np.asarray(scores.sum(axis=1)).ravel()
    bare = np.flatnonzero(totals <= 0)
    values[bare], totals[bare] = counts[items[bare]], counts.sum()
    if banned is not None:
        marks = (banned != 0).tocsr()[bare]
        values[bare] *= _entries(marks, items[bare]) == 0
        totals[bare] -= marks @ counts
    return np.where(candidates >= 0, values, 0.0) / np.where(totals > 0, totals, 1.0)[:, None]


def _entries(matrix: sp.csr_matrix, columns: np.ndarray) -> np.ndarray:
    """(r, C) float64 entries of the rows of a matrix (r, N) at the columns (r, C)."""
    if not columns.size:
        return np.zeros(columns.shape)  # scipy answers an empty index with a matrix
    owner = np.repeat(np.arange(len(columns)), columns.shape[1])
    return np.asarray(matrix[owner, columns.ravel()], dtype=np.float64).reshape(columns.shape)


def without(scores: sp.csr_matrix, banned: sp.csr_matrix | None) -> sp.csr_matrix:
    """Scores with 0 at the banned items; None bans nothing."""
    return scores if banned is None else (scores - scores.multiply(banned != 0)).tocsr()


def top_rows(
    scores: sp.csr_matrix | None, banned: sp.csr_matrix | None, order: np.ndarray, place: np.ndarray, k: int
) -> np.ndarray:
    """Best k items of each row of sparse scores, filled up by popularity.

    Args:
        scores: (r, N) positive scores; None when there are none.
        banned: (r, N) items that may not be ranked; None for none.
        order: (N,) item rows by popularity. place: (N,) its inverse. k: places.

    Returns:
        (r, k) item rows; -1 where the catalogue is used up.
    """
    if scores is not None and scores.nnz > _DENSE * scores.shape[0] * scores.shape[1]:
        return _top_dense(scores, banned, order, place, k)
    matrix = scores if scores is not None else banned
    if matrix is None:
        return _padded(order[None, :k], k)
    count = matrix.shape[0]
    ranked = np.full((count, k), -1, dtype=np.int64)
    used = np.zeros(count, dtype=np.int64)
    if scores is not None:
        scores = without(scores, banned)
        owner, item, rank, _ = _sorted_entries(scores, place, k)
        ranked[owner, rank] = item
        used = np.bincount(owner, minlength=count)
    if (used < k).any():
        _fill(ranked, used, banned, order, k)
    return ranked


def _top_dense(
    scores: sp.csr_matrix, banned: sp.csr_matrix | None, order: np.ndarray, place: np.ndarray, k: int
) -> np.ndarray:
    """`top_rows` on whole rows: with columns by popularity, the first k of (score down, column up) are the answer."""
    values = scores.toarray()[:, order]
    if banned is not None:
        entries = banned.tocoo()
        values[entries.row[entries.data != 0], place[entries.col[entries.data != 0]]] = -1.0
    import torch  # its topk is much faster than numpy's partition

    width = min(k, values.shape[1])
    # Only the k-th value is taken from topk: which of several equal columns it names is not defined.
    last = torch.topk(torch.from_numpy(values), width, dim=1).values[:, -1:].numpy()
    tied = values == last
    above = values > last
    missing = width - above.sum(axis=1, keepdims=True)
    crowded = np.flatnonzero(tied.sum(axis=1) > missing[:, 0])
    tied[crowded] &= np.cumsum(tied[crowded], axis=1, dtype=np.int32) <= missing[crowded]
    chosen = above | tied
    columns = np.nonzero(chosen)[1].reshape(len(values), width)
    found = np.take_along_axis(values, columns, axis=1)
    best = np.argsort(-found, axis=1, kind="stable")
    rows = np.where(np.take_along_axis(found, best, axis=1) < 0, -1, order[np.take_along_axis(columns, best, axis=1)])
    return _padded(rows, k)


def _sorted_entries(
    scores: sp.csr_matrix, place: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Owner row, item, rank and score of the k best positive entries of each row, by score, then popularity."""
    entries = scores.tocoo()
    positive = entries.data > 0
    owner, item, score = entries.row[positive].astype(np.int64), entries.col[positive], entries.data[positive]
    chosen = np.lexsort((place[item], -score, owner))
    owner = owner[chosen]
    starts = np.searchsorted(owner, np.arange(scores.shape[0]))
    rank = np.arange(len(owner)) - starts[owner]
    keep = rank < k
    return owner[keep], item[chosen][keep].astype(np.int64), rank[keep], score[chosen][keep]


def _fill(ranked: np.ndarray, used: np.ndarray, banned: sp.csr_matrix | None, order: np.ndarray, k: int) -> None:
    """Appends popular items that are neither ranked yet nor banned, in place."""
    most_banned = int(np.diff(banned.tocsr().indptr).max(initial=0)) if banned is not None else 0
    width = min(len(order), k + int(used.max(initial=0)) + most_banned)
    slot = np.full(len(order), -1, dtype=np.int64)
    slot[order[:width]] = np.arange(width)
    taken = np.zeros((len(ranked), width), dtype=bool)
    rows, columns = np.nonzero(ranked >= 0)
    slots = slot[ranked[rows, columns]]
    taken[rows[slots >= 0], slots[slots >= 0]] = True
    if banned is not None:
        entries = banned.tocoo()
        slots = slot[entries.col]
        taken[entries.row[slots >= 0], slots[slots >= 0]] = True
    target = used[:, None] + np.cumsum(~taken, axis=1) - 1
    rows, columns = np.nonzero(~taken & (target < k))
    ranked[rows, target[rows, columns]] = order[columns]


def _padded(rows: np.ndarray, k: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, k - rows.shape[1])), constant_values=-1)


def _check_requests(requests: BaselineRequests, items: int) -> Relevance:
    offsets = np.asarray(requests.history.offsets, dtype=np.int64)
    rows = np.asarray(requests.history.rows, dtype=np.int64)
    if len(offsets) != len(requests) + 1 or offsets[0] != 0 or offsets[-1] != len(rows) or (np.diff(offsets) < 0).any():
        raise DataError(
            f"The history of {len(requests)} requests needs {len(requests) + 1} offsets rising from 0 to {len(rows)}, "
            f"got {len(offsets)}; build it for the same requests."
        )
    if len(rows) and (rows.min() < 0 or rows.max() >= items):
        raise DataError(f"The history names item rows outside 0 to {items - 1}; leave out unknown items.")
    return Relevance(offsets, rows)


def _part(history: Relevance, start: int, stop: int) -> Relevance:
    offsets = history.offsets[start : stop + 1]
    return Relevance(offsets - offsets[0], history.rows[offsets[0] : offsets[-1]])


def _binary(history: Relevance, items: int) -> sp.csr_matrix:
    """(r, N) with 1 where the item is in the history, however often."""
    matrix = sp.csr_matrix((np.ones(len(history.rows)), history.rows, history.offsets), shape=(len(history), items))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix

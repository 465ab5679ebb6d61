"""Ranking metrics on items: HR, recall, precision, NDCG, MRR and MAP at k, for every request at once.

Notation: R requests, K ranked places, rank 1 is best, `rel` the set of relevant items of a request (gain > 0),
`hit_i` is 1 when the item at rank i is in `rel`. All values lie in [0, 1].

| name | definition at k |
|---|---|
| hr | 1 if any of ranks 1..k is a hit, else 0 ("hit rate"; equals recall when there is one relevant item) |
| recall | hits in ranks 1..k / number of relevant items |
| precision | hits in ranks 1..k / k, also when fewer than k places are filled |
| ndcg | sum of gain_i / log2(i + 1) over ranks 1..k / the same sum of the ideal ranking (see below) |
| mrr | 1 / rank of the first hit if it is at most k, else 0 |
| map | sum over hits i <= k of precision at i / min(k, number of relevant items) |

The ideal ranking fills its first min(k, number of relevant items) ranks with the largest gains. Gains are used as
they are (linear, as in Järvelin and Kekäläinen 2002); for the exponential form pass `2 ** gain - 1`. Without gains
every relevant item has gain 1. MAP's denominator min(k, |rel|) makes a perfect list score 1 at every k (our choice;
some tools divide by |rel|). An empty place (-1) is a miss that keeps its rank: nothing moves up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from sidtune.core.config import MANY
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.ragged import Ragged, offsets_of
from sidtune.metrics.registry import METRICS

_BLOCK = 1 << 21  # comparisons made at once
DEFAULT_METRICS = ("hr", "recall", "precision", "ndcg", "mrr", "map")


@dataclass(frozen=True)
class Relevance(Ragged):
    """Relevant items of each request.

    Attributes:
        offsets: (R + 1,) int64, starts at 0, never falls.
        rows: (total,) int64 item rows; within one request each row stands once.
        gains: (total,) float64 or None (all 1). A gain of 0 means judged and not relevant.
    """

    gains: np.ndarray | None = None

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]], gains: Sequence[Sequence[float]] | None = None) -> Relevance:
        """Builds from one list of item rows per request, and one equally long list of gains per request if given.

        Raises:
            DataError: other types, or gains and rows differ in shape.
        """
        lengths, flat = _joined(lists, "iu", "Relevant items must be a list of item row numbers")
        if gains is None:
            return cls(offsets_of(lengths), flat.astype(np.int64))
        gain_lengths, flat_gains = _joined(gains, "iuf", "Gains must be a list of numbers")
        if not np.array_equal(gain_lengths, lengths):
            raise DataError("The gains differ in shape from the relevant rows; give one gain for each relevant row.")
        return cls(offsets_of(lengths), flat.astype(np.int64), flat_gains.astype(np.float64))


@dataclass(frozen=True)
class Ranked:
    """Predictions looked up in the relevance: what every metric function reads.

    Attributes:
        gains: (R, K) gain of the item at each rank, 0 for a miss or an empty place.
        relevant: (R,) int64 number of relevant items (gain > 0).
        ideal_request: (P,) int64 request of each relevant item, sorted by request, then by falling gain.
        ideal_rank: (P,) int64 rank of that item in the ideal ranking, from 1.
        ideal_gain: (P,) float64 its gain.
    """

    gains: np.ndarray
    relevant: np.ndarray
    ideal_request: np.ndarray
    ideal_rank: np.ndarray
    ideal_gain: np.ndarray

    @cached_property
    def hits(self) -> np.ndarray:
        """(R, K) bool: the item at this rank is relevant."""
        return self.gains > 0


@dataclass(frozen=True)
class RankingResult:
    """Metrics of one system.

    Attributes:
        per_request: metric name such as `ndcg@10` → (R,) float64; NaN where `included` is false.
        included: (R,) bool, false for requests without a relevant item (only with `empty="exclude"`).
    """

    per_request: dict[str, np.ndarray]
    included: np.ndarray

    @property
    def excluded(self) -> int:
        """Number of requests left out because nothing is relevant to them."""
        return int((~self.included).sum())

    def values(self, name: str) -> np.ndarray:
        """(requests included,) values of one metric, ready for the bootstrap."""
        if name not in self.per_request:
            raise ConfigError(f"The metric '{name}' was not computed; computed are: {', '.join(self.per_request)}.")
        return self.per_request[name][self.included]

    def means(self, mask: np.ndarray | None = None) -> dict[str, float]:
        """Mean of each metric over the included requests, within `mask` (R,) bool if given.

        Raises:
            DataError: no request is left.
        """
        keep = self.included if mask is None else self.included & np.asarray(mask, dtype=bool)
        if not keep.any():
            raise DataError("No request is left to average over; check the mask and the relevance.")
        return {name: float(values[keep].mean()) for name, values in self.per_request.items()}


def evaluate_ranking(
    predictions: Any,
    relevance: Ragged | Sequence[Sequence[int]],
    ks: Sequence[int] = (5, 10, 20),
    metrics: Sequence[str] = DEFAULT_METRICS,
    empty: Literal["refuse", "exclude"] = "refuse",
) -> RankingResult:
    """Scores ranked item rows against the relevant item rows.

    Args:
        predictions: (R, K) integer item rows, best first, -1 for an empty place; or R lists, of which short ones end with empty
            places.
        relevance: R requests; `Relevance` or anything with `offsets` and `rows`, or R lists of item rows.
        ks: cut-offs; none may exceed K (pad with -1 where the catalogue itself is smaller).
        metrics: names in `METRICS`.
        empty: what to do with a request without relevant items: `refuse`, or `exclude` it from the means and count it.

    Returns:
        `RankingResult` with one entry `name@k` for each metric and cut-off, metric by metric.

    Raises:
        DataError: wrong shapes or types, a prediction row that names an item twice, a request without relevant items.
        ConfigError: a bad cut-off or an unknown metric.

    >>> evaluate_ranking([[4, 7, 1]], [[7, 9]], ks=[3], metrics=["hr", "recall", "mrr"]).means()
    {'hr@3': 1.0, 'recall@3': 0.5, 'mrr@3': 0.5}
    """
    check_metrics(ks, metrics)
    if empty not in ("refuse", "exclude"):
        raise ConfigError(f"empty must be 'refuse' or 'exclude', got '{empty}'.")
    functions = {name: METRICS.get(name) for name in metrics}
    ranked = rank_against(predictions, relevance)
    if max(ks) > ranked.gains.shape[1]:
        raise DataError(
            f"The predictions have {ranked.gains.shape[1]} places, but a metric at {max(ks)} was asked for; "
            "predict more items or lower ks."
        )
    included = ranked.relevant > 0
    if empty == "refuse" and not included.all():
        first = int(np.argmin(included))
        raise DataError(
            f"{int((~included).sum())} requests have no relevant item (the first is number {first}); "
            "remove them or pass empty='exclude'."
        )
    per_request = {}
    for name, function in functions.items():
        for k in ks:
            per_request[f"{name}@{k}"] = np.where(included, function(ranked, int(k)), np.nan)
    return RankingResult(per_request, included)


def check_metrics(ks: Sequence[int], metrics: Sequence[str], primary: str | None = None) -> None:
    """Refuses cut-offs that are none, unknown metrics, and a `primary` that these do not compute. Raises ConfigError."""
    if not _is_list(ks) or not len(ks) or not all(_is_count(k) for k in ks) or max(ks) > MANY:
        raise ConfigError(f"ks must be a list of positive integers such as [5, 10, 20], at most {MANY:,}, got {ks!r}.")
    if not _is_list(metrics) or not len(metrics):
        raise ConfigError(f"metrics must be a list of names such as ['ndcg', 'hr'], got {metrics!r}.")
    for name in metrics:
        METRICS.get(name)
    if primary is not None and primary not in {f"{name}@{k}" for name in metrics for k in ks}:
        raise ConfigError(f"primary is '{primary}', which metrics and ks do not compute; choose one they do.")


def rank_against(predictions: Any, relevance: Any) -> Ranked:
    """Looks the predictions up in the relevance; checks both. Raises DataError as `evaluate_ranking` says."""
    predictions = _check_predictions(predictions)
    offsets, rows, gains = _check_relevance(relevance, len(predictions))
    requests = np.repeat(np.arange(len(predictions), dtype=np.int64), np.diff(offsets))
    positive = gains > 0
    requests, rows, gains = requests[positive], rows[positive], gains[positive]
    found = _lookup(predictions, requests, rows, gains)
    order = np.lexsort((-gains, requests))
    relevant = np.bincount(requests, minlength=len(predictions)).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(relevant)[:-1]]) if len(relevant) else np.zeros(0, dtype=np.int64)
    requests = requests[order]
    ideal_rank = np.arange(len(order), dtype=np.int64) - starts[requests] + 1
    return Ranked(found, relevant, requests, ideal_rank, gains[order])


def hr(ranked: Ranked, k: int) -> np.ndarray:
    """Hit rate: (R,) 1.0 where any of the first k ranks is relevant."""
    return ranked.hits[:, :k].any(axis=1).astype(np.float64)


def recall(ranked: Ranked, k: int) -> np.ndarray:
    """(R,) share of the relevant items that stand in the first k ranks."""
    return ranked.hits[:, :k].sum(axis=1) / np.maximum(ranked.relevant, 1)


def precision(ranked: Ranked, k: int) -> np.ndarray:
    """(R,) share of the first k ranks that is relevant."""
    return ranked.hits[:, :k].sum(axis=1) / k


def ndcg(ranked: Ranked, k: int) -> np.ndarray:
    """(R,) discounted cumulative gain over that of the ideal ranking."""
    dcg = ranked.gains[:, :k] @ (1.0 / np.log2(np.arange(2, min(k, ranked.gains.shape[1]) + 2)))
    within = ranked.ideal_rank <= k
    parts = ranked.ideal_gain[within] / np.log2(ranked.ideal_rank[within] + 1)
    ideal = np.bincount(ranked.ideal_request[within], weights=parts, minlength=len(dcg))
    # Two summation orders may differ in the last bit; a perfect list must not score above 1.
    return np.minimum(np.divide(dcg, ideal, out=np.zeros_like(dcg), where=ideal > 0), 1.0)


def mrr(ranked: Ranked, k: int) -> np.ndarray:
    """(R,) reciprocal rank of the first hit within k, else 0."""
    hits = ranked.hits[:, :k]
    return np.where(hits.any(axis=1), 1.0 / (hits.argmax(axis=1) + 1), 0.0)


def average_precision(ranked: Ranked, k: int) -> np.ndarray:
    """(R,) mean of the precision at each hit within k, over min(k, number of relevant items); its mean is MAP."""
    hits = ranked.hits[:, :k]
    at = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    return (at * hits).sum(axis=1) / np.clip(ranked.relevant, 1, k)


def _is_list(values: Any) -> bool:
    return isinstance(values, (list, tuple, np.ndarray))


def _joined(lists: Any, kinds: str, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of lists of numbers, and the numbers end to end; `kinds` as numpy calls them."""
    if _is_list(lists) and all(_is_list(one) for one in lists):
        flat = np.array([value for one in lists for value in one])
        if flat.ndim == 1 and (not flat.size or flat.dtype.kind in kinds):
            return np.array([len(one) for one in lists], dtype=np.int64), flat
    raise DataError(f"{what} for each request, got {repr(lists)[:80]}; build them from the rows of the catalogue.")


def _is_count(k: Any) -> bool:
    return isinstance(k, (int, np.integer)) and not isinstance(k, bool) and k > 0


def _check_predictions(predictions: Any) -> np.ndarray:
    if isinstance(predictions, (list, tuple)) and len({len(one) for one in predictions if _is_list(one)}) > 1:
        lengths, flat = _joined(predictions, "iu", "Predictions must be a list of item row numbers")
        predictions = np.full((len(lengths), int(lengths.max())), -1, dtype=np.int64)
        predictions[np.arange(predictions.shape[1]) < lengths[:, None]] = flat
    predictions = np.asarray(predictions)
    if predictions.ndim != 2 or predictions.dtype.kind not in "iu":
        raise DataError(
            f"Predictions must be a (requests, places) array of integer item rows, got shape {predictions.shape} "
            f"of type {predictions.dtype}; pad short lists with -1."
        )
    predictions = predictions.astype(np.int64)
    if predictions.size and predictions.min() < -1:
        raise DataError(
            f"Predictions hold the item row {predictions.min()}; only -1 (empty) and rows from 0 are allowed."
        )
    ordered = np.sort(predictions, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        first = int(np.argmax(twice))
        raise DataError(
            f"{int(twice.sum())} prediction rows name an item more than once (the first is row {first}); "
            "a ranking must hold each item at most once, so remove the repeats."
        )
    return predictions


def _check_relevance(relevance: Any, requests: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not hasattr(relevance, "offsets") or not hasattr(relevance, "rows"):
        relevance = Relevance.from_lists(relevance)
    offsets, rows = np.atleast_1d(relevance.offsets), np.asarray(relevance.rows)
    if offsets.ndim != 1 or len(offsets) != requests + 1:
        raise DataError(
            f"There are {requests} prediction rows but relevance for {len(offsets) - 1} requests; give one each."
        )
    if not len(rows):
        rows = rows.astype(np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or offsets.dtype.kind not in "iu":
        raise DataError("Relevance must be integer offsets (requests + 1,) and integer item rows; check its arrays.")
    if offsets[0] != 0 or offsets[-1] != len(rows) or (np.diff(offsets) < 0).any():
        raise DataError(
            f"The offsets of the relevance must rise from 0 to {len(rows)}, its number of rows; check its arrays."
        )
    if len(rows) and rows.min() < 0:
        raise DataError(
            f"The relevance holds the item row {rows.min()}; leave out items that are not in the catalogue."
        )
    owner = np.repeat(np.arange(requests, dtype=np.int64), np.diff(offsets))
    order = np.lexsort((rows, owner))
    same = (rows[order][1:] == rows[order][:-1]) & (owner[order][1:] == owner[order][:-1])
    if same.any():
        first = int(owner[order][1:][np.argmax(same)])
        raise DataError(f"The relevance of request number {first} names an item twice; name each item once.")
    gains = getattr(relevance, "gains", None)
    gains = np.ones(len(rows)) if gains is None else np.asarray(gains)
    if gains.dtype.kind not in "iuf" or gains.shape != rows.shape or not np.isfinite(gains).all() or (gains < 0).any():
        raise DataError("Gains must be finite numbers from 0, one for each relevant item row; check them.")
    return offsets.astype(np.int64), rows.astype(np.int64), gains.astype(np.float64)


def _lookup(predictions: np.ndarray, requests: np.ndarray, rows: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """(R, K) gain of each predicted item: each relevant item is compared with the K places of its request."""
    found = np.zeros(predictions.shape)
    step = max(1, _BLOCK // max(predictions.shape[1], 1))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        pair, rank = np.nonzero(predictions[requests[part]] == rows[part, None])
        found[requests[part][pair], rank] = gains[part][pair]
    return found

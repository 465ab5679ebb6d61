"""Slices of the requests: by popularity of the target, by frequency of the query, by length of the user's history.

All counts come from training data. Each family of slices splits the requests without overlap:

| name | a request is in it when |
|---|---|
| popularity/head | the items with strictly more events than its target hold less than 50 % of all training events |
| popularity/torso | they hold 50 % to 90 % |
| popularity/tail | they hold 90 % or more, and the target has at least one training event |
| popularity/unseen | its target has no training event |
| query/none | it has no query (a recommendation) |
| query/unseen | its query is in no training request |
| query/rare | its query is in 1 to 9 training requests |
| query/frequent | its query is in 10 or more training requests |
| history/0, 1-4, 5-19, 20+ | the user has that many events before the request |

The target is the relevant item with the most training events. Items with equal counts fall in the same group, so no
slice depends on the order of a tie. Queries are compared after NFKC, lower case and collapsed white space. The limits
are our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import DataError
from sidtune.core.ragged import Ragged
from sidtune.metrics.baselines.tables import Folder, event_counts, training_events
from sidtune.metrics.statistics.bootstrap import bootstrap_interval

SHARES = (0.5, 0.9)
FREQUENT = 10
HISTORY_EDGES = (0, 1, 5, 20)  # the lowest length of each slice


@dataclass(frozen=True)
class SliceRow:
    """A metric within one slice.

    Attributes:
        name: `family/slice`, or `all`.
        requests: number of requests in it. share: their share of all requests, 0 to 1.
        mean: mean of the metric, None when the slice is empty.
        low, high: bootstrap interval, None when there are fewer than two independent units.
    """

    name: str
    requests: int
    share: float
    mean: float | None
    low: float | None
    high: float | None


def build_slices(
    folder: Folder,
    requests: pa.Table,
    relevance: Ragged,
    history_lengths: Any,
) -> dict[str, np.ndarray]:
    """All slices of the evaluated requests.

    Args:
        folder: data folder, read for its items, training events and training requests.
        requests: the R evaluated requests, in the order of the predictions.
        relevance: relevant item rows of each.
        history_lengths: (R,) number of events of the user before the request.

    Returns:
        slice name → (R,) bool mask, in the order of the table.

    Raises:
        DataError: lengths differ.
    """
    counts = event_counts(training_events(folder), folder.items)
    masks = popularity_slices(counts, relevance)
    masks |= query_slices(folder.requests["train"]["query"], requests["query"])
    masks |= history_slices(history_lengths)
    wrong = [name for name, mask in masks.items() if len(mask) != requests.num_rows]
    if wrong:
        raise DataError(
            f"The slice '{wrong[0]}' has {len(masks[wrong[0]])} rows for {requests.num_rows} requests; "
            "relevance and history lengths must belong to the requests."
        )
    return masks


def popularity_groups(counts: Any) -> np.ndarray:
    """(N,) int8 group of each item: 0 head, 1 torso, 2 tail, 3 unseen, by its training count (N,)."""
    counts = np.asarray(counts, dtype=np.float64)
    levels, level_of_item = np.unique(counts, return_inverse=True)
    mass = np.bincount(level_of_item, weights=counts, minlength=len(levels))
    above = (mass.sum() - np.cumsum(mass)) / max(mass.sum(), 1e-300)
    group = (above >= SHARES[0]).astype(np.int8) + (above >= SHARES[1]).astype(np.int8)
    group[levels <= 0] = 3
    return group[level_of_item]


def popularity_slices(counts: Any, relevance: Ragged) -> dict[str, np.ndarray]:
    """Masks (R,) by the group of the most clicked relevant item; a request without relevant items is in none."""
    groups = popularity_groups(counts)
    offsets, rows = np.asarray(relevance.offsets), np.asarray(relevance.rows, dtype=np.int64)
    best = np.full(len(offsets) - 1, 4, dtype=np.int8)
    np.minimum.at(best, np.repeat(np.arange(len(best)), np.diff(offsets)), groups[rows])
    names = ("head", "torso", "tail", "unseen")
    return {f"popularity/{name}": best == place for place, name in enumerate(names)}


def normalise_queries(queries: Any) -> pa.Array:
    """Queries as they are compared: NFKC, lower case, white space collapsed; an empty one becomes null."""
    queries = queries.combine_chunks() if isinstance(queries, pa.ChunkedArray) else pa.array(queries, pa.string())
    queries = pc.utf8_lower(pc.utf8_normalize(queries.cast(pa.string()), form="NFKC"))
    queries = pc.utf8_trim_whitespace(pc.replace_substring_regex(queries, r"\s+", " "))
    return pc.if_else(pc.equal(queries, ""), pa.scalar(None, pa.string()), queries)


def query_slices(train_queries: Any, queries: Any) -> dict[str, np.ndarray]:
    """Masks (R,) by how often the query stands among the training requests."""
    known = pc.value_counts(normalise_queries(train_queries).drop_null())
    queries = normalise_queries(queries)
    place = pc.index_in(queries, value_set=known.field("values"))
    counts = pc.fill_null(pc.take(known.field("counts"), place), 0).to_numpy(zero_copy_only=False)
    null = queries.is_null().to_numpy(zero_copy_only=False)
    return {
        "query/none": null,
        "query/unseen": ~null & (counts == 0),
        "query/rare": ~null & (counts > 0) & (counts < FREQUENT),
        "query/frequent": ~null & (counts >= FREQUENT),
    }


def history_slices(lengths: Any) -> dict[str, np.ndarray]:
    """Masks (R,) by history length."""
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or (len(lengths) and lengths.min() < 0):
        raise DataError(f"History lengths must be counts, one for each request, got {lengths.dtype} {lengths.shape}.")
    place = np.searchsorted(HISTORY_EDGES, lengths, side="right") - 1
    return {f"history/{name}": place == number for number, name in enumerate(("0", "1-4", "5-19", "20+"))}


def slice_rows(
    values: Any,
    masks: Mapping[str, np.ndarray],
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    clusters: Sequence[Any] | None = None,
) -> list[SliceRow]:
    """One metric in each slice, with intervals; the first row is `all`.

    Args:
        values: (R,) the metric of every request; NaN (an excluded request) is left out.
        masks: slice name → (R,) bool.
        level, samples, seed, clusters: as in `bootstrap_interval`; clusters (R,).
    """
    values = np.asarray(values, dtype=np.float64)
    if hasattr(clusters, "to_pylist"):
        clusters = clusters.to_pylist()
    labels = None if clusters is None else np.asarray(clusters, dtype=object)
    counted = np.isfinite(values)
    rows = []
    for name, mask in {"all": np.ones(len(values), dtype=bool), **masks}.items():
        if len(mask) != len(values):
            raise DataError(
                f"The slice '{name}' has {len(mask)} rows for {len(values)} values; build it on the same requests."
            )
        keep = counted & mask
        number = int(keep.sum())
        inside = None if labels is None else labels[keep]
        units = number if inside is None else _units(inside)
        low = high = None
        if units >= 2:
            interval = bootstrap_interval(values[keep], level, samples, seed, inside)
            low, high = interval.low, interval.high
        mean = float(values[keep].mean()) if number else None
        rows.append(SliceRow(name, number, number / max(int(counted.sum()), 1), mean, low, high))
    return rows


def _units(labels: np.ndarray) -> int:
    """Number of independent clusters; each null label is one."""
    known = [label for label in labels if label is not None]
    return len(set(known)) + len(labels) - len(known)

"""From logged requests to gains of leaves: clicks corrected for what was looked at, shown, and popular.

A logged click is a product: shown, looked at, attractive. Rewarding raw clicks rewards the production ranker's taste. Here the gain
of a candidate is its label's gain over the probability that it was seen (`specs/crs_debiased_grpo.md` 4, rows 20 and 21):

    gain = label gain / max(theta(position) * P(shown), floor)  *  min((N p_pop)^-alpha, 10)

Four things are kept apart:

| a candidate that | has in the targets |
|---|---|
| got a positive label | its corrected gain |
| was shown and is known to have got none | `exposed` (default 0) |
| has null feedback | nothing: unknown, never 0 |
| was not shown | nothing: no exposure is no evidence |

A label of 1 counts whatever else is null. The paper (CRS) has no such correction; this is the sheet's addition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.config import check_keys
from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.tables.columns import one_array, rows_of
from sidtune.models.position_bias.interventions import PositionBias, situations
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.trainers.rewards.batch import Targets
from sidtune.trainers.rewards.lists import popularity_weight

LABELS = ("order", "like", "click")
_LARGEST_POPULARITY_WEIGHT = 10.0


@dataclass(frozen=True)
class LeafFacts:
    """What the items table says of each leaf of the trie; the fields of `RewardBatch` of the same names.

    Attributes:
        leaf_codes: (M, L) int32, lexicographic.
        leaf_of_item: item id → leaf, as two aligned arrays: `item_ids` (N,) and `leaf_of_item` (N,).
        popularity_of_leaf: (M,) exposures, or else clicks or orders, summed over the leaf's items. None without counts.
    """

    leaf_codes: np.ndarray
    item_ids: pa.Array
    leaf_of_item: np.ndarray
    popularity_of_leaf: np.ndarray | None

    @classmethod
    def of(cls, items: pa.Table, sids: SemanticIds) -> LeafFacts:
        """Collects the facts.

        Raises:
            DataError: an item with a semantic ID is not in the items table.
        """
        codes, offsets, rows = sids.paths()
        leaf_of_item = np.empty(len(rows), np.int64)
        leaf_of_item[rows] = np.repeat(np.arange(len(codes)), np.diff(offsets))
        ids = pa.array(sids.item_ids, pa.string())
        found = rows_of(ids, items["item_id"])
        if (found < 0).any():
            wrong = sids.item_ids[int((found < 0).argmax())]
            raise DataError(
                f"The item '{wrong}' has a semantic ID but is not in the items table; use data and SIDs of one run."
            )
        mine = items.take(found)
        counts = (_summed(mine[name], leaf_of_item, len(codes)) for name in ("exposures", "clicks", "orders"))
        return cls(codes, ids, leaf_of_item, next((one for one in counts if one is not None), None))

    def leaves_of(self, item_ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """(n,) leaves of items, -1 for an item without a semantic ID."""
        found = rows_of(item_ids, self.item_ids)
        return np.where(found >= 0, self.leaf_of_item[found], -1)


def _summed(counts: pa.ChunkedArray, leaf: np.ndarray, leaves: int) -> np.ndarray | None:
    if counts.null_count == len(counts):
        return None
    return np.bincount(leaf, pc.fill_null(counts, 0).to_numpy().astype(np.float64), leaves)


@dataclass
class GainsConfig:
    """How feedback becomes gains; for YAML.

    Attributes:
        labels: label → gain; the largest gain among a candidate's positive labels counts.
        exposed: gain of a candidate that was shown and known to have got no label.
        floor: lowest probability of being seen that is divided by, in (0, 1].
        normalise: "none" keeps the weights as they are (unbiased above the floor); "request" divides them by their mean over the
            known candidates of the request (self-normalised: a little bias, less variance).
        popularity_alpha: strength of the popularity correction, at least 0; 0 is none.
    """

    labels: dict = field(default_factory=lambda: dict.fromkeys(LABELS, 1.0))
    exposed: float = 0.0
    floor: float = 0.05
    normalise: Literal["none", "request"] = "none"
    popularity_alpha: float = 0.0

    def __post_init__(self) -> None:
        check_keys(self.labels, LABELS, "labels of the gains")
        gains = [*self.labels.values(), self.exposed]
        plain = all(isinstance(g, (int, float)) and not isinstance(g, bool) for g in gains)
        if not self.labels or not plain or not all(0 <= g < float("inf") for g in gains):
            raise ConfigError(
                f"labels and exposed must be finite gains of at least 0, got {self.labels} and {self.exposed}."
            )
        if not 0 < self.floor <= 1 or not 0 <= self.popularity_alpha < float("inf"):
            raise ConfigError(
                f"floor must lie in (0, 1] and popularity_alpha be at least 0, got {self.floor} and {self.popularity_alpha}."
            )


@dataclass(frozen=True)
class ExposureGains:
    """Gains of requests.

    Attributes:
        targets: judged leaves of each request; gain 0 = shown without success.
        counts: candidates by what became of them.
    """

    targets: Targets
    counts: dict[str, int]

    def columns(self) -> dict[str, list[list[Any]]]:
        """Lists for a data set: target_leaves, target_gains."""
        ends, parts = self.targets.offsets[1:-1], {"leaves": self.targets.leaves, "gains": self.targets.gains}
        return {f"target_{name}": [row.tolist() for row in np.split(part, ends)] for name, part in parts.items()}


def exposure_gains(
    requests: pa.Table,
    facts: LeafFacts,
    bias: PositionBias | None = None,
    config: GainsConfig | None = None,
    shown: np.ndarray | None = None,
) -> ExposureGains:
    """Gains of the leaves of each request; see the top of the file.

    Candidates of one leaf are one: the largest gain counts. Candidates without a semantic ID are left out and counted.

    Args:
        requests: R requests in our schema.
        facts: of the catalogue whose trie is searched.
        bias: examination of positions; None corrects for no position. A candidate without a position is not corrected.
        config: options, default `GainsConfig()`.
        shown: (candidates of all requests,) P(candidate is shown to this request), as the experiment's design or
            `shown_rates` gives; None takes 1.

    Raises:
        DataError: `shown` does not fit. ConfigError: a popularity correction without counts.
    """
    config = config or GainsConfig()
    lists = one_array(requests["candidates"])
    flat, owner = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy().astype(np.int64)
    if shown is not None and (len(shown) != len(flat) or not ((shown > 0) & (shown <= 1)).all()):
        raise DataError(f"shown must hold a probability in (0, 1] for each of the {len(flat)} candidates.")
    leaf = facts.leaves_of(flat.field("item_id"))
    gain, positive, known = _labelled(flat, config.labels, config.exposed)
    weight = 1.0 / np.maximum(_seen(flat, bias) * (1.0 if shown is None else shown), config.floor)
    if config.normalise == "request":
        total = np.bincount(owner, weight * known, requests.num_rows)
        mean = total / np.maximum(np.bincount(owner, known, requests.num_rows), 1)
        weight = weight / np.where(mean > 0, mean, 1.0)[owner]
    if config.popularity_alpha > 0:
        rare = popularity_weight(facts.popularity_of_leaf, config.popularity_alpha, _LARGEST_POPULARITY_WEIGHT)
        weight = weight * np.append(rare, 1.0)[leaf]
    keep = known & (leaf >= 0)
    gain = np.where(positive, gain * weight, gain)
    counts = {
        "positive": int((positive & keep).sum()),
        "shown_without_success": int((keep & ~positive).sum()),
        "unknown_feedback": int((~known).sum()),
        "without_semantic_id": int((known & (leaf < 0)).sum()),
        "without_position": int(flat.field("position").null_count),
    }
    return ExposureGains(_merged(requests.num_rows, owner[keep], leaf[keep], gain[keep], len(facts.leaf_codes)), counts)


def _labelled(flat: pa.StructArray, labels: Mapping[str, float], exposed: float) -> tuple[np.ndarray, ...]:
    """(gain, whether positive, whether known) of each candidate.

    Without a positive label the outcome is known when the click is known to be 0 (nothing else happens without one), or when
    every label asked for is known.
    """
    gain = np.full(len(flat), -np.inf)
    missing = np.zeros(len(flat), bool)
    for label, value in labels.items():
        column = flat.field(label)
        hit = pc.fill_null(pc.equal(column, 1), False).to_numpy(zero_copy_only=False)
        gain = np.where(hit, np.maximum(gain, value), gain)
        missing |= pc.is_null(column).to_numpy(zero_copy_only=False)
    positive = np.isfinite(gain)
    refused = pc.fill_null(pc.equal(flat.field("click"), 0), False).to_numpy(zero_copy_only=False)
    return np.where(positive, gain, exposed), positive, positive | refused | ~missing


def _seen(flat: pa.StructArray, bias: PositionBias | None) -> np.ndarray:
    column = flat.field("position")
    if bias is None or column.null_count == len(column):
        return np.ones(len(flat))
    known = pc.is_valid(column).to_numpy(zero_copy_only=False)
    positions = pc.fill_null(column, 0).to_numpy()
    return np.where(known, bias.propensity(positions, floor=1e-9), 1.0)


def _merged(rows: int, owner: np.ndarray, leaf: np.ndarray, gain: np.ndarray, leaves: int) -> Targets:
    key = owner * max(1, leaves) + leaf
    order = np.lexsort((-gain, key))
    key, gain = key[order], gain[order]
    first = np.concatenate([[True], key[1:] != key[:-1]]) if len(key) else np.zeros(0, bool)
    owner, leaf = np.divmod(key[first], max(1, leaves))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=rows))])
    return Targets.make(offsets, leaf, gain[first])


def shown_rates(requests: pa.Table) -> np.ndarray:
    """(candidates,) share of the requests of the same situation that showed the candidate's item: an estimate of P(shown).

    A situation is a query, or the context where there is none (`models.position_bias.situations`). It is 1 for a situation that
    was logged once, so nothing is corrected where nothing is known.
    """
    lists = one_array(requests["candidates"])
    owner = pc.list_parent_indices(lists).to_numpy().astype(np.int64)
    item = pc.list_flatten(lists).field("item_id").dictionary_encode().indices.to_numpy().astype(np.int64)
    situation = situations(requests)
    size = np.bincount(situation)
    pair = situation[owner] * (int(item.max(initial=0)) + 1) + item
    _, first, number = np.unique(pair * requests.num_rows + owner, return_index=True, return_inverse=True)
    _, group = np.unique(pair[first], return_inverse=True)
    times = np.bincount(group.ravel())[group.ravel()]
    return (times / size[situation[owner[first]]])[number.ravel()]

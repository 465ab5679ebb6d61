"""Who ranks next items: a trained network or a baseline, alone or several that propose and score together.

A member ranks items and gives the probability of any item. A network's probability is that of the item's SID; a baseline's is the
item's share of all its scores (`Baseline.shares`). So an ensemble may hold both, as kNN language models mix a network with a
memory of what followed what (Khandelwal et al. 2020); here the memory is item-kNN and its share is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sidtune.core.errors import ConfigError, nearest
from sidtune.core.ragged import stretches
from sidtune.data_builders.sequences.item_sequences import ItemSequences, SequenceExamples
from sidtune.data_builders.tables.history import encode
from sidtune.data_builders.tables.schema import Tables
from sidtune.decoding.next_item.search import mean_probability
from sidtune.metrics.baselines.base import Baseline, BaselineRequests
from sidtune.metrics.ranking import Relevance
from sidtune.metrics.registry import BASELINES


class Member(Protocol):
    """What ranks and scores."""

    def rank_both(self, examples: SequenceExamples, k: int) -> dict[bool, np.ndarray]:
        """(n, k) item rows, -1 for none: items the user has are ranked (False) and left out (True)."""

    def score(self, examples: SequenceExamples, items: np.ndarray) -> np.ndarray:
        """(n, C) log-probabilities of item rows (n, C), -inf where the row is -1."""


@dataclass(frozen=True)
class NetworkMember:
    """A trained network with its ranker (`HistoryRanker`) and the most items of history that it reads."""

    network: Any
    ranker: Any
    max_history: int

    def rank_both(self, examples: SequenceExamples, k: int) -> dict[bool, np.ndarray]:
        """One search under both rules."""
        return self.ranker.rank_both(self.network, examples.cut(self.max_history), k)

    def score(self, examples: SequenceExamples, items: np.ndarray) -> np.ndarray:
        """Log-probabilities of the items' SIDs."""
        return self.ranker.score(self.network, examples.cut(self.max_history), items)


@dataclass(frozen=True)
class BaselineMember:
    """A fitted baseline. It decides by its training data whether it ranks items the user has, so both rules are the same."""

    baseline: Baseline
    sequences: ItemSequences

    def rank_both(self, examples: SequenceExamples, k: int) -> dict[bool, np.ndarray]:
        """The same ranking twice."""
        return dict.fromkeys((False, True), self.baseline.rank(self._requests(examples), k))

    def score(self, examples: SequenceExamples, items: np.ndarray) -> np.ndarray:
        """Log of each item's share."""
        with np.errstate(divide="ignore"):
            return np.log(self.baseline.shares(self._requests(examples), items)).astype(np.float32)

    def _requests(self, examples: SequenceExamples) -> BaselineRequests:
        offsets, flat = stretches(examples.starts, examples.firsts)
        return BaselineRequests([None] * len(examples), Relevance(offsets, self.sequences.rows[flat]))


def fit_baseline(name: str, tables: Tables, sequences: ItemSequences) -> BaselineMember:
    """A baseline that saw the training parts only."""
    events = tables.events
    order = np.lexsort((events["time"].to_numpy(), encode(events["user_id"])[0]))
    baseline = BASELINES.get(name)().fit(tables.items, events.take(order[sequences.training_places]))
    return BaselineMember(baseline, sequences)


def weights_of(name: str, ensembles: dict[str, list[str]]) -> dict[str, float]:
    """Member → weight of a row; the weights of an ensemble sum to 1, and an ensemble inside one shares its part equally.

    >>> weights_of("b", {"a": ["x", "y"], "b": ["a", "z"]})
    {'x': 0.25, 'y': 0.25, 'z': 0.5}
    """
    if name not in ensembles:
        return {name: 1.0}
    found: dict[str, float] = {}
    for member in ensembles[name]:
        for leaf, weight in weights_of(member, ensembles).items():
            found[leaf] = found.get(leaf, 0.0) + weight / len(ensembles[name])
    return found


def check_ensembles(ensembles: dict[str, Any], members: list[str]) -> None:
    """Raises ConfigError unless every ensemble lists known members, or ensembles that stand before it."""
    known = list(members)
    for name, listed in ensembles.items():
        for member in listed if isinstance(listed, list) and listed else [None]:
            if member not in known:
                raise ConfigError(
                    f"ensembles.{name} must list systems, baselines of the table or ensembles above it: "
                    f"{nearest(str(member), known)}"
                )
        known.append(name)


def rank_together(
    members: list[Member],
    weights: list[float],
    examples: SequenceExamples,
    proposed: np.ndarray,
    sequences: ItemSequences,
    k: int,
) -> dict[bool, np.ndarray]:
    """(n, k) item rows: the best candidates by the members' weighted mean probability, then popularity, then row.

    Args:
        members, weights: who scores, and with what weight.
        examples: n histories. proposed: (n, C) item rows, -1 for none, repeated ones count once.
        sequences: all users. k: places.

    Returns:
        Seen items ranked (False) and left out (True), of the same candidates.
    """
    proposed = np.sort(proposed, axis=1)
    proposed[:, 1:][proposed[:, 1:] == proposed[:, :-1]] = -1
    proposed = -np.sort(-proposed, axis=1)  # the empty places last
    scores = mean_probability([member.score(examples, proposed) for member in members], weights)
    counts, seen = sequences.training_counts(), sequences.seen(examples)
    owner = np.arange(len(examples))
    pairs = np.repeat(owner, [len(rows) for rows in seen]) * len(counts) + np.concatenate(seen)
    had = np.isin(owner[:, None] * len(counts) + proposed, pairs) & (proposed >= 0)
    sides = {False: proposed, True: np.where(had, -1, proposed)}
    return {rule: _best(rows, scores, counts, k) for rule, rows in sides.items()}


def _best(rows: np.ndarray, scores: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """The first k of candidate rows (n, C), -1 for none, by score, popularity and row."""
    popularity = np.where(rows >= 0, counts[np.maximum(rows, 0)], -1)
    order = np.lexsort((rows, -popularity, -np.where(rows >= 0, scores, -np.inf)), axis=1)[:, :k]
    return np.take_along_axis(rows, order, axis=1)

"""Rewards of a batch of rollouts: what a reward function sees, and the weighted sum of several.

A reward is a plain function of a `RewardBatch`: leaf numbers of the catalogue's trie and row-wise columns, never decoded text, so
that a token which the tokenizer hides cannot change a score (`specs/crs_debiased_grpo.md` 2.2). It returns one float64 for each
row; NaN says "cannot be scored", which is not the same as 0: such a row leaves the baseline of its group.

The paper (CRS, 2.7) adds its reward families with weights it does not publish; here the weights stand in YAML:

    rewards:
      list_ndcg: {weight: 1.0, k: 10, gammas: [0.1, 0.3]}
      format: 0.1                          # a number alone is the weight
      short: {reward: reasoning_length, weight: 0.05, longest: 64}     # a reward under a name of your own
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sidtune.core.config import check_keys, check_types
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.ragged import side_by_side, taken
from sidtune.trainers.rewards.registry import REWARDS

Reward = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Targets:
    """Leaves that were judged, with a number for each, ragged over the rows of a batch.

    Attributes:
        offsets: (R + 1,) int64, starts at 0, never falls; row r owns `leaves[offsets[r]:offsets[r + 1]]`.
        leaves: (T,) int64 leaf numbers, each at least 0; a leaf that stands twice in a row counts with its largest gain.
        gains: (T,) float64, finite and at least 0: 1 for a plain positive, a tier, an inverse-propensity weighted click, ...
            A gain of 0 means judged and not wanted.
    """

    offsets: np.ndarray
    leaves: np.ndarray
    gains: np.ndarray

    @classmethod
    def make(cls, offsets: Any, leaves: Any, gains: Any = None) -> Targets:
        """Builds and checks; without `gains` every leaf has gain 1.

        Raises:
            DataError: shapes that do not fit, a negative leaf, a gain that is negative or not finite.
        """
        offsets, leaves = np.asarray(offsets, np.int64), np.asarray(leaves, np.int64)
        gains = np.ones(len(leaves)) if gains is None else np.asarray(gains, np.float64)
        ragged = offsets.ndim == 1 and len(offsets) >= 1 and offsets[0] == 0 and (np.diff(offsets) >= 0).all()
        if not ragged or offsets[-1] != len(leaves) or gains.shape != leaves.shape or leaves.ndim != 1:
            raise DataError(
                f"Targets need offsets that rise from 0 to the number of leaves and one gain for each leaf, got {len(leaves)} "
                f"leaves, gains of shape {gains.shape} and offsets of shape {offsets.shape}."
            )
        if len(leaves) and (leaves.min() < 0 or not np.isfinite(gains).all() or gains.min() < 0):
            raise DataError(
                "Targets hold a negative leaf, or a gain that is negative or not finite; leave unknown leaves out instead."
            )
        return cls(offsets, leaves, gains)

    @classmethod
    def from_lists(cls, leaves: list[list[int]], gains: list[list[float]] | None = None) -> Targets:
        """Builds from one list of leaves per row, and one equally long list of gains per row if given."""
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in leaves])])
        flat = None if gains is None else [gain for row in gains for gain in row]
        return cls.make(offsets, [leaf for row in leaves for leaf in row], flat)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, rows: np.ndarray) -> Targets:
        """The targets of chosen rows, in their order; a row may be taken several times (`np.repeat` for G rollouts)."""
        rows = np.asarray(rows, np.int64)
        place, offsets = taken(self.offsets, rows)
        return Targets(offsets, self.leaves[place], self.gains[place])

    @cached_property
    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """(R, T') leaves, -1 where there is none, and (R, T') gains, 0 there; T' is the largest number of a row, at least 1."""
        place, mask = side_by_side(self.offsets)
        if not mask.shape[1]:
            return np.full((len(self), 1), -1, np.int64), np.zeros((len(self), 1))
        return np.where(mask, self.leaves[place], -1), np.where(mask, self.gains[place], 0.0)


@dataclass(frozen=True)
class RewardBatch:
    """R rollouts as rewards see them.

    Attributes:
        lists: (R, K) int64 leaf numbers, best first, -1 where a beam is dead. A direct SID rollout has K = 1.
        scores: (R, K) float32 log-probabilities of those leaves given the prompt (and the reasoning), -inf where dead.
        targets: the positive leaves of each row.
        leaf_codes: (M, L) int32 codes of the catalogue's leaves in leaf order, which is lexicographic (`SidTrie.leaf_codes`).
        closed: (R,) bool, whether the reasoning was ended by the model itself, or None where there is no reasoning.
        reasoning_lengths: (R,) tokens of the reasoning, without its end mark, or None.
        popularity_of_leaf: (M,) counts of the past (exposures or clicks), or None.
        columns: any column of the data set, (R,) each.
    """

    lists: np.ndarray
    scores: np.ndarray
    targets: Targets
    leaf_codes: np.ndarray
    closed: np.ndarray | None = None
    reasoning_lengths: np.ndarray | None = None
    popularity_of_leaf: np.ndarray | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, leaves = len(self.lists), len(self.leaf_codes)
        if self.lists.ndim != 2 or self.lists.shape != self.scores.shape or self.leaf_codes.ndim != 2:
            raise DataError(
                f"A reward batch needs lists and scores (R, K) and leaf_codes (M, L), got {self.lists.shape}, "
                f"{self.scores.shape} and {self.leaf_codes.shape}."
            )
        per_row = {"targets": self.targets, "closed": self.closed, "reasoning_lengths": self.reasoning_lengths}
        per_row |= {f"columns['{name}']": value for name, value in self.columns.items()}
        for name, value in {**per_row, "popularity_of_leaf": self.popularity_of_leaf}.items():
            wanted, unit = (leaves, "leaves") if name == "popularity_of_leaf" else (rows, "rows")
            if value is not None and len(value) != wanted:
                raise DataError(
                    f"A reward batch has {wanted} {unit} but {name} has {len(value)}; they must be aligned."
                )
        highest = max(int(part.max(initial=-1)) for part in (self.targets.leaves, self.lists))
        if highest >= leaves or int(self.lists.min(initial=-1)) < -1:
            raise DataError(
                f"A reward batch names a leaf outside the {leaves} of the catalogue; use lists, targets and leaf_codes of one trie."
            )
        if not _in_order(self.leaf_codes):
            raise DataError(
                "leaf_codes must be the distinct codes of a trie in lexicographic order; take them from its leaf_codes."
            )

    def __len__(self) -> int:
        return len(self.lists)

    @cached_property
    def alive(self) -> np.ndarray:
        """(R, K) bool: a leaf stands here and did not stand at a better place before, so no leaf counts twice."""
        order = np.argsort(self.lists, axis=1, kind="stable")
        ordered = np.take_along_axis(self.lists, order, axis=1)
        first = np.ones(ordered.shape, bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        out = np.empty_like(first)
        np.put_along_axis(out, order, first & (ordered >= 0), axis=1)
        return out


_ORDERED: dict[int, weakref.ref] = {}


def _in_order(codes: np.ndarray) -> bool:
    """Whether the rows rise lexicographically. A catalogue of a million leaves is looked through once, not in every step."""
    key = id(codes)
    known = _ORDERED.get(key)
    if known is not None and known() is codes:
        return True
    step = np.diff(codes, axis=0)
    first = np.argmax(step != 0, axis=1) if step.size else np.zeros(len(step), np.int64)
    rising = bool((step[np.arange(len(step)), first] > 0).all()) if step.size else len(codes) < 2
    if rising:
        _ORDERED[key] = weakref.ref(codes, lambda _: _ORDERED.pop(key, None))
    return rising


@dataclass(frozen=True)
class CombinedReward:
    """Several rewards with weights; made by `build_rewards`.

    Attributes:
        names: (n,) names as the config calls them.
        weights: (n,) float64.
        functions: (n,) functions of a batch alone.
    """

    names: list[str]
    weights: np.ndarray
    functions: list[Callable[[RewardBatch], np.ndarray]]

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        """(R, n) float64, the unweighted value of each reward; NaN where it cannot score the row."""
        columns = [np.asarray(function(batch), np.float64) for function in self.functions]
        for name, column in zip(self.names, columns, strict=True):
            if column.shape != (len(batch),) or np.isinf(column).any():
                raise DataError(
                    f"The reward '{name}' must return {len(batch)} finite numbers (or NaN), got shape {column.shape}"
                    f"{' with infinite values' if np.isinf(column).any() else ''}."
                )
        return np.stack(columns, axis=1)

    def total(self, values: np.ndarray) -> np.ndarray:
        """(R, n) values → (R,) weighted sum over the rewards that could score the row; NaN where none could."""
        known = ~np.isnan(values)
        total = np.where(known, values, 0.0) @ self.weights
        return np.where(known.any(axis=1), total, np.nan)


def build_rewards(config: Mapping[str, Any], depth: int | None = None) -> CombinedReward:
    """Makes the rewards a YAML file names.

    Args:
        config: name → weight, or name → mapping of `weight` (default 1), `reward` (name in the registry, default the name
            itself) and the options of the reward's function.
        depth: levels of a SID, to check the options that have one number per level; None leaves that to the first batch.

    Raises:
        ConfigError: no reward, an unknown reward or option (with the nearest known name), a value of the wrong type or range.

    >>> rewards = build_rewards({"list_ndcg": {"k": 10}, "hit": 0.5})
    >>> rewards.names, rewards.weights.tolist()
    (['list_ndcg', 'hit'], [1.0, 0.5])
    """
    if not isinstance(config, Mapping) or not config:
        raise ConfigError(f"rewards must map at least one reward to its weight or options, got {config!r}.")
    names, weights, functions = [], [], []
    for name, value in config.items():
        weight, function = _bound(str(name), value)
        function(_probe(depth))
        names.append(str(name))
        weights.append(weight)
        functions.append(function)
    return CombinedReward(names, np.array(weights), functions)


def _bound(name: str, value: Any) -> tuple[float, Callable[[RewardBatch], np.ndarray]]:
    where = f"rewards.{name}"
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        value = {"weight": 1.0 if value is None else value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a weight or a mapping of options, got {value!r}.")
    options = dict(value)
    weight = options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not np.isfinite(weight):
        raise ConfigError(f"{where}: weight must be a finite number, got {weight!r}.")
    function: Reward = REWARDS.get(str(options.pop("reward", name)))
    known = [n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    check_keys(options, [*known, "weight", "reward"], where)
    check_types(function, options, where)  # type: ignore[arg-type]
    return float(weight), lambda batch: function(batch, **options)


def _probe(depth: int | None) -> RewardBatch:
    """A batch of no rows: shows a wrong option before any work."""
    none, one = np.zeros(0, np.int64), np.zeros((0, 1))
    targets = Targets(np.zeros(1, np.int64), none, np.zeros(0))
    return RewardBatch(
        lists=one.astype(np.int64),
        scores=one.astype(np.float32),
        targets=targets,
        leaf_codes=np.zeros((0, depth or 0), np.int32),
        closed=none.astype(bool),
        reasoning_lengths=none,
        popularity_of_leaf=np.zeros(0),
    )

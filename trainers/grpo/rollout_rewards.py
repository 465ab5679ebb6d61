"""Rewards inside the trainer: from the rows of a rollout to one number per reward and row.

TRL calls one plain function per reward; ours answer from a table that is computed once per generation on leaf numbers,
so nothing depends on decoded text. With credit "list" a reward is judged on each beam alone and its expectation over
the list is the row's reward (`specs/crs_debiased_grpo.md` 2.7, R+list).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import Vocabulary
from sidtune.trainers.common.hooks import check_dataset
from sidtune.trainers.grpo.advantages import list_credit
from sidtune.trainers.grpo.rollouts import Rollout
from sidtune.trainers.rewards.batch import CombinedReward, RewardBatch, Targets, build_rewards
from sidtune.trainers.rewards.gains import LeafFacts
from sidtune.trainers.rewards.registry import REWARDS

TARGET_COLUMNS = ("target_leaves", "target_gains", "target_items")
_OWN = ("prompt", "prompt_ids", "leaves", "leaf_scores", "closed", "reasoning_length")


@dataclass(frozen=True)
class SidCatalogue:
    """What rollouts and rewards know of the catalogue.

    Attributes:
        trie: legal SIDs. sid_token_ids: (sum of level sizes,) token id of each code, level-major.
        popularity_of_leaf: (M,) counts of the past.
        leaf_of_item: item id → leaf, for targets by item id; None without.
    """

    trie: SidTrie
    sid_token_ids: np.ndarray
    popularity_of_leaf: np.ndarray | None = None
    leaf_of_item: Mapping[str, int] | None = None

    @classmethod
    def from_semantic_ids(
        cls, sids: SemanticIds, vocabulary: Vocabulary, facts: LeafFacts | None = None
    ) -> SidCatalogue:
        """The catalogue of semantic IDs and of the vocabulary of a model that learned them.

        `facts` are what rewards about popularity need: `LeafFacts.of(items, sids)`. Raises DataError where the vocabulary is of
        other semantic IDs.
        """
        vocabulary.check(sids=sids)
        _, offsets, rows = sids.paths()
        leaves = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)).tolist()
        items = dict(zip([sids.item_ids[row] for row in rows], leaves, strict=True))
        popularity = None if facts is None else facts.popularity_of_leaf
        return cls(SidTrie.from_semantic_ids(sids), vocabulary.sid_token_ids, popularity, items)

    @cached_property
    def leaf_codes(self) -> np.ndarray:
        """(M, L) codes of each leaf."""
        return self.trie.leaf_codes(torch.arange(self.trie.num_leaves, device=self.trie.device)).cpu().numpy()

    def leaves_of(self, items: Sequence[Any]) -> list[list[int]]:
        """Rows of one item id, a list of them or None → leaves.

        Raises:
            DataError: an item without a semantic ID. ConfigError: the catalogue knows no items.
        """
        if self.leaf_of_item is None:
            raise ConfigError(
                "target_items needs a catalogue that knows its items; make it with SidCatalogue.from_semantic_ids."
            )
        rows = [row if isinstance(row, (list, tuple)) else [] if row is None else [row] for row in items]
        wanted = {str(item) for row in rows for item in row}
        if unknown := sorted(wanted - self.leaf_of_item.keys()):
            raise DataError(
                f"target_items holds '{unknown[0]}' ({len(unknown)} such items), which has no semantic ID; leave such items out."
            )
        return [[self.leaf_of_item[str(item)] for item in row] for row in rows]


def reward_batch(catalogue: SidCatalogue, columns: Mapping[str, list], **rows: Any) -> RewardBatch:
    """What rewards see of rows with these `columns` of the data; `rows` are further fields of `RewardBatch`."""
    return RewardBatch(
        targets=_targets(columns, len(rows["lists"])),
        leaf_codes=catalogue.leaf_codes,
        popularity_of_leaf=catalogue.popularity_of_leaf,
        columns={name: values for name, values in columns.items() if name not in ("target_leaves", "target_gains")},
        **rows,
    )


def _targets(columns: Mapping[str, list], rows: int) -> Targets:
    if "target_leaves" not in columns:
        return Targets.make(np.zeros(rows + 1, np.int64), np.zeros(0, np.int64))
    lists = [list(row or []) for row in columns["target_leaves"]]
    values = [list(row or []) for row in columns["target_gains"]] if "target_gains" in columns else None
    if values is not None and [len(row) for row in values] != [len(row) for row in lists]:
        raise DataError("The columns target_leaves and target_gains differ in length; give every leaf one gain.")
    return Targets.from_lists(lists, values)


def check_targets(rewards: CombinedReward, catalogue: SidCatalogue, row: Mapping[str, Any]) -> None:
    """Refuses data whose first row lacks what the rewards compare with, or misspells it.

    Raises:
        DataError: a column that is nearly a target column, or none where a reward needs targets.
    """
    for name in sorted(row.keys() - set(TARGET_COLUMNS)):
        if difflib.get_close_matches(name, TARGET_COLUMNS, 1, 0.8):
            raise DataError(f"The data has a column '{name}', which no reward reads: {nearest(name, TARGET_COLUMNS)}")
    one: dict[str, Any] = {"lists": np.zeros((1, 1), np.int64), "scores": np.zeros((1, 1), np.float32)}
    one |= {"closed": np.ones(1, bool), "reasoning_lengths": np.ones(1, np.int64)}
    columns = {name: [value] for name, value in row.items() if name not in _OWN}
    scored = [
        ~np.isnan(
            rewards(reward_batch(catalogue, columns | {"target_leaves": [t], "target_gains": [[1.0] * len(t)]}, **one))[
                0
            ]
        )
        for t in ([], [0])
    ]
    needs = scored[1] & ~scored[0]
    if needs.any() and not {"target_leaves", "target_items"} & row.keys():
        needing = rewards.names[int(needs.argmax())]
        raise DataError(
            f"The reward '{needing}' compares with targets, but the data has neither target_leaves nor target_items; its columns "
            f"are {', '.join(row)}."
        )


def sorted_rewards(
    rewards: Any, reward_funcs: Any, catalogue: SidCatalogue
) -> tuple[CombinedReward | None, list[Callable[..., Any]]]:
    """The rewards of this package, and those of TRL's kind."""
    listed = [part for part in (rewards, reward_funcs) if part is not None]
    parts = [one for part in listed for one in (part if isinstance(part, (list, tuple)) else [part])]
    parts = [{one: 1.0} if isinstance(one, str) and one in REWARDS else one for one in parts]
    own = [one for one in parts if isinstance(one, (Mapping, CombinedReward))]
    if len(own) > 1:
        raise ConfigError("Rewards by name were given twice; put them into one mapping.")
    combined = build_rewards(own[0], catalogue.trie.depth) if own and isinstance(own[0], Mapping) else None
    return combined or (own[0] if own else None), [
        one for one in parts if not isinstance(one, (Mapping, CombinedReward))
    ]


def with_leaves(data: Any, name: str, rewards: CombinedReward | None, catalogue: SidCatalogue) -> Any:
    """A data set, or some by name, with `target_leaves` from `target_items` where it has those; checked by `check_targets`."""
    if isinstance(data, Mapping):
        return {key: with_leaves(one, f"{name} '{key}'", rewards, catalogue) for key, one in data.items()}
    check_dataset(data, name)
    if rewards is not None:
        check_targets(rewards, catalogue, data[0])
    if "target_items" not in data.column_names or "target_leaves" in data.column_names:
        return data
    return data.add_column("target_leaves", catalogue.leaves_of(data["target_items"][:]))


class RolloutRewards:
    """The rewards of the config as functions for TRL.

    Args:
        combined: rewards and weights, or None. catalogue: see there.
        by_item: judge each beam alone and take the expectation (credit "list").
    """

    def __init__(self, combined: CombinedReward | None, catalogue: SidCatalogue, by_item: bool) -> None:
        self.combined, self.catalogue, self.by_item = combined, catalogue, by_item
        if by_item and combined is None:
            raise ConfigError("credit 'list' judges every beam, which only the rewards of the config can; name some.")
        self._values = np.zeros((0, 0))
        self._matches = torch.zeros(0, 0)
        self.item_coefficients = torch.zeros(0, 0)

    def functions(self) -> list[Callable[..., list[float]]]:
        """One function per reward, named like it."""
        return [] if self.combined is None else [self._function(n, name) for n, name in enumerate(self.combined.names)]

    def _function(self, number: int, name: str) -> Callable[..., list[float]]:
        def reward(**columns: Any) -> list[float]:
            return self._values[:, number].tolist()

        reward.__name__ = name
        return reward

    def all_weights(self, given: Sequence[float] | None, others: int) -> list[float]:
        """Weights of the rewards of the config, then of `others` functions (`given`, default 1 each)."""
        given = [1.0] * others if given is None else list(given)
        if len(given) != others:
            raise ConfigError(
                f"reward_weights weighs the {others} reward_funcs, got {len(given)} weights; the rewards of the config have "
                "their weights in the config."
            )
        return [*([] if self.combined is None else map(float, self.combined.weights)), *given]

    def score(self, rollout: Rollout, rows: list[dict[str, Any]]) -> None:
        """Computes all rewards of the n rows of a rollout; `rows` are their columns."""
        known = {
            "lists": rollout.leaves,
            "scores": rollout.scores,
            "closed": rollout.closed,
            "reasoning_lengths": rollout.reasoning_lengths,
        }
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in _OWN}
        self._matches = self._best_matches(rollout.leaves[:, 0], _targets(columns, len(rows)))
        if self.combined is None:
            return
        fields = {name: value.numpy() for name, value in known.items() if value is not None}
        batch = reward_batch(self.catalogue, columns, **fields)
        if not self.by_item:
            self._values = self.combined(batch)
            return
        shape = batch.lists.shape
        values = self.combined(_one_by_one(batch)).reshape(*shape, -1)
        scores = rollout.scores
        expected = [list_credit(torch.from_numpy(v), scores)[0] for v in np.moveaxis(values, 2, 0)]
        self._values = torch.stack(expected, dim=1).numpy()
        total = self.combined.total(values.reshape(-1, values.shape[2])).reshape(values.shape[:2])
        self.item_coefficients = list_credit(torch.from_numpy(total).nan_to_num(nan=0.0), scores)[1]

    def matches(self) -> Tensor:
        """(n, L) 1 where a code of the first leaf is that of the row's best target (longest prefix, then largest gain),
        else 0; -1 in rows without a target.
        """
        return self._matches

    def _best_matches(self, leaves: Tensor, targets: Targets) -> Tensor:
        wanted, gains = targets.padded
        known = (wanted >= 0) & (gains > 0)
        own = self.catalogue.leaf_codes[leaves.clamp(min=0).numpy()]
        agree = (own[:, None] == self.catalogue.leaf_codes[np.maximum(wanted, 0)]) & (leaves.numpy() >= 0)[
            :, None, None
        ]
        length = np.where(known, np.cumprod(agree, axis=2).sum(axis=2), -1)
        best = np.lexsort((-gains, -length), axis=1)[:, 0]
        chosen = agree[np.arange(len(own)), best].astype(np.int64)
        chosen[~known.any(axis=1)] = -1
        return torch.from_numpy(chosen)


def _one_by_one(batch: RewardBatch) -> RewardBatch:
    """(R, K) lists → (R K, 1)."""
    rows = np.repeat(np.arange(len(batch)), batch.lists.shape[1])
    return replace(
        batch,
        lists=batch.lists.reshape(-1, 1),
        scores=batch.scores.reshape(-1, 1),
        targets=batch.targets.take(rows),
        closed=None if batch.closed is None else batch.closed[rows],
        reasoning_lengths=None if batch.reasoning_lengths is None else batch.reasoning_lengths[rows],
        columns={name: [value[row] for row in rows] for name, value in batch.columns.items()},
    )

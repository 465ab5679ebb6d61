"""Rewards inside the trainer: from the rows of a rollout to one number per reward and row.

TRL calls one plain function per reward; ours answer from a table that is computed once per generation on leaf numbers,
so nothing depends on decoded text. With credit "list" a reward is judged on each beam alone and its expectation over
the list is the row's reward (`specs/crs_debiased_grpo.md` 2.7, R+list).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import Vocabulary
from sidtune.trainers.grpo.advantages import list_credit
from sidtune.trainers.grpo.rollouts import Rollout
from sidtune.trainers.rewards.batch import CombinedReward, RewardBatch, Targets
from sidtune.trainers.rewards.gains import LeafFacts

TARGET_LEAVES, TARGET_GAINS = "target_leaves", "target_gains"
_OWN = ("prompt", "prompt_ids", "leaves", "leaf_scores", "closed", "reasoning_length")


@dataclass(frozen=True)
class SidCatalogue:
    """What rollouts and rewards know of the catalogue.

    Attributes:
        trie: legal SIDs. sid_token_ids: (sum of level sizes,) token id of each code, level-major.
        category_of_leaf: (M,) or (M, C) int64, -1 = unknown. popularity_of_leaf: (M,) counts of the past.
        statistics_of_leaf: (M, 3) exposures, clicks, orders of the past.
    """

    trie: SidTrie
    sid_token_ids: np.ndarray
    category_of_leaf: np.ndarray | None = None
    popularity_of_leaf: np.ndarray | None = None
    statistics_of_leaf: np.ndarray | None = None

    @classmethod
    def from_semantic_ids(
        cls, sids: SemanticIds, vocabulary: Vocabulary, facts: LeafFacts | None = None
    ) -> SidCatalogue:
        """The catalogue of semantic IDs and of the vocabulary of a model that learned them.

        `facts` are what rewards about categories and popularity need: `LeafFacts.of(items, sids)`. Raises DataError where the
        vocabulary is of other semantic IDs.
        """
        vocabulary.check(sids=sids)
        names = ("category_of_leaf", "popularity_of_leaf", "statistics_of_leaf")
        known = {} if facts is None else {name: getattr(facts, name) for name in names}
        return cls(SidTrie.from_semantic_ids(sids), vocabulary.sid_token_ids, **known)


@dataclass
class _Part:
    """The rows of one process, ready for a reward batch."""

    lists: np.ndarray
    scores: np.ndarray
    closed: np.ndarray | None
    lengths: np.ndarray | None
    columns: dict[str, list]


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
        leaves = torch.arange(catalogue.trie.num_leaves, device=catalogue.trie.device)
        self._leaf_codes = catalogue.trie.leaf_codes(leaves).cpu().numpy()
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

    def score(
        self,
        rollout: Rollout,
        rows: list[dict[str, Any]],
        group_size: int,
        *,
        gather: Callable[[list], list] | None,
        process: int,
    ) -> None:
        """Computes all rewards of a generation.

        Args:
            rollout: the n rows of this process. rows: their columns. group_size: G.
            gather: collects objects of all processes where groups are shared between them, else None.
            process: number of this process.
        """
        part = _part(rollout, rows)
        self._matches = self._best_matches(rollout.leaves[:, 0], _targets([part], TARGET_LEAVES, TARGET_GAINS))
        if self.combined is None:
            return
        parts = [part] if gather is None else gather([part])
        here = slice(None) if gather is None else slice(process * len(rollout), (process + 1) * len(rollout))
        batch = self._batch(parts, group_size)
        if not self.by_item:
            self._values = self.combined(batch)[here]
            return
        shape = batch.lists.shape
        values = self.combined(_one_by_one(batch)).reshape(*shape, -1)[here]
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
        own = self._leaf_codes[leaves.clamp(min=0).numpy()]
        agree = (own[:, None] == self._leaf_codes[np.maximum(wanted, 0)]) & (leaves.numpy() >= 0)[:, None, None]
        length = np.where(known, np.cumprod(agree, axis=2).sum(axis=2), -1)
        best = np.lexsort((-gains, -length), axis=1)[:, 0]
        chosen = agree[np.arange(len(own)), best].astype(np.int64)
        chosen[~known.any(axis=1)] = -1
        return torch.from_numpy(chosen)

    def _batch(self, parts: list[_Part], group_size: int) -> RewardBatch:
        names = list(parts[0].columns)
        judged = sorted(n.removesuffix("_leaves") for n in names if n.endswith("_leaves") and n != TARGET_LEAVES)
        used = {TARGET_LEAVES, TARGET_GAINS, *(f"{name}_{end}" for name in judged for end in ("leaves", "gains"))}
        catalogue = self.catalogue
        return RewardBatch(
            lists=np.concatenate([part.lists for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            targets=_targets(parts, TARGET_LEAVES, TARGET_GAINS),
            leaf_codes=self._leaf_codes,
            closed=_all(parts, "closed"),
            reasoning_lengths=_all(parts, "lengths"),
            category_of_leaf=catalogue.category_of_leaf,
            popularity_of_leaf=catalogue.popularity_of_leaf,
            statistics_of_leaf=catalogue.statistics_of_leaf,
            judgements={name: _targets(parts, f"{name}_leaves", f"{name}_gains") for name in judged},
            columns={name: [v for part in parts for v in part.columns[name]] for name in names if name not in used},
            group_size=group_size,
        )


def _part(rollout: Rollout, rows: list[dict[str, Any]]) -> _Part:
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in _OWN}
    return _Part(
        rollout.leaves.numpy(),
        rollout.scores.numpy(),
        None if rollout.closed is None else rollout.closed.numpy(),
        None if rollout.reasoning_lengths is None else rollout.reasoning_lengths.numpy(),
        columns,
    )


def _all(parts: list[_Part], name: str) -> np.ndarray | None:
    values = [getattr(part, name) for part in parts]
    return None if values[0] is None else np.concatenate(values)


def _targets(parts: list[_Part], leaves: str, gains: str) -> Targets:
    rows = sum(len(part.lists) for part in parts)
    if leaves not in parts[0].columns:
        return Targets.make(np.zeros(rows + 1, np.int64), np.zeros(0, np.int64))
    lists = [list(row or []) for part in parts for row in part.columns[leaves]]
    values = None
    if gains in parts[0].columns:
        values = [list(row or []) for part in parts for row in part.columns[gains]]
        if [len(row) for row in values] != [len(row) for row in lists]:
            raise DataError(f"The columns {leaves} and {gains} differ in length; give every leaf one gain.")
    return Targets.from_lists(lists, values)


def _one_by_one(batch: RewardBatch) -> RewardBatch:
    """(R, K) lists → (R K, 1)."""
    rows = np.repeat(np.arange(len(batch)), batch.lists.shape[1])
    return RewardBatch(
        lists=batch.lists.reshape(-1, 1),
        scores=batch.scores.reshape(-1, 1),
        targets=batch.targets.take(rows),
        leaf_codes=batch.leaf_codes,
        closed=None if batch.closed is None else batch.closed[rows],
        reasoning_lengths=None if batch.reasoning_lengths is None else batch.reasoning_lengths[rows],
        category_of_leaf=batch.category_of_leaf,
        popularity_of_leaf=batch.popularity_of_leaf,
        statistics_of_leaf=batch.statistics_of_leaf,
        judgements={name: value.take(rows) for name, value in batch.judgements.items()},
        columns={name: [value[row] for row in rows] for name, value in batch.columns.items()},
    )

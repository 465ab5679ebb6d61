"""Rewards of this package as reward functions of TRL's, for a stock `GRPOTrainer` without rollouts over the trie.

    GRPOTrainer(model, as_trl_reward("list_ndcg", catalogue), args, train_dataset)

The SID is read from the token ids of a completion, never from its text, and counts as a list of one place. What no trie kept
legal may be no item at all; such a place is dead, as everywhere. Our own plumbing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from sidtune.core.ragged import pad
from sidtune.trainers.grpo.rollout_rewards import SidCatalogue, check_targets, reward_batch
from sidtune.trainers.grpo.sid_positions import SidTable
from sidtune.trainers.rewards.batch import build_rewards


def as_trl_reward(
    reward: str | Mapping[str, Any], catalogue: SidCatalogue, *, end_token_id: int | None = None, **options: Any
) -> Callable[..., list[float | None]]:
    """A function that TRL's `GRPOTrainer` takes among its `reward_funcs`.

    Args:
        reward: a name in the registry of rewards, or a mapping as `build_rewards` takes it, whose weighted sum is the reward.
        catalogue: the trie and the tokens of its codes, see `SidCatalogue.from_semantic_ids`.
        end_token_id: the token that ends a reasoning; the SID follows its first one. None: a completion begins with its SID.
        options: options of the reward, such as `k` or `gammas`.

    Returns:
        The function, named like the reward. It reads the columns `target_leaves` or `target_items`, `target_gains`,
        and gives None where a row cannot be scored.

    Raises:
        ConfigError: an unknown reward or option. When the function is called, DataError: missing or misspelt target columns.
    """
    name = reward if isinstance(reward, str) else "_".join(reward)
    rewards = build_rewards({reward: options} if isinstance(reward, str) else reward, catalogue.trie.depth)
    table = SidTable(catalogue.trie, torch.from_numpy(np.array(catalogue.sid_token_ids, np.int64)), reasoned=False)

    def score(prompts: list, completions: list, completion_ids: list, **columns: Any) -> list[float | None]:
        told = {n: v for n, v in columns.items() if isinstance(v, list) and len(v) == len(completion_ids)}
        check_targets(rewards, catalogue, {n: v[0] for n, v in told.items()})
        if "target_items" in told and "target_leaves" not in told:
            told["target_leaves"] = catalogue.leaves_of(told["target_items"])
        leaves, closed, lengths = _read(completion_ids, table, end_token_id)
        rows = {"lists": leaves[:, None], "scores": np.where(leaves < 0, -np.inf, 0.0).astype(np.float32)[:, None]}
        reasoned = {} if end_token_id is None else {"closed": closed, "reasoning_lengths": lengths}
        batch = reward_batch(catalogue, told, **rows, **reasoned)
        total = rewards.total(rewards(batch))
        return [None if np.isnan(value) else value for value in total.tolist()]

    score.__name__ = name
    return score


def _read(completion_ids: list, table: SidTable, end: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R,) leaf, -1 for none; (R,) whether the end mark stands there; (R,) tokens before it."""
    rows = [[int(token) for token in ids] for ids in completion_ids]
    lengths = np.array([0 if end is None else ids.index(end) if end in ids else len(ids) for ids in rows])
    closed = np.array([end is None or end in ids for ids in rows])
    answers = [ids[n + (end is not None) :][: table.trie.depth] for ids, n in zip(rows, lengths, strict=True)]
    ids, mask = pad(answers, 0, left=False, width=table.trie.depth)
    start, codes = table.find(torch.from_numpy(ids), torch.from_numpy(mask))
    leaves = table.trie.find(codes) - table.trie.level_starts[table.trie.depth]
    return leaves.where(start >= 0, -1).cpu().numpy(), closed, lengths

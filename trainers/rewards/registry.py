"""Names of rewards, as YAML files write them: one line each.

A reward is a plain function `reward(batch: RewardBatch, *, options...) -> (R,) float64`, NaN where the row cannot be scored
(see `trainers/rewards/batch.py`).
"""

from __future__ import annotations

from sidtune.core.registry import Registry

REWARDS = Registry(
    "reward",
    {
        "hit": "sidtune.trainers.rewards.lists:hit",
        "list_ndcg": "sidtune.trainers.rewards.lists:list_ndcg",
        "list_dcg": "sidtune.trainers.rewards.lists:list_dcg",
        "prefix_match": "sidtune.trainers.rewards.lists:prefix_match",
        "popularity_penalty": "sidtune.trainers.rewards.catalogue:popularity_penalty",
        "validity": "sidtune.trainers.rewards.catalogue:validity",
        "format": "sidtune.trainers.rewards.catalogue:format_ok",
        "reasoning_length": "sidtune.trainers.rewards.catalogue:reasoning_length",
    },
)

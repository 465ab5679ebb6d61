"""Names of rewards, as YAML files write them: one line each.

A reward is a plain function `reward(batch: RewardBatch, *, options...) -> (R,) float64`, NaN where the row cannot be scored
(see `trainers/rewards.py`).
"""

from __future__ import annotations

from sidtune.core.registry import Registry

REWARDS = Registry(
    "reward",
    {
        "hit": "sidtune.trainers.list_rewards:hit",
        "list_ndcg": "sidtune.trainers.list_rewards:list_ndcg",
        "list_dcg": "sidtune.trainers.list_rewards:list_dcg",
        "expected_gain": "sidtune.trainers.list_rewards:expected_gain",
        "prefix_match": "sidtune.trainers.list_rewards:prefix_match",
        "ndcg_rule": "sidtune.trainers.list_rewards:ndcg_rule",
        "popularity_ndcg": "sidtune.trainers.list_rewards:popularity_ndcg",
        "popularity_penalty": "sidtune.trainers.catalogue_rewards:popularity_penalty",
        "category_match": "sidtune.trainers.catalogue_rewards:category_match",
        "relevance_tier": "sidtune.trainers.catalogue_rewards:relevance_tier",
        "pars": "sidtune.trainers.catalogue_rewards:pars",
        "validity": "sidtune.trainers.catalogue_rewards:validity",
        "format": "sidtune.trainers.catalogue_rewards:format_ok",
        "reasoning_length": "sidtune.trainers.catalogue_rewards:reasoning_length",
    },
)

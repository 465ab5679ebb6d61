"""Rewards that need the catalogue or the reasoning: popularity, validity, format, length.

Source: CRS (`specs/crs_debiased_grpo.md` 2.7), where the exact form of format, validity and length is unknown.
"""

from __future__ import annotations

import numpy as np

from sidtune.core.errors import ConfigError
from sidtune.trainers.rewards.batch import RewardBatch
from sidtune.trainers.rewards.lists import discounts, first_places, popularity


def popularity_penalty(batch: RewardBatch, *, k: int | None = None) -> np.ndarray:
    """(R,) -log(M p_pop) of the list, rank-weighted mean; its weight is the kappa of the spec's row 21.

    0 for leaves of average popularity, negative for popular ones. p_pop is smoothed, see `lists.popularity`.
    """
    places = first_places(batch, k)
    value = np.append(-np.log(len(batch.leaf_codes) * popularity(batch.popularity_of_leaf)), 0.0)
    weight = batch.alive[:, :places] * discounts(places)
    total = weight.sum(axis=1)
    mean = (weight * value[batch.lists[:, :places]]).sum(axis=1) / np.where(total > 0, total, 1.0)
    return np.where(total > 0, mean, np.nan)


def validity(batch: RewardBatch) -> np.ndarray:
    """(R,) share of the K places that hold a leaf of the catalogue, each leaf once."""
    return batch.alive.mean(axis=1)


def format_ok(batch: RewardBatch) -> np.ndarray:
    """(R,) 1 when the model ended its reasoning itself and the first place is valid, else 0.

    Raises:
        ConfigError: rollouts without reasoning, where decoding over the trie leaves no format to learn.
    """
    if batch.closed is None:
        raise ConfigError("The reward 'format' needs rollouts with reasoning; remove it for direct SID rollouts.")
    return (np.asarray(batch.closed, bool) & batch.alive[:, :1].any(axis=1)).astype(np.float64)


def reasoning_length(
    batch: RewardBatch, *, shortest: int = 8, longest: int = 128, fade: int | None = None
) -> np.ndarray:
    """(R,) h(|c|) of the spec's 2.7: 1 for shortest <= |c| <= longest tokens, falling linearly to 0 outside; 0 for a reasoning that
    the model did not end, whose length is that of the knife.

    Args:
        shortest, longest: limits in tokens, 0 <= shortest <= longest. Below, h = |c| / shortest.
        fade: tokens above `longest` over which h falls to 0; null takes `longest`. Must be at least 1.

    Raises:
        ConfigError: impossible limits, or rollouts without reasoning.
    """
    fade = longest if fade is None else fade
    if not 0 <= shortest <= longest or fade < 1:
        raise ConfigError(f"0 <= shortest <= longest and fade >= 1 must hold, got {shortest}, {longest} and {fade}.")
    if batch.reasoning_lengths is None:
        raise ConfigError(
            "The reward 'reasoning_length' needs rollouts with reasoning; remove it for direct SID rollouts."
        )
    length = np.asarray(batch.reasoning_lengths, np.float64)
    below = length / shortest if shortest else np.ones(length.shape)
    ended = np.ones(length.shape) if batch.closed is None else np.asarray(batch.closed, np.float64)
    return ended * np.clip(np.minimum(below, 1.0 - (length - longest) / fade), 0.0, 1.0)

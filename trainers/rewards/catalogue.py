"""Rewards that need the catalogue or the reasoning: category, relevance tier, PARS, popularity, validity, format, length.

Sources: PARS and its calibrated statistics from OneSearch (`specs/onesearch.md` 2.10, Eq. 6-8); relevance tiers from OneSearch-V2's
released reward; format, validity and length from CRS (`specs/crs_debiased_grpo.md` 2.7), where their exact form is unknown. What is
unknown about an item (no category, no judgement) is left out of a mean, never counted as 0.
"""

from __future__ import annotations

import numpy as np

from sidtune.core.errors import ConfigError, nearest
from sidtune.trainers.rewards.batch import RewardBatch, Targets
from sidtune.trainers.rewards.lists import discounts, first_places, popularity

SAME_CATEGORY = 0.2


def _weighted_mean(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(R,) mean of (R, K) values over known places with weights 1 / log2(k + 1); NaN where no place is known."""
    weight = known * discounts(values.shape[1])
    total = weight.sum(axis=1)
    return np.where(
        total > 0, (weight * np.where(known, values, 0.0)).sum(axis=1) / np.where(total > 0, total, 1.0), np.nan
    )


def _cut(batch: RewardBatch, k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first k places and which of them count."""
    places = first_places(batch, k)
    return batch.lists[:, :places], batch.alive[:, :places]


def _judged(batch: RewardBatch, name: str) -> Targets:
    try:
        return batch.judgements[name]
    except KeyError:
        raise ConfigError(
            f"A reward needs the judgements '{name}', which the data does not give: {nearest(name, batch.judgements)}"
        ) from None


def _look_up(judged: Targets, lists: np.ndarray) -> np.ndarray:
    """(R, K) the judged number of each leaf, NaN where the leaf was not judged."""
    leaves, values = judged.padded
    same = (lists[:, :, None] == leaves[:, None, :]) & (leaves >= 0)[:, None, :]
    return np.where(same.any(axis=2), np.where(same, values[:, None, :], -np.inf).max(axis=2), np.nan)


def relevance_tier(
    batch: RewardBatch, *, judgement: str = "tier", highest: float = 3.0, k: int | None = None
) -> np.ndarray:
    """(R,) rank-weighted mean of the judged relevance tiers of the list, over the highest tier; in [0, 1].

    Unjudged leaves are left out; NaN where the list holds no judged leaf.

    Args:
        judgement: name of the judgements that hold the tiers (0 ... highest).
        highest: the best tier (OneSearch-V2: 3).
        k: places that count, null for all.
    """
    if not highest > 0:
        raise ConfigError(f"highest must be above 0, got {highest}.")
    lists, alive = _cut(batch, k)
    tiers = _look_up(_judged(batch, judgement), lists)
    return _weighted_mean(np.minimum(tiers / highest, 1.0), alive & ~np.isnan(tiers))


def calibrated_rates(exposures: np.ndarray, clicks: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Harmonic mean h = 2 Ctr Cvr / (Ctr + Cvr) of OneSearch's calibrated rates (Eq. 6-8), each count at least 0.

    Ctr = log(clicks + 10) / log((exposures + 10)(clicks + 10)(orders + 10)), Cvr = log(orders + 10) / log(clicks + 10). In
    (0, 0.5] where exposures >= clicks >= orders, 0.5 exactly when all three are equal: an item without data gets the prior 0.5.
    """
    a, b, c = (np.log(np.asarray(counts, np.float64) + 10.0) for counts in (exposures, clicks, orders))
    ctr, cvr = b / (a + b + c), c / b
    return 2.0 * ctr * cvr / (ctr + cvr)


def pars(batch: RewardBatch, *, judgement: str = "level", k: int | None = None) -> np.ndarray:
    """(R,) rank-weighted mean of OneSearch's r(q, i) = 2 lambda h(i) over the list; at most the largest lambda.

    lambda is the judged level of the leaf for the row (bought in search 2.0, bought elsewhere 1.5, clicked 1.0, shown and not
    clicked 0.5), 0.2 for an unjudged leaf of the category of a positive, else 0; h as in `calibrated_rates`. NaN for a row
    without any judgement.

    Args:
        judgement: name of the judgements that hold lambda.
        k: places that count, null for all.

    Raises:
        ConfigError: no counts of exposures, clicks and orders, no such judgements.
    """
    if batch.statistics_of_leaf is None:
        raise ConfigError(
            "The reward 'pars' needs exposures, clicks and orders of the items, which the data does not give."
        )
    judged = _judged(batch, judgement)
    lists, alive = _cut(batch, k)
    level = _look_up(judged, lists)
    if batch.category_of_leaf is not None:
        level = np.where(np.isnan(level), SAME_CATEGORY * (_category_share(batch, lists) == 1.0), level)
    rates = np.append(calibrated_rates(*np.asarray(batch.statistics_of_leaf).T), 0.0)
    reward = 2.0 * np.nan_to_num(level) * rates[lists]
    return np.where(np.diff(judged.offsets) > 0, np.nan_to_num(_weighted_mean(reward, alive)), np.nan)


def _category_share(batch: RewardBatch, lists: np.ndarray) -> np.ndarray:
    """(R, K) largest share of leading category levels in common with a positive; NaN where the leaf's category is unknown."""
    categories = np.asarray(batch.category_of_leaf)
    categories = categories[:, None] if categories.ndim == 1 else categories
    leaves, gains = batch.targets.padded
    table = np.concatenate([categories, np.full((1, categories.shape[1]), -1)])
    mine, theirs = table[lists], table[np.where(gains > 0, leaves, -1)]
    known = (mine[:, :, 0] >= 0)[:, :, None] & (theirs[:, :, 0] >= 0)[:, None, :]
    # A category that ends early is compared as far as the positive's goes.
    depth = np.maximum((theirs >= 0).sum(axis=2), 1)[:, None, :]
    running, shared = known, np.zeros(known.shape)
    for level in range(table.shape[1]):
        running = running & (theirs >= 0)[:, None, :, level] & (mine[:, :, None, level] == theirs[:, None, :, level])
        shared += running
    share = np.where(known, shared / depth, -1.0).max(axis=2)
    return np.where(share < 0, np.nan, share)


def category_match(batch: RewardBatch, *, k: int | None = None) -> np.ndarray:
    """(R,) rank-weighted mean over the list of the share of category levels, coarse to fine, in common with a positive.

    Leaves of unknown category are left out; NaN without a positive of known category.

    Raises:
        ConfigError: the catalogue has no categories.
    """
    if batch.category_of_leaf is None:
        raise ConfigError("The reward 'category_match' needs categories of the items, which the data does not give.")
    lists, alive = _cut(batch, k)
    share = _category_share(batch, lists)
    return _weighted_mean(share, alive & ~np.isnan(share))


def popularity_penalty(batch: RewardBatch, *, k: int | None = None) -> np.ndarray:
    """(R,) -log(M p_pop) of the list, rank-weighted mean; its weight is the kappa of the spec's row 21.

    0 for leaves of average popularity, negative for popular ones. p_pop is smoothed, see `lists.popularity`.
    """
    lists, alive = _cut(batch, k)
    value = np.append(-np.log(len(batch.leaf_codes) * popularity(batch.popularity_of_leaf)), 0.0)
    return _weighted_mean(value[lists], alive)


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

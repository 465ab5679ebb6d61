"""Rewards that compare the decoded list with the positives: hit, ranked gain, shared prefix.

Source: R_rank of R-GRPO as reconstructed in `specs/crs_debiased_grpo.md` 2.7 (the paper's own weights are unknown):

    g(y, T) = max over positives t of gain(t) * gamma[number of leading codes that y and t share],  gamma[L] = 1, gamma[0] = 0
    R_rank  = sum over k of w_k g(y_k, T) / the same sum of the best list the catalogue allows,     w_k = 1 / log2(k + 1)

With one positive and all other gammas 0 this is NDCG@K of the list. The best list is counted exactly, so 1 is reachable for any
gammas and gains. A leaf counts at its first place only. Notation: R rows, K places, T positives of a row, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sidtune.core.errors import ConfigError
from sidtune.trainers.rewards.batch import RewardBatch


def discounts(places: int) -> np.ndarray:
    """(places,) w_k = 1 / log2(k + 1) for k = 1, 2, ..."""
    return 1.0 / np.log2(np.arange(places) + 2.0)


def level_gains(gammas: Sequence[float] | None, depth: int) -> np.ndarray:
    """(depth + 1,) share of the gain by the number of leading codes shared: 0, gammas, 1; all gammas 0 when None.

    Raises:
        ConfigError: not one number per inner level, or numbers that are not in [0, 1] or fall.
    """
    inner = np.zeros(max(depth - 1, 0)) if gammas is None else np.asarray(gammas, np.float64)
    if gammas is not None and depth and len(inner) != depth - 1:
        raise ConfigError(
            f"gammas must hold {depth - 1} numbers, one for each number of leading codes from 1 to {depth - 1}, got {gammas}."
        )
    table = np.concatenate([[0.0], inner, [1.0]])
    if not (np.isfinite(table).all() and (np.diff(table) >= 0).all()):
        raise ConfigError(f"gammas must lie in [0, 1] and not fall, got {gammas}; more shared codes are worth more.")
    return table


def shared_codes(batch: RewardBatch, leaves: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(R, K, T) number of leading codes that `leaves` (R, K) and `targets` (R, T) share; 0 where either is -1."""
    if not len(batch.leaf_codes):
        return np.zeros((*leaves.shape, targets.shape[1]), np.int64)
    mine, theirs = batch.leaf_codes[leaves], batch.leaf_codes[targets]
    real = (leaves >= 0)[:, :, None] & (targets >= 0)[:, None, :]
    shared, running = np.zeros(real.shape, np.int64), real
    for level in range(batch.leaf_codes.shape[1]):
        running = running & (mine[:, :, None, level] == theirs[:, None, :, level])
        shared += running
    return shared


def list_gains(batch: RewardBatch, gammas: Sequence[float] | None = None) -> np.ndarray:
    """(R, K) g(y_k, T) of every place; 0 on dead places and repeated leaves.

    Args:
        gammas: (L - 1,) share of the gain for 1 ... L - 1 shared leading codes; None is all 0.
    """
    leaves, gains = batch.targets.padded
    table = level_gains(gammas, batch.leaf_codes.shape[1])
    shared = shared_codes(batch, batch.lists, leaves)
    return np.where(batch.alive, (table[shared] * gains[:, None, :]).max(axis=2), 0.0)


def best_gains(batch: RewardBatch, places: int, gammas: Sequence[float] | None = None) -> np.ndarray:
    """(R, places) gains of the best list of distinct leaves, falling.

    The leaves that share m codes with a positive are a range of leaf numbers, and such ranges are nested or disjoint. Taken in
    falling order of worth, each adds the leaves that no earlier range holds. No loop over rows or leaves.
    """
    leaves, gains = batch.targets.padded
    depth = batch.leaf_codes.shape[1]
    table = level_gains(gammas, depth)
    first, last, worth = [], [], []
    for shared in range(depth, 0, -1):
        if table[shared] == 0.0:
            break
        low, high = _prefix_ranges(batch.leaf_codes, leaves, shared)
        first, last, worth = [*first, low], [*last, high], [*worth, np.where(leaves >= 0, gains * table[shared], 0.0)]
    if not worth:
        return np.zeros((len(batch), places))
    low, high, value = (np.concatenate(part, axis=1) for part in (first, last, worth))
    order = np.argsort(-value, axis=1, kind="stable")
    low, high, value = (np.take_along_axis(part, order, axis=1) for part in (low, high, value))
    new = np.zeros_like(low)
    for place in range(low.shape[1]):
        mine = slice(place, place + 1)
        within = (low[:, :place] >= low[:, mine]) & (high[:, :place] <= high[:, mine])
        covered = (low[:, :place] <= low[:, mine]) & (high[:, :place] >= high[:, mine])
        added = high[:, place] - low[:, place] - (new[:, :place] * within).sum(axis=1)
        new[:, place] = np.where(covered.any(axis=1) | (value[:, place] == 0), 0, added)
    ends = np.cumsum(new, axis=1)
    slot = (ends[:, None, :] <= np.arange(places)[None, :, None]).sum(axis=2)
    padded = np.concatenate([value, np.zeros((len(value), 1))], axis=1)
    return np.take_along_axis(padded, slot, axis=1)


def _prefix_ranges(codes: np.ndarray, leaves: np.ndarray, shared: int) -> tuple[np.ndarray, np.ndarray]:
    """Leaf ranges [low, high) that share the first `shared` codes with `leaves`; needs leaves in lexicographic order."""
    if shared == codes.shape[1] or not len(codes):
        return leaves, leaves + 1
    starts = np.flatnonzero(np.concatenate([[True], (codes[1:, :shared] != codes[:-1, :shared]).any(axis=1)]))
    run = np.searchsorted(starts, np.maximum(leaves, 0), side="right") - 1
    ends = np.append(starts[1:], len(codes))
    return starts[run], ends[run]


def _where_scorable(batch: RewardBatch, values: np.ndarray) -> np.ndarray:
    """NaN for a row without a leaf of a gain above 0, where no list can be scored."""
    return np.where((batch.targets.padded[1] > 0).any(axis=1), values, np.nan)


def first_places(batch: RewardBatch, k: int | None) -> int:
    """How many places count: k, or all of the list."""
    if k is not None and k < 1:
        raise ConfigError(f"k must be at least 1 or null for the whole list, got {k}.")
    return batch.lists.shape[1] if k is None else k


def hit(batch: RewardBatch, *, k: int | None = 1) -> np.ndarray:
    """(R,) 1 when a positive is among the first k places (default 1: the plain reward of vanilla GRPO), else 0."""
    found = list_gains(batch)[:, : first_places(batch, k)] > 0
    return _where_scorable(batch, found.any(axis=1).astype(np.float64))


def list_ndcg(batch: RewardBatch, *, k: int | None = None, gammas: list[float] | None = None) -> np.ndarray:
    """(R,) R_rank in [0, 1] of the first k places (default: the whole list); see the top of the file.

    Not for gains that are divided by propensities: the best list is divided by them too, so where a request has one positive they
    cancel and the reward is that of raw clicks. Use `list_dcg`.

    Args:
        k: places that count; the ideal list has k places too, so a list that is shorter than k cannot gain by that.
        gammas: (L - 1,) share of the gain for 1 ... L - 1 shared leading codes; null is all 0, plain NDCG.
    """
    places = first_places(batch, k)
    gains = list_gains(batch, gammas)[:, :places]
    best = best_gains(batch, places, gammas) @ discounts(places)
    return _where_scorable(batch, gains @ discounts(gains.shape[1]) / np.where(best > 0, best, 1.0))


def list_dcg(batch: RewardBatch, *, k: int | None = None, gammas: list[float] | None = None) -> np.ndarray:
    """(R,) sum of w_k g(y_k, T), not divided by the best list: linear in the gains, so unbiased gains give an unbiased reward.

    The reward for inverse-propensity weighted gains. NaN where nothing was judged; where something was, a row without success
    counts as 0, for leaving such rows out would bias the mean. Arguments as in `list_ndcg`.
    """
    gains = list_gains(batch, gammas)[:, : first_places(batch, k)]
    return np.where(np.diff(batch.targets.offsets) > 0, gains @ discounts(gains.shape[1]), np.nan)


def prefix_match(batch: RewardBatch, *, weights: list[float] | None = None) -> np.ndarray:
    """(R,) share of the weighted levels that the first place gets right before its first wrong code, in [0, 1].

    Args:
        weights: (L,) worth of each level; null is 1 each. The figure of OneSearch-V2 draws 2, 2, 2, 1, 1.
    """
    depth = batch.leaf_codes.shape[1]
    worth = np.ones(depth) if weights is None else np.asarray(weights, np.float64)
    if (depth and len(worth) != depth) or not np.isfinite(worth).all() or (worth < 0).any() or worth.sum() == 0 < depth:
        raise ConfigError(
            f"weights must hold {depth} numbers of at least 0, one per level and not all 0, got {weights}."
        )
    leaves, gains = batch.targets.padded
    shared = shared_codes(batch, batch.lists[:, :1], np.where(gains > 0, leaves, -1))[:, 0].max(axis=1)
    right = (shared[:, None] > np.arange(depth)) * worth[:depth]
    return _where_scorable(batch, right.sum(axis=1) / max(float(worth.sum()), 1e-300))


def popularity(counts: np.ndarray | None) -> np.ndarray:
    """(M,) smoothed popularity (n + 1) / (sum + M) of each leaf from its (M,) counts; sums to 1.

    Raises:
        ConfigError: no counts, or a negative one.
    """
    if counts is None:
        raise ConfigError(
            "The correction of popularity needs counts of exposures, clicks or orders in the items table; remove it or add them."
        )
    counts = np.asarray(counts, np.float64)
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ConfigError("The popularity of leaves must hold finite counts of at least 0; check the items table.")
    return (counts + 1.0) / (counts.sum() + max(1, len(counts)))


def popularity_weight(counts: np.ndarray | None, alpha: float, largest: float) -> np.ndarray:
    """(M,) min((M p_pop)^-alpha, largest): 1 for leaves of average popularity, more for rare ones."""
    share = popularity(counts)
    return np.minimum((len(share) * share) ** -alpha, largest)

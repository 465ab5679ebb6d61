"""The order a post-ranker should learn: candidates by falling relevance, ties by a stated rule.

The paper (arXiv 2411.01178, 3.1) orders MovieLens lists by falling rating and is silent on ties, which are the rule
with five-star ratings. Our default keeps the incoming order among equals.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from sidtune.core.errors import ConfigError, DataError


def target_order(
    relevance: np.ndarray,
    mask: np.ndarray | None = None,
    ties: Literal["incoming", "random"] = "incoming",
    seed: int = 0,
) -> np.ndarray:
    """Candidate places, best first.

    Args:
        relevance: (B, n) or (n,); NaN (unknown) goes after everything known.
        mask: same shape, False = pad; pads go last.
        ties: `incoming` keeps the incoming order among equals, `random` draws it from `seed`.

    Returns:
        int64 permutation of each row, shaped as `relevance`.

    Raises:
        ConfigError: an unknown tie rule. DataError: shapes differ.
    """
    if ties not in ("incoming", "random"):
        raise ConfigError(f"The ties of a target order must be 'incoming' or 'random', got '{ties}'.")
    values = np.atleast_2d(np.asarray(relevance, dtype=np.float64))
    real = np.ones(values.shape, bool) if mask is None else np.atleast_2d(np.asarray(mask, bool))
    if values.ndim != 2 or real.shape != values.shape:
        raise DataError(f"The relevance has shape {values.shape} and the mask {real.shape}; give one of each.")
    known = np.where(np.isnan(values), -np.inf, values)
    if ties == "random":
        tie = np.random.default_rng(seed).random(values.shape)
    else:
        tie = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.lexsort((tie, -known, ~real), axis=-1)
    return order.reshape(np.shape(relevance)).astype(np.int64)

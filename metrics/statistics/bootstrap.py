"""Bootstrap intervals and paired tests for means of per-request metrics, by request or by user.

Requests of one user are alike, so an interval over requests is too narrow when users have many; pass `clusters` and
whole users are resampled (the mean stays the mean over requests, a ratio of two sums). Intervals are percentile
intervals; the paired test shifts the resampled differences to zero (the bootstrap shift test, Efron and Tibshirani
1993, 16.4), two-sided: p = (1 + #{|d* - d| >= |d|}) / (1 + samples).

Below `FEW` users (or requests) percentile intervals cover too little, so there each resample is measured in its own standard
error (the bootstrap-t, Efron and Tibshirani 1993, 12.5; the error of a ratio by the delta method), at most 5 of them. No interval
repairs that one user has most of the requests.

All this is the chance of the draw of users. A difference of two trainings also has the chance of the trainings, which users do
not show: with the differences of several `seeds`, their standard error, by Student's t, is added to each resample.

Metrics take few distinct values (NDCG@10 with one relevant item takes eleven), so where they do, one multinomial draw
over the distinct values replaces drawing every request: the same distribution at a fraction of the cost. Memory stays
bounded: resamples are drawn in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sidtune.core.config import MANY
from sidtune.core.errors import ConfigError, DataError

FEW = 200
_BLOCK = 1 << 22  # drawn numbers held at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval.

    Attributes:
        mean: mean over the requests.
        low, high: bounds of the interval.
        level: confidence level, 0 to 1.
        requests: number of values. clusters: number of independent units (equal to `requests` without clusters).
        samples: number of resamples.
    """

    mean: float
    low: float
    high: float
    level: float
    requests: int
    clusters: int
    samples: int


@dataclass(frozen=True)
class PairedResult:
    """Difference of two systems on the same requests.

    Attributes:
        difference: mean of a minus mean of b. low, high: its interval.
        p_value: two-sided; never below 1 / (samples + 1).
        level, requests, clusters, samples: as in `Interval`.
        seeds: trainings whose chance is in interval and p-value, 1 for none but that of the users.
    """

    difference: float
    low: float
    high: float
    p_value: float
    level: float
    requests: int
    clusters: int
    samples: int
    seeds: int = 1


def bootstrap_interval(
    values: Any, level: float = 0.95, samples: int = 1000, seed: int = 0, clusters: Sequence[Any] | None = None
) -> Interval:
    """Interval of a mean.

    Args:
        values: (n,) finite numbers, one for each request.
        level: confidence level, between 0 and 1.
        samples: number of resamples, at least 100.
        seed: seed of the resampling; equal seeds give equal bounds.
        clusters: (n,) labels such as user ids; whole clusters are resampled. A null label is a cluster of its own.

    Raises:
        DataError: fewer than two values or clusters, values that are not finite, lengths that differ.
        ConfigError: level or samples out of range.
    """
    values = _check_values(values, "values")
    sums, sizes = _clusters(values, clusters)
    means = _resample(sums, sizes, samples, level, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), level, len(values), len(sums), samples)


def paired_bootstrap(
    a: Any,
    b: Any,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    clusters: Sequence[Any] | None = None,
    seeds: Sequence[float] = (),
) -> PairedResult:
    """Compares two systems on the same requests: mean of `a` minus mean of `b`, its interval, and a two-sided p-value.

    Args and errors as `bootstrap_interval`; `a` and `b` are (n,) values of the same requests in the same order, means over
    several trainings where there are, of which `seeds` holds the differences, one each.

    >>> found = paired_bootstrap([1.0, 0.5, 0.8, 0.9] * 100, [0.9, 0.5, 0.6, 0.9] * 100)
    >>> round(found.difference, 3), found.low > 0, found.p_value < 0.01
    (0.075, True, True)
    """
    a, b = _check_values(a, "the first system"), _check_values(b, "the second system")
    if len(a) != len(b):
        raise DataError(f"A paired test needs the same requests in both systems, got {len(a)} and {len(b)} values.")
    sums, sizes = _clusters(a - b, clusters)
    means = _resample(sums, sizes, samples, level, seed)
    difference = float((a - b).mean())
    if len(seeds) > 1:
        error = np.std(seeds, ddof=1) / np.sqrt(len(seeds))
        means = means + error * np.random.default_rng([seed, 1]).standard_t(len(seeds) - 1, samples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    tolerance = 1e-12 * max(1.0, float(np.abs(a - b).max()))
    extreme = np.abs(means - difference) >= abs(difference) - tolerance
    p_value = (1 + int(extreme.sum())) / (1 + samples)
    return PairedResult(
        difference, float(low), float(high), p_value, level, len(a), len(sums), samples, max(1, len(seeds))
    )


def check_bootstrap(level: float, samples: int) -> None:
    """Raises ConfigError for a level outside (0, 1), or too few resamples or more than any memory holds."""
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
        raise ConfigError(f"The level of an interval must lie between 0 and 1, got {level!r}.")
    if not isinstance(samples, int) or not 100 <= samples <= 100 * MANY:
        raise ConfigError(
            f"A bootstrap needs samples of at least 100 and at most {100 * MANY:,} resamples, got {samples}."
        )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-Bonferroni adjusted p-values, in the order given: they control the family-wise error.

    >>> holm([0.01, 0.5, 0.02])
    [0.03, 0.5, 0.04]
    """
    values = np.asarray(p_values, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise DataError("p-values must be a list of numbers between 0 and 1; check them.")
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values))))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def _check_values(values: Any, what: str) -> np.ndarray:
    try:
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"The bootstrap expects a list of numbers, got {repr(values)[:60]} as {what}.") from None
    if values.ndim != 1:
        raise DataError(
            f"The bootstrap expects one number for each request, got an array of shape {values.shape} as {what}."
        )
    if not np.isfinite(values).all():
        raise DataError(
            f"The bootstrap got {int((~np.isfinite(values)).sum())} values that are not finite as {what}; "
            "leave out excluded requests first (RankingResult.values does)."
        )
    return values


def _clusters(values: np.ndarray, clusters: Sequence[Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and size of each cluster, (C,) each; every value is its own cluster when there are no labels."""
    if clusters is None:
        sums, sizes = values, np.ones(len(values))
    else:
        try:
            codes = _codes(clusters)
        except TypeError:
            raise DataError(f"Clusters must be a list of texts or numbers, got {repr(clusters)[:60]}.") from None
        if len(codes) != len(values):
            raise DataError(f"There are {len(values)} values but {len(codes)} cluster labels; give one label for each.")
        sums, sizes = np.bincount(codes, weights=values), np.bincount(codes).astype(np.float64)
    if len(sums) < 2:
        unit = "values" if clusters is None else "clusters"
        raise DataError(f"An interval needs at least two {unit} to resample, got {len(sums)}.")
    return sums, sizes


def resampled(clusters: Sequence[Any] | None, count: int) -> str:
    """What an interval of `count` values resamples, for the words beside a table: "60 users" or "900 requests"."""
    if clusters is None or not any(label is not None for label in clusters):
        return f"{count:,} requests"
    return f"{int(_codes(clusters).max()) + 1:,} users"


def _codes(labels: Sequence[Any]) -> np.ndarray:
    """Numbers the labels by first appearance; null labels get a number each."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iuUS":
        _, first, codes = np.unique(labels, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[codes.reshape(-1)]
    if hasattr(labels, "to_pylist"):
        labels = labels.to_pylist()
    seen: dict[Any, int] = {}
    codes = np.empty(len(labels), dtype=np.int64)
    count = 0
    for place, label in enumerate(labels):
        known = None if label is None else seen.get(label)
        if known is None:
            known, count = count, count + 1
            if label is not None:
                seen[label] = known
        codes[place] = known
    return codes


def _resample(sums: np.ndarray, sizes: np.ndarray, samples: int, level: float, seed: int) -> np.ndarray:
    """(samples,) resampled means: sum over drawn clusters / number of requests in them."""
    check_bootstrap(level, samples)
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ConfigError(f"The seed of a bootstrap must be a whole number from 0, got {seed!r}.")
    generator = np.random.default_rng(seed)
    pairs, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    units = len(sums)
    means = np.empty(samples)
    if len(pairs) == 1:
        means[:] = sums[0] / sizes[0]
        return means
    if units < FEW:
        return _studentised(sums, sizes, samples, generator)
    equal = bool((sizes == sizes[0]).all())
    few = 8 * len(pairs) <= units
    width = len(pairs) if few else units
    step = max(1, _BLOCK // width)
    for start in range(0, samples, step):
        block = min(step, samples - start)
        if few:
            drawn = generator.multinomial(units, counts / units, size=block) @ pairs
        else:
            rows = generator.integers(0, units, size=(block, units), dtype=np.int64)
            total = np.full(block, units * sizes[0]) if equal else sizes[rows].sum(axis=1)
            drawn = np.stack([sums[rows].sum(axis=1), total], axis=1)
        means[start : start + block] = drawn[:, 0] / drawn[:, 1]
    return means


def _studentised(sums: np.ndarray, sizes: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """(samples,) numbers with the bootstrap-t as their quantiles: the mean less each resample's t, in errors of the data."""
    units, mean = len(sums), sums.sum() / sizes.sum()
    moments = np.stack([sums, sizes, sums**2, sums * sizes, sizes**2], axis=1)

    def error(total: np.ndarray, ratio: Any) -> Any:
        spread = total[..., 2] - 2 * ratio * total[..., 3] + ratio**2 * total[..., 4]
        return np.sqrt(np.maximum(spread, 0) * units / (units - 1)) / total[..., 1]

    drawn = generator.multinomial(units, np.full(units, 1 / units), size=samples) @ moments
    away = drawn[:, 0] / drawn[:, 1] - mean
    own = np.maximum(error(drawn, away + mean), np.abs(away) / 5)
    return mean - np.divide(away, own, out=np.zeros(samples), where=own > 0) * error(moments.sum(axis=0), mean)

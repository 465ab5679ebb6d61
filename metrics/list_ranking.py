"""Metrics of re-ordered candidate lists (NDCG, MRR, MAP), with the anchors that a random order would reach.

Notation: R lists, n candidates at most, k a cut-off. The LLM4PR paper (arXiv 2411.01178) reports NDCG and MRR without
saying of what, so every choice is an option here, and results under different options must not be compared:

| option | values |
|---|---|
| `relevance` of NDCG | `rating` (as given), `target_rank` (place in the target order), `binary` (given relevance >= `threshold`) |
| `gain` of NDCG | `linear` (r), `exp2` (2^r − 1) |
| `lowest` target rank | 0 (n−1 .. 0) or 1 (n .. 1); default 0 with linear, 1 with exp2 |
| `relevant` of MRR | `best_one` (the first of the target order), `any_best` (all with the highest relevance) |

MAP counts what `binary` counts: relevance of at least `threshold`; its denominator is min(k, relevant), as in
`ranking.average_precision`. A list in which nothing is relevant scores 0 in that metric (`empty="zero"`) or is left out
of every metric (`empty="exclude"`). The target order is falling relevance, equals in incoming order
(`data_builders/post_ranking/targets.py`): with `best_one` and `target_rank` ties therefore favour the incoming order, which
`any_best`, `rating` and `binary` do not.

The random anchors are exact, list by list: each of the n! orders is equally likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import gammaln

from sidtune.core.config import MANY
from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.post_ranking.targets import target_order
from sidtune.metrics.ranking import RankingResult
from sidtune.metrics.statistics.compare import SystemRow

RANDOM, BEST = "random order (anchor)", "best order (bound)"
SORTED, CLICKS = (
    "sorted by click probability",
    "expected clicks",
)  # a bound and a metric where a simulator knows the clicks
NAMES = ("ndcg", "mrr", "map")


@dataclass(frozen=True)
class ListMetrics:
    """What the metrics mean; see the module's docstring.

    Attributes:
        ks: cut-offs; one beyond a list's length reads the whole list.
        metrics: of `ndcg`, `mrr`, `map`.
        relevance, gain, lowest, relevant, threshold, empty: the options of the table.

    Raises:
        ConfigError: an unknown value.
    """

    ks: tuple[int, ...] = (3, 5)
    metrics: tuple[str, ...] = NAMES
    relevance: Literal["rating", "target_rank", "binary"] = "rating"
    gain: Literal["linear", "exp2"] = "exp2"
    lowest: int | None = None
    relevant: Literal["best_one", "any_best"] = "any_best"
    threshold: float = 4.0
    empty: Literal["zero", "exclude"] = "zero"

    def __post_init__(self) -> None:
        known: dict[str, tuple[Any, ...]] = {
            "relevance": ("rating", "target_rank", "binary"),
            "gain": ("linear", "exp2"),
            "lowest": (None, 0, 1),
            "relevant": ("best_one", "any_best"),
            "empty": ("zero", "exclude"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                listed = ", ".join(str(value) for value in values)
                raise ConfigError(f"The list metrics' '{name}' must be one of {listed}, got {getattr(self, name)!r}.")
        if not self.ks or any(not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= MANY for k in self.ks):
            raise ConfigError(f"The cut-offs of list metrics must be positive whole numbers, got {self.ks!r}.")
        if not self.metrics or any(name not in NAMES for name in self.metrics):
            raise ConfigError(f"List metrics are {', '.join(NAMES)}; got {self.metrics!r}.")

    @property
    def description(self) -> str:
        """One line for the head of a table."""
        graded = f"{self.relevance}>={self.threshold:g}" if self.relevance == "binary" else self.relevance
        if self.relevance == "target_rank":
            graded += f" from {self._lowest}"
        return (
            f"NDCG on {graded}, {self.gain} gain; MRR on {self.relevant}; MAP on relevance>={self.threshold:g}; lists "
            f"with nothing relevant: {self.empty}"
        )

    @property
    def _lowest(self) -> int:
        return self.lowest if self.lowest is not None else int(self.gain == "exp2")


@dataclass(frozen=True)
class _Judged:
    """Gains and relevant sets of every candidate (R, n), pads 0 / False."""

    gains: np.ndarray
    best: np.ndarray
    liked: np.ndarray
    lengths: np.ndarray
    included: np.ndarray
    target: np.ndarray


def evaluate_lists(order: Any, relevance: Any, mask: Any = None, settings: ListMetrics | None = None) -> RankingResult:
    """Scores one order for each list.

    Args:
        order: (R, m) integer candidate places, best first; −1 = empty place, and a miss.
        relevance: (R, n) of the candidates in incoming order, finite and not negative where real.
        mask: (R, n) bool, True = a real candidate; default all.
        settings: what the metrics mean.

    Returns:
        `RankingResult` with `name@k` → (R,), ready for `compare_systems`.

    Raises:
        DataError: shapes that do not fit, unknown relevance of a real candidate, a place named twice or of a pad.
    """
    settings = settings or ListMetrics()
    relevance, real = _checked(relevance, mask)
    order = _checked_order(order, real)
    judged = _judge(relevance, real, settings)
    made: dict[str, np.ndarray] = {}
    for name in settings.metrics:
        shown = _shown(order, {"ndcg": judged.gains, "mrr": judged.best, "map": judged.liked}[name])
        for k in settings.ks:
            made[f"{name}@{k}"] = _METRICS[name](shown, judged, k)
    return _result(made, judged)


def random_anchor(relevance: Any, mask: Any = None, settings: ListMetrics | None = None) -> RankingResult:
    """The mean of `evaluate_lists` over all n! orders of each list, in closed form. Args and errors as there."""
    settings = settings or ListMetrics()
    relevance, real = _checked(relevance, mask)
    judged = _judge(relevance, real, settings)
    made = {f"{name}@{k}": _ANCHORS[name](judged, k) for name in settings.metrics for k in settings.ks}
    return _result(made, judged)


def list_table(rows: Sequence[SystemRow], settings: ListMetrics | None = None, percent: bool = True) -> str:
    """A Markdown table of `compare_systems` rows; marks `+`/`-` = better/worse than the best baseline (paired, Holm)."""
    names = list(rows[0].metrics)
    scale, digits = (100.0, 2) if percent else (1.0, 4)
    lines = [f"{settings.description}.", ""] if settings else []
    lines += ["| system | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    sign = {"better": " +", "worse": " -", "": ""}
    for row in rows:
        cells = [f"{one.value * scale:.{digits}f}{sign[one.mark]}" for one in (row.metrics[name] for name in names)]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def valid_rate(orders: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Share of generated lists that are a permutation of their candidates before any repair.

    Args:
        orders: places as generated, any length, any number. lengths: candidates of each list.

    Raises:
        DataError: none at all, or numbers that differ.
    """
    if not len(orders) or len(orders) != len(lengths):
        raise DataError(f"The valid rate needs one length per list and at least one, got {len(orders)} lists.")
    good = [sorted(int(p) for p in order) == list(range(n)) for order, n in zip(orders, lengths, strict=True)]
    return float(np.mean(good))


def _judge(relevance: np.ndarray, real: np.ndarray, settings: ListMetrics) -> _Judged:
    lengths = real.sum(axis=1)
    target = target_order(relevance, real)
    liked = real & (relevance >= settings.threshold)
    top = np.where(real, relevance, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    if settings.relevant == "any_best":
        best = real & (relevance == top)
    else:
        best = np.zeros_like(real)
        np.put_along_axis(best, target[:, :1], True, axis=1)
    graded = relevance
    if settings.relevance == "binary":
        graded = liked.astype(np.float64)
    elif settings.relevance == "target_rank":
        place = np.argsort(target, axis=1)
        graded = (lengths[:, None] - 1 - place + settings._lowest).astype(np.float64)
    gains = np.where(real, graded if settings.gain == "linear" else np.exp2(np.where(real, graded, 0)) - 1, 0.0)
    needed = {"ndcg": gains > 0, "mrr": best, "map": liked}
    included = np.ones(len(real), bool)
    if settings.empty == "exclude":
        included = np.all([needed[name].any(axis=1) for name in settings.metrics], axis=0)
    return _Judged(gains, best, liked, lengths, included, target)


def _result(made: dict[str, np.ndarray], judged: _Judged) -> RankingResult:
    return RankingResult(
        {name: np.where(judged.included, value, np.nan) for name, value in made.items()}, judged.included
    )


def _shown(order: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(R, m) value of the candidate at each place, 0 at an empty one."""
    return np.where(order >= 0, np.take_along_axis(values, np.maximum(order, 0), axis=1), 0.0)


def _ideal(gains: np.ndarray, k: int) -> np.ndarray:
    ordered = -np.sort(-gains, axis=1)[:, :k]
    return ordered @ _discount(ordered.shape[1])


def _discount(k: int) -> np.ndarray:
    return 1.0 / np.log2(np.arange(2, k + 2))


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.zeros(len(top)), where=bottom > 0)


def _ndcg(shown: np.ndarray, judged: _Judged, k: int) -> np.ndarray:
    part = shown[:, :k]
    return np.minimum(_ratio(part @ _discount(part.shape[1]), _ideal(judged.gains, k)), 1.0)


def _mrr(shown: np.ndarray, judged: _Judged, k: int) -> np.ndarray:
    part = shown[:, :k] > 0
    return np.where(part.any(axis=1), 1.0 / (part.argmax(axis=1) + 1.0), 0.0)


def _map(shown: np.ndarray, judged: _Judged, k: int) -> np.ndarray:
    part = shown[:, :k]
    precision = np.cumsum(part, axis=1) / np.arange(1, part.shape[1] + 1)
    return _ratio((precision * part).sum(axis=1), np.minimum(judged.liked.sum(axis=1), k).astype(float))


def _places(judged: _Judged, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks 1..min(k, n) and whether each list is that long (R, places)."""
    ranks = np.arange(1, min(k, judged.gains.shape[1]) + 1)
    return ranks, ranks[None, :] <= judged.lengths[:, None]


def _random_ndcg(judged: _Judged, k: int) -> np.ndarray:
    ranks, there = _places(judged, k)
    mean = judged.gains.sum(axis=1) / judged.lengths
    return _ratio(mean * (there @ _discount(len(ranks))), _ideal(judged.gains, k))


def _random_mrr(judged: _Judged, k: int) -> np.ndarray:
    """P(first of m hits at rank i) = C(n − i, m − 1) / C(n, m)."""
    ranks, there = _places(judged, k)
    n, m = judged.lengths[:, None].astype(float), judged.best.sum(axis=1)[:, None].astype(float)
    possible = there & (n - ranks >= m - 1) & (m > 0)
    left = np.where(possible, n - ranks, m)
    chance = np.exp(_log_choose(left, np.maximum(m - 1, 0)) - _log_choose(n, m))
    return (np.where(possible, chance, 0.0) / ranks).sum(axis=1)


def _random_map(judged: _Judged, k: int) -> np.ndarray:
    """E[hit_i hits up to i] = p (1 + (i − 1) q), p = m / n, q = (m − 1) / (n − 1)."""
    ranks, there = _places(judged, k)
    n, m = judged.lengths[:, None].astype(float), judged.liked.sum(axis=1)[:, None].astype(float)
    q = (m - 1) / np.maximum(n - 1, 1)
    part = np.where(there, m / n * (1 + (ranks - 1) * q) / ranks, 0.0).sum(axis=1)
    return _ratio(part, np.minimum(m[:, 0], k))


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


_METRICS = {"ndcg": _ndcg, "mrr": _mrr, "map": _map}
_ANCHORS = {"ndcg": _random_ndcg, "mrr": _random_mrr, "map": _random_map}


def _checked(relevance: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(relevance, dtype=np.float64)
    real = np.ones(values.shape, bool) if mask is None else np.asarray(mask, dtype=bool)
    if values.ndim != 2 or real.shape != values.shape or not len(values):
        raise DataError(
            f"List metrics need relevance of shape (lists, candidates), got {values.shape} with a mask {real.shape}."
        )
    if not real.any(axis=1).all():
        raise DataError(f"List number {int(np.argmin(real.any(axis=1)))} has no candidates; leave such lists out.")
    wrong = real & ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        row, place = np.argwhere(wrong)[0]
        raise DataError(
            f"The relevance of candidate {place} of list {row} is {values[row, place]}; list metrics need a known "
            "number from 0 for every candidate, so leave the list out or judge it."
        )
    return np.where(real, values, 0.0), real


def _checked_order(order: Any, real: np.ndarray) -> np.ndarray:
    order = np.asarray(order)
    if order.ndim != 2 or len(order) != len(real) or order.dtype.kind not in "iu":
        raise DataError(f"An order must be ({len(real)}, places) whole numbers, got {order.dtype} {order.shape}.")
    order = order.astype(np.int64)
    if order.size and (order.min() < -1 or order.max() >= real.shape[1]):
        raise DataError(f"An order names a place outside 0..{real.shape[1] - 1}; only −1 stands for an empty place.")
    ordered = np.sort(order, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise DataError("An order names a candidate twice; a list must hold each candidate at most once.")
    pads = (order >= 0) & ~np.take_along_axis(real, np.maximum(order, 0), axis=1)
    # a full permutation of a padded list names its pads: that is allowed at the end only, where it changes nothing
    ends = np.cumsum(~pads[:, ::-1], axis=1)[:, ::-1] == 0
    if (pads & ~ends).any():
        raise DataError("An order names a padded place before a real candidate; put pads last.")
    return np.where(pads, -1, order)

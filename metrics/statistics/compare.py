"""Several systems in one table: means with intervals, and paired tests of each model against the best baseline.

The best baseline is chosen metric by metric as the one with the highest mean (our choice: the hardest opponent). All
p-values of a table are adjusted together by Holm's method, so a mark holds for the whole table and not for one lucky
cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.metrics.ranking import RankingResult
from sidtune.metrics.statistics.bootstrap import bootstrap_interval, holm, paired_bootstrap

Kind = Literal["model", "baseline", "bound", "anchor"]
MODEL = "sidtune"  # name of the evaluated model in every table


@dataclass(frozen=True)
class Estimate:
    """One metric of one system.

    Attributes:
        value: mean over the requests.
        low, high: bootstrap interval; None when unknown.
        versus: the best baseline it was tested against, or None.
        difference: value minus that of `versus`. difference_low, difference_high: its paired interval.
        p_value: two-sided paired p-value, adjusted for all tests of the table.
        mark: `better` or `worse` than `versus` at the level of the intervals, else `""`.
    """

    value: float
    low: float | None = None
    high: float | None = None
    versus: str | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class SystemRow:
    """One line of the metric table.

    Attributes:
        name: shown name.
        kind: `model`, `baseline`, `bound` (an upper bound that no system is tested against), or `anchor` (something else to
            read the others by: a random order, or a system that knows the truth).
        metrics: metric name → estimate.
        note: one short remark, or empty.
    """

    name: str
    kind: Kind
    metrics: dict[str, Estimate] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SystemRow:
        """Reads what `to_dict` wrote."""
        metrics = {name: Estimate(**estimate) for name, estimate in values.get("metrics", {}).items()}
        return cls(values["name"], values["kind"], metrics, values.get("note", ""))


def compare_systems(
    results: Mapping[str, RankingResult],
    baselines: Sequence[str] = (),
    bounds: Sequence[str] = (),
    metrics: Sequence[str] | None = None,
    clusters: Sequence[Any] | None = None,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> list[SystemRow]:
    """The metric table of systems that ranked the same requests.

    Args:
        results: system name → its metrics, in the order of the table.
        baselines: names of the baselines among them. bounds: names of upper bounds. All others are models.
        metrics: metric names such as `ndcg@10`; default all of the first system.
        clusters: (R,) user ids of the requests, to resample whole users.
        level, samples, seed: as in `bootstrap_interval`.

    Returns:
        One `SystemRow` for each system, in order.

    Raises:
        ConfigError: an unknown name. DataError: systems scored on different requests.
    """
    if not results:
        raise DataError("There is no system to compare; evaluate at least one.")
    for name in (*baselines, *bounds):
        if name not in results:
            raise ConfigError(f"There is no system named '{name}' in the comparison: {nearest(name, results)}")
    first = next(iter(results.values()))
    names = list(metrics if metrics is not None else first.per_request)
    for system, result in results.items():
        if not np.array_equal(result.included, first.included):
            raise DataError(f"The system '{system}' was scored on other requests than the first; use the same for all.")
    labels = _kept(clusters, first.included)
    options: dict[str, Any] = {"level": level, "samples": samples, "seed": seed, "clusters": labels}
    estimates: dict[str, dict[str, Estimate]] = {system: {} for system in results}
    for metric in names:
        values = {system: result.values(metric) for system, result in results.items()}
        best = max(baselines, key=lambda name: float(values[name].mean())) if baselines else None
        for system, own in values.items():
            interval = bootstrap_interval(own, **options)
            found = Estimate(interval.mean, interval.low, interval.high)
            if best is not None and system not in baselines and system not in bounds:
                pair = paired_bootstrap(own, values[best], **options)
                found = Estimate(
                    *(interval.mean, interval.low, interval.high, best),
                    *(pair.difference, pair.low, pair.high, pair.p_value),
                )
            estimates[system][metric] = found
    _adjust(estimates, level)
    kinds = dict.fromkeys(baselines, "baseline") | dict.fromkeys(bounds, "bound")
    return [SystemRow(name, kinds.get(name, "model"), found) for name, found in estimates.items()]


def _kept(clusters: Sequence[Any] | None, included: np.ndarray) -> list[Any] | None:
    if clusters is None:
        return None
    labels = clusters.to_pylist() if hasattr(clusters, "to_pylist") else list(clusters)
    if len(labels) != len(included):
        raise DataError(
            f"There are {len(included)} requests but {len(labels)} cluster labels; give one label for each."
        )
    return [label for label, keep in zip(labels, included, strict=True) if keep]


def _adjust(estimates: dict[str, dict[str, Estimate]], level: float) -> None:
    """Replaces raw p-values by Holm's and sets the marks, in place."""
    places = [(s, m) for s, row in estimates.items() for m, one in row.items() if one.p_value is not None]
    adjusted = holm([estimates[s][m].p_value for s, m in places])  # type: ignore[misc]
    for (system, metric), p_value in zip(places, adjusted, strict=True):
        values = asdict(estimates[system][metric])
        mark = "" if p_value > 1 - level else "better" if values["difference"] > 0 else "worse"
        estimates[system][metric] = Estimate(**{**values, "p_value": p_value, "mark": mark})

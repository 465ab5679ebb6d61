"""What scripts over several seeds share: the runs, mean and spread, families of paired tests, the lines of a README's table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sidtune.core.config import SEEDS, as_dict
from sidtune.core.errors import ConfigError, nearest
from sidtune.core.pipeline import RunArguments, resolve, run_pipeline
from sidtune.metrics.ranking import check_metrics
from sidtune.metrics.report.readme_table import check_readme
from sidtune.metrics.statistics.bootstrap import PairedResult, holm


def check_seeds(seeds: list[int], least: int = 1) -> None:
    """Raises ConfigError unless there are at least so many (one or two), all different and such that all libraries take."""
    if len(set(seeds)) != len(seeds) or len(seeds) < least:
        number = "at least two" if least > 1 else "one or more"
        raise ConfigError(f"seeds must be {number} different integers, got {seeds}.")
    if not all(0 <= seed <= SEEDS for seed in seeds):
        raise ConfigError(f"seeds must be between 0 and {SEEDS}, got {seeds}.")


def run_all(pipelines: Sequence[RunArguments], evaluation: str, metrics: list[str], readmes: list[str]) -> None:
    """Runs pipelines, one for each seed, after all of them and the READMEs that get the table were checked.

    Raises:
        ConfigError: `evaluation` is no evaluation of them, or it does not compute the metrics.
    """
    for readme in readmes:
        check_readme(readme)
    for pipeline in pipelines:
        evaluations = {step.name: step.config for step in resolve(pipeline) if hasattr(step.config, "ks")}
        if evaluation not in evaluations:
            raise ConfigError(
                f"There is no evaluation '{evaluation}' in the pipeline: {nearest(evaluation, evaluations)}"
            )
        for metric in metrics:
            check_metrics(evaluations[evaluation].ks, evaluations[evaluation].metrics, metric)
    for pipeline in pipelines:
        run_pipeline(pipeline)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """`mean`, sample standard deviation `std` (0 of one value) and the `values`."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}


def adjusted(pairs: Mapping[str, PairedResult]) -> dict[str, dict[str, Any]]:
    """A family of tests JSON-ready, each with its `adjusted_p_value` (Holm)."""
    p_values = holm([pair.p_value for pair in pairs.values()]) if pairs else []
    return {
        name: {**as_dict(pair), "adjusted_p_value": p_value}
        for (name, pair), p_value in zip(pairs.items(), p_values, strict=True)
    }


def difference(pair: Mapping[str, Any]) -> str:
    """`+0.0123 [+0.0100, +0.0150]`."""
    return f"{pair['difference']:+.4f} [{pair['low']:+.4f}, {pair['high']:+.4f}]"


def over(pair: Mapping[str, Any]) -> str:
    """What a test resampled beside users, as ` (users and 3 trainings)`; nothing where the trainings are not in it."""
    return f" (users and {pair['seeds']} trainings)" if pair.get("seeds", 1) > 1 else ""


def means(row: Mapping[str, Any], metrics: Iterable[str]) -> list[str]:
    """The cells `0.1234 ± 0.0012` of a row's metrics."""
    return [f"{row['metrics'][metric]['mean']:.4f} ± {row['metrics'][metric]['std']:.4f}" for metric in metrics]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a GitHub table, numbers behind the first column."""
    return [
        *("| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def counted(numbers: Iterable[int]) -> str:
    """`1,200`, or `1,200 to 1,300` where the seeds differ."""
    ordered = sorted(set(numbers))
    return f"{ordered[0]:,}" if len(ordered) == 1 else f"{ordered[0]:,} to {ordered[-1]:,}"

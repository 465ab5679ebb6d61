"""Runs a pipeline with several seeds and writes mean and spread of each system as the table of a README.

    sidtune seeds --config recipes/amazon_office/pipeline.yaml --seeds '[0, 1, 2]' \\
        --output_dir runs/amazon_office --results recipes/amazon_office/results.json --readme '[recipes/amazon_office/README.md]'

Each seed has its own folder below output_dir, so finished seeds are skipped like finished steps. The table goes between the lines
`<!-- results -->` and `<!-- /results -->` of the README; the figures themselves go to the results file.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sidtune.core.config import as_dict, command
from sidtune.core.folders import versions, writes
from sidtune.core.pipeline import RunArguments, resolve
from sidtune.metrics.report.readme_table import publish
from sidtune.metrics.statistics.compare import MODEL
from sidtune.recipes.over_seeds import check_seeds, counted, difference, means, run_all, spread, table
from sidtune.recipes.records import evaluation

LAUNCH = "alone"


@dataclass
class Arguments(RunArguments):
    """Options of the pipeline (see `RunArguments`) and:

    Attributes:
        seeds: seeds to run, at least two different ones.
        eval_step: name of the step whose metrics are collected.
        metrics: metrics shown, default ndcg@10, hr@10, recall@10, mrr@10.
        results: JSON file that receives all figures.
        readme: README files whose table is replaced.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    eval_step: str = "eval"
    metrics: list[str] = field(default_factory=lambda: ["ndcg@10", "hr@10", "recall@10", "mrr@10"])
    results: str | None = None
    readme: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seeds(self.seeds, 2)

    def pipeline_of(self, seed: int) -> RunArguments:
        """The pipeline of one seed."""
        options = {one.name: getattr(self, one.name) for one in fields(RunArguments)}
        folder = Path(self.output_dir) / f"seed_{seed}"
        return RunArguments(**{**options, "seed": seed, "output_dir": str(folder)})


@writes(None, tree=True)
def main(arguments: Arguments) -> None:
    """Runs all seeds and writes results and table."""
    started, pipelines = time.time(), {seed: arguments.pipeline_of(seed) for seed in arguments.seeds}
    run_all([*pipelines.values()], arguments.eval_step, arguments.metrics, arguments.readme)
    folders = {seed: Path(pipeline.output_dir) / arguments.eval_step for seed, pipeline in pipelines.items()}
    record = summarise({seed: evaluation(one)[0] for seed, one in folders.items()}, arguments.metrics)
    record["seconds"] = round(time.time() - started)
    settings = [as_dict(step.config) for step in resolve(next(iter(pipelines.values())))]
    publish(record, markdown(record), arguments.results, arguments.readme, config=settings)


def summarise(found: dict[int, dict[str, Any]], metrics: list[str]) -> dict[str, Any]:
    """Mean and sample standard deviation of every system and metric; `found` is seed → `metrics.json` of its evaluation."""
    first = next(iter(found.values()))
    systems: dict[str, Any] = {}
    for name, kind in [(row["name"], row["kind"]) for row in first["systems"]]:
        rows = [next(row["metrics"] for row in record["systems"] if row["name"] == name) for record in found.values()]
        values = {metric: spread([row[metric]["value"] for row in rows]) for metric in metrics}
        systems[name] = {"kind": kind, "metrics": values}
    return {
        "seeds": list(found),
        "requests": [record["requests"] for record in found.values()],
        **{name: first[name] for name in ("catalogue", "split", "primary")},
        "num_beams": first["decoding"]["num_beams"],
        "against": {name: [record["against"][name] for record in found.values()] for name in first["against"]},
        "systems": systems,
        "versions": versions(),
    }


def markdown(record: dict[str, Any]) -> str:
    """The results as a GitHub table: mean ± sample standard deviation over the seeds, the model last but for bounds."""
    systems = record["systems"]
    metrics = list(next(iter(systems.values()))["metrics"])
    kinds = ("baseline", "model", "bound")
    names = sorted(systems, key=lambda name: (kinds.index(systems[name]["kind"]), name == MODEL))
    rows = [[f"**{name}**" if name == MODEL else name, *means(systems[name], metrics)] for name in names]
    lines = [
        *table(["system", *metrics], rows),
        "",
        f"Mean ± standard deviation over seeds {', '.join(map(str, record['seeds']))}; {counted(record['requests'])} "
        f"{record['split']} requests, whole catalogue of {record['catalogue']:,} items, {record['num_beams']} beams.",
    ]
    for name, pairs in record.get("against", {}).items():
        each = ", ".join(map(difference, pairs))
        lines.append(
            f"{MODEL} minus {name} on {record['primary']}, seed by seed: {each} (paired bootstrap over users)."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command(main, Arguments)

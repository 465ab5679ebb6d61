"""Compares variants of one step over several seeds: what each change of GRPO, and the loop of CRS, do to the model they start from.

    sidtune ablation --config recipes/crs/ablation/shop.yaml --output_dir runs/ablation

The config names a pipeline, its step that the variants start from, and the variants: name → options laid over the
variant step's config. Every seed runs the pipeline up to that step once, then each variant and its evaluation, on the
same requests. `steps` adds steps that are not variants themselves (the self-evolving loop), `models` the models inside their
folders that get a row. The table holds mean and standard deviation over the seeds, and the difference to the start with a paired
bootstrap over the users of all seeds, p-values adjusted for the number of variants (Holm). Finished steps are skipped,
so an interrupted comparison goes on where it was. Choose settings on `split: valid`, report on `test`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from sidtune.core.config import as_dict, command, load_yaml
from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.folders import versions, writes
from sidtune.core.pipeline import RunArguments, resolve
from sidtune.core.shapes import misfit
from sidtune.metrics.report.readme_table import publish
from sidtune.metrics.statistics.bootstrap import check_bootstrap, paired_bootstrap
from sidtune.recipes.over_seeds import adjusted, check_seeds, counted, difference, means, run_all, spread, table

LAUNCH = "alone"

START = "start"


@dataclass
class Arguments:
    """Options of ablation.

    Attributes:
        pipeline: pipeline file, relative to this config.
        start: name of its step that the variants start from; steps behind it are not run.
        variants: name → options of the script, laid over `config`.
        output_dir: folder that receives `seed_<n>/<step>`.
        script: script of the variants. config: its YAML, relative to this config.
        steps: further steps behind the start, as in a pipeline file; their configs are relative to this config.
        models: row → `model`, a model in a folder of `steps` such as `evolve/round_1/rl`, `args` of its evaluation, and `against`,
            another row that it is compared with beside the start, usually the one its training began with.
        evaluate: YAML of the evaluation, relative to this config. evaluator: its script, `evaluate`, or `reason` for models
            that reason first.
        split: split that is evaluated, `test` or `valid`.
        seeds: at least two.
        metric: the metric compared.
        shown: further metrics in the table.
        level, samples: of the paired bootstrap.
        results: JSON file that receives all figures. readme: README files whose table is replaced.
        root: folder of this config; set by the runner.
    """

    pipeline: str
    start: str
    variants: dict
    output_dir: str
    script: str = "grpo"
    config: str = "grpo.yaml"
    steps: list[dict] = field(default_factory=list)
    models: dict = field(default_factory=dict)
    evaluate: str = "evaluate.yaml"
    evaluator: Literal["evaluate", "reason"] = "evaluate"
    split: str = "test"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    metric: str = "ndcg@10"
    shown: list[str] = field(default_factory=lambda: ["hr@10"])
    level: float = 0.95
    samples: int = 2000
    results: str | None = None
    readme: list[str] = field(default_factory=list)
    root: str | None = None

    def __post_init__(self) -> None:
        check_seeds(self.seeds, 2)
        check_bootstrap(self.level, self.samples)
        names = [*self.variants, *self.models]
        wrong = [name for name in names if name == START or not isinstance(name, str) or "/" in name]
        if not names or wrong or len(set(names)) < len(names):
            raise ConfigError(
                f"variants and models must be different names (no '/', not '{START}') with options each, got {wrong or names}."
            )
        for name, options in self.models.items():
            if not isinstance(options, dict) or set(options) - {"model", "args", "against"} or "model" not in options:
                raise ConfigError(f"models.{name} must have a `model`, may have `args` and `against`, got {options}.")
            if options.get("against", START) not in (START, *names):
                raise ConfigError(f"models.{name}.against: {nearest(str(options['against']), names)}")

    def pipeline_of(self, seed: int) -> RunArguments:
        """The pipeline of one seed: its own steps up to the start, then each variant and its evaluation."""
        root = Path(self.root or ".")
        file = root / self.pipeline
        base = load_yaml(file)
        shape = {"steps": [{"name": str, "config?": str | None, "inputs?": dict}], "launch?": dict}
        if (why := misfit(base, shape)) is not None:
            raise ConfigError(f"The pipeline {file} is none, because {why}; correct it.")
        names = [step["name"] for step in base["steps"]]
        if self.start not in names:
            raise ConfigError(f"The pipeline {file} has no step '{self.start}'; it has {', '.join(names)}.")
        steps = base["steps"][: names.index(self.start) + 1]
        for step in steps:
            if step.get("config"):
                step["config"] = str((file.parent / step["config"]).resolve())
        used = dict(next(step for step in steps if step["name"] == self.start).get("inputs", {}))
        data = {name: used[name] for name in ("data_dir", "sids_dir") if name in used}
        common = {"script": self.script, "config": str((root / self.config).resolve())}
        common |= {"inputs": {**data, "model_dir": self.start}}
        steps.append(self._evaluation(START, self.start, data))
        for name, options in self.variants.items():
            steps += [{"name": name, "args": options, **common}, self._evaluation(name, name, data)]
        steps += self.steps
        steps += [self._evaluation(name, one["model"], data, one.get("args")) for name, one in self.models.items()]
        folder, launch = Path(self.output_dir) / f"seed_{seed}", base.get("launch", {})
        return RunArguments(steps, str(folder), name=f"seed {seed}", launch=launch, seed=seed, root=str(root))

    def _evaluation(
        self, name: str, model: str, data: dict[str, str], args: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        config = str((Path(self.root or ".") / self.evaluate).resolve())
        alone = {"baselines": [], "upper_bound": False} if self.evaluator == "evaluate" else {"reasoning": False}
        step = {"name": f"{self.split}_{name}", "script": self.evaluator, "config": config}
        return {**step, "inputs": {**data, "model_dir": model}, "args": {"split": self.split, **alone, **(args or {})}}


@writes(None, tree=True)
def main(arguments: Arguments) -> None:
    """Runs all seeds and writes results and table."""
    started, metrics = time.time(), [arguments.metric, *arguments.shown]
    pipelines = [arguments.pipeline_of(seed) for seed in arguments.seeds]
    run_all(pipelines, f"{arguments.split}_{START}", metrics, arguments.readme)
    record = compare(arguments)
    record["seconds"] = round(time.time() - started)
    settings = [as_dict(step.config) for step in resolve(pipelines[0])]
    tried = len(arguments.variants) + len(arguments.models)
    publish(record, markdown(record), arguments.results, arguments.readme, config=settings, tried=tried)


def compare(arguments: Arguments) -> dict[str, Any]:
    """Mean and spread of every variant, and its difference to the start, request by request."""
    metrics = [arguments.metric, *arguments.shown]
    others = [*arguments.variants, *arguments.models]
    found = {name: [_values(arguments, seed, name, metrics) for seed in arguments.seeds] for name in (START, *others)}
    rows: dict[str, Any] = {}
    for name, seeds in found.items():
        rows[name] = {"metrics": {m: spread([float(values[m].mean()) for values in seeds]) for m in metrics}}
        for seed, one, start in zip(arguments.seeds, seeds, found[START], strict=True):
            if one["requests"] != start["requests"]:
                raise DataError(
                    f"'{name}' of seed {seed} was evaluated on other requests than its start, so they cannot be paired; remove "
                    "the folders of both evaluations and run again."
                )
    _add_pairs(arguments, rows, found, dict.fromkeys(others, START), "against_start")
    bases = {name: options["against"] for name, options in arguments.models.items() if "against" in options}
    _add_pairs(arguments, rows, found, bases, "against_base")
    for name, base in bases.items():
        rows[name]["base"] = base
    return {
        "metric": arguments.metric,
        "split": arguments.split,
        "seeds": arguments.seeds,
        "requests": [len(values["users"]) for values in found[START]],
        "variants": as_dict(arguments.variants | arguments.models),
        "rows": rows,
        "versions": versions(),
    }


def _add_pairs(
    arguments: Arguments, rows: dict[str, Any], found: dict[str, list[dict[str, Any]]], bases: dict[str, str], key: str
) -> None:
    """The difference of each row to its base under `key`, p-values adjusted together (Holm)."""
    pairs = {}
    for name, base in bases.items():
        one, other = (np.concatenate([values[arguments.metric] for values in found[n]]) for n in (name, base))
        # A user of one seed's shop is another person than the user of that name in another's.
        users = [f"{n}/{user}" for n, values in enumerate(found[name]) for user in values["users"]]
        by_seed = [
            float((one[arguments.metric] - other[arguments.metric]).mean())
            for one, other in zip(found[name], found[base], strict=True)
        ]
        pairs[name] = paired_bootstrap(one, other, arguments.level, arguments.samples, clusters=users, seeds=by_seed)
    for name, pair in adjusted(pairs).items():
        rows[name][key] = pair


def _values(arguments: Arguments, seed: int, name: str, metrics: list[str]) -> dict[str, Any]:
    folder = Path(arguments.output_dir) / f"seed_{seed}" / f"{arguments.split}_{name}"
    table = pq.read_table(folder / "per_request.parquet")
    prefix = "sidtune/" if arguments.evaluator == "evaluate" else ""
    missing = [metric for metric in metrics if prefix + metric not in table.column_names]
    if missing:
        raise DataError(
            f"{folder} has no {', '.join(missing)}; let the evaluation compute it, or compare another metric."
        )
    values: dict[str, Any] = {metric: table[prefix + metric].to_numpy() for metric in metrics}
    return {**values, "users": table["user_id"].to_pylist(), "requests": table["request_id"].to_pylist()}


def markdown(record: dict[str, Any]) -> str:
    """The comparison as a GitHub table."""
    rows = record["rows"]
    metrics = list(rows[START]["metrics"])
    head = ["variant", *metrics, f"{record['metric']} against start", "p (Holm)"]
    based = any("base" in row for row in rows.values())
    head += [f"{record['metric']} against its own start", "p (Holm)"] if based else []
    lines = []
    for name, row in rows.items():
        cells = [name, *means(row, metrics), *_pair_cells(row.get("against_start"))]
        if based:
            told, p_value = _pair_cells(row.get("against_base"))
            cells += [f"{row['base']}: {told}" if told else "", p_value]
        lines.append(cells)
    pairs = [row["against_start"] for row in rows.values() if "against_start" in row]
    trainings = " and trainings" if any(pair.get("seeds", 1) > 1 for pair in pairs) else ""
    told = (
        f"Mean ± standard deviation over seeds {', '.join(map(str, record['seeds']))}; {counted(record['requests'])} "
        f"{record['split']} requests each; paired bootstrap over users{trainings}."
    )
    return "\n".join([*table(head, lines), "", told]) + "\n"


def _pair_cells(pair: dict[str, Any] | None) -> list[str]:
    return ["", ""] if pair is None else [difference(pair), f"{pair['adjusted_p_value']:.3f}"]


if __name__ == "__main__":
    command(main, Arguments)

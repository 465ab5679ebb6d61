"""Evaluates a model on items, over the whole catalogue, beside its baselines and, in the simulated shop, what is best for the log.

    sidtune evaluate --config recipes/quickstart/evaluate.yaml --data_dir runs/quickstart/data \\
        --sids_dir runs/quickstart/sids --model_dir runs/quickstart/sft --output_dir runs/quickstart/eval

Requests are spread over the processes and gathered by number, so two processes give exactly the rows of one. The output holds
`metrics.json`, `predictions/<system>.parquet`, `per_request.parquet` (for paired tests between runs) and `samples.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rich

from sidtune.core.config import SEEDS, check_range, command
from sidtune.core.errors import ConfigError
from sidtune.core.folders import write_folder, write_json, write_run, writes
from sidtune.core.pipeline import Step, check_there
from sidtune.core.ragged import drawn
from sidtune.data_builders.tables.store import DataFolder, load_folder
from sidtune.metrics.baselines.relevance import LABELS, check_labels
from sidtune.metrics.ranking import RankingResult, check_metrics
from sidtune.metrics.registry import BASELINES
from sidtune.metrics.statistics.bootstrap import check_bootstrap
from sidtune.metrics.statistics.compare import MODEL, SystemRow
from sidtune.recipes.over_seeds import difference
from sidtune.recipes.preflight import check_data

SHOW_AT_END = True
_SHARED = (
    "split", "ks", "metrics", "primary", "labels", "num_beams", "batch_size", "max_requests", "level", "samples", "seed",
)  # fmt: skip

BEST_FOR_LOG = "best_for_log"


@dataclass
class Arguments:
    """Options of evaluate.

    Attributes:
        data_dir, sids_dir, model_dir: folders of the earlier steps; `model_dir` is a model folder or the folder of `sft`.
        output_dir: folder to write.
        start_dir: a second model, usually the one that training started from: decoded too and compared request by request.
        start_name: its name in the tables.
        split: `test` or `valid`.
        num_beams: beams per request.
        ks: cut-offs of the metrics; the largest must not exceed the beams' reach.
        metrics: names of metrics in `metrics/registry.py`.
        primary: metric of slices and paired tests.
        labels: feedback that makes an item relevant when it is 1.
        baselines: names of baselines in `metrics/registry.py`.
        upper_bound: when the data comes from `shop_world`, add the list that is best for the log: it knows every chance of a logged
            click, so no metric of the log can be higher on average. What is best for the user is `ideal`, in the truth.
        truth_requests: in the simulated shop, random requests of the split, with feedback or not, on which the table also says what
            each list earns in truth; 0 leaves that out.
        compare_to: evaluation folder of another run, name shown → path; its model enters the table.
        max_requests: evaluate a random part (null = all requests with feedback).
        batch_size: prompts decoded together.
        samples: bootstrap resamples. level: confidence level of intervals.
        sample_requests: how many requests `samples.json` shows.
        seed: of the random part and of the bootstrap.
    """

    data_dir: str
    sids_dir: str
    model_dir: str
    output_dir: str
    start_dir: str | None = None
    start_name: str = "start"
    split: Literal["test", "valid"] = "test"
    num_beams: int = 20
    ks: list[int] = field(default_factory=lambda: [5, 10, 20])
    metrics: list[str] = field(default_factory=lambda: ["ndcg", "hr", "recall", "mrr", "map"])
    primary: str = "ndcg@10"
    labels: list[str] = field(default_factory=lambda: list(LABELS))
    baselines: list[str] = field(default_factory=lambda: ["popularity", "bm25", "item_knn"])
    upper_bound: bool = True
    truth_requests: int = 300
    compare_to: dict[str, str] = field(default_factory=dict)
    max_requests: int | None = None
    batch_size: int = 64
    samples: int = 1000
    level: float = 0.95
    sample_requests: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        check_metrics(self.ks, self.metrics, self.primary)
        check_labels(self.labels)
        check_bootstrap(self.level, self.samples)
        check_range(self, 1, "num_beams", "max_requests", "batch_size")
        check_range(self, 0, "sample_requests", "truth_requests", "seed", most=SEEDS)
        if self.num_beams < max(self.ks):
            raise ConfigError(
                f"{self.num_beams} num_beams do not fill the {max(self.ks)} places of ks; raise num_beams."
            )
        for name in self.baselines:
            BASELINES.get(name)
        if self.start_dir is None and self.start_name != "start":
            raise ConfigError("start_name names the model of start_dir, and there is none; leave it out.")
        if self.start_dir is not None and self.start_name in (MODEL, BEST_FOR_LOG, *self.baselines, *self.compare_to):
            raise ConfigError(f"start_name '{self.start_name}' is the name of another system; choose another one.")


def preflight(step: Step) -> None:
    """Refuses a split without requests, lists longer than the catalogue, and an evaluation to compare with that is not there."""
    check_data(step, step.config.split, max(step.config.ks))
    check_there(step, **step.config.compare_to)


@writes("evaluate")
def main(arguments: Arguments) -> None:
    """Evaluates; prints the metric table."""
    import torch
    from accelerate import PartialState

    from sidtune.decoding.retrieval.evaluator import Evaluator
    from sidtune.decoding.retrieval.loading import load_retriever
    from sidtune.decoding.retrieval.model_folder import ModelFolder

    # Several CPU processes form a group only when told that the CPU is meant.
    state = PartialState(cpu=not torch.accelerator.is_available())
    data = load_folder(arguments.data_dir)
    shared = {name: getattr(arguments, name) for name in _SHARED}
    evaluator, world = Evaluator(data, **shared), _world(arguments, data)
    everyone = None
    if world is not None and arguments.truth_requests:
        everyone = Evaluator(data, **{**shared, "max_requests": arguments.truth_requests}, feedback_only=False)
    compared = evaluator.stored(arguments.compare_to, arguments.data_dir)
    folders = {MODEL: arguments.model_dir, arguments.start_name: arguments.start_dir}
    folders = {name: folder for name, folder in folders.items() if folder is not None}
    for folder in folders.values():  # strangers are refused before anything is decoded
        ModelFolder.open(folder, arguments.sids_dir, data, whole=True)
    ranked, true = {}, {}
    for name, folder in folders.items():
        retriever = load_retriever(folder, arguments.sids_dir, data, whole=True)
        retriever.model.to(state.device)
        ranked[name] = evaluator.rank(retriever)
        true[name] = None if everyone is None else everyone.rank(retriever)[0]
    if not state.is_main_process:
        return
    bounds = {}
    if world is not None and arguments.upper_bound:
        asked = world.request_rows(evaluator.requests["request_id"])
        bounds = {BEST_FOR_LOG: world.oracle_ranking(asked, evaluator.places)}
    rows = {name: found[0] for name, found in ranked.items()} | compared
    rows |= {**evaluator.baselines(arguments.baselines), **bounds}
    results = {name: evaluator.measured(one) for name, one in rows.items()}
    record = evaluator.compare(results, arguments.baselines, list(bounds))
    record["decoding"] = ranked[MODEL][2]
    if everyone is not None:
        record["truth"] = _truth(arguments, world, everyone, true, results)
    means = {row["name"]: {m: one["value"] for m, one in row["metrics"].items()} for row in record["systems"]}
    scores = ranked[MODEL][1]
    with write_folder(arguments.output_dir) as scratch:
        write_json(scratch / "metrics.json", record)
        _write_predictions(scratch, rows, scores, data, evaluator.requests)
        _write_per_request(scratch, results, evaluator.requests)
        write_json(scratch / "samples.json", _samples(arguments, evaluator, rows[MODEL], scores))
        write_run(scratch, metrics=means)
    _show(arguments, record)


def _world(arguments: Arguments, data: DataFolder) -> Any:
    """The simulated shop that the data comes from; None for other data."""
    if data.meta.get("reader") != "shop_world" or not (arguments.upper_bound or arguments.truth_requests):
        return None
    from sidtune.data_builders.shop_world.world import ShopWorld

    return ShopWorld.from_options(**data.meta["options"])


def _truth(arguments: Arguments, world: Any, asked: Any, lists: dict, results: dict[str, RankingResult]) -> dict:
    """What the lists of models and baselines earn in truth, beside the logged metric."""
    from sidtune.metrics.online.truth import truth

    rows, k = world.request_rows(asked.requests["request_id"]), min(10, max(arguments.ks), world.config.page_size)
    shown = {**lists, **asked.baselines(arguments.baselines)}
    if arguments.upper_bound:
        shown[BEST_FOR_LOG] = world.oracle_ranking(rows, k)
    logged = {name: result.means()[arguments.primary] for name, result in results.items()}
    return truth(world, rows, shown, k, logged)


def _show(arguments: Arguments, record: dict[str, Any]) -> None:
    from sidtune.metrics.online.truth import truth_lines
    from sidtune.metrics.report.html import console_table

    print(f"{record['requests']:,} {arguments.split} requests, {record['catalogue']:,} items, whole catalogue ranked")
    systems = [SystemRow.from_dict(row) for row in record["systems"]]
    cut = arguments.primary.partition("@")[2]  # one cut-off fits a terminal; all others are in metrics.json
    rich.print(console_table(systems, metrics=[name for name in systems[0].metrics if name.endswith(f"@{cut}")]))
    print(f"Intervals and tests resample {record['resampled']}; another seed of the training is not in them.")
    for line in truth_lines(record["truth"], arguments.primary) if "truth" in record else ():
        print(line)
    for name, pair in record["against"].items():
        print(f"{arguments.primary} against {name}: {difference(pair)}, p = {pair['p_value']:.3f}")


def _write_predictions(
    folder: Path, systems: dict[str, np.ndarray], scores: np.ndarray, data: DataFolder, requests: pa.Table
) -> None:
    (folder / "predictions").mkdir()
    ids = data.items["item_id"].combine_chunks()
    for name, rows in systems.items():
        kept = rows >= 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(kept.sum(1))]), pa.int32())
        items = pa.ListArray.from_arrays(offsets, ids.take(pa.array(rows[kept])))
        columns = {"request_id": requests["request_id"], "items": items}
        if name == MODEL:
            columns["scores"] = pa.ListArray.from_arrays(offsets, pa.array(scores[kept], pa.float32()))
        pq.write_table(pa.table(columns), folder / "predictions" / f"{name.replace(' ', '_')}.parquet")


def _write_per_request(folder: Path, results: dict[str, RankingResult], requests: pa.Table) -> None:
    columns: dict[str, Any] = {name: requests[name] for name in ("request_id", "user_id")}
    for name, result in results.items():
        columns |= {f"{name}/{metric}": values for metric, values in result.per_request.items()}
    pq.write_table(pa.table(columns), folder / "per_request.parquet")


def _samples(arguments: Arguments, evaluator: Any, ranked: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """Random requests with the model's answer, as a person wants to see them."""
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds

    sids = SemanticIds.from_pretrained(Path(arguments.sids_dir) / "sids").texts()
    data, requests, relevance = evaluator.data, evaluator.requests, evaluator.relevance
    ids, titles = data.items["item_id"].to_pylist(), data.items["title"].to_pylist()
    title_of = dict(zip(ids, titles, strict=True))
    samples = []
    for row in drawn(requests.num_rows, arguments.sample_requests, arguments.seed).tolist():
        (request,) = requests.slice(row, 1).to_pylist()
        relevant = set(relevance.rows[relevance.offsets[row] : relevance.offsets[row + 1]].tolist())
        past = data.events["item_id"].take(pa.array(evaluator.history[row][-8:])).to_pylist()
        answers = zip(ranked[row, :10].tolist(), scores[row, :10].tolist(), strict=True)
        samples.append(
            {
                "request_id": request["request_id"],
                "query": request["query"],
                "context": [(c["name"], c["value"]) for c in request["context"] or []],
                "history": [title_of[item] or item for item in past],
                "targets": [titles[item] or ids[item] for item in sorted(relevant)],
                "items": [
                    {"item_id": ids[i], "title": titles[i], "sid": sids[ids[i]], "hit": i in relevant, "score": s}
                    for i, s in answers
                    if i >= 0
                ],
            }
        )
    return samples


if __name__ == "__main__":
    command(main, Arguments)

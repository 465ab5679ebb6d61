"""Evaluates a model on items, over the whole catalogue, beside its baselines and (in the simulated shop) the upper bound.

    sidtune evaluate --config recipes/quickstart/evaluate.yaml --data_dir runs/quickstart/data \\
        --sids_dir runs/quickstart/sids --model_dir runs/quickstart/sft --output_dir runs/quickstart/eval

Requests are spread over the processes and gathered by number, so two processes give exactly the rows of one. The output holds
`metrics.json`, `predictions/<system>.parquet`, `per_request.parquet` (for paired tests between runs) and `samples.json`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rich
from tqdm.auto import tqdm

from sidtune.core.config import SEEDS, as_dict, check_range, command
from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.core.folders import write_folder, write_json, write_run, writes
from sidtune.core.pipeline import Step, check_there
from sidtune.core.ragged import drawn, gathered, own_rows
from sidtune.data_builders.tables.history import History
from sidtune.data_builders.tables.store import DataFolder, load_folder
from sidtune.metrics.baselines.base import BaselineRequests
from sidtune.metrics.baselines.relevance import LABELS, check_labels, relevance_of
from sidtune.metrics.baselines.tables import training_events
from sidtune.metrics.ranking import RankingResult, check_metrics, evaluate_ranking
from sidtune.metrics.registry import BASELINES
from sidtune.metrics.statistics.bootstrap import check_bootstrap, paired_bootstrap, resampled
from sidtune.metrics.statistics.compare import MODEL, compare_systems
from sidtune.metrics.statistics.slices import build_slices, slice_rows
from sidtune.recipes.over_seeds import difference
from sidtune.recipes.preflight import check_data

SHOW_AT_END = True


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
        upper_bound: add the simulator's own upper bound when the data comes from `shop_world`.
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
        check_range(self, 0, "sample_requests", "seed", most=SEEDS)
        if self.num_beams < max(self.ks):
            raise ConfigError(
                f"{self.num_beams} num_beams do not fill the {max(self.ks)} places of ks; raise num_beams."
            )
        for name in self.baselines:
            BASELINES.get(name)
        if self.start_dir is None and self.start_name != "start":
            raise ConfigError("start_name names the model of start_dir, and there is none; leave it out.")
        if self.start_dir is not None and self.start_name in (MODEL, "oracle", *self.baselines, *self.compare_to):
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

    from sidtune.decoding.retrieval.model_folder import ModelFolder
    from sidtune.metrics.report.html import console_table

    # Several CPU processes form a group only when told that the CPU is meant.
    state = PartialState(cpu=not torch.accelerator.is_available())
    data = load_folder(arguments.data_dir)
    if max(arguments.ks) > data.items.num_rows:
        raise ConfigError(
            f"ks: {max(arguments.ks):,} places, but the catalogue has {data.items.num_rows:,} items; lower it."
        )
    requests, excluded = _choose(data, arguments)
    compared, others = _compared(arguments, requests, data), {}
    for folder in (arguments.model_dir, arguments.start_dir):
        if folder is not None:  # strangers are refused before anything is decoded
            ModelFolder.open(folder, arguments.sids_dir, data, whole=True)
    ranked, scores, decoding = _rank_with_model(arguments, arguments.model_dir, data, requests, state)
    if arguments.start_dir is not None:
        others[arguments.start_name], _, _ = _rank_with_model(arguments, arguments.start_dir, data, requests, state)
    if not state.is_main_process:
        return
    others |= compared
    relevance = relevance_of(requests, data.items, arguments.labels)
    history = History(data.events).before(requests["user_id"], requests["time"].to_numpy())
    bounds = _bounds(arguments, data, requests)
    predictions = {MODEL: ranked, **others, **_baselines(arguments, data, requests, history), **bounds}
    results = {
        name: evaluate_ranking(rows, relevance, arguments.ks, arguments.metrics) for name, rows in predictions.items()
    }
    users = requests["user_id"].to_pylist()
    options = {"level": arguments.level, "samples": arguments.samples, "seed": arguments.seed, "clusters": users}
    systems = compare_systems(results, baselines=arguments.baselines, bounds=list(bounds), **options)
    masks = build_slices(data, requests, relevance, history.lengths)
    slices = {
        name: slice_rows(result.per_request[arguments.primary], masks, **options) for name, result in results.items()
    }
    own = results[MODEL].values(arguments.primary)
    pairs = {name: paired_bootstrap(own, results[name].values(arguments.primary), **options) for name in others}
    record = {
        "split": arguments.split,
        "requests": requests.num_rows,
        "requests_without_feedback": excluded,
        "catalogue": data.items.num_rows,
        "primary": arguments.primary,
        "level": arguments.level,
        "resampled": resampled(users, len(users)),
        "systems": [as_dict(system.to_dict()) for system in systems],
        "slices": {name: [as_dict(row) for row in rows] for name, rows in slices.items()},
        "against": {name: as_dict(pair) for name, pair in pairs.items()},
        "decoding": decoding,
    }
    with write_folder(arguments.output_dir) as scratch:
        write_json(scratch / "metrics.json", record)
        _write_predictions(scratch, predictions, scores, data, requests)
        _write_per_request(scratch, results, requests)
        write_json(scratch / "samples.json", _samples(arguments, data, requests, relevance, history, ranked, scores))
        write_run(scratch, metrics={s.name: {m: e.value for m, e in s.metrics.items()} for s in systems})
    print(f"{requests.num_rows:,} {arguments.split} requests, {data.items.num_rows:,} items, whole catalogue ranked")
    cut = arguments.primary.partition("@")[2]  # one cut-off fits a terminal; all others are in metrics.json
    shown = [name for name in systems[0].metrics if name.endswith(f"@{cut}")]
    rich.print(console_table(systems, metrics=shown))
    print(f"Intervals and tests resample {record['resampled']}; another seed of the training is not in them.")
    for name, pair in record["against"].items():
        p_value = f"p = {pair['p_value']:.3f}"
        print(f"{arguments.primary} against {name}: {difference(pair)}, {p_value}")


def _choose(data: DataFolder, arguments: Arguments) -> tuple[pa.Table, int]:
    """The requests to evaluate, and how many of the split have no feedback."""
    every = data.requests[arguments.split]
    requests = every.filter(pa.array(np.diff(relevance_of(every, data.items, arguments.labels).offsets) > 0))
    excluded = every.num_rows - requests.num_rows
    if not requests.num_rows:
        raise DataError(
            f"No request of the split '{arguments.split}' has feedback, so nothing can be measured; check labels."
        )
    chosen = drawn(requests.num_rows, arguments.max_requests, arguments.seed)
    return requests.take(chosen).combine_chunks(), excluded


def _rank_with_model(arguments: Arguments, model_dir: str, data: DataFolder, requests: pa.Table, state: Any):
    import torch

    from sidtune.decoding.items import BeamOutput, rank_items
    from sidtune.decoding.retrieval.loading import load_retriever, prompts_of

    retriever = load_retriever(model_dir, arguments.sids_dir, data, whole=True)
    retriever.model.to(state.device)
    mine = own_rows(requests.num_rows, state.process_index, state.num_processes)
    prompts = prompts_of(retriever, data, requests.take(mine))
    begin = time.time()
    with tqdm(
        total=len(prompts), desc="decoding", unit="request", disable=None if state.is_main_process else True
    ) as bar:
        beams = retriever.beams(prompts, arguments.num_beams, arguments.batch_size, progress=bar.update)
    seconds = time.time() - begin
    leaves, values = gathered(mine, beams.leaves.numpy(), beams.scores.numpy())
    if leaves.max() >= retriever.trie.num_leaves or leaves.min() < -1:
        raise SidtuneError("The decoder returned a SID outside the catalogue; this is a defect, please report it.")
    found = BeamOutput(torch.from_numpy(leaves), torch.from_numpy(values))
    rows, scores = rank_items(found, retriever.leaves, max(arguments.ks))
    decoding = {
        "num_beams": arguments.num_beams,
        "requests_per_second": round(len(prompts) / max(seconds, 1e-9), 2),
        "short_lists": int((rows[:, -1] < 0).sum()),
    }
    return rows, scores, decoding


def _baselines(arguments: Arguments, data: DataFolder, requests: pa.Table, history: Any) -> dict[str, np.ndarray]:
    events = training_events(data)
    wanted = BaselineRequests.from_events(requests["query"], history, data.events, data.items)
    return {
        name: BASELINES.get(name)().fit(data.items, events, data.requests["train"]).rank(wanted, max(arguments.ks))
        for name in tqdm(arguments.baselines, desc="baselines", disable=None)
    }


def _bounds(arguments: Arguments, data: DataFolder, requests: pa.Table) -> dict[str, np.ndarray]:
    if not arguments.upper_bound or data.meta.get("reader") != "shop_world":
        return {}
    from sidtune.data_builders.shop_world.world import ShopWorld

    world = ShopWorld.from_options(**data.meta["options"])
    return {"oracle": world.oracle_ranking(world.request_rows(requests["request_id"]), max(arguments.ks))}


def _compared(arguments: Arguments, requests: pa.Table, data: DataFolder) -> dict[str, np.ndarray]:
    from sidtune.decoding.retrieval.model_folder import check_made_from

    found = {}
    rows = {item: row for row, item in enumerate(data.items["item_id"].to_pylist())}
    for name, folder in arguments.compare_to.items():
        path = Path(folder) / "predictions" / f"{MODEL}.parquet"
        if not path.exists():
            raise DataError(f"compare_to.{name}: {path} does not exist; name the folder of a finished evaluation.")
        check_made_from(folder, data_dir=arguments.data_dir)
        table = pq.read_table(path)
        strange = [item for one in table["items"].to_pylist() for item in one if item not in rows]
        if strange:
            raise DataError(
                f"compare_to.{name}: {path} ranks the item '{strange[0]}', which is not in {arguments.data_dir}, so they do "
                "not belong together; evaluate that model on this data."
            )
        place = {request: n for n, request in enumerate(table["request_id"].to_pylist())}
        asked, width = requests["request_id"].to_pylist(), max(arguments.ks)
        missing = [request for request in asked if request not in place]
        if missing:
            raise DataError(
                f"compare_to.{name}: it lacks {len(missing)} of the requests, first '{missing[0]}'; evaluate alike."
            )
        lists = table["items"].take([place[request] for request in asked]).to_pylist()
        found[name] = np.array([([rows[i] for i in one] + [-1] * width)[:width] for one in lists], dtype=np.int64)
    return found


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


def _samples(arguments, data, requests, relevance, history, ranked, scores) -> list[dict[str, Any]]:
    """Random requests with the model's answer, as a person wants to see them."""
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds

    sids = SemanticIds.from_pretrained(Path(arguments.sids_dir) / "sids").texts()
    ids, titles = data.items["item_id"].to_pylist(), data.items["title"].to_pylist()
    title_of = dict(zip(ids, titles, strict=True))
    samples = []
    for row in drawn(requests.num_rows, arguments.sample_requests, arguments.seed).tolist():
        (request,) = requests.slice(row, 1).to_pylist()
        relevant = set(relevance.rows[relevance.offsets[row] : relevance.offsets[row + 1]].tolist())
        past = data.events["item_id"].take(pa.array(history[row][-8:])).to_pylist()
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

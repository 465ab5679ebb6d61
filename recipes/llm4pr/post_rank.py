"""Post-ranking: trains LLM4PR on one set of requests, and measures its lists on the test split.

    sidtune llm4pr.post-rank --config recipes/llm4pr/movielens.yaml --source.path <folder> \\
        --output_dir runs/post_rank

The output folder holds `metrics.json` (the system and what it is read against, with intervals and paired tests),
`per_request.parquet`, `table.md`, `run.json`, and for each seed a folder with the orders and the model. A finished seed is not
trained again while arguments and data stay the same; an interrupted one goes on from its last checkpoint, if `training.post_rank`
sets `save_strategy`. The lists of our own generator (`kind: generator`) are kept in `lists/`. One process.

Values are means over the seeds, request by request; intervals and tests resample users. The incoming order, random order and best
order stand in every table, and where a simulator knows the clicks also the list sorted by them, which forgets that neighbours
compete. `benchmarks/post_rank_rivals.py` reads this folder and adds ablations and other re-rankers.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidtune.core.config import SEEDS, as_dict, build, check_range, command
from sidtune.core.errors import ConfigError, nearest
from sidtune.core.folders import fingerprint, inputs_of, read_json, write_json, write_run, writes
from sidtune.core.pipeline import Step, check_there
from sidtune.core.resume import Work, digest
from sidtune.data_builders.post_ranking.sources import Source, load_source, parse_source
from sidtune.data_builders.post_ranking.text import request_of
from sidtune.decoding.serving.generator_source import FOLDERS, KINDS, with_folders
from sidtune.metrics.list_ranking import (
    BEST,
    CLICKS,
    RANDOM,
    SORTED,
    ListMetrics,
    evaluate_lists,
    list_table,
    random_anchor,
)
from sidtune.metrics.ranking import RankingResult
from sidtune.metrics.report.readme_table import check_readme, replace_table
from sidtune.metrics.statistics.bootstrap import check_bootstrap, paired_bootstrap
from sidtune.metrics.statistics.compare import compare_systems
from sidtune.recipes.llm4pr.training import Training, table_for, train_system
from sidtune.recipes.over_seeds import adjusted

LAUNCH = "alone"
RESULT_FILE = "result.json"

logger = logging.getLogger(__name__)
INITIAL, MAIN = "initial", "llm4pr"
METHODS = ("greedy", "beam", "single_forward", "unconstrained")


@dataclass
class Arguments:
    """Options of post_rank.

    Attributes:
        source: `kind` (movielens, shop, generator, passages, table) and its options, see `data_builders/post_ranking/sources.py`.
        output_dir: folder to write.
        data_dir, sids_dir, model_dir: folders of the source `generator`, for a pipeline; or they stand in `source`.
        training: options of `recipes.llm4pr.training.Training`.
        methods: ways to answer, the first is the system's (greedy, beam, single_forward, unconstrained).
        metrics: options of `ListMetrics` (ks, relevance, gain, ...).
        primary: metric of the paired tests; `expected clicks` where the source is simulated.
        seeds: of weights and draws.
        max_train, max_test: use a random part of the requests (null = all).
        samples, level: of the bootstrap.
        readme: README files whose table is replaced.
    """

    GONE: ClassVar[dict[str, str]] = dict.fromkeys(
        ("baselines", "reranker", "variants", "shuffles", "cost_requests", "save"),
        "benchmarks/post_rank_rivals.py compares with other systems",
    )

    source: dict
    output_dir: str
    data_dir: str | None = None
    sids_dir: str | None = None
    model_dir: str | None = None
    training: dict = field(default_factory=dict)
    methods: list[str] = field(default_factory=lambda: ["greedy", "single_forward"])
    metrics: dict = field(default_factory=dict)
    primary: str = "ndcg@5"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    max_train: int | None = None
    max_test: int | None = None
    samples: int = 2000
    level: float = 0.95
    readme: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        parse_source(self.whole_source(), KINDS)
        for name in self.methods:
            if name not in METHODS:
                raise ConfigError(f"methods: there is no '{name}': {nearest(name, METHODS)}")
        if not self.methods:
            raise ConfigError("post_rank needs at least one method.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must be different integers, at least one, got {self.seeds}.")
        check_range(self, 0, "seeds", most=SEEDS)
        check_range(self, 1, "max_train", "max_test")
        check_bootstrap(self.level, self.samples)
        self.train_settings()
        measured = self.list_metrics()
        if self.primary not in {CLICKS, *(f"{m}@{k}" for m in measured.metrics for k in measured.ks)}:
            raise ConfigError(f"primary is '{self.primary}', which metrics do not compute; choose one they do.")
        simulated = self.source["kind"] in ("shop", "generator") and self.source.get("label") != "logged"
        if self.primary == CLICKS and not simulated:
            raise ConfigError(f"primary is '{CLICKS}', which only simulated sessions have; choose another metric.")

    def whole_source(self) -> dict[str, Any]:
        """The source with the folders given beside it."""
        return with_folders(self.source, self.folders())

    def folders(self) -> dict[str, str | None]:
        """The folders of earlier steps, None where not given here."""
        return {name: getattr(self, name) for name in FOLDERS}

    def list_metrics(self) -> ListMetrics:
        """What the metrics mean."""
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in self.metrics.items()}
        return build(ListMetrics, values, "metrics")

    def train_settings(self) -> Training:
        """How the system is trained."""
        return build(Training, self.training, "training")


@dataclass
class Data:
    """The requests: training, validation and test rows of `source.table`, the longest test list, and what all depends on."""

    source: Source
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    width: int
    identity: str


def preflight(step: Step) -> None:
    """Refuses sources that are not there, clicks that no simulator knows, and lists longer than the catalogue."""
    from sidtune.recipes.preflight import check_data

    config, made = step.config, step.before.get("data_dir")
    if config.source["kind"] == "generator":
        options = parse_source(config.whole_source(), KINDS)
        check_data(step, largest=options.candidates)
        shop = made is None or getattr(made.config, "reader", "shop_world") == "shop_world"
        if not shop and (config.primary == CLICKS or options.label not in ("auto", "logged")):
            told = f"'{made.name}' reads '{made.config.reader}'"
            raise ConfigError(
                f"primary and label need a simulated shop, but {told}; choose metrics of the lists and logged."
            )
    check_there(step, **{"source.path": config.source.get("path")})


@writes("post_rank", tree=True)
def main(arguments: Arguments) -> None:
    """Trains and measures; prints the table."""
    for readme in arguments.readme:
        check_readme(readme)
    started, output = time.time(), Path(arguments.output_dir)
    data = load_data(arguments)
    found = [trained(arguments, data, seed, output / f"seed_{seed}" / MAIN) for seed in arguments.seeds]
    each = {INITIAL: [incoming(data)] * len(found)}
    record, table, results = compare(arguments, data, {**each, **orders_of(found)}, [INITIAL])
    record["told"] = {MAIN: [{"seed": s, **one["told"]} for s, one in zip(arguments.seeds, found, strict=True)]}
    (output / "table.md").write_text(table, "utf-8")
    write_json(output / "metrics.json", record)
    columns = {f"{n}/{m}": v for n, result in results.items() for m, v in result.per_request.items()}
    ids = data.source.table.requests["request_id"].take(pa.array(data.test))
    pq.write_table(pa.table({"request_id": ids, **columns}), output / "per_request.parquet")
    short = {row["name"]: {m: e["value"] for m, e in row["metrics"].items()} for row in record["systems"]}
    write_run(output, step="post_rank", config=as_dict(arguments), metrics=short, started=started)
    for readme in arguments.readme:
        replace_table(readme, table)
    print(table)


def load_data(arguments: Arguments) -> Data:
    """The requests of the source that every system here is trained and measured on."""
    from sidtune.trainers.post_ranking.data import judged_rows

    source = load_source(arguments.whole_source(), Path(arguments.output_dir) / "lists", KINDS)
    parts = {}
    for split, most in (("train", arguments.max_train), ("valid", arguments.max_test), ("test", arguments.max_test)):
        rows = judged_rows(source.table, source.table.rows_of(split))
        if most is not None and most < len(rows):
            rows = np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
        parts[split] = rows
    if not len(parts["train"]) or len(parts["test"]) < 2:
        raise ConfigError(
            f"The source has {len(parts['train'])} judged training and {len(parts['test'])} test requests; there must be "
            "some of both, so check its splits and labels."
        )
    if arguments.primary == CLICKS and source.sessions is None:
        raise ConfigError(f"primary is '{CLICKS}', which only simulated sessions have; choose a metric of the lists.")
    width = int(np.diff(source.table.candidate_offsets)[parts["test"]].max())
    told = {name: as_dict(arguments)[name] for name in ("training", "methods", "max_train", "max_test")}
    read = {name: fingerprint(path) for name, path in inputs_of(arguments.training).items()}
    identity = digest([source.table.requests.to_pylist(), source.table.matrices, told, read])
    return Data(source, **parts, width=width, identity=identity)


def incoming(data: Data) -> np.ndarray:
    """(R, n) the incoming order of each test list, −1 behind its last candidate."""
    places = np.arange(data.width)
    return np.where(places < np.diff(data.source.table.candidate_offsets)[data.test][:, None], places, -1)


def trained(
    arguments: Arguments,
    data: Data,
    seed: int,
    folder: Path,
    name: str = MAIN,
    changes: dict[str, Any] | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Orders of the test lists and facts of the training: read where they are finished, else made.

    Args:
        folder: of this system. name: of the system in tables.
        changes: options of `Training` that differ from the arguments'; the system then answers by the first method only.
        kept: folder of what several systems start from, default beside `folder`.
    """
    work = Work(folder, {"data and options": data.identity, "name": name, "seed": seed, "changes": changes})
    if work.is_done():
        logger.info("seed %d, %s: unchanged, not trained again", seed, name)
        return read_json(folder / RESULT_FILE)
    if (folder / "state.json").is_file():
        logger.warning("%s is of an earlier version and cannot be used; it is made again.", folder)
        shutil.rmtree(folder)
    work.begin()
    logger.info("seed %d, %s: training on %d requests", seed, name, len(data.train))
    training = replace(arguments.train_settings(), **(changes or {}))
    with work.finish("post_rank_variant") as scratch:
        from sidtune.models.post_ranking.files import save_post_rank
        from sidtune.models.post_ranking.ranker import PostRanker

        table = table_for(training, data.source.table, data.train)
        kept = kept or folder.parent / f"common_{data.identity[:16]}"
        model, processor, told = train_system(training, table, data.train, seed, work.folder, kept)
        requests = [request_of(table, int(row), training.max_history) for row in data.test]
        ranker, window = PostRanker(model, processor), min(20, training.max_candidates)
        orders = {}
        for place, method in enumerate(arguments.methods[:1] if changes else dict.fromkeys(arguments.methods)):
            ranked = ranker.rank(requests, method, window=window, stride=max(1, window // 2))
            rows = [order.tolist() + [-1] * (data.width - len(order)) for order in ranked]
            orders[f"{name} ({method})" if place else name] = rows
        save_post_rank(model, scratch / "model", processor)
        found = {"orders": orders, "told": told}
        write_json(scratch / RESULT_FILE, found)
        write_run(scratch, step="post_rank_variant", config={"name": name, "seed": seed})
    return found


def orders_of(found: Sequence[dict[str, Any]]) -> dict[str, list[np.ndarray]]:
    """Name → the orders of each seed, from what `trained` gave for each."""
    return {name: [np.array(one["orders"][name], dtype=np.int64) for one in found] for name in found[0]["orders"]}


def compare(
    arguments: Arguments, data: Data, orders: dict[str, list[np.ndarray]], references: list[str]
) -> tuple[dict[str, Any], str, dict[str, RankingResult]]:
    """(record of all systems and tests, their table, the metrics request by request) of orders of the test lists.

    Args:
        orders: name → orders of each seed. references: names that the others are tested against.
    """
    results, spread = _results(arguments, data, orders)
    users = [int(user) if user >= 0 else None for user in data.source.table.user_rows[data.test]]
    options = {"level": arguments.level, "samples": arguments.samples, "clusters": users}
    bounds = [name for name in (RANDOM, SORTED, BEST) if name in results]
    rows = compare_systems(results, references, bounds=bounds, **options)
    record = {
        "requests": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        "definition": arguments.list_metrics().description,
        "primary": arguments.primary,
        "seeds": arguments.seeds,
        "systems": [as_dict(row.to_dict()) for row in rows],
        "each_seed": spread,
        "against": _against(arguments, results, spread, options),
        "notes": data.source.table.notes,
    }
    return record, "\n".join([list_table(rows, arguments.list_metrics()), _differences(record)]), results


def _results(
    arguments: Arguments, data: Data, orders: dict[str, list[np.ndarray]]
) -> tuple[dict[str, RankingResult], dict[str, list[float]]]:
    """(metrics of each system as means over the seeds, primary metric of each seed); with both bounds."""
    from sidtune.data_builders.post_ranking.targets import target_order
    from sidtune.data_builders.shop_world.sessions import ShopSessions

    table, settings = data.source.table, arguments.list_metrics()
    batch = table.batch(data.test, 0)
    relevance, mask = batch.relevance, batch.item_mask
    whole, sessions = data.source.sessions, None
    if whole is not None:
        sessions = ShopSessions(whole.world, whole.rows[data.test], whole.items[data.test], whole.config)

    def clicked(result: RankingResult, clicks: Callable[[ShopSessions], np.ndarray]) -> RankingResult:
        if sessions is None:
            return result
        kept = np.where(result.included, clicks(sessions), np.nan)
        return RankingResult({**result.per_request, CLICKS: kept}, result.included)

    def scored(order: np.ndarray) -> RankingResult:
        return clicked(evaluate_lists(order, relevance, mask, settings), lambda known: known.utility(order))

    results, spread = {}, {}
    for name, seeds in orders.items():
        each = [scored(order) for order in seeds]
        mean = {metric: np.mean([one.per_request[metric] for one in each], axis=0) for metric in each[0].per_request}
        results[name] = RankingResult(mean, each[0].included)
        spread[name] = [float(one.values(arguments.primary).mean()) for one in each]
    best = target_order(np.where(mask, relevance, np.nan), mask)
    results[RANDOM] = clicked(random_anchor(relevance, mask, settings), lambda known: known.random_utility)
    if sessions is not None:
        results[SORTED] = scored(sessions.by_attraction())
    results[BEST] = scored(np.where(np.take_along_axis(mask, best, axis=1), best, -1))
    return results, spread


def _against(
    arguments: Arguments, results: dict[str, RankingResult], spread: dict[str, list[float]], options: dict[str, Any]
) -> dict[str, Any]:
    """`llm4pr` minus every other system on the primary metric, p-values adjusted together (Holm)."""
    others = [name for name in results if name not in (MAIN, RANDOM, SORTED, BEST)]
    if MAIN not in results or not others:
        return {}
    own, kept = results[MAIN].values(arguments.primary), results[MAIN].included
    options = {**options, "clusters": [u for u, keep in zip(options["clusters"], kept, strict=True) if keep]}
    pairs = {}
    for name in others:
        seeds = [a - b for a, b in zip(spread[MAIN], spread[name], strict=True)]
        pairs[name] = paired_bootstrap(own, results[name].values(arguments.primary), **options, seeds=seeds)
    return adjusted(pairs)


def _differences(record: dict[str, Any]) -> str:
    """`llm4pr` minus every other system on the primary metric, as a table."""
    if not record["against"]:
        return ""
    lines = [
        "",
        f"| {MAIN} minus | {record['primary']} | 95 % interval | p (Holm) | seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    own = record["each_seed"][MAIN]
    for name, pair in record["against"].items():
        seeds = ", ".join(f"{a - b:+.4f}" for a, b in zip(own, record["each_seed"][name], strict=True))
        interval = f"[{pair['low']:+.4f}, {pair['high']:+.4f}]"
        lines.append(f"| {name} | {pair['difference']:+.4f} | {interval} | {pair['adjusted_p_value']:.3f} | {seeds} |")
    trainings = " and trainings" if any(pair.get("seeds", 1) > 1 for pair in record["against"].values()) else ""
    note = f"Paired over requests (means of the seeds), users{trainings} resampled; the last column is seed by seed."
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    command(main, Arguments)

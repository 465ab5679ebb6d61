"""Post-ranking: trains LLM4PR, its ablations and the baselines on one set of requests, and compares them on the test split.

    sidtune llm4pr.post-rank --config recipes/llm4pr/movielens.yaml --source.path <folder> \\
        --output_dir runs/post_rank

The output folder holds `metrics.json` (all systems with intervals, paired tests, costs), `per_request.parquet`, `table.md`,
`run.json`, and for each seed and system a folder with its orders and, where `save` names it, its model. A finished system is
not trained again while arguments and data stay the same; an interrupted one goes on from its last checkpoint, if
`training.post_rank` sets `save_strategy`. The lists of our own generator (`kind: generator`) are kept in `lists/`. One process.

Values are means over the seeds, request by request; intervals and tests resample users. Random order and best order stand in
every table, and where a simulator knows the clicks also the list sorted by them, which forgets that neighbours compete.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidtune.core.config import as_dict, build, check_range, command
from sidtune.core.errors import ConfigError, nearest
from sidtune.core.folders import fingerprint, inputs_of, read_json, write_json, write_run, writes
from sidtune.core.pipeline import Step, check_there
from sidtune.core.resume import Work, digest
from sidtune.data_builders.post_ranking.sources import Source, load_source, parse_source
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
from sidtune.metrics.statistics.bootstrap import check_bootstrap, holm, paired_bootstrap
from sidtune.metrics.statistics.compare import compare_systems
from sidtune.models.registry import RERANKERS
from sidtune.recipes.llm4pr.systems import VARIANTS, Training, cost_table

LAUNCH = "alone"
RESULT_FILE = "result.json"

logger = logging.getLogger(__name__)
MAIN = "llm4pr"
METHODS = ("greedy", "beam", "single_forward", "unconstrained")


@dataclass
class Arguments:
    """Options of post_rank.

    Attributes:
        source: `kind` (movielens, shop, generator, passages, table) and its options, see `data_builders/post_ranking/sources.py`.
        output_dir: folder to write.
        data_dir, sids_dir, model_dir: folders of the source `generator`, for a pipeline; or they stand in `source`.
        baselines: names in `models.registry.RERANKERS`. reranker: options of `RerankerConfig` but the seed.
        variants: names in `systems.VARIANTS`.
        training: options of `systems.Training`.
        methods: how `llm4pr` answers; the first is that of all variants (greedy, beam, single_forward, unconstrained).
        shuffles: adds `llm4pr` with the mean order over so many shuffles of the incoming list; 0 for none.
        metrics: options of `ListMetrics` (ks, relevance, gain, ...).
        primary: metric of the tests among the systems; `expected clicks` where the source is simulated.
        seeds: of weights, draws and baselines.
        max_train, max_test: use a random part of the requests (null = all).
        cost_requests: requests answered one at a time for tokens, latency and valid rate.
        save: variants whose models are kept.
        samples, level: of the bootstrap.
        readme: README files whose table is replaced.
    """

    source: dict
    output_dir: str
    data_dir: str | None = None
    sids_dir: str | None = None
    model_dir: str | None = None
    baselines: list[str] = field(
        default_factory=lambda: ["initial", "mlp", "dlcm", "prm", "setrank", "seq2slate", "prs"]
    )
    reranker: dict = field(default_factory=dict)
    variants: list[str] = field(default_factory=lambda: [MAIN, "no_qia", "no_adaptation", "no_aux", "ptpr"])
    training: dict = field(default_factory=dict)
    methods: list[str] = field(default_factory=lambda: ["greedy", "single_forward"])
    shuffles: int = 0
    metrics: dict = field(default_factory=dict)
    primary: str = "ndcg@5"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    max_train: int | None = None
    max_test: int | None = None
    cost_requests: int = 32
    save: list[str] = field(default_factory=lambda: [MAIN])
    samples: int = 2000
    level: float = 0.95
    readme: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        parse_source(self.whole_source(), KINDS)
        for name in self.baselines:
            RERANKERS.get(name)
        for what, names, known in (
            ("variants", self.variants, VARIANTS),
            ("save", self.save, self.variants),
            ("methods", self.methods, METHODS),
        ):
            for name in names:
                if name not in known:
                    raise ConfigError(f"{what}: there is no '{name}': {nearest(name, known)}")
        if not self.methods or not self.baselines + self.variants:
            raise ConfigError("post_rank needs at least one method, and one baseline or variant.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must be different integers, at least one, got {self.seeds}.")
        check_range(self, 0, "shuffles")
        check_range(self, 0, "seeds", most=2**63)
        check_range(self, 1, "cost_requests", "max_train", "max_test")
        check_bootstrap(self.level, self.samples)
        self.train_settings(), self.reranker_config(0)
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
        """How variants are trained."""
        return build(Training, self.training, "training")

    def reranker_config(self, seed: int) -> Any:
        """How baselines are fitted."""
        from sidtune.trainers.post_ranking.rerankers import RerankerConfig

        return build(RerankerConfig, {**self.reranker, "seed": seed}, "reranker")


@dataclass
class _Data:
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
    """Trains and compares all systems; prints the table."""
    for readme in arguments.readme:
        check_readme(readme)
    started, output = time.time(), Path(arguments.output_dir)
    data = _load(arguments)
    orders: dict[str, list[np.ndarray]] = {}
    told: dict[str, Any] = {}
    for seed in arguments.seeds:
        for name in arguments.baselines:
            orders.setdefault(name, []).append(_baseline(name, arguments, data, seed))
        for name in arguments.variants:
            found = _variant(name, arguments, data, seed, output / f"seed_{seed}" / name)
            for shown, rows in found["orders"].items():
                orders.setdefault(shown, []).append(np.array(rows, dtype=np.int64))
            told.setdefault(name, []).append({"seed": seed, **found["told"]})
    results, spread = _results(arguments, data, orders)
    users = [int(user) if user >= 0 else None for user in data.source.table.user_rows[data.test]]
    options = {"level": arguments.level, "samples": arguments.samples, "clusters": users}
    bounds = [name for name in (RANDOM, SORTED, BEST) if name in results]
    rows = compare_systems(results, arguments.baselines, bounds=bounds, **options)
    record = {
        "requests": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        "definition": arguments.list_metrics().description,
        "primary": arguments.primary,
        "seeds": arguments.seeds,
        "systems": [as_dict(row.to_dict()) for row in rows],
        "each_seed": spread,
        "against": _against(arguments, results, options),
        "told": told,
        "notes": data.source.table.notes,
    }
    table = "\n".join([list_table(rows, arguments.list_metrics()), _differences(record), cost_table(told)])
    (output / "table.md").write_text(table, "utf-8")
    write_json(output / "metrics.json", record)
    columns = {f"{n}/{m}": v for n, result in results.items() for m, v in result.per_request.items()}
    ids = data.source.table.requests["request_id"].take(pa.array(data.test))
    pq.write_table(pa.table({"request_id": ids, **columns}), output / "per_request.parquet")
    short = {row.name: {m: e.value for m, e in row.metrics.items()} for row in rows}
    write_run(output, step="post_rank", config=as_dict(arguments), metrics=short, started=started)
    for readme in arguments.readme:
        replace_table(readme, table)
    print(table)


def _load(arguments: Arguments) -> _Data:
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
    return _Data(source, **parts, width=width, identity=_identity(arguments, source))


def _identity(arguments: Arguments, source: Source) -> str:
    """Changes with whatever a trained system depends on; what the text-only prompt alone depends on is told apart in `_variant`."""
    names = ("training", "methods", "shuffles", "max_train", "max_test", "cost_requests", "save")
    told = {name: as_dict(arguments)[name] for name in names}
    told["training"] = {key: value for key, value in told["training"].items() if key != "ptpr"}
    read = {name: fingerprint(path) for name, path in inputs_of(arguments.training).items()}
    return digest([source.table.requests.to_pylist(), source.table.matrices, told, read])


def _baseline(name: str, arguments: Arguments, data: _Data, seed: int) -> np.ndarray:
    from sidtune.trainers.post_ranking.rerankers import fit_reranker, rank_table

    table, config = data.source.table, arguments.reranker_config(seed)
    fitted = fit_reranker(name, table, data.train, data.valid, config)
    return rank_table(fitted.model, table, data.test, max_history=config.max_history)


def _variant(name: str, arguments: Arguments, data: _Data, seed: int, folder: Path) -> dict[str, Any]:
    """Orders and facts of a variant: read where they are finished, else trained."""
    words = {"ptpr": arguments.training["ptpr"]} if VARIANTS[name].words and arguments.training.get("ptpr") else {}
    work = Work(folder, {"data and options": data.identity, "name": name, "seed": seed, **words})
    if work.is_done():
        logger.info("seed %d, %s: unchanged, not trained again", seed, name)
        return read_json(folder / RESULT_FILE)
    if (folder / "state.json").is_file():
        logger.warning("%s is of an earlier version and cannot be used; it is made again.", folder)
        shutil.rmtree(folder)
    work.begin()
    with work.finish("post_rank_variant") as scratch:
        found = _train(name, arguments, data, seed, work.folder, scratch)
        write_json(scratch / RESULT_FILE, found)
        write_run(scratch, step="post_rank_variant", config={"name": name, "seed": seed})
    return found


def _train(name: str, arguments: Arguments, data: _Data, seed: int, work: Path, folder: Path) -> dict[str, Any]:
    from sidtune.models.post_ranking.files import save_post_rank
    from sidtune.models.post_ranking.ranker import PostRanker
    from sidtune.recipes.llm4pr import systems

    training, variant = arguments.train_settings(), VARIANTS[name]
    logger.info("seed %d, %s: training on %d requests", seed, name, len(data.train))
    table = systems.table_for(variant, training, data.source.table, data.train)
    kept = work.parent / f"common_{data.identity[:16]}"
    model, processor, told = systems.train_variant(variant, training, table, data.train, seed, work, kept)
    requests = systems.requests_of(table, data.test, training.max_history)
    ranker = PostRanker(model, processor)
    window = min(20, training.max_candidates)
    windows = {"window": window, "stride": max(1, window // 2)}
    first = arguments.methods[0]
    orders = {name: systems.rank_requests(ranker, requests, first, data.width, **windows)}
    if name == MAIN:
        for method in arguments.methods[1:]:
            orders[f"{name} ({method})"] = systems.rank_requests(ranker, requests, method, data.width, **windows)
        if arguments.shuffles:
            options = {"shuffles": arguments.shuffles, "seed": seed, **windows}
            orders[f"{name} ({arguments.shuffles} shuffles)"] = systems.rank_requests(
                ranker, requests, first, data.width, **options
            )
    methods = list(dict.fromkeys([*arguments.methods, "single_forward"]))
    told["cost"] = as_dict(systems.measure_cost(model, processor, requests[: arguments.cost_requests], methods))
    if name in arguments.save:
        save_post_rank(model, folder / "model", processor)
    return {"orders": orders, "told": told}


def _results(
    arguments: Arguments, data: _Data, orders: dict[str, list[np.ndarray]]
) -> tuple[dict[str, RankingResult], dict[str, list[float]]]:
    """(metrics of each system as means over the seeds, primary metric of each seed); with both bounds."""
    from sidtune.data_builders.post_ranking.targets import target_order

    table, settings = data.source.table, arguments.list_metrics()
    batch = table.batch(data.test, 0)
    relevance, mask = batch.relevance, batch.item_mask
    value = _Utility(data)

    def scored(order: np.ndarray) -> RankingResult:
        return value.added(evaluate_lists(order, relevance, mask, settings), order)

    results, spread = {}, {}
    for name, seeds in orders.items():
        each = [scored(order) for order in seeds]
        mean = {metric: np.mean([one.per_request[metric] for one in each], axis=0) for metric in each[0].per_request}
        results[name] = RankingResult(mean, each[0].included)
        spread[name] = [float(one.values(arguments.primary).mean()) for one in each]
    best = target_order(np.where(mask, relevance, np.nan), mask)
    results[RANDOM] = value.added(random_anchor(relevance, mask, settings), None)
    if value.sessions is not None:
        results[SORTED] = scored(value.sessions.by_attraction())
    results[BEST] = scored(np.where(np.take_along_axis(mask, best, axis=1), best, -1))
    return results, spread


class _Utility:
    """Adds the simulator's expected clicks of a list, where there is a simulator."""

    def __init__(self, data: _Data) -> None:
        from sidtune.data_builders.shop_world.sessions import ShopSessions

        whole = data.source.sessions
        self.sessions = None
        if whole is not None:
            self.sessions = ShopSessions(whole.world, whole.rows[data.test], whole.items[data.test], whole.config)

    def added(self, result: RankingResult, order: np.ndarray | None) -> RankingResult:
        """The result with `expected clicks`; no order means a random one."""
        if self.sessions is None:
            return result
        value = self.sessions.random_utility if order is None else self.sessions.utility(order)
        kept = np.where(result.included, value, np.nan)
        return RankingResult({**result.per_request, CLICKS: kept}, result.included)


def _against(arguments: Arguments, results: dict[str, RankingResult], options: dict[str, Any]) -> dict[str, Any]:
    """`llm4pr` minus every other system on the primary metric, p-values adjusted together (Holm)."""
    others = [name for name in results if name not in (MAIN, RANDOM, SORTED, BEST)]
    if MAIN not in results or not others:
        return {}
    own, kept = results[MAIN].values(arguments.primary), results[MAIN].included
    options = {**options, "clusters": [u for u, keep in zip(options["clusters"], kept, strict=True) if keep]}
    pairs = {name: paired_bootstrap(own, results[name].values(arguments.primary), **options) for name in others}
    adjusted = holm([pair.p_value for pair in pairs.values()])
    return {
        name: {**as_dict(pair), "adjusted_p_value": p} for (name, pair), p in zip(pairs.items(), adjusted, strict=True)
    }


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
    note = "Paired over requests (means of the seeds), users resampled; the last column is seed by seed."
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    command(main, Arguments)

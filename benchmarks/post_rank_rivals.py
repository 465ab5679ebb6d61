"""Other re-rankers and LLM4PR's own ablations beside a run of `llm4pr.post-rank`: one table, one set of requests, the same seeds.

    sidtune llm4pr.post-rank --config recipes/llm4pr/shop.yaml --output_dir runs/llm4pr_shop
    python benchmarks/post_rank_rivals.py --run runs/llm4pr_shop --output runs/llm4pr_shop_rivals \\
        --readme recipes/llm4pr/shop.md

Reads the run's options, its orders and what its training started from; fits the rivals of `benchmarks/rivals/registry.py`, trains
the ablations (a finished one is not trained again), and writes `table.md`, `metrics.json` and what an answer costs. Without `--run`
it first makes a small run of its own on simulated sessions.

| ablation | differs in |
|---|---|
| `no_qia`, `no_qia_query` | an MLP on the fields; on fields and query |
| `no_adaptation`, `no_aux` | no feature adaptation; no auxiliary task |
| `query_alone` | the adapter reads the words of the query alone |
| `ptpr` | features as words, no adapter |
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sidtune.benchmarks.rivals.registry import RERANKERS
from sidtune.benchmarks.rivals.rerankers.fitting import RerankerConfig, fit_reranker, rank_table
from sidtune.core.config import build
from sidtune.core.folders import read_json, write_json
from sidtune.data_builders.post_ranking.text import request_of
from sidtune.metrics.report.readme_table import check_readme, replace_table
from sidtune.models.post_ranking.ranker import PostRanker
from sidtune.recipes.llm4pr import post_rank
from sidtune.recipes.llm4pr.training import table_for

ABLATIONS: dict[str, dict[str, Any]] = {
    "no_qia": {"adapter": "mlp"},
    "no_qia_query": {"adapter": "mlp_query"},
    "no_adaptation": {"adaptation": None},
    "no_aux": {"aux": False},
    "query_alone": {"query": "request"},
    "ptpr": {"words": True, "query": "request"},
}
_STEP = {"max_steps": 20, "per_device_train_batch_size": 16, "save_strategy": "no", "disable_tqdm": True}
_SHAPE = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
SMALL = {
    "source": {"kind": "shop", "world": {"n_items": 400, "n_users": 100, "n_requests": 1500}, "count": 600},
    "training": {"scratch": _SHAPE, "train": "all", "adaptation_trains": "all", "d_h": 16, "max_history": 2}
    | {"query": "personal", "adaptation": _STEP, "post_rank": _STEP},
    "metrics": {"ks": [8], "gain": "linear", "relevant": "best_one"},
    "primary": "ndcg@8",
    "seeds": [0],
}


def rivals_of(names: list[str], options: dict[str, Any], run: Any, data: post_rank.Data) -> dict[str, list[np.ndarray]]:
    """Name → orders of the test lists by a rival fitted with each seed."""
    made: dict[str, list[np.ndarray]] = {}
    table = data.source.table
    for seed in run.seeds:
        config = build(RerankerConfig, {**options, "seed": seed}, "reranker")
        for name in names:
            model = fit_reranker(name, table, data.train, data.valid, config).model
            found = rank_table(model, table, data.test, max_history=config.max_history)
            made.setdefault(name, []).append(found)
    return made


def ablations_of(
    names: list[str], steps_in_words: int | None, run: Any, data: post_rank.Data, output: Path
) -> dict[str, list[dict[str, Any]]]:
    """Name → what `post_rank.trained` tells of each seed; all start from what the run itself started from."""
    made: dict[str, list[dict[str, Any]]] = {}
    for seed in run.seeds:
        kept = output / f"seed_{seed}" / f"common_{data.identity[:16]}"
        before = Path(run.output_dir) / f"seed_{seed}" / kept.name
        if before.is_dir() and not kept.exists():
            shutil.copytree(before, kept)
        for name in names:
            changes = dict(ABLATIONS[name])
            if name == "ptpr" and steps_in_words is not None:
                changes["post_rank"] = {**run.train_settings().post_rank, "max_steps": steps_in_words}
            folder = output / f"seed_{seed}" / name
            made.setdefault(name, []).append(post_rank.trained(run, data, seed, folder, name, changes, kept))
    return made


def cost(
    folder: Path, run: Any, data: post_rank.Data, changes: dict[str, Any], count: int
) -> tuple[float, list[float]]:
    """(mean prompt tokens, median milliseconds by each method) of requests answered one at a time by a saved model."""
    settings = {**run.training, **changes}
    training = build(type(run.train_settings()), settings, "training")
    table = table_for(training, data.source.table, data.train)
    requests = [request_of(table, int(row), training.max_history) for row in data.test[:count]]
    ranker, tokens, medians = PostRanker.from_pretrained(folder), [], []
    ranker.batch_size = 1
    for method in run.methods:
        ranker.rank(requests[:1], method)
        spent = []
        for one in requests:
            begin = time.perf_counter()
            ranker.rank([one], method)
            spent.append(1000 * (time.perf_counter() - begin))
            tokens.append(ranker.counts.prompt_tokens)
        medians.append(statistics.median(spent))
    return statistics.fmean(tokens), medians


def cost_table(costs: dict[str, tuple[float, list[float]]], methods: list[str]) -> str:
    """The costs as people read them."""
    head = ["variant", "prompt tokens", *[f"ms ({method})" for method in methods]]
    lines = ["", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, (tokens, times) in costs.items():
        lines.append(f"| {name} | {tokens:.1f} | " + " | ".join(f"{t:.1f}" for t in times) + " |")
    return "\n".join([*lines, "", "One request at a time, first seed; latency is the median of a request.", ""])


def compared(run: Any, options: argparse.Namespace, output: Path) -> tuple[dict[str, Any], str]:
    """(record, table) of the run, its rivals and its ablations."""
    data = post_rank.load_data(run)
    homes = {seed: Path(run.output_dir) / f"seed_{seed}" / post_rank.MAIN for seed in run.seeds}
    own = [read_json(home / post_rank.RESULT_FILE) for home in homes.values()]
    rivals = rivals_of(options.rivals, json.loads(options.reranker), run, data)
    ablations = ablations_of(options.ablations, options.steps_in_words, run, data, output)
    orders = {post_rank.INITIAL: [post_rank.incoming(data)] * len(own), **rivals, **post_rank.orders_of(own)}
    for found in ablations.values():
        orders |= post_rank.orders_of(found)
    record, table, _ = post_rank.compare(run, data, orders, [post_rank.INITIAL, *rivals])
    first = run.seeds[0]
    models = {post_rank.MAIN: homes[first], **{name: output / f"seed_{first}" / name for name in ablations}}
    costs = {
        name: cost(folder / "model", run, data, ABLATIONS.get(name, {}), options.cost_requests)
        for name, folder in models.items()
    }
    record["told"] = {name: [one["told"] for one in found] for name, found in ablations.items()}
    return record, table + "\n" + cost_table(costs, run.methods)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder that llm4pr.post-rank wrote; default: a small run of its own")
    parser.add_argument(
        "--output", type=Path, help="folder of the ablations and the table; default: one that is removed"
    )
    parser.add_argument("--rivals", nargs="*", default=list(RERANKERS), choices=list(RERANKERS))
    parser.add_argument("--ablations", nargs="*", default=list(ABLATIONS), choices=list(ABLATIONS))
    parser.add_argument("--reranker", default="{}", help="options of RerankerConfig as JSON, the seed excepted")
    parser.add_argument("--steps_in_words", type=int, help="steps of ptpr, each of which costs many times as much")
    parser.add_argument("--cost_requests", type=int, default=32, help="requests answered one at a time")
    parser.add_argument("--readme", nargs="*", default=[], help="README files whose table is replaced")
    parser.add_argument("--quick", action="store_true", help="two rivals and one ablation")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(argv)
    for readme in options.readme:
        check_readme(readme)
    if options.quick:
        options.rivals, options.ablations = ["mlp", "dlcm"], ["no_qia"]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or Path(scratch) / "rivals"
        folder = options.run or Path(scratch) / "run"
        if options.run is None:
            post_rank.main(build(post_rank.Arguments, {**SMALL, "output_dir": str(folder)}, "the small run"))
        config = {**read_json(folder / "run.json")["config"], "output_dir": str(folder)}
        record, table = compared(build(post_rank.Arguments, config, str(folder)), options, output)
        (output / "table.md").parent.mkdir(parents=True, exist_ok=True)
        (output / "table.md").write_text(table, "utf-8")
        write_json(output / "metrics.json", record)
    for readme in options.readme:
        replace_table(readme, table)
    print(table)
    if options.json:
        machine = {"processor": platform.machine(), "threads": 1, "torch": torch.__version__}
        primary = record["primary"]
        rows = [{"name": s["name"], "ndcg_list": s["metrics"][primary]["value"]} for s in record["systems"]]
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", "utf-8")
    return record


if __name__ == "__main__":
    main()

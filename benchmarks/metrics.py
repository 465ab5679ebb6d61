"""Speed of metrics, bootstrap and baselines against plain ways to get the same numbers.

    python benchmarks/metrics.py [--quick] [--json FILE]

Every pair runs in this one process, on the same input, alternating; outputs are compared before anything is timed.
Baselines: a loop over requests with Python sets (what most evaluation scripts do), scikit-learn's `ndcg_score` on
dense scores, `scipy.stats.bootstrap`, a loop that resamples users, `bm25s` searching query by query, and dense numpy
for item-kNN. Bootstraps draw different numbers, so there `equal` means bounds within 5 % of the interval's width.
Lists of BM25 and item-kNN are equal when the scores at each rank are: the baselines break ties otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pyarrow as pa
import scipy.stats
from sklearn.metrics import ndcg_score

from sidtune.data_builders.tables.schema import table_from_columns
from sidtune.metrics.baselines.base import BaselineRequests
from sidtune.metrics.baselines.bm25 import BM25, tokenise
from sidtune.metrics.baselines.item_knn import ItemKNN
from sidtune.metrics.ranking import Relevance, evaluate_ranking
from sidtune.metrics.statistics.bootstrap import bootstrap_interval

K = 20
ROUNDS = 3
LETTERS = list("bcdfghjklmnpqrstvwz")


def best_times(ours: Callable[[], Any], baseline: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the fastest of `ROUNDS` alternating runs of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for which, call in enumerate((ours, baseline)):
            start = time.perf_counter()
            call()
            times[which].append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


def compare(name: str, baseline_name: str, ours: Callable, baseline: Callable, equal: Callable) -> dict[str, Any]:
    """One row: `equal(ours(), baseline())` is checked first, then both are timed."""
    same = bool(equal(ours(), baseline()))
    mine, theirs = best_times(ours, baseline)
    row = {"name": name, "baseline": baseline_name, "ours_s": round(mine, 4), "baseline_s": round(theirs, 4)}
    row |= {"ratio": round(theirs / mine, 2), "equal": same}
    print(
        f"{name:42} {mine:9.4f} s   {baseline_name:34} {theirs:9.4f} s   x{theirs / mine:7.1f}   equal {same}",
        flush=True,
    )
    return row


def loop_metrics(predictions: list[list[int]], relevant: list[list[int]], ks: tuple[int, ...]) -> dict[str, float]:
    """All six metrics, one request at a time."""
    sums: dict[str, float] = {}
    for row, items in zip(predictions, relevant, strict=True):
        wanted = set(items)
        for k in ks:
            hits, gain, precisions, first = 0, 0.0, 0.0, 0.0
            for rank, item in enumerate(row[:k], 1):
                if item in wanted:
                    hits += 1
                    gain += 1 / math.log2(rank + 1)
                    precisions += hits / rank
                    first = first or 1 / rank
            most = min(k, len(wanted))
            ideal = sum(1 / math.log2(rank + 1) for rank in range(1, most + 1))
            values = {"hr": float(hits > 0), "recall": hits / len(wanted), "precision": hits / k}
            values |= {"ndcg": gain / ideal, "mrr": first, "map": precisions / most}
            for name, value in values.items():
                sums[f"{name}@{k}"] = sums.get(f"{name}@{k}", 0.0) + value
    return {name: value / len(predictions) for name, value in sums.items()}


def ranking_rows(requests: int, dense_requests: int) -> list[dict[str, Any]]:
    """Metrics against the loop and against scikit-learn."""
    draw = np.random.default_rng(0)
    items = 5000
    predictions = np.stack([draw.choice(items, K, replace=False) for _ in range(2000)])[
        draw.integers(0, 2000, requests)
    ]
    relevant = [
        list(dict.fromkeys(draw.integers(0, items, 3).tolist())) + [int(row[draw.integers(K)])] for row in predictions
    ]
    relevant = [list(dict.fromkeys(one)) for one in relevant]
    relevance, rows, ks = Relevance.from_lists(relevant), predictions.tolist(), (5, 10, 20)
    first = compare(
        f"6 metrics at 3 cut-offs, {requests:,} requests",
        "Python loop over requests",
        lambda: evaluate_ranking(predictions, relevance, ks).means(),
        lambda: loop_metrics(rows, relevant, ks),
        lambda a, b: all(abs(a[name] - b[name]) < 1e-9 for name in b),
    )
    catalogue = 1000
    scores = draw.random((dense_requests, catalogue))
    truth = (draw.random(scores.shape) < 0.003).astype(float)
    truth[:, 0] = 1.0
    wanted = Relevance.from_lists([np.flatnonzero(row).tolist() for row in truth])
    second = compare(
        f"NDCG@10 from scores, {dense_requests:,} requests",
        "sklearn ndcg_score",
        lambda: evaluate_ranking(np.argsort(-scores, axis=1)[:, :10], wanted, (10,), ("ndcg",)).means()["ndcg@10"],
        lambda: ndcg_score(truth, scores, k=10),
        lambda a, b: abs(a - b) < 1e-9,
    )
    return [first, second]


def bootstrap_rows(requests: int) -> list[dict[str, Any]]:
    """Intervals of a metric with few values, by request and by user."""
    draw = np.random.default_rng(1)
    values = np.append(1 / np.log2(np.arange(2, 12)), 0.0)[np.minimum(draw.geometric(0.15, requests) - 1, 10)]
    users = draw.integers(0, requests // 8, requests)

    def close(ours: Any, bounds: tuple[float, float]) -> bool:
        limit = 0.05 * (bounds[1] - bounds[0])
        return abs(ours.low - bounds[0]) < limit and abs(ours.high - bounds[1]) < limit

    def scipy_interval() -> tuple[float, float]:
        found = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2), batch=200
        )
        return found.confidence_interval.low, found.confidence_interval.high

    def user_loop() -> tuple[float, float]:
        order = np.argsort(users, kind="stable")
        groups = np.split(values[order], np.flatnonzero(np.diff(users[order])) + 1)
        generator, means = np.random.default_rng(3), []
        for _ in range(400):
            chosen = generator.integers(0, len(groups), len(groups))
            means.append(np.concatenate([groups[n] for n in chosen]).mean())
        return tuple(np.quantile(means, [0.025, 0.975]))

    def wide(ours: Any, bounds: tuple[float, float]) -> bool:
        # 400 resamples leave the quantiles themselves uncertain by about a tenth of the width.
        limit = 0.15 * (bounds[1] - bounds[0])
        return abs(ours.low - bounds[0]) < limit and abs(ours.high - bounds[1]) < limit

    return [
        compare(
            f"bootstrap, 4000 x {requests:,} requests",
            "scipy.stats.bootstrap, vectorised",
            lambda: bootstrap_interval(values, samples=4000),
            scipy_interval,
            close,
        ),
        compare(
            f"bootstrap by user, 400 x {requests:,} requests",
            "Python loop over users",
            lambda: bootstrap_interval(values, samples=400, clusters=users),
            user_loop,
            wide,
        ),
    ]


def shop(items: int, users: int, events: int, requests: int) -> tuple[pa.Table, pa.Table, BaselineRequests]:
    """Items with titles of made-up words, events by popularity, and requests with a query and a history."""
    draw = np.random.default_rng(4)
    words = np.array(["".join(draw.choice(LETTERS, 5)) for _ in range(3000)])
    share = 1 / np.arange(1, 3001)
    titles = [" ".join(words[draw.choice(3000, 12, p=share / share.sum())]) for _ in range(items)]
    ids = [f"i{n:06d}" for n in range(items)]
    table = table_from_columns("items", {"item_id": ids, "title": titles}, items)
    weight = 1 / np.arange(1, items + 1) ** 0.8
    clicked = draw.choice(items, events, p=weight / weight.sum())
    columns = {"user_id": [f"u{n}" for n in draw.integers(0, users, events)], "item_id": [ids[n] for n in clicked]}
    log = table_from_columns("events", {**columns, "time": np.arange(events)}, events)
    queries = [" ".join(words[draw.choice(3000, 3, p=share / share.sum())]) for _ in range(requests)]
    history = Relevance(np.arange(requests + 1) * 10, draw.choice(items, requests * 10, p=weight / weight.sum()))
    return table, log, BaselineRequests(queries, history)


def baseline_rows(items: int, users: int, events: int, requests: int) -> list[dict[str, Any]]:
    """BM25 against the library's search, item-kNN against dense numpy; both rank only, the models are fitted before."""
    table, log, asked = shop(items, users, events, requests)
    model = BM25(fields=["title"], exclude_seen=False).fit(table, log)
    library = bm25s.BM25(method="lucene", dtype="float64")
    library.index([tokenise(title) for title in table["title"].to_pylist()], show_progress=False)
    tokens = [tokenise(query) for query in asked.queries]
    check = range(0, requests, max(1, requests // 50))

    def search() -> np.ndarray:
        return library.retrieve(tokens, k=K, show_progress=False)[0]

    def same_text(ours: np.ndarray, theirs: np.ndarray) -> bool:
        scores = [(library.get_scores(tokens[n]), n) for n in check]
        return all(np.allclose(one[ours[n]], one[theirs[n]], atol=1e-9) for one, n in scores)

    knn = ItemKNN(neighbours=None, exclude_seen=False).fit(table, log)
    dense = knn.similarity.toarray()
    history = asked.history.rows.reshape(requests, -1)

    def dense_search() -> np.ndarray:
        seen = np.zeros((requests, items))
        seen[np.arange(requests)[:, None], history] = 1.0
        scores = -(seen @ dense)
        best = np.argpartition(scores, K - 1, axis=1)[:, :K]
        return np.take_along_axis(best, np.argsort(np.take_along_axis(scores, best, axis=1), axis=1), axis=1)

    def same_neighbours(ours: np.ndarray, theirs: np.ndarray) -> bool:
        scores = [(dense[np.unique(history[n])].sum(axis=0), n) for n in check]
        return all(np.allclose(one[ours[n]], one[theirs[n]], atol=1e-9) for one, n in scores)

    return [
        compare(
            f"BM25 top {K}, {requests:,} queries x {items:,} items",
            "bm25s retrieve",
            lambda: model.rank(asked, K),
            search,
            same_text,
        ),
        compare(
            f"item-kNN top {K}, {requests:,} x {items:,} items",
            "dense numpy",
            lambda: knn.rank(asked, K),
            dense_search,
            same_neighbours,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, about half a minute")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    arguments = parser.parse_args()
    if arguments.quick:
        rows = ranking_rows(20_000, 1000) + bootstrap_rows(8000) + baseline_rows(2000, 1000, 20_000, 1000)
    else:
        rows = ranking_rows(200_000, 5000) + bootstrap_rows(40_000) + baseline_rows(10_000, 10_000, 200_000, 4000)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "numpy": np.__version__,
    }
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()

"""Names of metrics and baselines, as YAML files write them.

A metric is a function `(ranked: Ranked, k: int) -> (R,) float64` (see `metrics/ranking.py`); a baseline is a class with
`fit(items, events, requests=None) -> self` and `rank(requests, k) -> (R, k) item rows` (see `metrics/baselines/base.py`).
"""

from __future__ import annotations

from sidtune.core.registry import Registry

METRICS = Registry(
    "metric",
    {
        "hr": "sidtune.metrics.ranking:hr",
        "recall": "sidtune.metrics.ranking:recall",
        "precision": "sidtune.metrics.ranking:precision",
        "ndcg": "sidtune.metrics.ranking:ndcg",
        "mrr": "sidtune.metrics.ranking:mrr",
        "map": "sidtune.metrics.ranking:average_precision",
    },
)

BASELINES = Registry(
    "baseline",
    {
        "popularity": "sidtune.metrics.baselines.base:Popularity",
        "bm25": "sidtune.metrics.baselines.bm25:BM25",
        "item_knn": "sidtune.metrics.baselines.item_knn:ItemKNN",
    },
)

"""What can an adapter see? Query-instructed adapter and MLP with one linear layer behind them, for three query vectors.

    python benchmarks/post_rank_adapter.py [--quick] [--json FILE] [--movielens FOLDER]

No language model: the soft token of a candidate goes into one linear layer, trained with the Plackett-Luce loss on the lists of
recipes/llm4pr/shop.yaml, or movielens.yaml. The NDCG of whole lists on validation requests says what the adapter itself can use of
the query, the user and the history; what a language model adds must come on top. Not a benchmark of speed.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sidtune.core.config import load_yaml
from sidtune.data_builders.post_ranking.personal_queries import personal_queries
from sidtune.data_builders.post_ranking.schema import PostRankBatch, PostRankTable
from sidtune.data_builders.post_ranking.sources import load_source
from sidtune.metrics.list_ranking import ListMetrics, evaluate_lists
from sidtune.models.post_ranking.adapter import build_adapter
from sidtune.trainers.post_ranking.data import field_specs

CONFIGS = Path(__file__).parents[1] / "recipes" / "llm4pr"
QUERIES = ("query", "query and user", "query, user and history")


class Scorer(torch.nn.Module):
    """One number for each candidate: adapter, then a linear layer."""

    def __init__(self, kind: str, table: PostRankTable, rows: np.ndarray, width: int = 64) -> None:
        super().__init__()
        self.specs = [spec for spec in field_specs(table, rows) if spec.side == "item"]
        self.adapter = build_adapter(kind, self.specs, table.d_q, width, width)
        self.head = torch.nn.Linear(width, 1)

    def forward(self, batch: PostRankBatch) -> torch.Tensor:
        """(B, n) scores, very low at pads."""
        mask = torch.from_numpy(batch.item_mask)
        query = torch.from_numpy(batch.query)[:, None].expand(-1, mask.shape[1], -1)[mask]
        fields = {}
        for spec in self.specs:
            present = torch.from_numpy(batch.item_present[spec.name])[..., None]
            fields[spec.name] = torch.from_numpy(batch.item_fields[spec.name]).masked_fill(~present, torch.nan)[mask]
        return torch.full(mask.shape, -1e9).masked_scatter(mask, self.head(self.adapter(query, fields))[:, 0])


def list_loss(scores: torch.Tensor, batch: PostRankBatch) -> torch.Tensor:
    """Plackett-Luce: each place of the best list against what is left; mean over candidates."""
    relevance = torch.from_numpy(np.where(batch.item_mask, np.nan_to_num(batch.relevance), -1.0))
    order = relevance.argsort(dim=1, descending=True)
    sorted_scores, real = scores.gather(1, order), torch.from_numpy(batch.item_mask).gather(1, order)
    left = sorted_scores.flip(1).logcumsumexp(1).flip(1)
    return ((left - sorted_scores) * real).sum() / real.sum()


def ndcg(scorer: Scorer, table: PostRankTable, rows: np.ndarray, gain: str) -> float:
    """NDCG of the requests in order of their scores, over whole lists."""
    batch = table.batch(rows, 0)
    with torch.no_grad():
        order = scorer(batch).argsort(dim=1, descending=True).numpy()
    settings = ListMetrics(ks=(order.shape[1],), metrics=("ndcg",), relevance="rating", gain=gain)
    found = evaluate_lists(order, batch.relevance, batch.item_mask, settings)
    return float(found.per_request[f"ndcg@{order.shape[1]}"].mean())


def fit(kind: str, table: PostRankTable, epochs: int, seed: int, gain: str) -> float:
    """NDCG on validation after the last epoch."""
    train, valid = table.rows_of("train"), table.rows_of("valid")
    torch.manual_seed(seed)
    scorer, random = Scorer(kind, table, train), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=3e-3)
    for _ in range(epochs):
        rows = random.permutation(train)
        for start in range(0, len(rows), 32):
            batch = table.batch(rows[start : start + 32], 0)
            optimizer.zero_grad()
            list_loss(scorer(batch), batch).backward()
            optimizer.step()
    return ndcg(scorer, table, valid, gain)


def tables(source: dict) -> dict[str, PostRankTable]:
    """The requests with each query vector."""
    whole = load_source(source, Path()).table
    rows = whole.rows_of("train")
    return dict(zip(QUERIES, (whole, personal_queries(whole, rows, 0), personal_queries(whole, rows)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, 1,500 requests")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--movielens", metavar="FOLDER", help="ml-100k or ml-1m instead of simulated sessions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config: dict[str, Any] = load_yaml(CONFIGS / ("shop.yaml" if arguments.movielens is None else "movielens.yaml"))
    source, gain = config["source"], config["metrics"]["gain"]
    epochs = 6 if arguments.movielens is None else 3
    if arguments.movielens is not None:
        source["path"] = arguments.movielens
    seeds = (0,) if arguments.quick else (0, 1, 2)
    if arguments.quick and arguments.movielens is None:
        source["count"] = 1500
    rows = []
    for name, table in tables(source).items():
        for kind in ("qia", "mlp_query"):
            started = time.perf_counter()
            found = [fit(kind, table, epochs, seed, gain) for seed in seeds]
            seconds = time.perf_counter() - started
            spread = float(np.std(found, ddof=1)) if len(found) > 1 else None
            row = {"name": f"{kind}, {name}", "ndcg_list": round(float(np.mean(found)), 4), "seeds": len(found)}
            rows.append({**row, "spread": spread, "values": found, "seconds": seconds})
            shown = "" if spread is None else f" ± {spread:.4f}"
            print(f"{kind:10s} {name:25s} NDCG {np.mean(found):.4f}{shown}  ({seconds:.0f} s)")
    if arguments.json:
        machine = {"processor": platform.machine(), "threads": 1, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""Does the post-ranker learn, and does the query matter? A toy with a known answer, and what an answer costs.

    python benchmarks/post_rank.py --steps 800 --output post_rank.json

Five items carry three scalars, each along an own random direction of a vector field; the query vector says which of two scalars
to sort by, and no text does, so a query-blind adapter can at best sort by a mixture. Wanted (LLM4PR, arXiv 2411.01178, has no such
figure): the query-instructed adapter beats the query-blind MLP by more than 0.02 NDCG. Small Llama trained whole, main task.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sidtune.data_builders.post_ranking.schema import PostRankField, PostRankRequest, PostRankTable
from sidtune.data_builders.post_ranking.text import request_of, table_from_requests
from sidtune.metrics.list_ranking import ListMetrics, evaluate_lists, random_anchor
from sidtune.models.post_ranking.model import PostRankForCausalLM
from sidtune.models.post_ranking.processor import PostRankProcessor, build_config
from sidtune.models.post_ranking.ranker import PostRanker
from sidtune.tokenizers.base_models.from_scratch import build_model, train_lm_tokenizer
from sidtune.trainers.post_ranking.data import field_specs
from sidtune.trainers.post_ranking.trainer import learn_to_post_rank, paper_arguments

ITEMS, WIDTH, D_Q = 5, 6, 4
METRICS = ListMetrics((ITEMS,), ("ndcg",), relevance="target_rank", gain="linear")


def toy(count: int, seed: int) -> PostRankTable:
    """Requests whose relevance is the place by one of two scalars; the third is noise."""
    directions = np.random.default_rng(7).normal(size=(3, WIDTH))
    queries = np.random.default_rng(8).normal(size=(2, D_Q))
    random = np.random.default_rng(seed)
    requests = []
    for number in range(count):
        scalars, asked = random.normal(size=(3, ITEMS)), int(random.integers(2))
        places = np.argsort(np.argsort(scalars[asked])).astype(np.float32)
        items = [{f"x{k}": scalars[k, n] * directions[k] for k in range(3)} for n in range(ITEMS)]
        ids = [f"{number}:{n}" for n in range(ITEMS)]
        requests.append(PostRankRequest(str(number), None, queries[asked], {}, items, ids, places))
    fields = [PostRankField(f"x{k}", "text_vector", "item", WIDTH) for k in range(3)]
    return table_from_requests(requests, fields, D_Q, ["train"] * count)


def train(adapter: str, table: PostRankTable, steps: int, batch: int, seed: int) -> PostRanker:
    """A model of that adapter, trained on the table."""
    tokenizer = train_lm_tokenizer([" A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"] * 50, vocab_size=300)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    language_model = build_model({"model_type": "llama", **size}, tokenizer, seed=seed)
    fields = field_specs(table, np.arange(len(table)))
    config = build_config(language_model, tokenizer, fields, D_Q, d_h=64, adapter=adapter)
    torch.manual_seed(seed)
    model = PostRankForCausalLM.from_base(language_model, config)
    processor = PostRankProcessor(tokenizer, config)
    options = {"learning_rate": 2e-3, "max_steps": steps, "per_device_train_batch_size": batch, "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        args = paper_arguments(scratch, save_strategy="no", disable_tqdm=True, **options)
        learn_to_post_rank(model, processor, table, np.arange(len(table)), args, aux=False, shuffle=0.0, resume=False)
    return PostRanker(model, processor, batch_size=256)


def score(ranker: PostRanker, table: PostRankTable, method: str) -> dict[str, float]:
    """Mean NDCG, rate of valid answers, and milliseconds of one request alone (median of 20)."""
    requests = [request_of(table, row) for row in range(len(table))]
    order = np.stack(ranker.rank(requests, method))
    found = evaluate_lists(order, table.relevance.reshape(-1, ITEMS), settings=METRICS)
    valid = ranker.counts.valid_rate
    spent = []
    for one in requests[:20]:
        begin = time.perf_counter()
        ranker.rank([one], method)
        spent.append(1000 * (time.perf_counter() - begin))
    return {"ndcg": found.means()[f"ndcg@{ITEMS}"], "valid": valid, "milliseconds": statistics.median(spent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--adapters", nargs="+", default=["qia", "mlp", "mlp_query"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    table, test = toy(20_000, 1), toy(500, 2)
    anchor = random_anchor(test.relevance.reshape(-1, ITEMS), settings=METRICS).means()[f"ndcg@{ITEMS}"]
    found: dict[str, Any] = {"steps": options.steps, "batch": options.batch, "random order": anchor}
    for adapter in options.adapters:
        begin = time.time()
        ranker = train(adapter, table, options.steps, options.batch, options.seed)
        found[adapter] = {"seconds": round(time.time() - begin, 1)}
        for method in ("greedy", "single_forward", "unconstrained"):
            found[adapter][method] = score(ranker, test, method)
        print(adapter, json.dumps(found[adapter]), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

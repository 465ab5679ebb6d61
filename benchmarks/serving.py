"""Serving under concurrent load: the micro-batching server against the same server with one request at a time.

    python benchmarks/serving.py [--quick] [--json FILE]

Both servers run in this process over the same retriever, on real HTTP connections, and answer the same requests from the
same number of client threads; rounds alternate. Before anything is timed, every answer of both is compared with
`SidRetriever.search` of the same request. The model is a randomly initialised Qwen3 (4 layers, width 256) with a tokenizer
trained on the catalogue's titles; requests have a query and, two of three, a history.

`equal`: the same items, scores to 1e-5; items whose scores are that close may trade places. The row with one client
shows what batching costs when there is nothing to batch.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn

from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.decoding.retrieval.retriever import Hit, SidRetriever
from sidtune.decoding.retrieval.search_request import parse_request
from sidtune.decoding.serving.http_app import SearchService, ServingOptions, server_config
from sidtune.tokenizers.base_models.from_scratch import build_model, train_lm_tokenizer
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import extend_vocabulary

TOLERANCE, CODES, DEPTH = 1e-5, 64, 3
MODEL = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """One size of the job: catalogue items, beams, client threads, requests."""

    items: int
    beams: int
    clients: int
    requests: int

    @property
    def name(self) -> str:
        return f"items {self.items}, beams {self.beams}, clients {self.clients}, requests {self.requests}"


QUICK = [Case(10_000, 10, 1, 24), Case(10_000, 10, 16, 96), Case(10_000, 50, 16, 48)]
FULL = [Case(10_000, b, c, 256) for b in (10, 50) for c in (1, 4, 16, 64)]


def make_retriever(items: int) -> SidRetriever:
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(500)]
    titles = [" ".join(draw.choice(words, 4)) for _ in range(items)]
    tokenizer = train_lm_tokenizer(titles[:2000], 1000)
    model = build_model(dict(MODEL), tokenizer, seed=0).eval()
    codes = draw.integers(0, CODES, (items, DEPTH))
    sids = SemanticIds([f"item{n}" for n in range(items)], codes, (CODES,) * DEPTH)
    vocabulary = extend_vocabulary(model, tokenizer, sids, init="mean")
    torch.manual_seed(0)
    with torch.no_grad():  # the same start for every code would give every item the same score
        model.get_input_embeddings().weight[vocabulary.start : vocabulary.stop].normal_(std=0.1)
    return SidRetriever(
        model, tokenizer, vocabulary, sids, Serializer(tokenizer), titles=dict(zip(sids.item_ids, titles, strict=True))
    )


def make_bodies(retriever: SidRetriever, case: Case) -> list[dict[str, Any]]:
    draw = np.random.default_rng(1)
    ids, made = retriever.sids.item_ids, []
    for n in range(case.requests):
        title = retriever.titles[ids[int(draw.integers(len(ids)))]] or ""
        past = [ids[int(row)] for row in draw.integers(0, len(ids), n % 3 * 5)]
        made.append({"query": title, "history": past, "k": 10, "num_beams": case.beams})
    return made


class Served:
    """A server thread and the clients that ask it."""

    def __init__(self, retriever: SidRetriever, max_batch: int) -> None:
        options = ServingOptions(max_batch=max_batch, max_wait_ms=4.0 if max_batch > 1 else 0.0, max_queue=1000)
        service = SearchService(lambda: retriever, options)
        self.server = uvicorn.Server(server_config(service, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not (self.server.started and service.ready):
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def ask(self, bodies: list[dict[str, Any]], clients: int) -> tuple[list[dict[str, Any]], list[float], float]:
        """Answers, seconds of each request, and seconds until the last answer."""
        answers: list[Any] = [None] * len(bodies)
        seconds = [0.0] * len(bodies)

        def work(client: int) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port)
            for place in range(client, len(bodies), clients):
                begin = time.perf_counter()
                connection.request("POST", "/search", json.dumps(bodies[place]))
                answers[place] = json.loads(connection.getresponse().read())
                seconds[place] = time.perf_counter() - begin
            connection.close()

        threads = [threading.Thread(target=work, args=(client,)) for client in range(clients)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers, seconds, time.perf_counter() - begin

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def is_equal(answer: dict[str, Any], hits: list[Hit]) -> bool:
    """See `equal` in the module's docstring."""
    found = answer.get("hits", [])
    score = {hit.item_id: hit.score for hit in hits}
    last = hits[-1].score if hits else 0.0
    return len(found) == len(hits) and all(
        abs(one["score"] - hit.score) <= TOLERANCE and abs(score.get(one["item_id"], last) - hit.score) <= TOLERANCE
        for one, hit in zip(found, hits, strict=True)
    )


def measure(case: Case, retriever: SidRetriever, servers: dict[str, Served], rounds: int) -> dict[str, Any]:
    bodies = make_bodies(retriever, case)
    expected = [retriever.search_batch([parse_request(body)])[0] for body in bodies]
    first = {name: server.ask(bodies, case.clients)[0] for name, server in servers.items()}
    equal = all(is_equal(a, hits) for answers in first.values() for a, hits in zip(answers, expected, strict=True))
    walls: dict[str, list[float]] = {name: [] for name in servers}
    waits: dict[str, list[float]] = {name: [] for name in servers}
    batches: list[int] = []
    for _ in range(rounds):
        for name, server in servers.items():
            answers, seconds, wall = server.ask(bodies, case.clients)
            walls[name].append(wall)
            waits[name] += seconds
            batches += [answer["batch"] for answer in answers] if name == "batched" else []
    ours, baseline = statistics.median(walls["batched"]), statistics.median(walls["single"])
    latency = {
        f"{name}_p{p}_ms": round(1000 * float(np.percentile(waits[name], p)), 2) for name in servers for p in (50, 95)
    }
    return {
        "name": case.name,
        "baseline": "one request at a time (max_batch 1)",
        "ours_s": round(ours, 5),
        "baseline_s": round(baseline, 5),
        "ratio": round(baseline / ours, 2),
        "equal": equal,
        "requests_per_s": round(case.requests / ours, 1),
        "requests_in_a_batch": round(statistics.mean(batches), 1),
        **latency,
        "rounds": rounds,
    }


def machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, well under 5 minutes on 2 cores")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(argv)
    rows = []
    retriever = make_retriever(10_000)
    for case in QUICK if options.quick else FULL:
        # One retriever is not thread-safe; the two servers take turns and never run at the same time.
        servers = {"batched": Served(retriever, 16), "single": Served(retriever, 1)}
        rows.append(row := measure(case, retriever, servers, rounds=2 if options.quick else 5))
        for server in servers.values():
            server.stop()
        print(
            f"{row['name']}: {row['ratio']:.2f}x against {row['baseline']}, {row['requests_in_a_batch']} in a batch, "
            f"p95 {row['batched_p95_ms']:.0f} ms against {row['single_p95_ms']:.0f} ms, equal: {row['equal']}",
            flush=True,
        )
    result = {"machine": machine(), "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()

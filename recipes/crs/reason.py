"""Evaluates a model that reasons before it searches; on the train split it also finds the hard requests for GRPO.

    sidtune crs.reason --data_dir runs/crs/data --sids_dir runs/crs/sids --model_dir runs/crs/evolve \\
        --output_dir runs/crs/reason_test --split test

One greedy reasoning per request, then the beam search of evaluation. The output holds `metrics.json`, `per_request.parquet` (for
paired tests), `answers.parquet` (the rank of the strongest positive and the reasoning) and, with `hard_k`, `hard_set.parquet`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidtune.core.config import SEEDS, as_dict, check_range, command
from sidtune.core.errors import ConfigError
from sidtune.core.folders import write_folder, write_json, write_run, writes
from sidtune.core.pipeline import Step
from sidtune.core.ragged import drawn, gathered, own_rows
from sidtune.metrics.baselines.relevance import LABELS, check_labels, relevance_of
from sidtune.metrics.ranking import RankingResult, check_metrics, evaluate_ranking


@dataclass
class Arguments:
    """Options of reason.

    Attributes:
        data_dir, sids_dir, model_dir: folders of the earlier steps; `model_dir` is a model folder or a folder that names one.
        output_dir: folder to write.
        split: `valid`, `test` or `train`.
        reasoning: false searches right behind the prompt, as `evaluate` does, for comparison.
        max_reasoning_tokens: longest reasoning, in tokens.
        num_beams: beams per request.
        ks, metrics: metrics to compute. primary: the one that is printed.
        labels: feedback that makes an item relevant when it is 1.
        hard_k: write the requests whose strongest positive is not among the first `hard_k` places; null writes none.
        max_requests: a random part of the requests; null for all.
        batch_size: prompts decoded together.
        seed: of the random part.
    """

    data_dir: str
    sids_dir: str
    model_dir: str
    output_dir: str
    split: str = "valid"
    reasoning: bool = True
    max_reasoning_tokens: int = 48
    num_beams: int = 10
    ks: list[int] = field(default_factory=lambda: [1, 5, 10])
    metrics: list[str] = field(default_factory=lambda: ["hr", "ndcg"])
    primary: str = "ndcg@10"
    labels: list[str] = field(default_factory=lambda: list(LABELS))
    hard_k: int | None = None
    max_requests: int | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("train", "valid", "test"):
            raise ConfigError(f"split must be train, valid or test, got '{self.split}'.")
        check_metrics(self.ks, self.metrics, self.primary)
        check_labels(self.labels)
        check_range(self, 1, "num_beams", "max_requests", "batch_size", "max_reasoning_tokens", "hard_k")
        check_range(self, 0, "seed", most=SEEDS)
        if self.num_beams < max(self.ks):
            raise ConfigError(
                f"{self.num_beams} num_beams do not fill the {max(self.ks)} places of ks; raise num_beams."
            )


def preflight(step: Step) -> None:
    """Refuses a split without requests, and lists longer than the catalogue."""
    from sidtune.recipes.preflight import check_data

    check_data(step, step.config.split, max(step.config.ks))


@writes("reason")
def main(arguments: Arguments) -> None:
    """Reasons, searches, measures."""
    import torch
    from accelerate import PartialState

    from sidtune.decoding.retrieval.reasoning_requests import load_requests

    # Several CPU processes form a group only when told that the CPU is meant.
    started, state = time.time(), PartialState(cpu=not torch.accelerator.is_available())
    found = load_requests(
        arguments.data_dir,
        arguments.sids_dir,
        arguments.model_dir,
        arguments.split,
        arguments.seed,
        num_beams=arguments.num_beams,
        max_reasoning_tokens=arguments.max_reasoning_tokens,
        batch_size=arguments.batch_size,
    )
    if arguments.reasoning:
        _ = found.reasoner.marks  # a tokenizer without them is refused before the work starts
    found = found.take(drawn(len(found.item), arguments.max_requests, arguments.seed))
    found.reasoner.retriever.model.to(state.device)
    mine = own_rows(len(found.item), state.process_index, state.num_processes)
    answers = gathered(mine, *_answers(arguments, found, mine, state.is_main_process))
    if state.is_main_process:
        _write(arguments, found, *answers, started)


def _answers(arguments: Arguments, found: Any, rows: np.ndarray, show: bool) -> tuple[Any, ...]:
    """Leaves, scores (n, K), whether the model ended its reasoning (n,), and the n reasonings."""
    from tqdm.auto import tqdm

    from sidtune.data_builders.tasks.reasoning import THINK

    reasoner = found.reasoner
    with tqdm(total=len(rows), desc="reasoning", unit="request", disable=None if show else True) as bar:
        pieces = found.pieces(rows)
        if not arguments.reasoning:
            beams = reasoner.retriever.beams(pieces, arguments.num_beams, arguments.batch_size, progress=bar.update)
            return beams.leaves.numpy(), beams.scores.numpy(), np.ones(len(rows), bool), [""] * len(rows)
        answers = reasoner.answer(reasoner.prompts(pieces), progress=bar.update)
    texts = [reasoner.retriever.tokenizer.decode(ids[0][:-1]).removeprefix(THINK) for ids in answers.reasonings]
    return answers.leaves[:, 0], answers.scores[:, 0], answers.closed[:, 0], texts


def _write(
    arguments: Arguments,
    found: Any,
    leaves: np.ndarray,
    scores: np.ndarray,
    closed: np.ndarray,
    texts: list[str],
    started: float,
) -> None:
    import torch

    from sidtune.decoding.items import BeamOutput, rank_items
    from sidtune.decoding.retrieval.reasoner import is_hard, ranks_of

    ranks = ranks_of(leaves, found.leaf)
    beams = BeamOutput(torch.from_numpy(leaves), torch.from_numpy(scores))
    rows, _ = rank_items(beams, found.reasoner.retriever.leaves, max(arguments.ks))
    relevance = relevance_of(found.requests, found.data.items, arguments.labels)
    result: RankingResult = evaluate_ranking(rows, relevance, arguments.ks, arguments.metrics)
    means = {name: float(values.mean()) for name, values in result.per_request.items()}
    hard = is_hard(ranks, arguments.hard_k or 1)
    metrics = {
        **means,
        "requests": len(ranks),
        "target_first": float((ranks == 0).mean()),
        "closed_share": float(closed.mean()),
        **({"hard": int(hard.sum())} if arguments.hard_k else {}),
    }
    with write_folder(arguments.output_dir) as scratch:
        write_json(scratch / "metrics.json", metrics)
        columns = {"request_id": found.requests["request_id"], "user_id": found.requests["user_id"]}
        pq.write_table(pa.table({**columns, **result.per_request}), scratch / "per_request.parquet")
        answers = {"request_id": found.ids, "rank": ranks, "reasoning": texts, "closed": closed}
        pq.write_table(pa.table(answers), scratch / "answers.parquet")
        if arguments.hard_k:
            table = pa.table({"request_id": found.ids, "rank": ranks})
            pq.write_table(table.filter(pa.array(hard)), scratch / "hard_set.parquet")
        write_run(scratch, step="reason", config=as_dict(arguments), metrics=metrics, started=started)
    told = f", {metrics['hard']} of them hard" if arguments.hard_k else ""
    print(
        f"{Path(arguments.output_dir).name}: {len(ranks):,} {arguments.split} requests{told}, {arguments.primary} "
        f"{means[arguments.primary]:.4f}, reasonings ended by the model {closed.mean():.0%}"
    )


if __name__ == "__main__":
    command(main, Arguments)

"""Trains and runs one system of `post_rank`: a variant of LLM4PR from a backbone to orders, and what it costs.

| variant | adapter | feature adaptation | auxiliary task |
|---|---|---|---|
| `llm4pr` | query-instructed | yes | yes |
| `no_qia`, `no_qia_query` | MLP on the fields; on fields and query | yes | yes |
| `no_adaptation` | query-instructed | no | yes |
| `no_aux` | query-instructed | yes | no |
| `query_alone` | query-instructed, by the words of the query alone | yes | yes |
| `ptpr` | none: features as words | – | yes |

The paper's "w/o QIA" is a DNN of unstated shape, so there are two. A backbone built from scratch has no language to adapt to;
let both steps train everything then (`train: all`, `adaptation_trains: all`), which is not the paper's method but its shape.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError
from sidtune.core.folders import RUN_FILE, read_json, write_run
from sidtune.core.resume import Work
from sidtune.data_builders.post_ranking.personal_queries import personal_queries
from sidtune.data_builders.post_ranking.schema import PostRankRequest, PostRankTable
from sidtune.data_builders.post_ranking.text import render_request, request_of


@dataclass(frozen=True)
class Variant:
    """What a variant changes, see the module's table."""

    adapter: str = "qia"
    adaptation: bool = True
    aux: bool = True
    words: bool = False
    personal: bool = True


VARIANTS = {
    "llm4pr": Variant(),
    "no_qia": Variant(adapter="mlp"),
    "no_qia_query": Variant(adapter="mlp_query"),
    "no_adaptation": Variant(adaptation=False),
    "no_aux": Variant(aux=False),
    "query_alone": Variant(personal=False),
    "ptpr": Variant(adaptation=False, words=True),
}


@dataclass(frozen=True)
class Training:
    """How variants are trained.

    Attributes:
        backbone: model folder or hub id; None builds one from `scratch` with a BPE of `vocab_size` tokens.
        scratch: `model_type` and fields of its config. drill: for a backbone from scratch, arguments of
            `trainers.post_ranking.drill` as for the steps below (`max_steps`, ...); empty for none.
        train: `lora` (the paper) or `all`, in the second step. adaptation_trains: `adapters` (the paper) or `all`.
        lora: `r`, `alpha`, `dropout`, `targets` of `add_lora`.
        adaptation, post_rank: arguments of each step over `trainers.post_ranking.trainer.paper_arguments`.
        ptpr: arguments over `post_rank` for the text-only prompt, whose steps cost many times as much.
        adapter_learning_rate: peak rate of the adapters in the second step; None = that of the step.
        query: what the adapters' query vector holds, `request` (as the source gives it) or `personal` (with user and history, see
            `data_builders/post_ranking/personal_queries.py`).
        aux_weight, main_loss, label_sum, shuffle, ties, max_candidates, max_history, d_h: as in the trainer, the processor
            and the model's config.

    Raises:
        ConfigError: a value out of range.
    """

    backbone: str | None = None
    scratch: dict = field(default_factory=lambda: {"model_type": "qwen3"})
    drill: dict = field(default_factory=dict)
    vocab_size: int = 1024
    train: str = "lora"
    adaptation_trains: str = "adapters"
    lora: dict = field(default_factory=dict)
    adaptation: dict = field(default_factory=dict)
    post_rank: dict = field(default_factory=dict)
    ptpr: dict = field(default_factory=dict)
    adapter_learning_rate: float | None = None
    query: str = "request"
    aux_weight: float = 1.0
    main_loss: str = "tokens"
    label_sum: bool = False
    shuffle: float = 0.5
    ties: str = "incoming"
    max_candidates: int = 20
    max_history: int = 10
    d_h: int = 512

    def __post_init__(self) -> None:
        for name, known in (
            ("train", ("lora", "all")),
            ("adaptation_trains", ("adapters", "all")),
            ("ties", ("incoming", "random")),
            ("main_loss", ("tokens", "permutation")),
            ("query", ("request", "personal")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"training.{name} must be one of {', '.join(known)}, got '{getattr(self, name)}'.")
        if self.backbone is None and (self.train != "all" or self.adaptation_trains != "all"):
            raise ConfigError(
                "training: a backbone built from scratch knows nothing, so LoRA and adapters alone cannot train it; set train and "
                "adaptation_trains to all, or name a backbone."
            )
        if self.drill and self.backbone is not None:
            raise ConfigError("training: the drill is for a backbone built from scratch; remove `drill` or `backbone`.")
        unknown = set(self.lora) - {"r", "alpha", "dropout", "targets"}
        if unknown:
            raise ConfigError(f"training.lora knows r, alpha, dropout and targets, got {sorted(unknown)}.")
        check_range(self, 0, "max_history", "adapter_learning_rate")
        check_range(self, 1, "d_h")
        if not 0 <= self.shuffle <= 1 or self.aux_weight < 0 or not 2 <= self.max_candidates <= 26:
            raise ConfigError(
                "training: shuffle lies in [0, 1], aux_weight is not negative, max_candidates is 2 to 26."
            )
        self._check_heavy()

    def _check_heavy(self) -> None:
        """What the libraries say of the arguments of each step, and of a backbone from scratch."""
        from sidtune.tokenizers.base_models.from_scratch import check_model
        from sidtune.trainers.post_ranking.trainer import checked_paper

        both = {**self.post_rank, **self.ptpr}
        for name, values in (("adaptation", self.adaptation), ("post_rank", self.post_rank), ("ptpr", both)):
            checked_paper(values, f"training.{name}")
        if self.drill:
            checked_paper(self.drill, "training.drill")
        if self.backbone is None:
            check_model(self.scratch, self.vocab_size)


@dataclass(frozen=True)
class Cost:
    """What answering one request at a time costs: prompt tokens (mean) and milliseconds (median) for each method."""

    prompt_tokens: float
    milliseconds: dict[str, float]
    valid_rate: float


def start_model(
    training: Training,
    table: PostRankTable,
    rows: np.ndarray,
    adapter: str,
    seed: int,
    kept: Path | None = None,
) -> tuple[Any, Any]:
    """(language model with fresh adapters, tokenizer) before any training on the table; `kept`: see `train_variant`."""
    import torch

    from sidtune.models.post_ranking.model import PostRankForCausalLM
    from sidtune.models.post_ranking.processor import build_config
    from sidtune.tokenizers.base_models.from_scratch import build_model, train_lm_tokenizer
    from sidtune.tokenizers.base_models.loading import load_plain, load_tokenizer
    from sidtune.trainers.post_ranking.data import field_specs
    from sidtune.trainers.post_ranking.drill import drilled, start_on_the_line

    line = None
    if training.backbone is None:
        tokenizer = train_lm_tokenizer(_texts(table, rows), vocab_size=training.vocab_size)
        language_model = build_model(training.scratch, tokenizer, seed=seed)
        if training.drill and kept is None:
            raise ConfigError("training: the drill needs a folder for its checkpoints; give one, or leave `drill` out.")
        if training.drill:
            most = min(training.max_candidates, int(np.diff(table.candidate_offsets)[rows].max()))
            given = (language_model, tokenizer, most)
            told = _kept(language_model, kept / "drill", lambda folder: drilled(*given, folder, seed, **training.drill))
            line = {"direction": told["direction"], "bias": told["bias"]}
    else:
        tokenizer, language_model = load_tokenizer(training.backbone), load_plain(training.backbone)
    options = {name: getattr(training, name) for name in ("d_h", "aux_weight", "main_loss", "label_sum")}
    config = build_config(language_model, tokenizer, field_specs(table, rows), table.d_q, adapter=adapter, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PostRankForCausalLM.from_base(language_model, config)
        if line is not None:
            start_on_the_line(model, **line)
        return model, tokenizer


def table_for(variant: Variant, training: Training, table: PostRankTable, rows: np.ndarray) -> PostRankTable:
    """The requests as a variant sees them: with the query vectors that `training.query` asks for."""
    personal = training.query == "personal" and variant.personal
    return personal_queries(table, rows) if personal else table


def train_variant(
    variant: Variant,
    training: Training,
    table: PostRankTable,
    rows: np.ndarray,
    seed: int,
    folder: Path,
    kept: Path | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """Trains one variant; checkpoints lie in `folder`, an interrupted run goes on.

    Args:
        table: of `table_for`.
        kept: folder that keeps what several variants start from: the drilled backbone, and the model behind feature adaptation,
            which depends on adapter and query vectors only. Default `folder`.

    Returns:
        (model, processor, {step → seconds and last losses}).
    """
    import torch

    from sidtune.models.post_ranking.files import add_lora
    from sidtune.models.post_ranking.processor import PostRankProcessor
    from sidtune.trainers.post_ranking.trainer import adapt_features, learn_to_post_rank, paper_arguments

    kept = kept or folder
    model, tokenizer = start_model(training, table, rows, variant.adapter, seed, kept)
    processor = PostRankProcessor(tokenizer, model.config, max_history=training.max_history, words=variant.words)
    told = {}
    if variant.adaptation:
        changes = {"seed": seed, **training.adaptation}
        given, trains = (model, processor, table, rows), training.adaptation_trains
        told["adaptation"] = _kept(
            model,
            kept / f"adapted_{variant.adapter}_{table.d_q}",
            lambda folder: _told(adapt_features(*given, paper_arguments(folder, **changes), train=trains)),
        )
    if training.train == "lora":
        model.requires_grad_(False)
        for parameter in model.adapter_parameters():
            parameter.requires_grad_(True)
        torch.manual_seed(seed)  # new factors are the same whether the adaptation was trained just now or read
        model = add_lora(model, **training.lora)
    else:
        model.requires_grad_(True)
    step = {**training.post_rank, **(training.ptpr if variant.words else {})}
    args = paper_arguments(folder / "post_rank", **{"seed": seed, **step})
    trainer = learn_to_post_rank(
        model,
        processor,
        table,
        rows,
        args,
        aux=variant.aux,
        shuffle=training.shuffle,
        ties=training.ties,
        max_candidates=training.max_candidates,
        adapter_learning_rate=training.adapter_learning_rate,
    )
    told["post_rank"] = _told(trainer)
    return trainer.model.eval(), processor, told


def _kept(model: Any, folder: Path, train: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Trains the model, or reads it where an earlier variant has left it; returns what there is to tell of the training.

    Args:
        train: gets the folder of the checkpoints.
    """
    from safetensors.torch import load_model, save_model

    work = Work(folder, {})  # what it depends on is in its name
    if not work.is_done():
        work.begin()
        told = train(work.checkpoints)
        with work.finish("post_rank_shared") as scratch:
            save_model(model, str(scratch / "model.safetensors"))
            write_run(scratch, step="post_rank_shared", config={}, metrics=told)
        return told
    load_model(model, folder / "model.safetensors")
    return read_json(folder / RUN_FILE)["metrics"]


def rank_requests(ranker: Any, requests: Sequence[PostRankRequest], method: str, width: int, **options: Any) -> list:
    """Orders of all requests as rows of `width` places, −1 behind the last candidate (JSON-ready)."""
    found = ranker.rank(requests, method, **options)
    return [order.tolist() + [-1] * (width - len(order)) for order in found]


def measure_cost(model: Any, processor: Any, requests: Sequence[PostRankRequest], methods: Sequence[str]) -> Cost:
    """Answers requests one at a time, and once without constraint for the rate of valid answers."""
    from sidtune.models.post_ranking.ranker import PostRanker

    ranker = PostRanker(model, processor, batch_size=1)
    times, tokens = {}, []
    for method in methods:
        ranker.rank(requests[:1], method)
        spent = []
        for one in requests:
            begin = time.perf_counter()
            ranker.rank([one], method)
            spent.append(1000 * (time.perf_counter() - begin))
            tokens.append(ranker.counts.prompt_tokens)
        times[method] = statistics.median(spent)
    ranker = PostRanker(model, processor)
    ranker.rank(requests, "unconstrained")
    return Cost(statistics.fmean(tokens), times, ranker.counts.valid_rate)


def cost_table(told: dict[str, Any]) -> str:
    """Prompt tokens, latency and valid rate of each variant, means over the seeds."""
    if not told:
        return ""
    methods = list(next(iter(told.values()))[0]["cost"]["milliseconds"])
    head = ["prompt tokens", *[f"ms ({method})" for method in methods], "valid, unconstrained"]
    lines = ["", "| variant | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    for name, seeds in told.items():
        costs = [one["cost"] for one in seeds]
        tokens = np.mean([cost["prompt_tokens"] for cost in costs])
        times = [np.mean([cost["milliseconds"][method] for cost in costs]) for method in methods]
        valid = np.mean([cost["valid_rate"] for cost in costs])
        lines.append(f"| {name} | {tokens:.1f} | " + " | ".join(f"{t:.1f}" for t in times) + f" | {valid:.3f} |")
    return "\n".join([*lines, "", "One request at a time; latency is the median of a request.", ""])


def requests_of(table: PostRankTable, rows: np.ndarray, max_history: int) -> list[PostRankRequest]:
    """The rows as requests of their own."""
    return [request_of(table, int(row), max_history) for row in rows]


def _told(trainer: Any) -> dict[str, Any]:
    history = trainer.state.log_history
    last = next((entry for entry in reversed(history) if "loss" in entry), {})
    losses = {key: round(last[key], 6) for key in ("main_loss", "aux_loss") if key in last}
    seconds = next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), 0.0)
    return {"steps": trainer.state.global_step, "seconds": round(seconds, 1), **losses}


def _texts(table: PostRankTable, rows: np.ndarray) -> list[str]:
    """What the BPE of a backbone from scratch is trained on: requests in words, and the letters of the answers."""
    from sidtune.models.post_ranking.permutation import LETTERS

    made = []
    for row in rows[:1000]:
        request = request_of(table, int(row), 3)
        made.append(render_request(request, [str(place) for place in range(len(request.item_ids))]))
    return made + [" ".join(("", *LETTERS))] * 100

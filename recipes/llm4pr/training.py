"""Trains LLM4PR, from a backbone to a post-ranker: feature adaptation, then learning to post-rank.

The paper's ablations are options: `adapter: mlp` or `mlp_query` ("w/o QIA": a DNN of unstated shape, so there are two),
`adaptation: null`, `aux: false`, and `words: true` for features as text (PTPR). A backbone built from scratch has no language to
adapt to; let both steps train everything then (`train: all`, `adaptation_trains: all`), which is not the paper's method but its
shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sidtune.core.config import check_range, check_types
from sidtune.core.errors import ConfigError
from sidtune.core.folders import RUN_FILE, read_json, write_run
from sidtune.core.resume import Work
from sidtune.data_builders.post_ranking.personal_queries import personal_queries
from sidtune.data_builders.post_ranking.schema import PostRankTable
from sidtune.data_builders.post_ranking.text import render_request, request_of


@dataclass(frozen=True)
class Training:
    """How the system is trained.

    Attributes:
        backbone: model folder or hub id; None builds one from `scratch` with a BPE of `vocab_size` tokens.
        scratch: `model_type` and fields of its config. drill: for a backbone from scratch, arguments of
            `trainers.post_ranking.drill` as for the steps below (`max_steps`, ...); empty for none.
        train: `lora` (the paper) or `all`, in the second step. adaptation_trains: `adapters` (the paper) or `all`.
        lora: `r`, `alpha`, `dropout`, `targets` of `add_lora`.
        adaptation, post_rank: arguments of each step over `trainers.post_ranking.trainer.paper_arguments`; no adaptation = null.
        adapter: `qia`, `mlp` (fields only) or `mlp_query` (fields and query). aux: with the auxiliary task.
        words: features as text instead of soft tokens, so there is nothing to adapt.
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
    adaptation: dict | None = field(default_factory=dict)
    post_rank: dict = field(default_factory=dict)
    adapter: str = "qia"
    aux: bool = True
    words: bool = False
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
        check_types(type(self), vars(self), "training")
        for name, known in (
            ("train", ("lora", "all")),
            ("adaptation_trains", ("adapters", "all")),
            ("ties", ("incoming", "random")),
            ("main_loss", ("tokens", "permutation")),
            ("query", ("request", "personal")),
            ("adapter", ("qia", "mlp", "mlp_query")),
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
        if self.words and (self.adapter != "qia" or self.query == "personal" or self.label_sum):
            raise ConfigError(
                "training: with words features are text, so adapter, query: personal and label_sum would change nothing; leave "
                "them out."
            )
        if self.lora and self.train != "lora":
            raise ConfigError("training: options of LoRA need train: lora, but train is 'all'; change one of them.")
        check_range(self, 0, "max_history", "adapter_learning_rate", "aux_weight")
        check_range(self, 1, "d_h")
        check_range(self, 0, "shuffle", most=1)
        check_range(self, 2, "max_candidates", most=26)
        self._check_heavy()

    def _check_heavy(self) -> None:
        """What the libraries say of the arguments of each step, and of a backbone from scratch."""
        from sidtune.models.post_ranking.files import check_lora
        from sidtune.tokenizers.base_models.from_scratch import check_model
        from sidtune.trainers.post_ranking.trainer import checked_paper

        check_lora("training.lora", **self.lora)
        for name in ("adaptation", "post_rank", "drill"):
            checked_paper(getattr(self, name) or {}, f"training.{name}")
        if self.backbone is None:
            check_model(self.scratch, self.vocab_size)


def start_model(training: Training, table: PostRankTable, rows: np.ndarray, seed: int, kept: Path) -> tuple[Any, Any]:
    """(language model with fresh adapters, tokenizer) before any training on the table; `kept`: see `train_system`."""
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
        if training.drill:
            most = min(training.max_candidates, int(np.diff(table.candidate_offsets)[rows].max()))
            given = (language_model, tokenizer, most)
            told = _kept(language_model, kept / "drill", lambda folder: drilled(*given, folder, seed, **training.drill))
            line = {"direction": told["direction"], "bias": told["bias"]}
    else:
        tokenizer, language_model = load_tokenizer(training.backbone), load_plain(training.backbone)
    options = {name: getattr(training, name) for name in ("d_h", "adapter", "aux_weight", "main_loss", "label_sum")}
    config = build_config(language_model, tokenizer, field_specs(table, rows), table.d_q, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PostRankForCausalLM.from_base(language_model, config)
        if line is not None:
            start_on_the_line(model, **line)
        return model, tokenizer


def table_for(training: Training, table: PostRankTable, rows: np.ndarray) -> PostRankTable:
    """The requests with the query vectors that `training.query` asks for."""
    return personal_queries(table, rows) if training.query == "personal" else table


def train_system(
    training: Training, table: PostRankTable, rows: np.ndarray, seed: int, folder: Path, kept: Path
) -> tuple[Any, Any, dict[str, Any]]:
    """Trains on requests of `table_for`; checkpoints lie in `folder`, an interrupted run goes on.

    Args:
        kept: folder that keeps what several settings start from: the drilled backbone, and the model behind feature adaptation,
            which depends on adapter and query vectors only.

    Returns:
        (model, processor, {step → seconds and last losses}).
    """
    import torch

    from sidtune.models.post_ranking.files import add_lora
    from sidtune.models.post_ranking.processor import PostRankProcessor
    from sidtune.trainers.post_ranking.trainer import adapt_features, learn_to_post_rank, paper_arguments

    model, tokenizer = start_model(training, table, rows, seed, kept)
    processor = PostRankProcessor(tokenizer, model.config, max_history=training.max_history, words=training.words)
    told = {}
    if training.adaptation is not None and not training.words:
        changes = {"seed": seed, **training.adaptation}
        given, trains = (model, processor, table, rows), training.adaptation_trains
        told["adaptation"] = _kept(
            model,
            kept / f"adapted_{training.adapter}_{table.d_q}",
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
    args = paper_arguments(folder / "post_rank", **{"seed": seed, **training.post_rank})
    names = ("aux", "shuffle", "ties", "max_candidates", "adapter_learning_rate")
    options = {name: getattr(training, name) for name in names}
    trainer = learn_to_post_rank(model, processor, table, rows, args, **options)
    told["post_rank"] = _told(trainer)
    return trainer.model.eval(), processor, told


def _kept(model: Any, folder: Path, train: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Trains the model, or reads it where an earlier run has left it; returns what there is to tell of the training.

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
        made.append(render_request(request))
    return made + [" ".join(("", *LETTERS))] * 100

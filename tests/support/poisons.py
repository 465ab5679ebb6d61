"""Trainers of every kind with a checkpoint after every step, and poisons: a NaN or an infinity put into one step of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

STEPS = 5


def sft(folder: Path, **changes: Any) -> Any:
    from sft_stand_ins import level_token_ids, random_examples, tiny_model, tiny_tokenizer

    from sidtune.trainers.common.args import sft_config
    from sidtune.trainers.sft.trainer import SidSFTTrainer

    values = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS, "disable_tqdm": True, **changes}
    config = sft_config(values, output_dir=folder, max_length=64, seed=3, evaluate=False, where="test")
    return SidSFTTrainer(
        tiny_model(), config, random_examples(), None, tiny_tokenizer(), level_token_ids=level_token_ids()
    )


def grpo(folder: Path, **changes: Any) -> Any:
    from grpo_stand_ins import trainer

    return trainer(folder, **{"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "patience": 0, **changes})


def lists(features: np.ndarray | None = None, relevance: np.ndarray | None = None) -> Any:
    """20 requests of 4 candidates each, in random order."""
    from post_rank_sources import toy_table

    draw = np.random.default_rng(0)
    relevance = draw.permuted(np.tile(np.arange(4.0), (20, 1)), axis=1) if relevance is None else relevance
    features = draw.normal(size=(20, 4, 2)) if features is None else features
    return toy_table(relevance, features, draw.normal(size=(20, 3)), ["train"] * 20)


def post_rank(folder: Path, **changes: Any) -> Any:
    from lm_stand_ins import tiny_model, tiny_tokenizer

    from sidtune.models.post_ranking.model import PostRankForCausalLM
    from sidtune.models.post_ranking.processor import PostRankProcessor, build_config
    from sidtune.trainers.post_ranking.data import PostRankExamples, field_specs
    from sidtune.trainers.post_ranking.trainer import PostRankTrainer, paper_arguments

    table = lists()
    rows, (language_model, tokenizer) = np.arange(20), (tiny_model("llama"), tiny_tokenizer())
    config = build_config(language_model, tokenizer, field_specs(table, rows), table.d_q, d_h=8)
    model = PostRankForCausalLM.from_base(language_model, config)
    values = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS, "disable_tqdm": True, **changes}
    examples = PostRankExamples(table, rows, PostRankProcessor(tokenizer, config), aux=False)
    return PostRankTrainer(model, paper_arguments(folder, **values), examples)


def next_item(folder: Path, **changes: Any) -> Any:
    from next_item_worlds import SIZES, random_catalogue, random_sequences, small_network

    from sidtune.decoding.next_item.ranking import HistoryRanker
    from sidtune.trainers.next_item.data import NextItemRows
    from sidtune.trainers.next_item.trainer import FitSettings, NextItemTrainer, fit_arguments

    sequences = random_sequences(users=12)
    catalogue = random_catalogue(sequences)
    rows = NextItemRows(sequences, sequences.whole_examples(50), catalogue.codes, SIZES)
    values = {"per_device_train_batch_size": len(rows), "num_train_epochs": STEPS, "warmup_steps": 0, **changes}
    settings = FitSettings(args=values, average=0.5)
    arguments = fit_arguments(settings, folder, len(rows), 0)
    ranker = HistoryRanker(sequences, catalogue, num_beams=4)
    network = small_network("items")
    return NextItemTrainer(network, arguments, rows, ranker, sequences.held_out("valid"), settings)


def aligned(folder: Path, **changes: Any) -> Any:
    from align_worker import TINY, examples

    from sidtune.tokenizers.encoders.scratch import scratch_encoder
    from sidtune.trainers.contrastive.losses import AlignedLossConfig
    from sidtune.trainers.contrastive.trainer import AlignedTrainer, aligned_args

    data = examples()
    model, tokenizer = scratch_encoder(data.texts, TINY, 300, 0)
    model.pooler.requires_grad_(False)
    values = {"per_device_train_batch_size": 8, "max_steps": STEPS, "save_steps": 1, "disable_tqdm": True, **changes}
    return AlignedTrainer(model, aligned_args(values, folder), data, tokenizer, AlignedLossConfig(), max_length=16)


TRAINERS = {"sft": sft, "grpo": grpo, "post_rank": post_rank, "next_item": next_item, "aligned": aligned}


class _At(TrainerCallback):
    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.act()


def poison_loss(trainer: Any, step: int, value: float) -> None:
    compute = trainer.compute_loss

    def bad(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        return loss * value if trainer.state.global_step == step - 1 else loss

    trainer.compute_loss = bad


def trained(trainer: Any) -> torch.nn.Parameter:
    """A matrix that trains and that every step uses."""
    return [p for p in trainer.model.parameters() if p.requires_grad and p.ndim == 2][-1]


def poison_gradient(trainer: Any, step: int, value: float) -> None:
    def hook(gradient: torch.Tensor) -> torch.Tensor | None:
        if trainer.state.global_step != step - 1:
            return None
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    trained(trainer).register_hook(hook)


def poison_weight(trainer: Any, step: int, value: float) -> None:
    trainer.add_callback(_At(step, lambda: trained(trainer).data.view(-1)[:].fill_(value)))


POISONS = {"loss": poison_loss, "gradient": poison_gradient, "weight": poison_weight}

"""Trains a text encoder on aligned pairs (OneSearch, section 3.1.1) with transformers' Trainer, and saves it as a plain folder.

    model, tokenizer = scratch_encoder(texts)  # or load_encoder("BAAI/bge-small-en-v1.5")
    examples = AlignedExamples(queries, item_texts, {"q2i": pairs, "i2i": others})
    train_aligned(model, tokenizer, examples, args, AlignedLossConfig(), pooling="mean", max_length=64)
    save_aligned("work/encoder", model, tokenizer, pooling="mean", max_length=64)

The paper starts from a distilled BGE; any encoder or decoder-only model of `transformers.AutoModel` will do, and a small BERT from
scratch makes it run offline. Every batch holds rows of every term (B of each; a shorter list of pairs comes round more often),
so each step sees the whole loss and, under data parallelism, every process has a gradient for every parameter. Each distinct text
of a batch is encoded once. Negatives are those of the process's own batch; they are not gathered across processes. The model is
small, so it is trained whole on every process: a launch that splits weights (ZeRO-3, FSDP) is refused.

Overriding points of Trainer (everything else is transformers'): `_get_train_sampler` (the order is a function of seed and epoch, so
a run resumes exactly), `compute_loss`, `log`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.base_models.loading import load_text_model as load_encoder  # noqa: F401
from sidtune.tokenizers.encoders.pooling import POOLINGS, pooled, write_pooling
from sidtune.tokenizers.encoders.text import TransformersConfig
from sidtune.trainers.common.args import RESERVED, built, check_together, checked_fields, fields_of
from sidtune.trainers.common.callbacks import MarkComplete, SetEpoch, go_on
from sidtune.trainers.common.finite import FiniteSteps
from sidtune.trainers.contrastive.losses import TERMS, AlignedLossConfig, aligned_loss
from sidtune.trainers.post_ranking.data import ExampleSampler

_SIDES = {"q2q": "qq", "i2i": "ii", "q2i": "qi", "rank": "qiii", "relevance": "qi"}


class AlignedExamples(Dataset):
    """Rows of texts for each term of the loss.

    Args:
        queries: query texts. item_texts: one text per item, exactly as the encoder will be given it.
        pairs: term of `TERMS` → (P, 2) rows (`rank`: (P, 4) query, order, click, show, -1 = missing); q is a row of `queries`, i of
            `item_texts`. Pairs of two equal texts teach nothing and are dropped; a term without rows is left out.
        scores: (J,) relevance in [0, 1] of the rows of `relevance`.

    Attributes:
        texts: the distinct texts. rows: term → rows of `texts`.

    Raises:
        ConfigError: an unknown term.
        DataError: rows of the wrong shape or out of range, relevance without scores, or nothing to learn from.
    """

    def __init__(
        self,
        queries: Sequence[str],
        item_texts: Sequence[str],
        pairs: Mapping[str, np.ndarray],
        scores: np.ndarray | None = None,
    ) -> None:
        number: dict[str, int] = {}
        ids = {}
        for side, texts in (("q", queries), ("i", item_texts)):
            filled = (text if text.strip() else TransformersConfig.empty_text for text in texts)
            ids[side] = np.array([number.setdefault(text, len(number)) for text in filled], dtype=np.int64)
        self.texts, self.rows, self.scores = list(number), {}, np.empty(0)
        for term, given in pairs.items():
            rows = self._numbered(term, np.asarray(given), ids)
            keep = np.ones(len(rows), bool) if term == "rank" else rows[:, 0] != rows[:, 1]
            if term == "relevance":
                if scores is None or len(scores) != len(rows):
                    raise DataError("Every row of 'relevance' needs one score; give as many scores as rows.")
                self.scores = np.asarray(scores, dtype=np.float32)[keep]
                if not ((self.scores >= 0) & (self.scores <= 1)).all():
                    raise DataError("A score of 'relevance' lies outside [0, 1] or is no number; correct the scores.")
            if keep.any():
                self.rows[term] = rows[keep]
        if not self.rows:
            raise DataError("There are no pairs to learn from; lower the thresholds or the support of the mining.")

    @staticmethod
    def _numbered(term: str, rows: np.ndarray, ids: dict[str, np.ndarray]) -> np.ndarray:
        if term not in TERMS:
            raise ConfigError(f"There is no term '{term}' of the aligned loss; known are {', '.join(TERMS)}.")
        sides = _SIDES[term]
        if rows.ndim != 2 or rows.shape[1] != len(sides):
            raise DataError(f"Rows of '{term}' must have {len(sides)} columns, got the shape {rows.shape}.")
        made = np.full(rows.shape, -1, dtype=np.int64)
        for column, side in enumerate(sides):
            there = rows[:, column] >= 0
            if not there.all() and (term != "rank" or column == 0) or rows[:, column].max(initial=-1) >= len(ids[side]):
                raise DataError(f"A row of '{term}' names a text outside the {len(ids[side])} that were given.")
            made[there, column] = ids[side][rows[there, column]]
        return made

    def __len__(self) -> int:
        return max(map(len, self.rows.values()))

    def __getitem__(self, number: int) -> int:
        return number

    def batch(self, numbers: Sequence[int]) -> tuple[list[str], dict[str, Tensor]]:
        """The distinct texts of a batch, and for each term the rows of these texts (see `aligned_loss`)."""
        chosen = {term: np.asarray(numbers) % len(rows) for term, rows in self.rows.items()}
        rows = {term: self.rows[term][place] for term, place in chosen.items()}
        used = np.unique(np.concatenate([part.ravel() for part in rows.values()]))
        used = used[used >= 0]
        places = {
            term: torch.from_numpy(np.where(part >= 0, np.searchsorted(used, part), -1)) for term, part in rows.items()
        }
        if "relevance" in rows:
            places["relevance_score"] = torch.from_numpy(self.scores[chosen["relevance"]])
        return [self.texts[n] for n in used], places


def collated(
    numbers: Sequence[int], examples: AlignedExamples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    """Numbers of `AlignedExamples` → `input_ids`, `attention_mask` (U, T) of the distinct texts, and `places`."""
    texts, places = examples.batch(numbers)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "places": places}


class AlignedTrainer(FiniteSteps, Trainer):
    """Trainer of the aligned loss.

    Args:
        model: a text model whose output has `last_hidden_state` (B, T, d).
        args: of `aligned_args`.
        examples: what to learn. tokenizer: of the model.
        loss: weights and constants.
        pooling: one of `POOLINGS`. max_length: longer texts are cut.
        options: passed on to transformers.

    Logged beside transformers' metrics: `<term>_loss` of each term, before its weight, mean over the micro-batches since the last
    log.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        examples: AlignedExamples,
        tokenizer: PreTrainedTokenizerBase,
        loss: AlignedLossConfig,
        pooling: str = "mean",
        max_length: int = 64,
        **options: Any,
    ) -> None:
        self.loss, self.pooling = loss, pooling
        self.terms = [term for term in TERMS if term in examples.rows and loss.weight(term)]
        if not self.terms:
            raise ConfigError("Every term that has pairs has the weight 0, so nothing would be learned; raise one.")
        self._epoch_callback, self._sums = SetEpoch(), None
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(collated, examples=examples, tokenizer=tokenizer, max_length=max_length),
            train_dataset=examples,
            callbacks=[self._epoch_callback, MarkComplete(), *options.pop("callbacks", ())],
            **options,
        )
        self.model_accepts_loss_kwargs = False  # the mean over a batch; accumulation divides by its steps

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._epoch_callback.sampler = ExampleSampler(len(dataset), seed)
        return self._epoch_callback.sampler

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        mask = inputs["attention_mask"]
        states = model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state.float()
        vectors = F.normalize(pooled(states, mask, self.pooling), dim=-1)
        loss, parts = aligned_loss(vectors, inputs["places"], self.loss)
        seen = torch.stack([*(parts[term] for term in self.terms), loss.new_ones(())])
        self._sums = seen if self._sums is None else self._sums + seen
        return (loss, vectors) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._sums is not None:
            *sums, count = self.accelerator.reduce(self._sums, "sum").tolist()
            logs.update({f"{term}_loss": value / count for term, value in zip(self.terms, sums, strict=True)})
            self._sums = None
        super().log(logs, start_time)


def checked_aligned_args(values: dict[str, Any], where: str = "args") -> dict[str, Any]:
    """Fields of transformers' TrainingArguments that are known, right and go together; ConfigError otherwise."""
    reserved = {key: reason for key, reason in RESERVED.items() if key in fields_of(TrainingArguments)}
    reserved["prediction_loss_only"] = "nothing is evaluated"
    values = checked_fields(TrainingArguments, reserved, values, where)
    check_together(TrainingArguments, values, where)
    return values


def aligned_args(values: dict[str, Any], output_dir: str | Path, seed: int = 0) -> TrainingArguments:
    """`values` over the defaults of the aligned encoder: batches of 64 rows of each term, 2e-5 falling to 0 after a short warm-up.

    Raises:
        ConfigError: an unknown key, a wrong type, values that do not go together, or a launch that splits the weights.
    """
    preset = {
        "per_device_train_batch_size": 64,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "logging_steps": 50,
        "save_steps": 500,
    }
    checked = {**preset, **checked_aligned_args(values)}
    fixed = {"output_dir": str(output_dir), "remove_unused_columns": False, "prediction_loss_only": True}
    args = built(TrainingArguments, checked, seed, "args", **fixed)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or is_deepspeed_zero3_enabled():
        raise ConfigError(
            "The aligned encoder is trained and saved as one piece, so it needs whole weights on every process; launch it with "
            "ddp or zero2."
        )
    return args


def train_aligned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: AlignedExamples,
    args: TrainingArguments,
    loss: AlignedLossConfig,
    pooling: str = "mean",
    max_length: int = 64,
    **options: Any,
) -> AlignedTrainer:
    """Trains `model` in place, going on from the last complete checkpoint in `args.output_dir`; a finished run is only loaded.

    Returns:
        The trainer, finished; `trainer.state.log_history` holds the curves.

    Raises:
        ConfigError: an encoder-decoder model, an unknown pooling, or texts longer than the model's positions.
    """
    check_encoder(model, pooling, max_length)
    # Nothing reads the head some families put on the first token, so it would be a parameter without gradient.
    if getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)
    trainer = AlignedTrainer(model, args, examples, tokenizer, loss, pooling, max_length, **options)
    go_on(trainer)
    return trainer


def check_encoder(model: PreTrainedModel, pooling: str, max_length: int) -> None:
    """Raises ConfigError where model, pooling and length do not go together."""
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"A {model.config.model_type} model is an encoder-decoder; the aligned encoder needs an encoder such as BERT or "
            "BGE, or a decoder-only model."
        )
    if pooling not in POOLINGS:
        raise ConfigError(f"The pooling must be one of {', '.join(POOLINGS)}, got '{pooling}'.")
    positions = getattr(model.config, "max_position_embeddings", None)
    if max_length < 1 or (positions and max_length > positions):
        raise ConfigError(f"max_length must be between 1 and the {positions} positions of the model, got {max_length}.")


def save_aligned(
    folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pooling: str, max_length: int
) -> None:
    """Writes model, tokenizer, pooling and length into an existing folder, which the encoders `transformers` and
    `sentence_transformers` read as it is: both then pool, cut and scale as the training did."""
    model.save_pretrained(folder)
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)
    write_pooling(folder, pooling, int(model.config.hidden_size), max_length)

"""The two training steps of LLM4PR (arXiv 2411.01178) on transformers' Trainer: feature adaptation, learning to post-rank.

    model, processor = ...                                       # PostRankForCausalLM.from_base, PostRankProcessor
    adapt_features(model, processor, table, rows, paper_arguments("work/fa", max_steps=1000))
    model = add_lora(model)                                      # or not, to train everything
    trainer = learn_to_post_rank(model, processor, table, rows, paper_arguments("work/lpr", max_steps=4000))
    save_post_rank(trainer.model, "work/model", processor)

The paper's schedule is `paper_arguments`: AdamW, 1e-3 falling to 1e-6, warm-up over the first tenth of the steps. It does not name
the shape of the fall (ours: cosine), weight decay (0.01), clipping (1.0), the number of steps, or one rate for the adapters and
another for LoRA (`adapter_learning_rate`). It trains 5 requests on each of 8 GPUs.

Overriding points (everything else is transformers'):

1. `_get_train_sampler`: the order of an epoch is a function of seed and epoch.
2. `create_optimizer`: gives the adapters a rate of their own.
3. `compute_loss`, `log`: the token means of both tasks.
4. `_save`, `_load_from_checkpoint`: a checkpoint holds the weights that train and nothing else, whatever the layout.

Under ZeRO-3 each step needs a launch of its own (save the model between them): LoRA cannot go on weights that are shared out.

Loss scaling is left alone: the model says `accepts_loss_kwargs = False`, so each micro-batch's loss is divided by the number of
accumulation steps. Two micro-batches are one big one where both have as many answer tokens of each task.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.post_ranking.schema import PostRankTable
from sidtune.models.post_ranking.model import PostRankForCausalLM
from sidtune.models.post_ranking.processor import PostRankProcessor
from sidtune.trainers.common.args import check_together, checked_fields, machine_defaults, sentence
from sidtune.trainers.common.callbacks import MarkComplete, SetEpoch, go_on
from sidtune.trainers.common.finite import FiniteSteps
from sidtune.trainers.post_ranking.data import ExampleSampler, PostRankExamples, collate

TRAINED_FILE = "trained.safetensors"
LEARNING_RATE, LAST_LEARNING_RATE, WARM_UP = 1e-3, 1e-6, 0.1


def checked_paper(changes: dict[str, Any], where: str = "The arguments of post-ranking training") -> dict[str, Any]:
    """The paper's schedule with `changes` laid over it; touches no device.

    Args:
        changes: fields of `TrainingArguments`, over the preset. `min_learning_rate`: where the rate ends, default 1e-6.
        where: how messages call this place.

    Raises:
        ConfigError: an unknown argument, a wrong value, or values that do not go together.
    """
    changes = dict(changes)
    last = changes.pop("min_learning_rate", LAST_LEARNING_RATE)
    preset = {
        "optim": "adamw_torch",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine_with_min_lr",
        "warmup_steps": WARM_UP,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 5,
        "logging_first_step": True,
        "save_total_limit": 2,
        "ddp_find_unused_parameters": False,
        "prediction_loss_only": True,
    }
    reserved = {
        "output_dir": "the run has its own folder",
        "remove_unused_columns": "batches are made here",
        "label_smoothing_factor": "the model has its own loss",
    }
    values = {**preset, **checked_fields(TrainingArguments, reserved, changes, where)}
    if values["lr_scheduler_type"] == "cosine_with_min_lr":
        # As a share: transformers cannot work it out from an optimizer that DeepSpeed has wrapped.
        values.setdefault("lr_scheduler_kwargs", {"min_lr_rate": last / (values["learning_rate"] or 1.0)})
    check_together(TrainingArguments, values, where)
    return values


def paper_arguments(output_dir: str | Path, **changes: Any) -> TrainingArguments:
    """The paper's schedule as transformers' arguments.

    Args:
        output_dir: folder of the checkpoints.
        changes: see `checked_paper`.

    Raises:
        ConfigError: as `checked_paper`, or values that do not fit this machine.
    """
    defaults = {"report_to": "none", **machine_defaults()}
    values = {**defaults, **checked_paper(changes), "remove_unused_columns": False}
    try:
        return TrainingArguments(output_dir=str(output_dir), **values)
    except (ValueError, TypeError, ImportError, AssertionError) as error:
        raise ConfigError(f"The arguments of post-ranking training do not go together ({sentence(error)}).") from None


class PostRankTrainer(FiniteSteps, Trainer):
    """Trains what is trainable of a post-ranking model.

    Args:
        model: `PostRankForCausalLM`, or a PEFT model around it (layout A).
        args: of `paper_arguments`.
        train_dataset, eval_dataset: `PostRankExamples`.
        adapter_learning_rate: peak rate of the adapters; None = that of `args`. The schedule scales both alike.
        callbacks, options: passed on to transformers.

    Raises:
        ConfigError: nothing of the model trains.

    Logged beside transformers' metrics (`eval_` before each in evaluation): `main_loss` and `aux_loss`, means over the
    micro-batches since the last log (`aux_loss` only over those that had auxiliary examples).
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: PostRankExamples,
        eval_dataset: PostRankExamples | None = None,
        *,
        adapter_learning_rate: float | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("Nothing of the post-ranking model trains; free the adapters or add LoRA first.")
        self.adapter_learning_rate = adapter_learning_rate
        self._epoch_callback = SetEpoch()
        self._losses: dict[str, torch.Tensor] = {}
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[self._epoch_callback, MarkComplete(), *callbacks],
            **options,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._epoch_callback.sampler = ExampleSampler(len(dataset), seed)
        return self._epoch_callback.sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.adapter_learning_rate is not None:
            mine = {id(p) for n, p in self.model.named_parameters() if _of_adapter(n)}
            for group in list(optimizer.param_groups):
                split = [p for p in group["params"] if id(p) in mine]
                group["params"] = [p for p in group["params"] if id(p) not in mine]
                if split:
                    optimizer.add_param_group({**group, "params": split, "lr": self.adapter_learning_rate})
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        some = outputs.aux_loss.new_tensor(1.0)
        has_aux = (inputs["task_id"] == 1).any().to(some)
        found = torch.stack([outputs.main_loss, some, outputs.aux_loss, has_aux]).detach()
        mode = "train" if self.model.training else "eval"
        self._losses[mode] = self._losses.get(mode, torch.zeros_like(found)) + found
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if mode in self._losses:
            main, count, aux, with_aux = self.accelerator.reduce(self._losses.pop(mode), "sum").tolist()
            prefix = "eval_" if mode == "eval" else ""
            logs[f"{prefix}main_loss"] = main / count
            if with_aux:
                logs[f"{prefix}aux_loss"] = aux / with_aux
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self._trainable() if state_dict is None else {n: state_dict[n] for n in self._trainable()}
        kept = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_file(kept, folder / TRAINED_FILE, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / TRAINED_FILE
        if not path.is_file():
            raise DataError(f"The checkpoint {resume_from_checkpoint} has no {TRAINED_FILE}; start the training anew.")
        weights, own = load_file(path), self._trainable()
        wrong = sorted(n for n in weights.keys() | own.keys() if _shape(weights, n) != _shape(own, n))
        if wrong:
            raise DataError(
                f"The checkpoint {resume_from_checkpoint} was made for another model (first difference: '{wrong[0]}'); train in "
                "another folder."
            )
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def adapt_features(
    model: PostRankForCausalLM,
    processor: PostRankProcessor,
    table: PostRankTable,
    rows: Sequence[int] | np.ndarray,
    args: TrainingArguments,
    *,
    train: str = "adapters",
    resume: bool = True,
    **options: Any,
) -> PostRankTrainer:
    """Feature adaptation: the adapters learn to be read by the language model.

    Args:
        model: without LoRA yet. processor: its own. table, rows: training requests.
        args: of `paper_arguments`.
        train: `adapters` (the paper: the language model is frozen) or `all`, for a language model that was never trained and so
            has nothing to be adapted to.
        resume: go on from the last complete checkpoint in `args.output_dir`.
        options: of `PostRankTrainer`.

    Returns:
        The trainer, finished. The language model stays as `train` left it; `add_lora` or `requires_grad_` decides what is next.

    Raises:
        ConfigError: an unknown `train`. DataError: as `PostRankExamples`.
    """
    if train not in ("adapters", "all"):
        raise ConfigError(f"Feature adaptation trains 'adapters' or 'all', got '{train}'.")
    examples = PostRankExamples(table, rows, processor, "adaptation", seed=args.seed)
    if train == "all":
        model.requires_grad_(True)
    else:
        model.train_adapters_only()
    trainer = PostRankTrainer(model, args, examples, **options)
    go_on(trainer, resume)
    return trainer


def learn_to_post_rank(
    model: nn.Module,
    processor: PostRankProcessor,
    table: PostRankTable,
    rows: Sequence[int] | np.ndarray,
    args: TrainingArguments,
    *,
    valid_rows: Sequence[int] | np.ndarray = (),
    aux: bool = True,
    shuffle: float = 0.5,
    ties: str = "incoming",
    max_candidates: int = 20,
    resume: bool = True,
    **options: Any,
) -> PostRankTrainer:
    """Learning to post-rank: main and auxiliary task together, on whatever of the model is trainable.

    Args:
        model: after `add_lora` (the paper: adapters and LoRA), or with everything free.
        valid_rows: requests for the evaluation loss (incoming order, no draws but the auxiliary pair).
        aux, shuffle, ties, max_candidates: of `PostRankExamples`. The weight of the auxiliary task is the config's `aux_weight`.
        resume, options: as `adapt_features`.
    """
    drawn = {"aux": aux, "ties": ties, "max_candidates": max_candidates, "seed": args.seed}
    examples = PostRankExamples(table, rows, processor, shuffle=shuffle, **drawn)
    valid = PostRankExamples(table, valid_rows, processor, shuffle=0.0, **drawn) if len(valid_rows) else None
    trainer = PostRankTrainer(model, args, examples, valid, **options)
    go_on(trainer, resume)
    return trainer


def _of_adapter(name: str) -> bool:
    return any(part in ("qia_user", "qia_item") for part in name.split("."))


def _shape(weights: dict[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None

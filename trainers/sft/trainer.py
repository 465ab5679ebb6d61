"""Supervised fine-tuning on semantic IDs: TRL's `SFTTrainer` with measured parts, an exact order of examples, and
honest packing.

Overriding points (everything else is TRL's and stays untouched; `trl_surface.py` names what they rely on):

1. `__init__`: checks every example first, proves packing exact or refuses it, and lets the fused head of TRL take a head
   whose new rows train alone under ZeRO-3.
2. `_prepare_dataset`: TRL tokenises texts and messages; nothing is cut.
3. `_set_signature_columns_if_needed`: keeps the column `task`.
4. `_get_train_sampler`: the order of an epoch is a function of seed and epoch (`batches.EpochSampler`).
5. `compute_loss`: measures the loss per task and the accuracy per SID level; on CPU scores only the positions that are
   learned.
6. `log`: adds those measurements, summed over processes.

`common/hooks.py` adds what both trainers have: no weight decay on embedding rows that are trained alone or beside LoRA, and no
telemetry.

The loss is TRL's: the negative log-likelihood of the learned tokens, averaged over the learned tokens of the *global*
batch, so that two processes with half the batch each give the loss of one process. A whole-history example therefore
weighs as much as its number of targets, exactly like the windowed copies it replaces.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sidtune.core.errors import ConfigError, DataError
from sidtune.trainers.common import trl_surface
from sidtune.trainers.common.batches import EpochSampler, ExampleSizes, TaskCollator, measure
from sidtune.trainers.common.hooks import TrlHooks, causal_config, check_dataset, default_args

TRAIN_MODES = ("rows", "lora", "all")
_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
_PACKING_TOLERANCE = 1e-4


class SidSFTTrainer(TrlHooks, SFTTrainer):
    """Trains a causal LM on examples that are tokenised, or on texts and messages as TRL takes them.

    Args:
        model: a causal `PreTrainedModel`, a PEFT model around one with what trains already chosen, or a name or folder.
        args: TRL's config; None is TRL's default with what this machine can do. `max_length` is a limit, never a cut: TRL
            would drop the end of a longer example, which is where its target stands, so a longer example is refused.
        train_dataset: columns `input_ids`, `labels` and, for the loss per task, `task` (string); or a data set of TRL's
            (`prompt` and `completion`, `messages`, `text`), which TRL tokenises.
        eval_dataset: the same, or None, or a mapping of name to such a dataset.
        processing_class: the tokenizer; None is that of the model.
        train: what trains ("rows", "lora" or "all"); chooses the weight decay, nothing else. None: "lora" for a PEFT model
            or with a `peft_config`, else "all".
        level_token_ids: token ids of each SID level, for the accuracy per level; None measures none.
        options: passed on to TRL (`callbacks`, `peft_config`, `formatting_func`, ...).

    Raises:
        ConfigError: an encoder-decoder model, an example longer than `max_length` or than the model's positions, or
            packing that is not exact for this model.
        DataError: an example that is damaged or teaches nothing.

    Logged beside TRL's metrics (`eval_` before each in evaluation): `target_loss` (mean over all learned tokens since
    the last log), `loss_<task>`, `sid_accuracy_<level>` (share of the SID tokens of level 1, 2, ... that are the most
    likely token given the true prefix), `text_accuracy` (the same for learned tokens that are no SID token). Packed
    rows forget their tasks.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        train: str | None = None,
        level_token_ids: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        trl_surface.check()
        config = causal_config(model, "supervised fine-tuning")
        args = default_args(SFTConfig, model, "SFT") if args is None else args
        if not isinstance(args, SFTConfig):
            args = SFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})
        evals = eval_dataset if isinstance(eval_dataset, dict) else {"evaluation": eval_dataset}
        evals = {name: dataset for name, dataset in evals.items() if dataset is not None}
        self._config, self.sizes = config, ExampleSizes(np.zeros(0, np.int64), np.zeros(0, np.int64))
        for name, dataset in {**evals, "training": train_dataset}.items():
            check_dataset(dataset, f"The {name} data")
            if "input_ids" in dataset.column_names:
                self.sizes = _checked(dataset, config, args, f"The {name} data")
        packed = args.packing or args.padding_free
        if packed:
            args.eval_packing = bool(args.eval_packing)
            if not isinstance(model, str):
                check_packing(model, args)
        self._sums: dict[str, torch.Tensor] = {}
        self._outputs: Any = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            train=train,
            **options,
        )
        if packed and isinstance(model, str):
            check_packing(self.model, args)
        self.tasks = _tasks([train_dataset, *evals.values()])
        self._level_of_token = _levels(level_token_ids, self.model.get_input_embeddings().weight, config)
        self._levels = 0 if level_token_ids is None else len(level_token_ids)
        if isinstance(self.data_collator, DataCollatorForLanguageModeling):
            self.data_collator = TaskCollator.extend(self.data_collator, self.tasks)
        self.model.register_forward_hook(self._keep_outputs)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: SFTConfig, packing: bool, formatting_func: Any, name: str
    ) -> Dataset:
        """Tokenises as TRL does, but cuts nothing."""
        if "input_ids" not in dataset.column_names:
            whole = copy.copy(args)
            whole.max_length = None
            dataset = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, name)
            sizes = _checked(dataset, self._config, args, f"The {'training' if name == 'train' else name} data")
            self.sizes = sizes if name == "train" else self.sizes
        if packing:
            return super()._prepare_dataset(dataset, processing_class, args, True, formatting_func, name)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "task" not in self._signature_columns:
            self._signature_columns.append("task")

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths, batch = None, 1
        if strategy == "group_by_length":
            lengths = self.sizes.tokens if len(self.sizes.tokens) == len(dataset) else measure(dataset).tokens
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._epoch_callback.sampler = EpochSampler(len(dataset), seed, lengths, batch)
        return self._epoch_callback.sampler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        task_ids = inputs.pop("task_ids", None)
        self._outputs = None
        with score_labelled_only(inputs["input_ids"].device):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._outputs is not None:
            self._measure(inputs, task_ids, *self._outputs)
            self._outputs = None
        return result

    def _keep_outputs(self, module: nn.Module, arguments: tuple, output: Any) -> None:
        if getattr(output, "is_top1", None) is not None:
            self._outputs = (output.log_probs.detach(), output.is_top1.detach(), output.label_mask)

    def _measure(
        self,
        inputs: dict[str, Any],
        task_ids: torch.Tensor | None,
        log_probs: torch.Tensor,
        is_top1: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        """Adds loss, hits and count of each learned token to its task and to its level, without leaving the device."""
        labels = inputs["labels"][:, 1:] if inputs.get("shift_labels") is None else inputs["shift_labels"]
        if labels.shape != mask.shape:
            return
        precision = torch.float32 if mask.device.type == "mps" else torch.float64
        values = torch.stack([-log_probs[mask], is_top1[mask], torch.ones_like(log_probs[mask])], dim=1).to(precision)
        mode = "train" if self.model.training else "eval"
        if mode not in self._sums:
            size = (len(self.tasks) + self._levels + 1, 3)
            self._sums[mode] = torch.zeros(size, dtype=precision, device=mask.device)
        sums = self._sums[mode]
        if self._level_of_token.device != mask.device:
            self._level_of_token = self._level_of_token.to(mask.device)
        sums.index_add_(0, len(self.tasks) + self._level_of_token[labels[mask]], values)
        if task_ids is not None:
            if "seq_idx" in inputs:
                task = task_ids[inputs["seq_idx"][:, 1:].long()]
            else:
                task = task_ids[:, None].expand(mask.shape)
            sums.index_add_(0, task[mask], values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        sums = self._sums.pop(mode, None)
        if sums is not None:
            prefix = "eval_" if mode == "eval" else ""
            logs.update({prefix + key: value for key, value in self._means(sums).items()})
        super().log(logs, start_time)

    def _means(self, sums: torch.Tensor) -> dict[str, float]:
        table = self.accelerator.reduce(sums, "sum").tolist()
        tasks, levels, text = table[: len(self.tasks)], table[len(self.tasks) : -1], table[-1]
        count = sum(row[2] for row in [*levels, text])
        means = {"target_loss": sum(row[0] for row in [*levels, text]) / max(count, 1)}
        means |= {f"loss_{task}": row[0] / row[2] for task, row in zip(self.tasks, tasks, strict=True) if row[2]}
        means |= {f"sid_accuracy_{n}": row[1] / row[2] for n, row in enumerate(levels, 1) if row[2]}
        return means | ({"text_accuracy": text[1] / text[2]} if text[2] and levels else {})


@contextlib.contextmanager
def score_labelled_only(device: torch.device) -> Iterator[None]:
    """Makes TRL's fused LM head score only the learned positions on CPU, as it does on GPUs.

    TRL scores every position where Triton is missing, to keep shapes fixed for compiled devices. On CPU that costs half
    of the time of a step when a fifth of the tokens is learned, and changes no value: the other positions are masked
    afterwards.
    """
    if device.type != "cpu":
        yield
        return
    original = trl_utils._use_triton
    trl_utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl_utils._use_triton = original


def check_packing(model: PreTrainedModel, args: SFTConfig) -> None:
    """Refuses packing or padding-free batches unless examples in one row provably do not see each other.

    Flash attention receives the borders of the examples. Every other attention must derive them from the position ids,
    which not every model does; so two short examples are run in one row and alone, and their logits compared.

    Raises:
        ConfigError: a packing strategy that cuts examples, or logits that differ.
    """
    if args.packing and args.packing_strategy != "bfd":
        raise ConfigError(
            f"packing_strategy '{args.packing_strategy}' cuts examples apart, which separates targets from their "
            "context; use 'bfd'."
        )
    attention = getattr(model.config, "_attn_implementation", None)
    if attention in _FLASH:
        return
    if any(getattr(p, "ds_id", None) is not None for p in model.parameters()):
        raise ConfigError(
            f"Packing with attention '{attention}' cannot be checked on a model sharded by ZeRO-3; load it with "
            f"attn_implementation flash_attention_2 or switch packing off."
        )
    error = packing_error(model)
    if not error <= _PACKING_TOLERANCE:
        raise ConfigError(
            f"{type(model).__name__} with attention '{attention}' lets packed examples see each other (their logits "
            f"differ by {error:.1e} from those of the examples alone); switch packing and padding_free off or use "
            "flash_attention_2."
        )


@torch.no_grad()
def packing_error(model: PreTrainedModel) -> float:
    """Largest difference of the logits of two short examples in one row from their logits alone.

    Relative to the largest logit.
    """
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randint(0, weight.shape[0], (n,), generator=generator).tolist() for n in (5, 8)]
    packed = TaskCollator(pad_token_id=0, padding_free=True)([{"input_ids": x} for x in lists])
    packed = {k: v.to(weight.device) if torch.is_tensor(v) else v for k, v in packed.items() if k != "labels"}
    training = model.training
    model.eval()
    try:
        together = model(**packed, use_cache=False).logits[0].float()
        inputs = [torch.tensor([x], device=weight.device) for x in lists]
        reference = torch.cat([model(input_ids=x, use_cache=False).logits[0].float() for x in inputs])
    finally:
        model.train(training)
    return float((together - reference).abs().max() / reference.abs().max().clamp(min=1e-12))


def _checked(dataset: Dataset, config: PretrainedConfig, args: SFTConfig, where: str) -> ExampleSizes:
    sizes = measure(dataset, config.vocab_size, where)
    longest = int(sizes.tokens.max())
    if args.max_length is not None and longest > args.max_length:
        number = int((sizes.tokens > args.max_length).sum())
        raise ConfigError(
            f"{where} holds {number} examples longer than max_length={args.max_length} (the longest has {longest} "
            "tokens), and cutting them would drop their targets; raise max_length or lower max_history."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"{where} holds an example of {longest} tokens, but the model has {positions} positions; lower max_history."
        )
    return sizes


def _tasks(datasets: list[Dataset]) -> list[str]:
    found: set[str] = set()
    for dataset in datasets:
        if "task" in dataset.column_names:
            found.update(dataset.unique("task"))
    if None in found:
        raise DataError("The column 'task' holds an empty value; name the task of every example.")
    return sorted(found)


def _levels(
    level_token_ids: Sequence[Sequence[int]] | None, weight: torch.Tensor, config: PretrainedConfig
) -> torch.Tensor:
    """`(V,)` int64: the place of each token's level; tokens of no level come last."""
    levels = level_token_ids or []
    vocabulary = max(config.vocab_size, weight.shape[0] if weight.ndim == 2 else 0)
    table = torch.full((vocabulary,), len(levels), dtype=torch.int64)
    for n, ids in enumerate(levels):
        table[torch.tensor(np.array(ids, dtype=np.int64))] = n
    return table

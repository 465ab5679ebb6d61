"""What our trainers on TRL have in common beside `finite.py`: how a TRL user's arguments become theirs, what decays, no telemetry.

Our own plumbing.
"""

from __future__ import annotations

from typing import Any

import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from sidtune.core.errors import ConfigError, DataError
from sidtune.trainers.common.args import machine_defaults
from sidtune.trainers.common.callbacks import MarkComplete, SetEpoch
from sidtune.trainers.common.finite import FiniteSteps


class TrlHooks(FiniteSteps):
    """Mixin of a trainer of TRL's: `train_mode` says what trains ("rows", "lora" or "all")."""

    def __init__(self, *, model: Any, train: str | None, **options: Any) -> None:
        adapted = isinstance(model, PeftModel) or options.get("peft_config") is not None
        self.train_mode = train or ("lora" if adapted else "all")
        self._epoch_callback = SetEpoch()
        options["callbacks"] = [self._epoch_callback, MarkComplete(), *(options.get("callbacks") or [])]
        super().__init__(model=model, **options)
        if self.train_mode != "all" and is_deepspeed_zero3_enabled():
            accept_whole_heads()

    def _send_telemetry(self) -> None:
        """Sends nothing."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the decayed parameters: none for "rows", the LoRA factors for "lora", transformers' choice for
        "all".

        A decayed embedding shrinks also the rows that no gradient reaches, so new-rows training would damage the old
        ones.
        """
        names = super().get_decay_parameter_names(model)
        if self.train_mode == "rows":
            return []
        return [n for n in names if "lora_" in n] if self.train_mode == "lora" else names


def causal_config(model: Any, task: str) -> PretrainedConfig:
    """The text config of a model, or of the model that a name or folder stands for, before it is loaded.

    Raises:
        ConfigError: an encoder-decoder model.
    """
    config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config
    if config.is_encoder_decoder:
        named = f"'{model}'" if isinstance(model, str) else type(model).__name__
        raise ConfigError(f"{named} is an encoder-decoder model; {task} here needs a causal LM such as Qwen3.")
    return config.get_text_config()


def default_args(kind: type, model: Any, suffix: str) -> Any:
    """TRL's default config of a trainer that was given none, with what this machine can do."""
    name = model if isinstance(model, str) else model.config._name_or_path
    return kind(f"{name.rstrip('/').rpartition('/')[2] or 'model'}-{suffix}", **machine_defaults())


def check_dataset(data: Any, name: str) -> None:
    """Raises DataError unless `data` is a `Dataset` with rows."""
    if not isinstance(data, Dataset):
        raise DataError(f"{name} must be a datasets.Dataset, got {type(data).__name__}; load or convert it first.")
    if not len(data):
        raise DataError(f"{name} holds no examples; check the tasks, their limits and the split.")


def accept_whole_heads() -> None:
    """Lets TRL's fused LM head take a head that is put together on the fly, under ZeRO-3.

    TRL gathers the head's parameter there and stumbles over a plain tensor, which is what the head is while only the
    rows of new tokens train: already whole. Done once per process; a parameter is treated as before.
    """
    original = trl_utils.maybe_gather_lm_head_ctx
    if getattr(original, "takes_whole_heads", False):
        return

    def gather(*params: torch.Tensor | None) -> Any:
        return original(*(p for p in params if p is not None and hasattr(p, "ds_status")))

    gather.takes_whole_heads = True  # type: ignore[attr-defined]
    trl_utils.maybe_gather_lm_head_ctx = gather

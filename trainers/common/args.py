"""From the `args` of a stage to TRL's `SFTConfig`: every key known, every value of the right type, defaults that fit
the machine.

Our choices, not a paper's. Where there is no accelerator the default is fp32 on the CPU without activation
checkpointing; TRL's own default (bf16, checkpointing) is kept where there is one. Several CPU processes need help:
accelerate forms a group of CPU processes only when told `use_cpu`, which in turn hides a DeepSpeed launch, so a
DeepSpeed launch without an accelerator gets the gloo backend instead. FSDP has no CPU form in accelerate: it would
silently become plain data parallelism, so it is refused.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from pathlib import Path
from typing import Any, TypeVar

import torch
from trl import SFTConfig

from sidtune.core.config import check_keys, check_types
from sidtune.core.errors import ConfigError

T = TypeVar("T")

RESERVED = {
    "output_dir": "the stage has its own folder",
    "max_length": "set max_length of the stage",
    "truncation_mode": "an example is never cut",
    "dataset_kwargs": "examples are tokenised before training",
    "dataset_text_field": "examples are tokenised before training",
    "dataset_num_proc": "examples are tokenised before training",
    "completion_only_loss": "the learn flags of the examples decide what is learned",
    "assistant_only_loss": "the learn flags of the examples decide what is learned",
    "eos_token": "the tokenizer of the model decides",
    "pad_token": "the tokenizer of the model decides",
    "chat_template_path": "the templates of the data set decide",
    "remove_unused_columns": "the trainer needs the column 'task'",
    "label_names": "the label column is fixed",
    "resume_from_checkpoint": "an interrupted stage resumes by itself",
    "save_only_model": "an interrupted stage could not resume",
    "ignore_data_skip": "a resumed stage would train on other examples",
    "load_best_model_at_end": "a stage ends with its last step; choose max_steps instead",
    "do_train": "a stage always trains",
    "do_eval": "name eval_tasks instead",
    "do_predict": "evaluate in its own step",
    "deepspeed": "choose it with accelerate launch --config_file",
    "fsdp": "choose it with accelerate launch --config_file",
    "fsdp_config": "choose it with accelerate launch --config_file",
    "push_to_hub": "publishing is a step of the recipe",
    "hub_model_id": "publishing is a step of the recipe",
    "hub_token": "publishing is a step of the recipe",
    "trust_remote_code": "sidtune runs no code from model folders",
    "auto_find_batch_size": "it would change the global batch size silently",
}
_ALIASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def machine_defaults() -> dict[str, Any]:
    """Defaults that depend on the machine and on how the process was launched.

    Raises:
        ConfigError: an FSDP launch without an accelerator.
    """
    known = fields_of(SFTConfig)
    checkpointing = _ALIASES["gradient_checkpointing"]
    checkpointing = checkpointing if checkpointing in known else "gradient_checkpointing"
    if torch.accelerator.is_available():
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return {"bf16": bf16, checkpointing: True}
    values = {"bf16": False, checkpointing: False, "dataloader_pin_memory": False}
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ConfigError(
            "FSDP was asked for, but this machine has no accelerator and accelerate shards on accelerators only; "
            "launch with ddp_cpu.yaml or zero2_cpu.yaml instead."
        )
    if _deepspeed_launch():
        return values | {"ddp_backend": "gloo"}
    return values | {"use_cpu": True}


def checked_args(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The `args` of a stage with known keys and right types; touches no device, so a pipeline can call it before any
    work.

    Raises:
        ConfigError: an unknown or reserved key, or a value of the wrong type.
    """
    return checked_fields(SFTConfig, RESERVED, values, where)


def checked_fields(kind: type, reserved: dict[str, str], values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` as fields of the config class `kind`; shared by every trainer's `args`.

    Args:
        reserved: fields that cannot be set, and why.

    Raises:
        ConfigError: an unknown or reserved key, or a value of the wrong type.
    """
    values, known = dict(values), fields_of(kind)
    check_keys(values, sorted(set(known) - set(reserved) | (set(reserved) & set(values))), where)
    for key, reason in reserved.items():
        if key in values:
            raise ConfigError(f"{where}: the key '{key}' cannot be set here ({reason}); remove it.")
    for old, new in _ALIASES.items():
        if old in values and new in known:
            if new in values:
                raise ConfigError(f"{where}: '{old}' and '{new}' mean the same; keep one of them.")
            values[new] = values.pop(old)
    values = {key: _number(value, known[key]) for key, value in values.items()}
    check_types(kind, values, where)
    return values


def built(kind: type[T], values: dict[str, Any], seed: int, where: str, **fixed: Any) -> T:
    """The config `kind` of a run: checked `values` over the defaults of every run and of this machine.

    Raises:
        ConfigError: `use_cpu` under DeepSpeed, or values that do not go together.
    """
    if values.get("use_cpu") and _deepspeed_launch():
        raise ConfigError(
            f"{where}: use_cpu hides the DeepSpeed launch; remove it, the CPU is used where nothing else is."
        )
    defaults = {
        "report_to": "none",
        "seed": seed,
        "logging_first_step": True,
        "save_total_limit": 2,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": 7200,
        "disable_tqdm": False,
        **machine_defaults(),
    }
    try:
        return kind(**{**defaults, **values, **fixed})
    except (ValueError, TypeError, ImportError, AssertionError) as error:
        raise ConfigError(f"{where}: the arguments do not go together ({sentence(error)}).") from None


def sft_config(
    values: dict[str, Any], *, output_dir: str | Path, max_length: int | None, seed: int, evaluate: bool, where: str
) -> SFTConfig:
    """Builds the config of one stage.

    Args:
        values: the `args` of the stage: fields of SFTConfig but the reserved ones.
        output_dir: folder of the checkpoints.
        max_length: longest example in tokens.
        seed: seed of the run; `seed` in `values` wins.
        evaluate: whether there is evaluation data. Unless `values` say otherwise, it is used at the end of each epoch.
        where: how messages call this place.

    Raises:
        ConfigError: an unknown or reserved key, a value of the wrong type, or values that do not go together.
    """
    values = checked_args(values, where)
    if values.get("eval_strategy", "no") != "no" and not evaluate:
        raise ConfigError(f"{where}: eval_strategy is set, but the stage names no eval_tasks; add some or remove it.")
    values.setdefault("eval_strategy", "epoch" if evaluate else "no")
    config = built(SFTConfig, values, seed, where, output_dir=str(output_dir), max_length=max_length)
    if config.packing and max_length is None:
        raise ConfigError(
            f"{where}: packing needs max_length, the length of a packed row; set max_length of the stage."
        )
    return config


def fields_of(kind: type) -> dict[str, Any]:
    """Field name → type of a config dataclass."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}


def _number(value: Any, hint: Any) -> Any:
    """YAML reads `1e-4` as a text; where a number is expected it becomes one."""
    inner = typing.get_args(hint) or (hint,)
    if isinstance(value, str) and float in inner and str not in inner:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _deepspeed_launch() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def sentence(error: BaseException) -> str:
    """The message of another library's error on one line."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__

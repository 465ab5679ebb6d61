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
import logging
import os
import typing
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

from sidtune.core.config import check_keys, check_types
from sidtune.core.console import TRACKER_VARIABLE
from sidtune.core.errors import ConfigError, nearest
from sidtune.core.shapes import as_number

logger = logging.getLogger(__name__)
T = TypeVar("T")

# What no training can be told, and why.
COMMON = {
    "output_dir": "the run has its own folder",
    "resume_from_checkpoint": "an interrupted run resumes by itself",
    "save_only_model": "an interrupted run could not resume",
    "ignore_data_skip": "a resumed run would train on other examples",
    "load_best_model_at_end": "a run ends with its last step; choose max_steps instead",
    "remove_unused_columns": "the trainer reads every column",
    "label_names": "the label column is fixed",
    "do_train": "a run always trains",
    "auto_find_batch_size": "it would change the global batch size silently",
    "trust_remote_code": "sidtune runs no code from model folders",
    **dict.fromkeys(("do_eval", "do_predict"), "evaluate in its own step"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "choose it with accelerate launch --config_file"),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token"), "publishing is a step of the recipe"),
}
_TOKENISED = ("dataset_kwargs", "dataset_text_field", "dataset_num_proc")
RESERVED = {
    **COMMON,
    "max_length": "set max_length of the stage",
    "truncation_mode": "an example is never cut",
    "do_eval": "name eval_tasks instead",
    "chat_template_path": "the templates of the data set decide",
    **dict.fromkeys(_TOKENISED, "examples are tokenised before training"),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), "the learn flags of the examples decide"),
    **dict.fromkeys(("eos_token", "pad_token"), "the tokenizer of the model decides"),
}
_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(
        ("num_train_epochs", "learning_rate", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm"), 0
    ),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), 1e-9),
    **dict.fromkeys(("dataloader_num_workers", "seed", "neftune_noise_alpha"), 0),
    **dict.fromkeys(("save_total_limit", "num_generations", "max_completion_length", "num_iterations"), 1),
    "max_steps": -1,
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
    tracker = {"report_to": os.environ[TRACKER_VARIABLE]} if TRACKER_VARIABLE in os.environ else {}
    if torch.accelerator.is_available():
        return {"bf16": fast_bf16(), checkpointing: True, **tracker}
    values = {"bf16": False, checkpointing: False, "dataloader_pin_memory": False, **tracker}
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ConfigError(
            "FSDP was asked for, but this machine has no accelerator and accelerate shards on accelerators only; "
            "launch with ddp_cpu.yaml or zero2_cpu.yaml instead."
        )
    if _deepspeed_launch():
        return values | {"ddp_backend": "gloo"}
    return values | {"use_cpu": True}


def fast_bf16() -> bool:
    """Whether bfloat16 is quick here: on a GPU that has it, or a processor with AMX; others emulate it, several times slower."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def checked_fields(kind: type, reserved: dict[str, str], values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` as fields of the config class `kind`; shared by every trainer's `args`. `bf16: auto` is decided here.

    Args:
        reserved: fields that cannot be set, and why.

    Raises:
        ConfigError: an unknown or reserved key, or a value of the wrong type or range.
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
    values = {key: as_number(value, known[key]) for key, value in values.items()}
    if values.get("bf16") == "auto":
        values["bf16"] = fast_bf16()
    elif values.get("bf16") is True and not fast_bf16():
        logger.warning("%s: bf16 is emulated on this processor, several times slower; set it to auto or false.", where)
    check_types(kind, values, where)
    for key, value in values.items():
        if (least := _LEAST.get(key)) is not None and isinstance(value, (int, float)) and value < least:
            raise ConfigError(f"{where}: {key} must be at least {least}, got {value}; correct it.")
    if values.get("max_steps") == 0 or values.get("num_train_epochs", 1) <= 0:
        raise ConfigError(
            f"{where}: there is nothing to train with max_steps 0 or epochs that are not above 0; raise them."
        )
    return values


def check_together(kind: type, values: dict[str, Any], where: str, processes: int | None = None, **fixed: Any) -> None:
    """Refuses what the config `kind`, its optimizer or its schedule refuses, without touching a device or a launch.

    Args:
        values: of `checked_fields`.
        processes: how many processes share a batch; None where nobody knows, then batch sizes are not compared.
        fixed: fields that the run sets.

    Raises:
        ConfigError: with the reason of transformers, TRL or torch.
    """
    for one in dataclasses.fields(kind):
        choices = one.metadata.get("choices")
        if choices and values.get(one.name) is not None and values[one.name] not in choices:
            raise ConfigError(f"{where}: {one.name}: {nearest(str(values[one.name]), choices)}")
    unknown = {"tf32", "torch_compile"} | (set() if processes else {"generation_batch_size"})
    values = {key: value for key, value in {**values, **fixed}.items() if key not in unknown}
    values = {"report_to": "none", "bf16": False, "output_dir": ".", **values, "use_cpu": True}
    values.setdefault(_ALIASES["gradient_checkpointing"], False)
    try:
        made = _dry(kind, processes or values.get("num_generations") or 1)(**values)
        if missing := set(made.report_to) - set(get_available_reporting_integrations()):
            raise ValueError(f"report_to names {', '.join(missing)}, which is unknown or not installed")
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(made, None)
        whole = "model" in options or "optimizer_dict" in options  # made for a model, not for parameters
        made_for = torch.optim.SGD([weight], lr=1e-3) if whole else optimizer([weight], **options)
        schedule = {"scheduler_specific_kwargs": made.lr_scheduler_kwargs or {}, "num_training_steps": 100}
        get_scheduler(made.lr_scheduler_type, made_for, num_warmup_steps=made.get_warmup_steps(100), **schedule)
    except (ValueError, TypeError, ImportError, AssertionError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{where}: the arguments do not go together ({sentence(error)}).") from None


def _dry(kind: type, processes: int) -> type:
    """`kind` without its look at devices and launch, which would form the group of processes."""
    machine = {"_setup_devices": torch.device("cpu"), "_n_gpu": 0, "distributed_state": None}
    return type(kind.__name__, (kind,), {**machine, "world_size": processes})


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


def checked_sft(values: dict[str, Any], *, max_length: int | None, evaluate: bool, where: str) -> dict[str, Any]:
    """The `args` of a stage with known keys, right types and values that go together; touches no device.

    Args:
        values: fields of SFTConfig but the reserved ones.
        max_length: longest example in tokens.
        evaluate: whether there is evaluation data. Unless `values` say otherwise, it is used at the end of each epoch.
        where: how messages call this place.

    Raises:
        ConfigError: an unknown or reserved key, a value of the wrong type or range, or values that do not go together.
    """
    values = checked_fields(SFTConfig, RESERVED, values, where)
    if values.get("eval_strategy", "no") != "no" and not evaluate:
        raise ConfigError(f"{where}: eval_strategy is set, but the stage names no eval_tasks; add some or remove it.")
    if values.get("packing") and max_length is None:
        raise ConfigError(
            f"{where}: packing needs max_length, the length of a packed row; set max_length of the stage."
        )
    values.setdefault("eval_strategy", "epoch" if evaluate else "no")
    check_together(SFTConfig, values, where, max_length=max_length)
    return values


def sft_config(
    values: dict[str, Any], *, output_dir: str | Path, max_length: int | None, seed: int, evaluate: bool, where: str
) -> SFTConfig:
    """Builds the config of one stage.

    Args:
        output_dir: folder of the checkpoints.
        seed: seed of the run; `seed` in `values` wins.
        values, max_length, evaluate, where: see `checked_sft`.

    Raises:
        ConfigError: as `checked_sft`, or values that do not fit this machine.
    """
    values = checked_sft(values, max_length=max_length, evaluate=evaluate, where=where)
    return built(SFTConfig, values, seed, where, output_dir=str(output_dir), max_length=max_length)


def fields_of(kind: type) -> dict[str, Any]:
    """Field name → type of a config dataclass."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}


def _deepspeed_launch() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def sentence(error: BaseException) -> str:
    """The message of another library's error on one line."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__

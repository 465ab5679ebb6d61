"""From the `args` of a GRPO run to a `DebiasedGRPOConfig`: every key known, every type right, contradictions told
before any work.

Like `sft_args.py`, whose defaults for the machine and the launch it shares. Our own plumbing.
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from sidtune.core.config import check_keys, check_types
from sidtune.core.errors import ConfigError
from sidtune.trainers.grpo_config import DebiasedGRPOConfig
from sidtune.trainers.sft_args import deepspeed_launch, machine_defaults, number, sentence

RESERVED = {
    "output_dir": "the run has its own folder",
    "reward_weights": "weights stand in `rewards`",
    "remove_unused_columns": "the rewards read every column",
    "label_names": "there are no label columns",
    "resume_from_checkpoint": "an interrupted run resumes by itself",
    "save_only_model": "an interrupted run could not resume",
    "ignore_data_skip": "a resumed run would see other prompts",
    "load_best_model_at_end": "a run ends with its last step; choose max_steps instead",
    "do_train": "a run always trains",
    "do_eval": "evaluate in its own step",
    "do_predict": "evaluate in its own step",
    "eval_strategy": "evaluate in its own step",
    "deepspeed": "choose it with accelerate launch --config_file",
    "fsdp": "choose it with accelerate launch --config_file",
    "fsdp_config": "choose it with accelerate launch --config_file",
    "push_to_hub": "publishing is a step of the recipe",
    "hub_model_id": "publishing is a step of the recipe",
    "hub_token": "publishing is a step of the recipe",
    "trust_remote_code": "sidtune runs no code from model folders",
    "auto_find_batch_size": "it would change the groups silently",
    "use_vllm": "rollouts are decoded over the catalogue's trie by the model itself",
    "chat_template_kwargs": "the templates of the model folder decide",
    "log_completions_hub_repo": "publishing is a step of the recipe",
}
_ALIASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def checked_args(values: dict[str, Any], where: str = "args") -> dict[str, Any]:
    """`args` with known keys, right types and settings that go together; touches no device.

    Raises:
        ConfigError: an unknown or reserved key, a value of the wrong type, or settings that contradict each other.
    """
    known = _fields()
    check_keys(values, sorted(set(known) - set(RESERVED) | (set(RESERVED) & set(values))), where)
    for key, reason in RESERVED.items():
        if key in values:
            raise ConfigError(f"{where}: the key '{key}' cannot be set here ({reason}); remove it.")
    values = dict(values)
    for old, new in _ALIASES.items():
        if old in values and new in known:
            if new in values:
                raise ConfigError(f"{where}: '{old}' and '{new}' mean the same; keep one of them.")
            values[new] = values.pop(old)
    values = {key: number(value, known[key]) for key, value in values.items()}
    check_types(DebiasedGRPOConfig, values, where)
    DebiasedGRPOConfig.check_settings(values)
    return values


def grpo_config(
    values: dict[str, Any], *, output_dir: str | Path, seed: int, where: str = "args"
) -> DebiasedGRPOConfig:
    """Builds the config of a run.

    Args:
        values: `args`: fields of DebiasedGRPOConfig but the reserved ones.
        output_dir: folder of the checkpoints.
        seed: seed of the run; `seed` in `values` wins.
        where: how messages call this place.

    Raises:
        ConfigError: as `checked_args`, or batch sizes that do not fit the groups.
    """
    values = checked_args(values, where)
    if values.get("use_cpu") and deepspeed_launch():
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
        return DebiasedGRPOConfig(output_dir=str(output_dir), **{**defaults, **values})
    except (ValueError, TypeError, ImportError, AssertionError) as error:
        raise ConfigError(f"{where}: the arguments do not go together ({sentence(error)}).") from None


def _fields() -> dict[str, Any]:
    hints = typing.get_type_hints(DebiasedGRPOConfig)
    return {f.name: hints[f.name] for f in dataclasses.fields(DebiasedGRPOConfig) if f.init}

"""From the `args` of a GRPO run to a `DebiasedGRPOConfig`: every key known, every type right, contradictions told
before any work.

By the mechanism of `../common/args.py`. Our own plumbing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled

from sidtune.core.errors import ConfigError
from sidtune.trainers.common.args import COMMON, built, check_together, checked_fields
from sidtune.trainers.grpo.config import DebiasedGRPOConfig

RESERVED = {
    **COMMON,
    "reward_weights": "weights stand in `rewards`",
    "eval_strategy": "evaluate in its own step",
    "use_vllm": "rollouts are decoded over the catalogue's trie by the model itself",
    "chat_template_kwargs": "the templates of the model folder decide",
    "log_completions_hub_repo": "publishing is a step of the recipe",
}


def checked_args(values: dict[str, Any], where: str = "args", processes: int | None = None) -> dict[str, Any]:
    """`args` with known keys, right types and settings that go together; touches no device.

    Batch sizes are compared where the number of `processes` is given.

    Raises:
        ConfigError: an unknown or reserved key, a value of the wrong type, or settings that contradict each other.
    """
    values = checked_fields(DebiasedGRPOConfig, RESERVED, values, where)
    DebiasedGRPOConfig.check_settings(values)
    check_together(DebiasedGRPOConfig, values, where, processes)
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
    return built(DebiasedGRPOConfig, values, seed, where, output_dir=str(output_dir))


def check_launch(trainer: Any) -> None:
    """Refuses batches and launches that rollouts cannot work with."""
    needed = trainer.args.generation_batch_size // trainer.num_generations
    if len(trainer.train_dataset) < needed:  # TRL would end without a step
        raise ConfigError(
            f"One generation takes {needed} prompts, but there are only {len(trainer.train_dataset)}; lower "
            "per_device_train_batch_size or use more prompts."
        )
    if trainer.is_fsdp_enabled:
        raise ConfigError(
            "Rollouts need whole weights on every process, which FSDP does not give here; launch with ddp, zero2 or zero3."
        )
    rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    if trainer.args.rollout == "without_replacement" and rows % trainer.num_generations:
        raise ConfigError(
            f"A set drawn without replacement must lie on one process: per_device_train_batch_size x steps_per_generation "
            f"({rows}) must be a multiple of num_generations ({trainer.num_generations})."
        )
    if is_deepspeed_zero3_enabled() and not trainer.args.ds3_gather_for_generation:
        raise ConfigError(
            "Constrained decoding under ZeRO-3 needs the weights gathered; leave ds3_gather_for_generation at true."
        )

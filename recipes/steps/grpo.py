"""Debiased GRPO on logged requests: rollouts over the catalogue's trie, rewards from feedback, a model folder like an
SFT stage's.

    sidtune grpo --config recipes/quickstart/grpo.yaml --data_dir runs/quickstart/data \\
        --sids_dir runs/quickstart/sids --model_dir runs/quickstart/sft --output_dir runs/quickstart/grpo

The output folder is a complete model folder (model, tokenizer, SID vocabulary, prompt settings), with `run.json`,
`log_history.json` and, unless everything was trained, `trained/`. An interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sidtune.core.config import build, command
from sidtune.core.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass
class Arguments:
    """Options of grpo.

    Attributes:
        data_dir, sids_dir, model_dir: folders of the earlier steps; `model_dir` is a model folder or the folder of
            `sft`.
        output_dir: folder to write.
        rewards: name → weight or options, see `trainers.rewards`.
        args: fields of `trainers.grpo.config.DebiasedGRPOConfig`: preset, rollout, batch sizes, learning rate, ...
        train: what trains: "rows", "lora" (LoRA factors and SID rows) or "all".
        lora: options of LoRA for train="lora" (fields of `peft.LoraConfig`).
        gains: how feedback becomes gains, see `trainers.rewards.gains.GainsConfig`.
        position_bias: null, `interventions` or `em` (estimated from the train requests), or a folder that holds one.
        split: requests to train on: "train", or "valid", which SFT has not seen (choose no settings on it then).
        hard_set: parquet file with a column `request_id`: only these requests are used; null for all.
        max_requests: at most so many requests, drawn at random; null for all.
        end_of_reasoning: text of the token that ends a reasoning (rollout "reasoning").
        max_length: most tokens of prompt, reasoning and SID together; null takes the model's prompt settings.
        seed: of the choice of requests, the order, the rollouts and LoRA.
    """

    data_dir: str
    sids_dir: str
    model_dir: str
    output_dir: str
    rewards: dict = field(default_factory=lambda: {"list_ndcg": 1.0})
    args: dict = field(default_factory=dict)
    train: Literal["rows", "lora", "all"] = "all"
    lora: dict = field(default_factory=dict)
    gains: dict = field(default_factory=dict)
    position_bias: str | None = None
    split: Literal["train", "valid"] = "train"
    hard_set: str | None = None
    max_requests: int | None = None
    end_of_reasoning: str = "</think>"
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        from sidtune.trainers.grpo.args import checked_args
        from sidtune.trainers.rewards.batch import build_rewards
        from sidtune.trainers.rewards.gains import GainsConfig

        checked_args(self.args, "args")
        build_rewards(self.rewards)
        build(GainsConfig, self.gains, "gains")
        if self.lora and self.train != "lora":
            raise ConfigError(f"LoRA options need train: lora, but train is '{self.train}'; change one of them.")
        if self.max_requests is not None and self.max_requests < 1:
            raise ConfigError(f"max_requests must be at least 1, or null for all, got {self.max_requests}.")


def main(arguments: Arguments) -> None:
    """Trains; writes the model folder."""
    from sidtune.data_builders.tables.store import load_folder
    from sidtune.decoding.retrieval.model_folder import ModelFolder
    from sidtune.trainers.grpo.stage import GRPOStage, run_grpo

    source = ModelFolder.open(arguments.model_dir, arguments.sids_dir, load_folder(arguments.data_dir))
    stage = GRPOStage(
        model_dir=source.path,
        data_dir=Path(arguments.data_dir),
        sids_dir=Path(arguments.sids_dir) / "sids",
        output_dir=Path(arguments.output_dir),
        serializer=source.serializer,
        max_history=source.settings.max_history,
        max_length=arguments.max_length or source.settings.max_length,
        save_prompts=source.complete,
    )
    metrics = run_grpo(stage, arguments)
    if metrics is not None:
        logger.info("%s: %d steps on %d prompts", arguments.output_dir, metrics["steps"], metrics["prompts"])


if __name__ == "__main__":
    command(main, Arguments)

"""Supervised fine-tuning in stages: each reads the model folder of the one before and writes its own.

    stages = parse_stages(yaml["stages"])
    folders = run_stages(stages, "work/model", "work/data", "work/sids", "work/sft", seed=1)

The folders are `stage_1_<name>/`, `stage_2_<name>/`, ..., see `trainers/common/stage.py`; while a stage trains, its mixture and its
checkpoints lie in `.work_stage_<k>/`. A changed stage is trained again, and so is every later one, because its input model changes.

Nothing here is prescribed by a paper; the tasks of the stages are (see the recipes).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl import SFTConfig

from sidtune.core.config import as_dict
from sidtune.core.errors import ConfigError
from sidtune.core.folders import fingerprint
from sidtune.core.processes import on_main
from sidtune.trainers.common.args import sft_config
from sidtune.trainers.common.stage import Stage
from sidtune.trainers.common.stage_model import StageModel
from sidtune.trainers.sft.mixture import StageConfig, TaskMix, describe, mixture, parse_stages
from sidtune.trainers.sft.task_examples import TaskExamples
from sidtune.trainers.sft.trainer import SidSFTTrainer

__all__ = ["BuildExamples", "StageConfig", "TaskMix", "parse_stages", "run_stages", "stage_folder"]

BuildExamples = Callable[[StageConfig, str, StageModel], dict[str, Dataset]]
"""(stage, "train" or "valid", opened model) → tokenised examples of each task of that split, columns input_ids and
labels.
"""
logger = logging.getLogger(__name__)


def stage_folder(output_dir: str | Path, number: int, stage: StageConfig) -> Path:
    """The folder of stage `number`, counted from 1."""
    return Path(output_dir) / f"stage_{number}_{stage.name}"


def run_stages(
    stages: Sequence[StageConfig | dict[str, Any]],
    model_folder: str | Path,
    data: str | Path,
    sids: str | Path,
    output_dir: str | Path,
    *,
    seed: int = 0,
    build_examples: BuildExamples | None = None,
    extra_inputs: dict[str, str | Path] | None = None,
    settings: dict[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[Path]:
    """Trains all stages, skipping finished ones and resuming an interrupted one.

    Started by `accelerate launch` every process calls this; only the main one writes, so `output_dir` must be on a file
    system that all machines share.

    Args:
        stages: the stages in order, as `StageConfig` or mappings of its fields.
        model_folder: model, tokenizer and SID vocabulary to start from.
        data: data folder (`data_builders/tables/store.py`).
        sids: semantic-ID folder.
        output_dir: where the stage folders go.
        seed: seed of mixtures, order and initialisation; `seed` in a stage's `args` wins for the training itself.
        build_examples: makes the examples of a stage; default: `data_builders.tasks` by the names of the tasks.
        extra_inputs: role → path of further inputs of `build_examples` (templates); a change of them retrains.
        settings: further JSON-ready settings the examples depend on; a change of them retrains. Without
            `build_examples` they are the options of `TaskExamples` (templates, max_chars, history_context).
        callbacks: further callbacks of the trainer.

    Returns:
        The folder of each stage.

    Raises:
        ConfigError, DataError: before anything is trained, where the input is to blame.
    """
    stages = parse_stages(stages)
    inputs = {"data": Path(data), "sids": Path(sids), **{k: Path(v) for k, v in (extra_inputs or {}).items()}}
    build = TaskExamples(data, sids, seed=seed, **(settings or {})) if build_examples is None else build_examples
    told: dict[str, Any] = {"settings": settings or {}}
    if isinstance(build, TaskExamples):
        build.check(stages)
        told["examples"] = build.identity()
    runs: list[SFTStage] = []
    for number, stage in enumerate(stages, 1):
        source = runs[-1].output if runs else Path(model_folder)
        runs.append(SFTStage(stage, number, source, Path(output_dir), inputs, seed, build, callbacks))
        runs[-1].arguments()  # a typo in the last stage is told before the first one trains
    known = on_main(lambda: {role: fingerprint(path) for role, path in inputs.items()})
    for run in runs:
        run.known = {**told, **known}
        run.run()
    return [run.output for run in runs]


@dataclass
class SFTStage(Stage):
    """One stage.

    Attributes:
        known: role → what the examples of all stages depend on, inputs by content.
    """

    stage: StageConfig
    number: int
    source: Path
    output_dir: Path
    inputs: dict[str, Path]
    seed: int
    build: BuildExamples
    callbacks: Sequence[TrainerCallback]
    known: dict[str, Any] = field(default_factory=dict)

    step = "sft_stage"

    def __post_init__(self) -> None:
        self.title, self.train, self.lora = (
            f"stage {self.number} '{self.stage.name}'",
            self.stage.train,
            self.stage.lora,
        )
        self.output = stage_folder(self.output_dir, self.number, self.stage)
        self.work = self.output_dir / f".work_stage_{self.number}"
        self.config = {"stage": as_dict(self.stage), "seed": self.seed}
        self.inputs = {"model": self.source, **self.inputs}

    def arguments(self) -> SFTConfig:
        if self.train != "all" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise ConfigError(
                f"{self.title}: train '{self.train}' does not work under FSDP2, which replaces the modules that new rows "
                "are attached to; launch with zero3.yaml, or set train: all."
            )
        return sft_config(
            self.stage.args,
            output_dir=self.work / "checkpoints",
            max_length=self.stage.max_length,
            seed=self.seed,
            evaluate=bool(self.stage.eval_tasks),
            where=f"{self.title}, args",
        )

    def identity(self) -> dict[str, Any]:
        return {**self.config, "model": fingerprint(self.source), **self.known}

    def examples(self, model: StageModel) -> tuple[dict[str, Dataset], dict[str, Any]]:
        data, told = {}, {}
        for split, mixes in (("train", self.stage.tasks), ("valid", self.stage.eval_tasks)):
            if mixes:
                made = self.build(self.stage, split, model)
                data[split] = mixture(made, mixes, self.seed, f"{self.title}, {split}")
                told[split] = describe(data[split])
        for split, tasks in told.items():
            for task, size in tasks.items():
                sizes = (size["examples"], size["tokens"], size["targets"])
                logger.info("%s, %s, %s: %d examples, %d tokens, %d learned", self.title, split, task, *sizes)
        return data, told

    def trainer(self, model: StageModel, data: dict[str, Dataset]) -> SidSFTTrainer:
        return SidSFTTrainer(
            *(model.model, self.args, data["train"], data.get("valid"), model.tokenizer),
            train=self.train,
            level_token_ids=model.level_token_ids,
            callbacks=self.callbacks,
        )

    def metrics(self, trainer: Trainer, told: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
        last = next((h for h in reversed(history) if "eval_loss" in h), {})
        return {"examples": told, "eval": {k: v for k, v in last.items() if k.startswith("eval_")}}

    def complete(self, folder: Path, model: StageModel) -> None:
        if isinstance(self.build, TaskExamples):
            self.build.complete(folder, model)

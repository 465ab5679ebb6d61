"""Training in stages: each stage reads the model folder of the one before and writes its own.

    stages = parse_stages(yaml["stages"])
    folders = run_stages(stages, "work/model", "work/data", "work/sids", "work/sft", seed=1)

`stage_1_<name>/`, `stage_2_<name>/`, ... are complete Hugging Face model folders (model, tokenizer,
`sid_vocabulary.json`), each with `run.json` (config, fingerprints of the inputs, metrics), `log_history.json` (the
curve) and, unless everything was trained, `trained/`: only what this stage trained. While a stage trains, its mixture
and its checkpoints lie in `.work_stage_<k>/`.

A finished stage whose config and inputs are unchanged is skipped; a changed one is trained again, and so is every later
one, because its input model changes. An interrupted stage goes on from its last complete checkpoint and ends with the
weights of an uninterrupted one: the order of examples and the random states are restored, see `batches.py` and
`callbacks.py`.

Nothing here is prescribed by a paper; the tasks of the stages are (see the recipes).
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, load_from_disk
from transformers import TrainerCallback
from trl import SFTConfig

from sidtune.core.config import as_dict
from sidtune.core.errors import ConfigError
from sidtune.core.folders import RUN_FILE, fingerprint, read_json, write_folder, write_json, write_run
from sidtune.core.processes import on_main
from sidtune.trainers.common.args import sft_config
from sidtune.trainers.common.callbacks import last_complete_checkpoint
from sidtune.trainers.common.stage_model import StageModel
from sidtune.trainers.sft.mixture import StageConfig, TaskMix, describe, mixture, parse_stages
from sidtune.trainers.sft.task_examples import TaskExamples
from sidtune.trainers.sft.trainer import SidSFTTrainer

__all__ = ["BuildExamples", "StageConfig", "TaskMix", "parse_stages", "run_stages", "stage_folder"]

BuildExamples = Callable[[StageConfig, str, StageModel], dict[str, Dataset]]
"""(stage, "train" or "valid", opened model) → tokenised examples of each task of that split, columns input_ids and
labels.
"""

HISTORY_FILE = "log_history.json"
_STATE_FILE = "stage.json"
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
    output = Path(output_dir)
    for number, stage in enumerate(stages, 1):
        _config(stage, output, number, seed)  # a typo in the last stage is told before the first one trains
    inputs = {"data": Path(data), "sids": Path(sids), **{k: Path(v) for k, v in (extra_inputs or {}).items()}}
    build = TaskExamples(data, sids, seed=seed, **(settings or {})) if build_examples is None else build_examples
    told: dict[str, Any] = {"settings": settings or {}}
    if isinstance(build, TaskExamples):
        build.check(stages)
        told["examples"] = build.identity()
    known = on_main(lambda: {role: fingerprint(path) for role, path in inputs.items()})
    known["settings"] = _digest(told)
    folders: list[Path] = []
    previous = Path(model_folder)
    for number, stage in enumerate(stages, 1):
        run = _StageRun(stage, number, previous, output, inputs, known, seed, build, list(callbacks))
        previous = run.run()
        folders.append(previous)
    return folders


def _config(stage: StageConfig, output: Path, number: int, seed: int) -> SFTConfig:
    if stage.train != "all" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ConfigError(
            f"stage '{stage.name}': train '{stage.train}' does not work under FSDP2, which replaces the modules that "
            "new rows are attached to; launch with zero3.yaml, or set train: all."
        )
    return sft_config(
        stage.args,
        output_dir=_work_folder(output, number) / "checkpoints",
        max_length=stage.max_length,
        seed=seed,
        evaluate=bool(stage.eval_tasks),
        where=f"stage '{stage.name}', args",
    )


def _work_folder(output: Path, number: int) -> Path:
    return output / f".work_stage_{number}"


class _StageRun:
    """One stage: decide, prepare, train, write."""

    def __init__(
        self,
        stage: StageConfig,
        number: int,
        source: Path,
        output: Path,
        inputs: dict[str, Path],
        known: dict[str, str],
        seed: int,
        build: BuildExamples,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.stage, self.number, self.source, self.output = stage, number, source, output
        self.inputs, self.known, self.seed, self.build, self.callbacks = inputs, known, seed, build, callbacks
        self.folder = stage_folder(output, number, stage)
        self.work = _work_folder(output, number)
        self.title = f"stage {number} '{stage.name}'"

    def run(self) -> Path:
        started = time.time()
        args = _config(self.stage, self.output, self.number, self.seed)  # also forms the group of processes
        plan = on_main(self._decide)
        if plan["done"]:
            logger.info("%s is unchanged and is skipped.", self.title)
            return self.folder
        self._train(args, plan["identity"], started)
        gc.collect()  # the next stage loads its model into the memory of this one
        return self.folder

    def _train(self, args: SFTConfig, identity: str, started: float) -> None:
        stage = self.stage
        model = StageModel.open(self.source, args, name=stage.name, train=stage.train, lora=stage.lora)
        on_main(lambda: self._prepare(identity, model))
        checkpoint = on_main(self._checkpoint)
        trainer = self._trainer(model, args)
        if checkpoint:
            logger.info("%s goes on from %s.", self.title, Path(checkpoint).name)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        self._write(trainer, model, identity, result.metrics, started)

    def _decide(self) -> dict[str, Any]:
        """Main process: is the stage done, and what identifies its result?"""
        inputs = {"model": fingerprint(self.source), **self.known}
        identity = _digest({"stage": as_dict(self.stage), "seed": self.seed, "inputs": inputs})
        done = False
        if (self.folder / RUN_FILE).is_file():
            done = read_json(self.folder / RUN_FILE).get("config", {}).get("fingerprint") == identity
        if done:
            shutil.rmtree(self.work, ignore_errors=True)
        return {"done": done, "identity": identity}

    def _prepare(self, identity: str, model: StageModel) -> None:
        """Main process: builds the mixture, unless an interrupted run of the same stage left it."""
        state = {"identity": identity, "launch": _launch()}
        if (self.work / _STATE_FILE).is_file() and read_json(self.work / _STATE_FILE) == state:
            return
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self._build(self.stage.tasks, "train", model).save_to_disk(str(self.work / "train"))
        if self.stage.eval_tasks:
            self._build(self.stage.eval_tasks, "valid", model).save_to_disk(str(self.work / "valid"))
        write_json(self.work / _STATE_FILE, state)

    def _build(self, mixes: dict[str, TaskMix], split: str, model: StageModel) -> Dataset:
        mixed = mixture(self.build(self.stage, split, model), mixes, self.seed, f"{self.title}, {split}")
        for task, size in describe(mixed).items():
            logger.info(
                "%s, %s, %s: %d examples, %d tokens, %d of them learned",
                *(self.title, split, task, size["examples"], size["tokens"], size["targets"]),
            )
        return mixed

    def _checkpoint(self) -> str | None:
        found = last_complete_checkpoint(self.work / "checkpoints", remove_broken=True)
        return str(found) if found else None

    def _trainer(self, model: StageModel, args: SFTConfig) -> SidSFTTrainer:
        valid = self.work / "valid"
        return SidSFTTrainer(
            model.model,
            args,
            load_from_disk(str(self.work / "train")),
            load_from_disk(str(valid)) if valid.is_dir() else None,
            model.tokenizer,
            train=self.stage.train,
            level_token_ids=model.level_token_ids,
            callbacks=list(self.callbacks),
        )

    def _write(
        self, trainer: SidSFTTrainer, model: StageModel, identity: str, metrics: dict[str, float], started: float
    ) -> None:
        """Writes the folder of the stage at once, then removes the work folder."""
        weights = model.collect(trainer, self.work)

        def write() -> None:
            examples = {
                s: describe(load_from_disk(str(self.work / s))) for s in ("train", "valid") if (self.work / s).is_dir()
            }
            history = _finite(trainer.state.log_history)
            last = next((h for h in reversed(history) if "eval_loss" in h), {})
            with write_folder(self.folder) as scratch:
                model.save(trainer, scratch, self.work, weights)
                if isinstance(self.build, TaskExamples):
                    self.build.complete(scratch, model)
                write_json(scratch / HISTORY_FILE, history)
                write_run(
                    scratch,
                    step="sft_stage",
                    config={"stage": as_dict(self.stage), "seed": self.seed, "fingerprint": identity},
                    inputs={"model": str(self.source), **{role: str(path) for role, path in self.inputs.items()}},
                    metrics={
                        "examples": examples,
                        "steps": trainer.state.global_step,
                        "train": _finite(metrics),
                        "eval": {k: v for k, v in last.items() if k.startswith("eval_")},
                        "launch": _launch(),
                    },
                    started=started,
                )
            shutil.rmtree(self.work, ignore_errors=True)

        on_main(write)


def _launch() -> dict[str, Any]:
    """How this run is spread over processes; a checkpoint fits only the same spread."""
    state = PartialState()
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") if "DEEPSPEED" in str(state.distributed_type) else None
    return {"processes": state.num_processes, "kind": state.distributed_type.value, "zero_stage": stage}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _finite(value: Any) -> Any:
    """JSON has no NaN; a metric without a value becomes null."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

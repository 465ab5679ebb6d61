"""One training from a model folder to a model folder: what stages of fine-tuning and runs of GRPO have in common. Our own plumbing.

While it trains, examples and checkpoints lie in a work folder beside the output. A finished training whose settings and inputs are
unchanged is skipped; an interrupted one goes on from its last complete checkpoint and ends with the weights of an uninterrupted one
(`core/resume.py`). The output is a complete Hugging Face model folder with `run.json`, `log_history.json` (the curve) and, unless
everything was trained, `trained/`: only what this training trained.
"""

from __future__ import annotations

import abc
import contextlib
import gc
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import Trainer, TrainerCallback, TrainingArguments

from sidtune.core.folders import RUN_FILE, check_output, locked, read_json, write_json, write_run
from sidtune.core.processes import launch, on_main
from sidtune.core.resume import Work
from sidtune.trainers.common.callbacks import go_on
from sidtune.trainers.common.stage_model import StageModel

HISTORY_FILE = "log_history.json"
logger = logging.getLogger(__name__)


class Stage(abc.ABC):
    """What a kind of training says: where it reads and writes, its identity, its examples, its trainer.

    Attributes:
        step: its name in `run.json`. title: how messages call it.
        source: model folder to start from. output: folder to write. work: folder of the unfinished parts.
        train, lora: what trains, see `StageConfig` in `trainers/sft/mixture.py`.
        config: JSON-ready, for `run.json`. inputs: role → what was read and the config does not name.
        callbacks: further callbacks of the trainer. args: the trainer's, made by `arguments` when the training begins.
    """

    step: str
    title: str
    source: Path
    output: Path
    work: Path
    train: str
    lora: dict[str, Any]
    config: dict[str, Any]
    inputs: dict[str, Path]
    callbacks: Sequence[TrainerCallback]
    args: Any

    @abc.abstractmethod
    def arguments(self) -> TrainingArguments:
        """The trainer's arguments, checked, with checkpoints below `work`; making them forms the group of processes."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Role → all that the result depends on, inputs by content. Main process only."""

    @abc.abstractmethod
    def examples(self, model: StageModel) -> tuple[dict[str, Dataset], dict[str, Any]]:
        """Examples of "train" and, if wanted, "valid"; and what there is to tell of them (JSON-ready). Main process only."""

    @abc.abstractmethod
    def trainer(self, model: StageModel, data: dict[str, Dataset]) -> Trainer:
        """The trainer of these examples, with `self.args` and `self.callbacks`."""

    @abc.abstractmethod
    def metrics(self, trainer: Trainer, told: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
        """What `run.json` says beside steps, training metrics and launch; `told` is of `examples`."""

    def complete(self, folder: Path, model: StageModel) -> None:  # noqa: B027
        """Puts beside the saved model what makes its folder complete. Main process only."""

    def run(self) -> dict[str, Any]:
        """Trains, unless it is done. Every process calls this; only the main one writes, so all must see the same folders.

        Returns:
            The metrics of `run.json`.

        Raises:
            ConfigError, DataError: before anything is trained, where the input is to blame.
        """
        started = time.time()
        self.args = self.arguments()
        with contextlib.ExitStack() as held:
            on_main(lambda: held.enter_context(locked(self.output)))
            metrics = self._run(started)
        gc.collect()  # the next stage loads its model into the memory of this one
        return metrics

    def _run(self, started: float) -> dict[str, Any]:
        work = Work(self.output, on_main(self.identity), self.work, launch())
        if on_main(work.is_done):
            logger.info("%s is unchanged and is skipped.", self.title)
            return on_main(lambda: read_json(self.output / RUN_FILE)["metrics"])
        on_main(lambda: check_output(self.output, self.step))
        model = StageModel.open(self.source, self.args, name=self.title, train=self.train, lora=self.lora)
        told = on_main(lambda: work.begin(lambda folder: self._prepare(folder, model)))
        data = {split: load_from_disk(str(work.folder / split)) for split in told["splits"]}
        trainer = self.trainer(model, data)
        result = go_on(trainer)
        return self._write(work, model, trainer, told["examples"], result.metrics, started)

    def _prepare(self, folder: Path, model: StageModel) -> dict[str, Any]:
        data, told = self.examples(model)
        for split, examples in data.items():
            examples.save_to_disk(str(folder / split))
        return {"splits": list(data), "examples": told}

    def _write(
        self, work: Work, model: StageModel, trainer: Trainer, told: dict[str, Any], result: dict, started: float
    ) -> dict[str, Any]:
        weights = model.collect(trainer, work.folder)

        def write() -> dict[str, Any]:
            history = finite(trainer.state.log_history)
            common = {"steps": trainer.state.global_step, "train": result, "launch": launch()}
            metrics = finite({**self.metrics(trainer, told, history), **common})
            with work.finish(self.step) as scratch:
                model.save(trainer, scratch, work.folder, weights)
                self.complete(scratch, model)
                write_json(scratch / HISTORY_FILE, history)
                record = {"config": self.config, "inputs": self.inputs, "metrics": metrics}
                write_run(scratch, step=self.step, started=started, **record)
            return metrics

        return on_main(write)


def finite(value: Any) -> Any:
    """JSON has no NaN; a metric without a value becomes null."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""How transformers' trainers go on exactly where they stood, by the mechanism of `core/resume.py`.

Not from a paper. transformers writes the parts of a checkpoint one after the other, so a run that dies meanwhile leaves a folder
that looks like a checkpoint. `MarkComplete` lists the files as the very last step, after every process has finished; `go_on`
goes on from the last folder that matches its list.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from sidtune.core.processes import on_main
from sidtune.core.resume import last_complete_checkpoint, mark_complete
from sidtune.trainers.common.batches import EpochSampler

logger = logging.getLogger(__name__)
_MOST_WARMUP = 0.3  # share of the steps


class SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins; also after a resume in the middle of an epoch."""

    def __init__(self) -> None:
        self.sampler: EpochSampler | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class MarkComplete(TrainerCallback):
    """Lists the files of a checkpoint once all processes have written theirs."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            mark_complete(folder, step=state.global_step)
        PartialState().wait_for_everyone()


class Progress(TrainerCallback):
    """A live bar with the loss on a terminal, and elsewhere a line for each tenth of the steps. Main process only.

    It stands in the place of transformers' callbacks, which print a dictionary for each step that is logged; the whole curve is in
    `log_history.json`, and in a tracker with `report_to`.
    """

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.loss, self.began, self.first = "", 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        warmup = args.get_warmup_steps(state.max_steps)
        logger.info("%s steps, %s of them warm-up, %.4g epochs", f"{state.max_steps:,}", warmup, state.num_train_epochs)
        if warmup > state.max_steps * _MOST_WARMUP:
            logger.warning(
                "Warm-up takes %d of %d steps, so the learning rate is hardly reached; set warmup_steps to %d or train longer.",
                warmup, state.max_steps, max(state.max_steps // 20, 1),
            )  # fmt: skip
        self.began, self.first = time.monotonic(), state.global_step
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None, dynamic_ncols=True)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None and "loss" in (kwargs.get("logs") or {}):
            self.loss = f"loss {float(kwargs['logs']['loss']):.4g}"
            self.bar.set_postfix_str(self.loss, refresh=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is None:
            return
        self.bar.update(state.global_step - self.bar.n if not self.bar.disable else 1)
        every = max(state.max_steps // 10, 1)
        if self.bar.disable and state.global_step % every == 0:
            rate = (state.global_step - self.first) / max(time.monotonic() - self.began, 1e-9)
            left = (state.max_steps - state.global_step) / max(rate, 1e-9)
            logger.info(
                "step %d of %d, %s, %.3g steps/s, %.0f s left",
                state.global_step,
                state.max_steps,
                self.loss,
                rate,
                left,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()


def go_on(trainer: Trainer, resume: bool = True) -> TrainOutput:
    """Trains, from the last complete checkpoint in `args.output_dir` where there is one; a finished training is only loaded.

    The folder must be this run's alone, see `core.resume.Work`. `resume` false starts anew. Collective: every process calls it.
    """
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    trainer.add_callback(Progress())
    folder = Path(trainer.args.output_dir)
    found = on_main(lambda: str(last_complete_checkpoint(folder, remove_broken=True) or ""))
    if not (found and resume):
        return trainer.train()
    logger.info("The training goes on from %s.", Path(found).name)
    state = TrainerState.load_from_json(str(Path(found) / TRAINER_STATE_NAME))
    if not _finished(trainer.args, state):
        return trainer.train(resume_from_checkpoint=found)
    values = trainer.set_initial_training_values
    # No epoch is left; transformers would train one step more.
    trainer.set_initial_training_values = lambda *given: (0, *values(*given)[1:])  # type: ignore[method-assign]
    result = trainer.train(resume_from_checkpoint=found)
    trainer.state.num_train_epochs = state.num_train_epochs
    return result


def _finished(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a checkpoint was written at the end of a training as long as `args` asks for."""
    ended = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
    if args.max_steps > 0:
        return ended and state.max_steps >= args.max_steps
    return ended and state.num_train_epochs >= args.num_train_epochs

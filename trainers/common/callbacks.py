"""How transformers' trainers go on exactly where they stood, by the mechanism of `core/resume.py`.

Not from a paper. transformers writes the parts of a checkpoint one after the other, so a run that dies meanwhile leaves a folder
that looks like a checkpoint. `MarkComplete` lists the files as the very last step, after every process has finished; `go_on`
goes on from the last folder that matches its list.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from sidtune.core.processes import on_main
from sidtune.core.resume import last_complete_checkpoint, mark_complete
from sidtune.trainers.common.batches import EpochSampler

logger = logging.getLogger(__name__)


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


def go_on(trainer: Trainer, resume: bool = True) -> TrainOutput:
    """Trains, from the last complete checkpoint in `args.output_dir` where there is one; a finished training is only loaded.

    The folder must be this run's alone, see `core.resume.Work`. `resume` false starts anew. Collective: every process calls it.
    """
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

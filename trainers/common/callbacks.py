"""Callbacks that make an interrupted stage resume exactly where it stood.

Not from a paper. transformers writes the parts of a checkpoint one after the other, so a run that dies meanwhile leaves
a folder that looks like a checkpoint. `MarkComplete` writes a list of the files and their sizes as the very last step,
after every process has finished; only a folder that matches its list is resumed from.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sidtune.core.errors import DataError
from sidtune.core.folders import read_json, write_json
from sidtune.trainers.common.batches import EpochSampler

COMPLETE_FILE = "complete.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
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
            files = {
                p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()
            }
            files.pop(COMPLETE_FILE, None)
            write_json(folder / COMPLETE_FILE, {"step": state.global_step, "files": files})
        PartialState().wait_for_everyone()


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of its list in the recorded size."""
    try:
        files = read_json(folder / COMPLETE_FILE)["files"]
    except (DataError, KeyError, TypeError):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def last_complete_checkpoint(folder: Path, remove_broken: bool = False) -> Path | None:
    """The newest complete checkpoint below `folder`, or None.

    Args:
        folder: work folder of a stage; need not exist.
        remove_broken: also delete checkpoints that are not complete (one process only).
    """
    if not folder.is_dir():
        return None
    found = []
    for path in folder.iterdir():
        match = _CHECKPOINT.fullmatch(path.name)
        if not match or not path.is_dir():
            continue
        if is_complete(path):
            found.append((int(match.group(1)), path))
        elif remove_broken:
            logger.info("The checkpoint %s is incomplete and is skipped.", path.name)
            shutil.rmtree(path)
    return max(found)[1] if found else None

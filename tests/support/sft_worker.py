"""What `test_distributed_sft.py` runs, in one process or in several: stages of every kind, one of them killed and
resumed.

accelerate launch ... tests/support/sft_worker.py ROOT OUTPUT KINDS RESUMED
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
from sft_stand_ins import task_examples
from transformers import TrainerCallback

from sidtune.core.errors import DataError
from sidtune.core.processes import end_processes
from sidtune.trainers.common import args as sft_args
from sidtune.trainers.sft.stages import run_stages

GLOBAL_BATCH = 16
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


class Kill(TrainerCallback):
    """Dies at the beginning of a step, on every process."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def plan(kinds: list[str]) -> list[dict]:
    args = {
        "per_device_train_batch_size": GLOBAL_BATCH // PROCESSES,
        "learning_rate": 2e-3,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": 4,
        "train_sampling_strategy": "group_by_length",
        "disable_tqdm": True,
    }
    # 32 examples of one task twice and all 16 of the other: 80 examples, 5 steps an epoch.
    tasks = {"text_to_sid": {"weight": 2.0}, "query_to_text": None}
    stage = {"tasks": tasks, "args": args, "max_length": 64, "eval_tasks": {"text_to_sid": None}}
    return [stage | {"name": k, "train": k} | ({"lora": {"r": 4}} if k == "lora" else {}) for k in kinds]


def train(root: Path, output: str, kinds: list[str], kill: int | None = None, data: str = "data") -> None:
    run_stages(
        plan(kinds),
        *(root / "model", root / data, root / "sids", root / output),
        seed=5,
        build_examples=task_examples,
        callbacks=[] if kill is None else [Kill(kill)],
    )


def train_resumed(root: Path, output: str, kinds: list[str]) -> None:
    """Killed in the second epoch, after step 8 of 10 was saved."""
    try:
        train(root, output, kinds, kill=9)
    except KeyboardInterrupt:
        train(root, output, kinds)


def fail(root: Path, output: str) -> None:
    """The data are missing; only the main process finds out."""
    try:
        train(root, output, ["all"], data="nowhere")
    except (DataError, SystemExit) as error:
        said = {"kind": type(error).__name__, "text": str(error)}
        (root / f"{output}_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(said))


def pretend_accelerator() -> None:
    """accelerate shards by FSDP on accelerators only; here the CPU passes for one, to run our side of it."""
    import accelerate.state
    from accelerate.utils import DistributedType

    def backend(self, *args, **kwargs):
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self):
        self.device = torch.device("cpu")

    accelerate.state.PartialState._prepare_backend = backend
    accelerate.state.PartialState.set_device = set_device
    values = {"bf16": False, "activation_checkpointing": False, "dataloader_pin_memory": False, "ddp_backend": "gloo"}
    sft_args.machine_defaults = lambda: values


def main(root: Path, output: str, kinds: str, resumed: str) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        pretend_accelerator()
    gc.freeze()  # each stage collects garbage; the imported libraries need not be looked at each time
    fail(root, f"{output}_failed")
    train(root, output, kinds.split(","))
    if resumed:
        train_resumed(root, f"{output}_resumed", resumed.split(","))
    end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

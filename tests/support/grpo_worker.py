"""What `test_grpo_distributed.py` runs, in one process or in several: GRPO with rollouts that depend on the row's number only.

accelerate launch ... tests/support/grpo_worker.py ROOT OUTPUT MODES
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from grpo_stand_ins import catalogue, prompts
from transformers import TrainerCallback

from sidtune.core.errors import ConfigError
from sidtune.core.processes import end_processes, on_main
from sidtune.trainers.common.stage import finite
from sidtune.trainers.common.stage_model import StageModel
from sidtune.trainers.grpo.args import grpo_config
from sidtune.trainers.grpo.trainer import DebiasedGRPOTrainer

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
ROWS, GROUP = 12, 4  # three prompts: with two processes the second group lies on both
REWARDS = {"hit": 1.0, "prefix_match": 0.5}


class Watch(TrainerCallback):
    """Keeps the rewards and advantages of all processes after every step."""

    def __init__(self) -> None:
        self.trainer: DebiasedGRPOTrainer | None = None
        self.seen: list[dict] = []

    def on_step_end(self, args, state, control, **kwargs):
        made = self.trainer
        inputs = made._buffered_inputs[0]
        order = made.accelerator.gather(inputs["row_ids"]).argsort()
        advantages = made.accelerator.gather(inputs["advantages"])[order]
        self.seen.append({"rewards": made._gathered_rewards.tolist(), "advantages": advantages.tolist()})


def by_number(made: DebiasedGRPOTrainer):
    """A rollout whose leaves are a function of row and step."""

    def roll_out(model, prompt_ids, rows):
        numbers = torch.from_numpy(rows.numbers)
        leaves = ((numbers * 7 + made.state.global_step * 5 + numbers // 5) % 9)[:, None]
        return made._own_maker._rows([list(ids) for ids in prompt_ids], leaves, torch.full(leaves.shape, -1.0), None)

    return roll_out


def train(root: Path, output: str, mode: str) -> None:
    work = root / f".work_{output}_{mode}"
    options = {
        "per_device_train_batch_size": ROWS // PROCESSES,
        "num_generations": GROUP,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "beta": 0.1 if mode == "all" else 0.0,
        "lr_scheduler_type": "constant",
    }
    if mode == "sampled":
        options |= {"per_device_train_batch_size": 8, "rollout": "without_replacement"}
    args = grpo_config(options, output_dir=work, seed=3)
    kind = "all" if mode == "sampled" else mode
    lora = {"r": 4} if mode == "lora" else {}
    model = StageModel.open(root / "model", args, name=mode, train=kind, lora=lora)
    watch = Watch()
    made = DebiasedGRPOTrainer(
        *(model.model, REWARDS, args, prompts(12, longest=12)),
        processing_class=model.tokenizer,
        catalogue=catalogue(),
        train=kind,
        callbacks=[watch],
    )
    watch.trainer = made
    if mode != "sampled":
        made._own_maker, made._maker = made._maker, None
        made._maker = by_number(made)
    made.train()
    weights = model.collect(made, work)

    def write() -> None:
        folder = root / f"{output}_{mode}"
        folder.mkdir()
        model.save(made, folder, work, weights)
        (folder / "seen.json").write_text(json.dumps({"steps": watch.seen, "log": finite(made.state.log_history)}))
        shutil.rmtree(work, ignore_errors=True)

    on_main(write)


def refuse(root: Path, output: str) -> None:
    """A set without replacement may not be shared between processes."""
    options = {"per_device_train_batch_size": 6, "num_generations": GROUP, "rollout": "without_replacement"}
    args = grpo_config(options, output_dir=root / ".work_refused", seed=3)
    model = StageModel.open(root / "model", args, name="x", train="all", lora={})
    try:
        DebiasedGRPOTrainer(
            *(model.model, REWARDS, args, prompts(12)), processing_class=model.tokenizer, catalogue=catalogue()
        )
    except ConfigError as error:
        told = str(error)
        on_main(lambda: (root / f"{output}_refused.txt").write_text(told))


def main(root: Path, output: str, modes: str) -> None:
    for mode in modes.split(","):
        train(root, output, mode)
    if PROCESSES > 1:
        refuse(root, output)
        end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

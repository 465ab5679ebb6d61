"""What a person is told while a trainer runs."""

import logging

import pytest
import torch
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from sidtune.trainers.common.callbacks import Progress


def told(tmp_path, caplog, warmup: float, steps: int, first: int = 0) -> list[str]:
    args = TrainingArguments(str(tmp_path), warmup_steps=warmup, use_cpu=True)
    state = TrainerState(max_steps=steps, num_train_epochs=2, global_step=first, is_world_process_zero=True)
    progress, control = Progress(), TrainerControl()
    with caplog.at_level(logging.INFO):
        progress.on_train_begin(args, state, control)
        for step in range(first + 1, steps + 1):
            state.global_step = step
            progress.on_log(args, state, control, logs={"loss": torch.tensor(float(step))})
            progress.on_step_end(args, state, control)
        progress.on_train_end(args, state, control)
    return [record.message for record in caplog.records]


def test_without_a_terminal_each_tenth_of_the_steps_is_a_line(tmp_path, caplog):
    lines = told(tmp_path, caplog, warmup=0.05, steps=40)
    assert lines[0] == "40 steps, 2 of them warm-up, 2 epochs"
    assert [line.split(", ")[:2] for line in lines[1:]] == [[f"step {n} of 40", f"loss {n}"] for n in range(4, 41, 4)]


def test_a_resumed_training_counts_on(tmp_path, caplog):
    assert [line.split(",")[0] for line in told(tmp_path, caplog, 0, 40, first=30)[1:]] == [
        "step 32 of 40", "step 36 of 40", "step 40 of 40",
    ]  # fmt: skip


@pytest.mark.parametrize(("warmup", "steps", "number"), [(30, 40, 2), (0.5, 100, 5)])
def test_a_warm_up_that_takes_the_training_is_named_with_the_number_to_set(tmp_path, caplog, warmup, steps, number):
    assert f"set warmup_steps to {number} " in told(tmp_path, caplog, warmup, steps)[1]
    caplog.clear()
    assert "warmup_steps" not in "".join(told(tmp_path, caplog, 0.3, steps))

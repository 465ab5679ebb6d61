"""Stand-ins for the self-evolving loop: a GRPO step that copies its model, and launchers that run, count or fake steps."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidtune.core.config import as_dict
from sidtune.core.folders import write_folder, write_json, write_run
from sidtune.core.scripts import Script, find_script
from sidtune.data_builders.prompts.serializer import Serializer

REASONED = {"per_device_train_batch_size": 16, "learning_rate": 0.01, "num_train_epochs": 25, "logging_steps": 50}
STAGE = {"name": "reason", "tasks": {"reason_to_sid": {}}, "max_length": 256, "args": REASONED}


@dataclass
class Arguments:
    """Options of the stand-in for recipes/grpo."""

    data_dir: str
    sids_dir: str
    model_dir: str
    output_dir: str
    hard_set: str | None = None
    seed: int = 0


def main(arguments: Arguments) -> None:
    """Copies the model, with its prompt settings, as if nothing had been learned."""
    from sidtune.decoding.retrieval.loading import final_model

    source = final_model(arguments.model_dir)
    assert pq.read_table(arguments.hard_set).num_rows
    with write_folder(arguments.output_dir) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)
        inputs = {n: getattr(arguments, n) for n in ("data_dir", "sids_dir", "model_dir", "hard_set")}
        write_run(scratch, step="grpo", config=as_dict(arguments), inputs=inputs)


def stand_in_script(name: str) -> Script:
    """The scripts of the loop, with this file as that of GRPO."""
    return Script("grpo", __name__, False, "") if name == "grpo" else find_script(name)


class InProcess:
    """Runs steps in this process and remembers their names; `stop_at` breaks off before the step of that name."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.names: list[str] = []
        self.stop_at = stop_at

    def __call__(self, step: Any, options: dict[str, Any]) -> None:
        if step.name == self.stop_at:
            raise KeyboardInterrupt
        self.names.append(step.name)
        importlib.import_module(step.module).main(step.config)


class Faked:
    """Writes the files of each step without a model; `values[name]` are the validation values of 50 users' requests."""

    def __init__(self, values: dict[str, np.ndarray], hard: int = 5, trajectories: int = 5) -> None:
        self.values, self.hard, self.trajectories = values, hard, trajectories
        self.steps: list[Any] = []

    def __call__(self, step: Any, options: dict[str, Any]) -> None:
        self.steps.append(step)
        name, kind = step.name.rpartition("/")[::2]
        with write_folder(step.folder, kind) as scratch:
            metrics: dict[str, Any] = {}
            if kind == "valid":
                value = self.values[name]
                columns = {
                    "request_id": [str(n) for n in range(len(value))],
                    "user_id": [str(n % 50) for n in range(len(value))],
                }
                pq.write_table(pa.table({**columns, "ndcg@10": value}), scratch / "per_request.parquet")
                write_json(scratch / "metrics.json", {"ndcg@10": float(value.mean())})
            elif kind == "hard":
                write_json(scratch / "metrics.json", {"hard": self.hard})
                pq.write_table(pa.table({"request_id": ["a"]}), scratch / "hard_set.parquet")
            elif kind in ("trajectories", "seeds"):
                (scratch / "trajectories.jsonl").write_text('{"request_id": "a", "reasoning": "b"}\n')
                metrics = {"trajectories": self.trajectories}
            else:
                stage = scratch if kind == "rl" else scratch / "stage_1_reason"
                stage.mkdir(exist_ok=True)
                (stage / "config.json").write_text("{}")
                fake_prompt_settings(stage)
                metrics = {"final": stage.name}
            inputs = {n: getattr(step.config, n) for n in ("data_dir", "sids_dir", "model_dir")}
            write_run(scratch, step=kind, config=as_dict(step.config), inputs=inputs, metrics=metrics)


def fake_prompt_settings(folder: Path) -> None:
    """What every stage holds of its prompts."""
    Serializer(None).save_templates(folder / "templates")
    write_json(
        folder / "serializer.json", {"max_history": 3, "max_length": 99, "max_chars": None, "history_context": True}
    )

"""The config of a training stage and the mixture of tasks it trains on.

Follows the multi-stage recipes of the specs (item and SID alignment first, behaviour next, the full personalised
request last) in that a stage names its tasks; how they are mixed is our choice: a *weight* is how often each example of
a task is seen per pass over the stage's data, which keeps a mixture readable (1 = all of it once) and independent of
the sizes of the tasks.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets

from sidtune.core.config import build
from sidtune.core.errors import ConfigError, DataError
from sidtune.trainers.common.batches import measure

_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
COLUMNS = ("input_ids", "labels", "task")


@dataclass
class TaskMix:
    """How much of one task goes into a mixture.

    Attributes:
        weight: how often each example is seen per pass: 1 = once, 0.5 = a random half once, 2.5 = twice, and a random
            half a third time.
        limit: at most this many examples, chosen at random, before the weight is applied; None takes all.
        options: options of the task itself (see `data_builders/tasks/alignment.py`).
    """

    weight: float = 1.0
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageConfig:
    """One stage of training.

    Attributes:
        name: lower-case letters, digits and underscores; part of the folder's name.
        tasks: task name → `TaskMix` (a mapping of its fields, or null for its defaults).
        train: what trains: "rows" = the rows of the SID tokens, "lora" = LoRA factors and those rows, "all" =
            everything.
        lora: options of LoRA for train="lora" (fields of `peft.LoraConfig`).
        args: fields of TRL's `SFTConfig` (learning rate, batch size, epochs, ...).
        max_history: most events of the past in an example; None keeps all.
        max_length: most tokens of an example, default 1024; None sets no limit. Longer examples lose their oldest turns
            when they are encoded.
        eval_tasks: like `tasks`, built from the validation split and evaluated as `args` say (default: after each
            epoch).
    """

    name: str
    tasks: dict[str, Any]
    train: Literal["rows", "lora", "all"] = "all"
    lora: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    max_history: int | None = 20
    max_length: int | None = 1024
    eval_tasks: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tasks = _mixes(self.tasks, f"stage '{self.name}', tasks")
        self.eval_tasks = _mixes(self.eval_tasks, f"stage '{self.name}', eval_tasks")


def parse_stages(values: Sequence[StageConfig | dict[str, Any]]) -> list[StageConfig]:
    """Strictly reads the list of stages of a YAML file.

    Raises:
        ConfigError: no stages, an unknown key, a value of the wrong type or range, two stages of one name.
    """
    if not isinstance(values, (list, tuple)) or not values:
        raise ConfigError(f"stages must be a list of at least one stage, got {values!r}.")
    stages = []
    for number, value in enumerate(values):
        where = f"stages[{number}]"
        if not isinstance(value, StageConfig):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: expected a mapping of key: value, got {value!r}.")
            value = build(StageConfig, value, where)
        _check_stage(value, where)
        if value.name in (stage.name for stage in stages):
            raise ConfigError(f"{where}: the name '{value.name}' is taken by an earlier stage; choose another.")
        stages.append(value)
    return stages


def _check_stage(stage: StageConfig, where: str) -> None:
    if not _NAME.fullmatch(stage.name):
        raise ConfigError(
            f"{where}: the name '{stage.name}' must consist of lower-case letters, digits and underscores."
        )
    if not stage.tasks:
        raise ConfigError(f"{where}: the stage '{stage.name}' names no tasks; give it at least one.")
    if stage.lora and stage.train != "lora":
        raise ConfigError(
            f"{where}: lora options are set, but train is '{stage.train}'; set train: lora or remove them."
        )
    for key in ("max_history", "max_length"):
        number = getattr(stage, key)
        if number is not None and number < 1:
            raise ConfigError(f"{where}: {key} must be at least 1 or null, got {number}.")


def _mixes(values: dict[str, Any], where: str) -> dict[str, TaskMix]:
    mixes = {}
    for name, value in values.items():
        mix = value if isinstance(value, TaskMix) else build(TaskMix, {} if value is None else value, f"{where}.{name}")
        if not (0 < mix.weight < float("inf")):
            raise ConfigError(
                f"{where}.{name}: weight must be a number above 0, got {mix.weight}; remove the task instead."
            )
        if mix.limit is not None and mix.limit < 1:
            raise ConfigError(f"{where}.{name}: limit must be at least 1 or null, got {mix.limit}.")
        mixes[str(name)] = dataclasses.replace(mix)
    return mixes


def chosen_rows(rows: int, mix: TaskMix, seed: int, task: str) -> np.ndarray:
    """Which examples of a task enter the mixture, with repetitions: int64, sorted within each repetition.

    A function of the arguments only; another task in the mixture changes nothing.
    """
    random = np.random.Generator(np.random.PCG64([seed % 2**63, zlib.crc32(task.encode())]))
    pool = np.arange(rows)
    if mix.limit is not None and mix.limit < rows:
        pool = np.sort(random.choice(rows, mix.limit, replace=False))
    whole = int(mix.weight)
    part = round((mix.weight - whole) * len(pool))
    return np.concatenate([np.tile(pool, whole), np.sort(random.choice(pool, part, replace=False))]).astype(np.int64)


def mixture(datasets: dict[str, Dataset], mixes: dict[str, TaskMix], seed: int, where: str) -> Dataset:
    """Mixes tokenised tasks into one shuffled dataset (columns `input_ids`, `labels`, `task`).

    Args:
        datasets: task name → dataset with `input_ids` and `labels`.
        mixes: task name → how much of it; the same names.
        seed: the mixture is a function of this seed and the datasets.
        where: how messages call this place.

    Raises:
        DataError: a task is missing or has no examples.
    """
    parts = []
    for task, mix in mixes.items():
        dataset = datasets.get(task)
        rows = chosen_rows(len(dataset), mix, seed, task) if dataset is not None and len(dataset) else []
        if not len(rows):
            raise DataError(f"{where}: the task '{task}' has no examples; check the split, its options and its limit.")
        part = dataset.select(rows).select_columns(["input_ids", "labels"])
        parts.append(part.add_column("task", np.repeat(np.array([task], dtype=object), len(rows)).tolist()))
    features = parts[0].features
    mixed = concatenate_datasets([part.cast(features) for part in parts])
    order = np.random.Generator(np.random.PCG64([seed % 2**63, 1])).permutation(len(mixed))
    return mixed.select(order)


def describe(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Examples, tokens and learned tokens of each task of a mixture."""
    sizes = measure(dataset)
    names, place = np.unique(np.asarray(dataset["task"]), return_inverse=True)
    return {
        str(name): {
            "examples": int((place == n).sum()),
            "tokens": int(sizes.tokens[place == n].sum()),
            "targets": int(sizes.targets[place == n].sum()),
        }
        for n, name in enumerate(names)
    }

"""Writes a pipeline for your tables: sizes and steps come from the data and are stated in the file.

    sidtune new my_shop --data my_tables
    sidtune run --config my_shop/pipeline.yaml

The file is yours to change; an existing one is never written over.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import yaml

from sidtune.core.config import command
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import write_files
from sidtune.data_builders.registry import read_source, reader_options
from sidtune.data_builders.tables.survey import FEW_REQUESTS, Survey, survey

LAUNCH = "alone"
FILE = "pipeline.yaml"
_TEST, _VALID = 0.1, 0.05
# Fewer steps leave new tokens near their start; more epochs learn small logs by heart.
_FEWEST_STEPS, _FEWEST_EPOCHS, _MOST_EPOCHS = 300, 5, 15


@dataclass
class Arguments:
    """Options of new.

    Attributes:
        name: folder of the new pipeline, and its name in messages; may stand without a name: `sidtune new my_shop`.
        data: folder or id that the reader reads.
        reader: name of a reader in `data_builders/registry.py`; `sidtune` is the folder of your own tables.
        options: options of the reader.
        vectors: `.npy` file of item vectors in the order of the items; null makes vectors of the texts, or of the log where the
            items have no words.
        base: a causal language model of the hub or a folder; null for a small one from scratch.
    """

    POSITIONAL: ClassVar[str] = "name"
    name: str
    data: str
    reader: str = "sidtune"
    options: dict = field(default_factory=dict)
    vectors: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        reader_options(self.reader, self.options, self.data)
        if not re.fullmatch(r"[\w./-]*\w", self.name):
            raise ConfigError(f"name must be a folder of letters, digits, '_' and '-', got '{self.name}'.")
        for there in (Path(self.name, FILE), self.output):
            if there.exists():
                raise ConfigError(f"{there} exists already; move it away or give another name.")
        if self.vectors is not None and not Path(self.vectors).is_file():
            raise ConfigError(f"vectors: {self.vectors} does not exist; check the path.")

    @property
    def output(self) -> Path:
        """Where the pipeline will write."""
        return Path("runs", Path(self.name).name)


def main(arguments: Arguments) -> None:
    """Reads the data, writes the file, and says what it will do."""
    found = survey(read_source(arguments.reader, arguments.data, arguments.options))
    text = pipeline_text(arguments, found)
    with write_files(arguments.name) as scratch:
        (scratch / FILE).write_text(text, encoding="utf-8")
    print(f"{Path(arguments.name, FILE)} is written; it says where its numbers come from.")
    left = {part: answer for part, answer in found.parts().items() if answer.startswith("no")}
    for part, answer in left.items():
        print(f"  {part}: {answer}")
    if (tested := found.requests * _TEST) < FEW_REQUESTS and not found.prescribed:
        print(f"  about {tested:.0f} test requests: intervals will be wide; {FEW_REQUESTS} or more tell systems apart.")
    print(f"Next: sidtune run --config {Path(arguments.name, FILE)}")


def pipeline_text(arguments: Arguments, found: Survey) -> str:
    """The YAML file, with comments.

    Raises:
        DataError: the data cannot train anything.
    """
    if not found.items or not found.requests:
        raise DataError(f"{arguments.data} has {found.items:,} items and {found.requests:,} requests; both are needed.")
    own = {"name": Path(arguments.name).name, "output_dir": str(arguments.output), "seed": 0}
    lines = [
        f"# sidtune run --config {Path(arguments.name, FILE)}",
        "#",
        f"# Made for {found.items:,} items, {found.users:,} users, {found.events:,} events and {found.requests:,} requests of "
        f"{arguments.data!r}.",
        *yaml.safe_dump(own, sort_keys=False, allow_unicode=True).splitlines(),
        "launch: {config_file: accelerate_configs/cpu.yaml}  # with GPUs: ddp.yaml, zero2.yaml, ... and num_processes",
        "steps:",
    ]
    for comment, step in _steps(arguments, found):
        written = yaml.safe_dump([step], sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
        lines += [f"  # {comment}", *(f"  {line}" for line in written.splitlines())]
    return "\n".join(lines) + "\n"


def _steps(arguments: Arguments, found: Survey) -> list[tuple[str, dict]]:
    made = {"data_dir": "data", "sids_dir": "sids"}
    about = {"model_name": Path(arguments.name).name, "dataset_name": str(arguments.data)}
    again = f"sidtune run --config {shlex.quote(str(Path(arguments.name, FILE)))}"
    return [
        ("Clean tables, split by time, counts of the past.", _data(arguments, found)),
        _sids(arguments, found),
        ("A small language model from scratch, or yours, with the SIDs as tokens.", _model(arguments, found)),
        _sft(found),
        (
            "Test requests against the whole catalogue, beside baselines.",
            {"name": "eval", "script": "evaluate", "inputs": {**made, "model_dir": "sft"}, "args": _evaluation(found)},
        ),
        (
            "A folder to serve or to push: sidtune serve --model_dir .../bundle",
            {"name": "bundle", "script": "publish", "inputs": {**made, "model_dir": "sft", "eval_dir": "eval"},
             "args": {**about, "command": again}},
        ),
        (
            "One page with all of it. GRPO and post-ranking can follow, see recipes/README.md.",
            {"name": "report", "script": "report", "inputs": {**made, "model_dir": "sft", "eval_dir": "eval"},
             "args": {"title": f"{Path(arguments.name).name} by sidtune", "command": again}},
        ),
    ]  # fmt: skip


def _data(arguments: Arguments, found: Survey) -> dict:
    split: dict = {"kind": "source"} if found.prescribed else {"kind": "leave_one_out"}
    if found.clock and not found.prescribed:
        split = {"kind": "global_time", "valid_share": _VALID, "test_share": _TEST}
    args = {"reader": arguments.reader, "path": str(arguments.data), "options": arguments.options, "split": split}
    return {"name": "data", "script": "build_data", "args": args}


def _sids(arguments: Arguments, found: Survey) -> tuple[str, dict]:
    levels, size = sid_sizes(found.items)
    encoder = {"name": "tfidf_svd" if found.has_words else "collaborative", "dims": 64}
    if arguments.vectors is not None:
        encoder = {"name": "precomputed", "path": str(arguments.vectors)}
    quantizer = {"name": "residual_kmeans", "level_sizes": [size] * levels}
    step = {"name": "sids", "script": "learn_sids", "inputs": {"data_dir": "data"}}
    comment = f"{levels} levels of {size} codes: {size**levels:,} SIDs for {found.items:,} items."
    return comment, {**step, "args": {"encoder": encoder, "quantizer": quantizer}}


def sid_sizes(items: int) -> tuple[int, int]:
    """Levels and codes of a level: enough that few items share a SID, few enough that each code is learned.

    Our choice, after the recipes of this suite: about 1.4 times the root of the number of items, from 8 to 256, a power of two; a
    fourth level from 20,000 items on.

    >>> sid_sizes(2_000), sid_sizes(100_000)
    ((3, 64), (4, 256))
    """
    size = 2 ** round(math.log2(1.4 * math.sqrt(max(items, 1))))
    return (4 if items >= 20_000 else 3), min(max(size, 8), 256)


def _model(arguments: Arguments, found: Survey) -> dict:
    inputs = {"data_dir": "data", "sids_dir": "sids"}
    if arguments.base is not None:
        return {"name": "model", "script": "init_model", "inputs": inputs, "args": {"base": arguments.base}}
    width = 128 if found.items < 20_000 else 256
    shape = {
        "model_type": "qwen3", "hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": width // 4, "intermediate_size": 3 * width, "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    words = 2048 if found.items < 5_000 else 4096
    args = {"base": None, "scratch": shape, "text_vocab_size": words, "init": "codebook"}
    return {"name": "model", "script": "init_model", "inputs": inputs, "args": args}


def _sft(found: Survey) -> tuple[str, dict]:
    tasks: dict[str, dict] = {"item_to_sid": {}, "sid_to_item": {}} if found.has_words else {}
    examples = len(tasks) * found.items
    if found.searches:
        tasks["query_to_sid"] = {"limit": 6000}
        examples += min(round(found.requests * found.searches), 6000)
    history: dict[str, dict] = {"whole_history": {}}  # every request of a user is learned in one pass over all of them
    batch = 8 if found.users < 500 else 16 if found.users < 5000 else 32
    planned = [("align", tasks, examples, 32, 256), ("personalise", history, found.users, batch, 512)]
    stages, told = [], []
    for name, wanted, rows, size, length in planned:
        if wanted:
            epochs, steps = _schedule(rows, size)
            told.append(f"{name}: {rows:,} examples, {epochs} epochs, about {steps:,} steps")
            args = _training(epochs, size)
            stages.append({"name": name, "tasks": wanted, "train": "all", "max_length": length, "args": args})
    args = {"prompt_max_history": 20, "prompt_max_length": 512, "max_chars": {"description": 0}, "stages": stages}
    inputs = {"data_dir": "data", "sids_dir": "sids", "model_dir": "model"}
    told.append("descriptions are left out of prompts (max_chars)")
    return "; ".join(told) + ".", {"name": "sft", "script": "sft", "inputs": inputs, "args": args}


def _schedule(examples: int, batch: int) -> tuple[int, int]:
    """Epochs, and about how many steps they are."""
    of_one = max(math.ceil(examples / batch), 1)
    epochs = min(max(math.ceil(_FEWEST_STEPS / of_one), _FEWEST_EPOCHS), _MOST_EPOCHS)
    return epochs, epochs * of_one


def _training(epochs: int, batch: int) -> dict:
    return {
        "num_train_epochs": epochs, "per_device_train_batch_size": batch, "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "logging_steps": 20,
    }  # fmt: skip


def _evaluation(found: Survey) -> dict:
    baselines = ["popularity", *(["bm25"] if found.has_words else []), "item_knn"]
    return {"split": "test", "num_beams": 20, "ks": [k for k in (5, 10, 20) if k <= found.items] or [1],
            "baselines": baselines}  # fmt: skip


if __name__ == "__main__":
    command(main, Arguments)

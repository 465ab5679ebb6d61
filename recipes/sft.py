"""Multi-stage supervised fine-tuning: every stage names its task mixture, what trains, and its schedule.

    accelerate launch -m sidtune.recipes.sft --config recipes/quickstart/sft.yaml --data_dir runs/quickstart/data \\
        --sids_dir runs/quickstart/sids --model_dir runs/quickstart/model --output_dir runs/quickstart/sft

The output folder holds one complete model folder per stage, `serializer.json` and `templates/` (how prompts are rendered), and
`run.json`, which names the last stage. An interrupted run goes on from the last checkpoint of the stage it was in.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from sidtune.core.config import as_dict, command
from sidtune.core.errors import ConfigError
from sidtune.core.folders import read_json, write_run
from sidtune.trainers.mixture import StageConfig, parse_stages

logger = logging.getLogger(__name__)


@dataclass
class Arguments:
    """Options of sft.

    Attributes:
        data_dir, sids_dir, model_dir: folders of the earlier steps.
        output_dir: folder to write.
        stages: list of stages, see `trainers.mixture.StageConfig`.
        templates: `plain`, `chatml`, or a folder with templates of your own.
        max_chars: field → longest text in characters, over the defaults of the serializer.
        history_context: render the context of past turns too (whole-history training needs it).
        max_history: most past turns in prompts at evaluation and serving; null for all that fit.
        max_length: most tokens of prompt and SID at evaluation and serving; null for no limit.
        seed: seed of mixtures, order and LoRA.
    """

    data_dir: str
    sids_dir: str
    model_dir: str
    output_dir: str
    stages: list[dict]
    templates: str = "plain"
    max_chars: dict = field(default_factory=dict)
    history_context: bool = True
    max_history: int | None = 20
    max_length: int | None = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        from sidtune.data_builders.task_registry import TASKS

        for stage in parse_stages(self.stages):
            for task in (*stage.tasks, *stage.eval_tasks):
                TASKS.get(task)
        if self.max_history is not None and self.max_history < 0:
            raise ConfigError(f"max_history must be 0 or more turns, or null for all, got {self.max_history}.")


def main(arguments: Arguments) -> None:
    """Trains all stages."""
    from sidtune.decoding.retriever import PromptSettings, make_serializer
    from sidtune.recipes.loading import save_serializer
    from sidtune.trainers.processes import on_main
    from sidtune.trainers.stages import run_stages

    started = time.time()
    settings = PromptSettings(
        max_history=arguments.max_history,
        max_length=arguments.max_length,
        max_chars=arguments.max_chars or None,
        history_context=arguments.history_context,
    )
    examples = Examples(arguments, settings)
    folders = run_stages(
        arguments.stages,
        arguments.model_dir,
        arguments.data_dir,
        Path(arguments.sids_dir) / "sids",
        arguments.output_dir,
        seed=arguments.seed,
        build_examples=examples,
        extra_inputs={"templates": examples.templates},
    )

    def finish() -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folders[-1])
        save_serializer(arguments.output_dir, make_serializer(tokenizer, arguments.templates, settings), settings)
        stages = [read_json(folder / "run.json") for folder in folders]
        write_run(
            arguments.output_dir,
            step="sft",
            config=as_dict(arguments),
            inputs={name: getattr(arguments, name) for name in ("data_dir", "sids_dir", "model_dir")},
            metrics={
                "final": folders[-1].name,
                "stages": [
                    {"name": folder.name, "seconds": record["seconds"], **record["metrics"]}
                    for folder, record in zip(folders, stages, strict=True)
                ],
            },
            started=started,
        )

    on_main(finish)
    logger.info("%s: %d stages, the last is %s", arguments.output_dir, len(folders), folders[-1].name)


class Examples:
    """Builds the tokenised examples of a stage by the names of its tasks (the `build_examples` of `run_stages`)."""

    def __init__(self, arguments: Arguments, settings: Any) -> None:
        self.arguments, self.settings = arguments, settings
        folder = Path(arguments.templates)
        packaged = Path(__file__).parent.parent / "data_builders" / "templates" / arguments.templates
        self.templates = folder if folder.is_dir() else packaged
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, stage: StageConfig, split: str, model: Any) -> dict[str, Dataset]:
        from sidtune.data_builders.encoding import encode_examples
        from sidtune.data_builders.task_registry import TASKS
        from sidtune.decoding.retriever import make_serializer
        from sidtune.recipes.loading import task_input

        data, sids = self._tables()
        serializer = make_serializer(model.tokenizer, self.arguments.templates, self.settings)
        source = task_input(data, serializer, sids, split, stage.max_history, self.arguments.seed)
        found = {}
        for task, mix in (stage.tasks if split == "train" else stage.eval_tasks).items():
            options = dict(mix.options)
            if task == "whole_history" and stage.max_length is not None:
                options.setdefault("max_tokens", stage.max_length)
            examples = _built(TASKS.get(task), task, source, options)
            found[task] = encode_examples(
                model.tokenizer, examples, stage.max_length, allowed_ids=serializer.literal_ids()
            )
        return found

    def _tables(self) -> tuple[Any, Any]:
        from sidtune.data_builders.store import load_folder
        from sidtune.tokenizers.semantic_ids import SemanticIds

        if self._loaded is None:
            sids = SemanticIds.from_pretrained(Path(self.arguments.sids_dir) / "sids")
            self._loaded = load_folder(self.arguments.data_dir), sids
        return self._loaded


def _built(function: Any, task: str, source: Any, options: dict[str, Any]) -> Dataset:
    import inspect

    from sidtune.core.config import check_keys

    known = [name for name in inspect.signature(function).parameters if name != "data"]
    check_keys(options, known, f"options of the task '{task}'")
    return function(source, **options)


if __name__ == "__main__":
    command(main, Arguments)

"""The examples of a stage by the names of its tasks: data folder → `data_builders.tasks` → token ids.

The order of pieces and the cutting of long histories are those of `data_builders`; nothing is rendered or cut here, so
a prompt at evaluation has the same tokens. Our plumbing; the tasks name their papers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset

from sidtune.core.config import check_keys
from sidtune.core.errors import ConfigError, nearest
from sidtune.core.folders import fingerprint
from sidtune.data_builders.prompts import serializer
from sidtune.data_builders.prompts.encoding import encode_examples
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tables.store import DataFolder, load_folder
from sidtune.data_builders.tasks.input import TaskInput
from sidtune.data_builders.tasks.registry import TASKS
from sidtune.decoding.retrieval.model_folder import PromptSettings, complete_model_folder, make_serializer
from sidtune.tokenizers.sids.query_codes import CODER_PARTS
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import Vocabulary
from sidtune.trainers.common.stage_model import StageModel
from sidtune.trainers.sft.mixture import StageConfig, TaskMix


class TaskExamples:
    """Builds the tokenised examples of a stage; the default `build_examples` of `run_stages`.

    Args:
        data: data folder.
        sids: semantic-ID folder.
        seed: of every random choice.
        templates: built-in templates by name, or a folder of edited ones.
        max_chars, history_context: see `Serializer`.
        query_coder: folder of a `QueryCoder`, for prompts that show the SID of each query; None for prompts without.
        max_history, max_length: of prompts at evaluation and serving, see `PromptSettings`.

    Attributes:
        templates_folder: the folder of edited templates, None for built-in ones.
    """

    def __init__(
        self,
        data: str | Path,
        sids: str | Path,
        *,
        seed: int = 0,
        templates: str | Path = "plain",
        max_chars: Mapping[str, int | None] | None = None,
        history_context: bool = True,
        query_coder: str | Path | None = None,
        max_history: int | None = PromptSettings.max_history,
        max_length: int | None = PromptSettings.max_length,
    ) -> None:
        self.data, self.sids, self.seed, self.templates = Path(data), Path(sids), seed, templates
        limits = None if max_chars is None else dict(max_chars)
        self.settings = PromptSettings(
            max_history, max_length, limits or None, history_context, query_coder is not None
        )
        self.query_coder = None if query_coder is None else Path(query_coder)
        self.templates_folder = Path(templates) if Path(templates).is_dir() else None
        self._tables: tuple[DataFolder, SemanticIds] | None = None

    def identity(self) -> dict[str, Any]:
        """What the examples depend on beside data, SIDs and stage; a change of it trains the stages again."""
        packaged = Path(serializer.__file__).parent / "templates" / str(self.templates)
        folder = self.templates_folder or packaged
        if not folder.is_dir():
            raise ConfigError(f"There are no templates '{folder.name}': {nearest(folder.name, serializer.BUILT_IN)}")
        coder = [fingerprint(self.query_coder / part) for part in CODER_PARTS] if self.query_coder else []
        queries = {"query_coder": coder} if coder else {}
        rendering = {name: value for name, value in asdict(self.settings).items() if name != "query_sids"}
        return {**rendering, **queries, "templates": fingerprint(folder), "seed": self.seed}

    def check(self, stages: Sequence[StageConfig]) -> None:
        """Refuses unknown tasks, unknown options, tasks that cannot be evaluated, and wrong templates, before any work.

        Raises:
            ConfigError: with the nearest known name.
        """
        Serializer(None, self.templates, self.settings.max_chars, self.settings.history_context)
        for stage in stages:
            for mixes in (stage.tasks, stage.eval_tasks):
                for task, mix in mixes.items():
                    known = [p for p in inspect.signature(TASKS.get(task)).parameters if p not in ("data", "limit")]
                    check_keys(mix.options, known, f"stage '{stage.name}', options of the task '{task}'")
            if "whole_history" in stage.eval_tasks:
                raise ConfigError(
                    f"stage '{stage.name}': whole_history reads the training part of each history and cannot be "
                    "evaluated; put request_to_sid into eval_tasks."
                )

    def __call__(self, stage: StageConfig, split: str, model: StageModel) -> dict[str, Dataset]:
        """The examples of each task of a stage.

        Args:
            stage: the stage.
            split: "train" for its tasks, "valid" for its eval_tasks on the requests of the validation split.
            model: gives the tokenizer.
        """
        data, sids = self._load()
        renderer = self.opened(model.tokenizer, model.vocabulary)
        source = TaskInput.of_split(data, sids.texts(), renderer, split, stage.max_history, self.seed)
        mixes = stage.tasks if split == "train" else stage.eval_tasks
        return {task: self._encoded(task, mix, source, stage, model) for task, mix in mixes.items()}

    def opened(self, tokenizer: Any, vocabulary: Vocabulary) -> Serializer:
        """The serializer of a model, after its vocabulary, the semantic IDs and the items were found to belong together.

        Raises:
            DataError: they do not. ConfigError: a mistake in a template.
        """
        data, sids = self._load()
        vocabulary.check(tokenizer, sids)
        sids.check_items(data.items, data.path)
        return make_serializer(tokenizer, self.templates, self.settings, self.query_coder)

    def complete(self, folder: str | Path, model: StageModel) -> None:
        """Puts prompt settings, templates and semantic IDs beside a model that was saved into `folder`."""
        renderer = self.opened(model.tokenizer, model.vocabulary)
        complete_model_folder(folder, renderer, self.settings, self._load()[1])

    def _load(self) -> tuple[DataFolder, SemanticIds]:
        if self._tables is None:
            self._tables = load_folder(self.data), SemanticIds.from_pretrained(self.sids)
        return self._tables

    @staticmethod
    def _encoded(task: str, mix: TaskMix, source: TaskInput, stage: StageConfig, model: StageModel) -> Dataset:
        function: Callable[..., Dataset] = TASKS.get(task)
        options = dict(mix.options)
        if "max_tokens" in inspect.signature(function).parameters and stage.max_length is not None:
            options.setdefault("max_tokens", stage.max_length)
        examples = function(source, limit=mix.limit, **options)
        marks = model.tokenizer.convert_tokens_to_ids(list(getattr(function, "marks", ())))
        allowed = [*source.serializer.literal_ids(), *marks]
        return encode_examples(model.tokenizer, examples, stage.max_length, allowed_ids=allowed)

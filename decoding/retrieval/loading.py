"""What several recipes load: a retriever from step folders, prompts of requests, and the serializer of a training run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa

from sidtune.core.errors import DataError
from sidtune.core.folders import read_json, write_json
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tables.store import DataFolder
from sidtune.data_builders.tasks.behaviour import prompt_for_requests
from sidtune.data_builders.tasks.input import TaskInput
from sidtune.decoding.retrieval.retriever import (
    SERIALIZER_FILE,
    TEMPLATES_FOLDER,
    PromptSettings,
    SidRetriever,
    make_serializer,
)
from sidtune.tokenizers.base_models.loading import load_tokenizer
from sidtune.tokenizers.sids.query_codes import CODER_FOLDER
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import Vocabulary
from sidtune.tokenizers.vocabulary.saving import load_model

_LONGEST_CHAIN = 100


def final_model(folder: str | Path) -> Path:
    """The model folder itself, or the last stage below a folder of `sft`. Raises DataError when there is neither."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    if (folder / "run.json").exists():
        final = read_json(folder / "run.json").get("metrics", {}).get("final")
        if final and (folder / final).is_dir():
            return folder / final
    raise DataError(f"{folder} holds no model (no config.json) and no finished training; run the step that writes it.")


def training_runs(folder: str | Path) -> list[dict[str, Any]]:
    """`run.json` of the step that wrote a model and of the steps whose models it started from, the first one first.

    The chain ends where the folder of an earlier step is gone.
    """
    found: list[dict[str, Any]] = []
    file = Path(folder) / "run.json"
    while file.is_file() and len(found) < _LONGEST_CHAIN:
        found.insert(0, read_json(file))
        start = found[0].get("inputs", {}).get("model_dir", {}).get("path")
        if not start:
            break
        file = Path(start) / "run.json"
    return found


def save_serializer(folder: str | Path, serializer: Serializer, settings: PromptSettings) -> None:
    """Writes what a model's prompts look like, for evaluation and serving."""
    serializer.save_templates(Path(folder) / TEMPLATES_FOLDER)
    write_json(Path(folder) / SERIALIZER_FILE, dataclasses.asdict(settings))
    if settings.query_sids:
        serializer.query_sids.save_pretrained(Path(folder) / CODER_FOLDER)


def load_serializer(model_folder: str | Path, tokenizer: Any) -> tuple[Serializer, PromptSettings]:
    """The serializer saved beside a model or beside its stage folder; the built-in plain templates where there is none."""
    for folder in (Path(model_folder), Path(model_folder).parent):
        if (folder / SERIALIZER_FILE).exists():
            settings = PromptSettings(**read_json(folder / SERIALIZER_FILE))
            return make_serializer(tokenizer, folder / TEMPLATES_FOLDER, settings, folder), settings
    settings = PromptSettings()
    return make_serializer(tokenizer, "plain", settings), settings


def load_parts(model_folder: str | Path) -> tuple[Any, Any, Vocabulary]:
    """Plain model, tokenizer and SID vocabulary of a model folder, checked against each other."""
    vocabulary, tokenizer = Vocabulary.from_pretrained(model_folder), load_tokenizer(model_folder)
    vocabulary.check(tokenizer)
    return load_model(model_folder), tokenizer, vocabulary


def load_retriever(model_folder: str | Path, sids_dir: str | Path) -> SidRetriever:
    """A retriever from a model folder and the folder of learn_sids."""
    model, tokenizer, vocabulary = load_parts(model_folder)
    serializer, settings = load_serializer(model_folder, tokenizer)
    sids = SemanticIds.from_pretrained(Path(sids_dir) / "sids")
    return SidRetriever(model, tokenizer, vocabulary, sids, serializer, settings)


def prompts_of(retriever: SidRetriever, data: DataFolder, requests: pa.Table) -> list[list[str]]:
    """Prompts (pieces) of requests, rendered by the code and the settings of training."""
    limit = retriever.settings.max_history
    source = TaskInput.of_split(data, retriever.sids.texts(), retriever.serializer, "train", limit)
    return prompt_for_requests(source, requests)

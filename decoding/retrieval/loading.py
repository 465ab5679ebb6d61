"""What recipes load: a retriever from step folders, and the prompts of requests."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from sidtune.data_builders.tables.store import DataFolder
from sidtune.data_builders.tasks.behaviour import prompt_for_requests
from sidtune.data_builders.tasks.input import TaskInput
from sidtune.decoding.retrieval.model_folder import ModelFolder as ModelFolder
from sidtune.decoding.retrieval.model_folder import check_made_from as check_made_from
from sidtune.decoding.retrieval.model_folder import complete_model_folder as complete_model_folder
from sidtune.decoding.retrieval.model_folder import final_model as final_model
from sidtune.decoding.retrieval.model_folder import training_runs as training_runs
from sidtune.decoding.retrieval.prompter import Prompter
from sidtune.decoding.retrieval.retriever import SidRetriever


def load_retriever(
    model_dir: str | Path, sids_dir: str | Path | None = None, data: DataFolder | None = None, whole: bool = False
) -> SidRetriever:
    """A retriever on the CPU; arguments as in `ModelFolder.open`."""
    return SidRetriever.from_prompter(Prompter.of(ModelFolder.open(model_dir, sids_dir, data, whole)), "cpu")


def prompts_of(retriever: SidRetriever, data: DataFolder, requests: pa.Table) -> list[list[str]]:
    """Prompts (pieces) of requests, rendered by the code and the settings of training."""
    limit = retriever.settings.max_history
    source = TaskInput.of_split(data, retriever.sids.texts(), retriever.serializer, "train", limit)
    return prompt_for_requests(source, requests)

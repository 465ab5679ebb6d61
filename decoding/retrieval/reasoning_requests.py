"""Requests with their targets and a model that reasons about them: what evaluation and rejection sampling load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sidtune.core.errors import DataError
from sidtune.data_builders.tables.store import DataFolder, load_folder
from sidtune.data_builders.tasks.behaviour import prompt_for_requests
from sidtune.data_builders.tasks.input import TaskInput, rows_of
from sidtune.data_builders.tasks.reasoning import strongest_targets
from sidtune.decoding.retrieval.loading import load_retriever
from sidtune.decoding.retrieval.reasoner import Reasoner


@dataclass
class ReasoningRequests:
    """Requests of a split that have a positive, with the strongest one as target.

    Attributes:
        data: the data folder.
        source: what prompts are made from.
        reasoner: `Reasoner`.
        requests: R requests.
        item: (R,) rows of the targets in `source.sid_ids`.
        leaf: (R,) their leaves.
    """

    data: DataFolder
    source: TaskInput
    reasoner: Reasoner
    requests: pa.Table
    item: np.ndarray
    leaf: np.ndarray

    @property
    def ids(self) -> list[str]:
        """(R,) request ids."""
        return self.requests["request_id"].to_pylist()

    @property
    def sids(self) -> list[str]:
        """(R,) SID text of each target."""
        return [self.source.sid_texts[row] for row in self.item.tolist()]

    @property
    def item_ids(self) -> list[str]:
        """(R,) item id of each target."""
        return self.source.sid_ids.take(pa.array(self.item)).to_pylist()

    @property
    def titles(self) -> list[str | None]:
        """(R,) title of each target."""
        row = rows_of(self.source.sid_ids.take(pa.array(self.item)), self.data.items["item_id"])
        return self.data.items["title"].take(pa.array(row)).to_pylist()

    def pieces(self, rows: np.ndarray) -> list[list[str]]:
        """Prompts of chosen requests, as pieces, by the code of training."""
        return prompt_for_requests(self.source, self.requests.take(pa.array(rows)))

    def take(self, rows: np.ndarray) -> ReasoningRequests:
        """Chosen requests."""
        return ReasoningRequests(
            self.data, self.source, self.reasoner, self.requests.take(pa.array(rows)), self.item[rows], self.leaf[rows]
        )


def load_requests(
    data_dir: str | Path, sids_dir: str | Path, model_dir: str | Path, split: str, seed: int, **reasoning: Any
) -> ReasoningRequests:
    """All requests of a split with a positive, and the model of a folder.

    Args:
        reasoning: options of `Reasoner`.

    Raises:
        DataError: no request of the split has a positive, or folders that do not fit together.
    """
    data = load_folder(data_dir)
    retriever = load_retriever(model_dir, sids_dir, data)
    reasoner = Reasoner(retriever, **reasoning)
    source = TaskInput.of_split(
        data, retriever.sids.texts(), retriever.serializer, split, retriever.settings.max_history, seed
    )
    rows, item = strongest_targets(source)
    if not len(rows):
        raise DataError(f"No request of the split '{split}' has a positive item, so there is nothing to reason about.")
    leaf = retriever.leaves.leaf_of[item]
    return ReasoningRequests(data, source, reasoner, data.requests[split].take(pa.array(rows)), item, leaf)

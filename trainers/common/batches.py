"""What a batch is: the checks of pre-tokenised examples, the order of an epoch, the collator that keeps the task.

Nothing here comes from a paper. The order of an epoch is a function of `(seed, epoch)` and the *global* batch size
only, never of the number of processes or of how often a run was interrupted. transformers' own grouping by length draws
from the global random state, so a resumed run meets other batches than an uninterrupted one; with `EpochSampler` random
and grouped order are made the same way, and both resume exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sidtune.core.errors import DataError

IGNORED = -100
_MEGABATCHES = 50
_INTEGERS = {t.id for t in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32())}


@dataclass(frozen=True)
class ExampleSizes:
    """Sizes of tokenised examples.

    Attributes:
        tokens: `(n,)` int64, tokens of each example.
        targets: `(n,)` int64, tokens of each example that are learned; the first token of an example never is.
    """

    tokens: np.ndarray
    targets: np.ndarray


def measure(dataset: Dataset, vocab_size: int | None = None, where: str = "The training data") -> ExampleSizes:
    """Sizes of every example of a tokenised dataset, and the checks that keep a wrong example from training silently.

    Args:
        dataset: columns `input_ids` and `labels` (lists of integers; label -100 = not learned).
        vocab_size: rows of the model's embedding; None skips that check.
        where: how messages call the dataset.

    Raises:
        DataError: no examples, a missing column, labels that do not fit the tokens, an id outside the vocabulary, or an
            example that teaches nothing.
    """
    absent = [c for c in ("input_ids", "labels") if c not in dataset.column_names]
    if absent:
        raise DataError(
            f"{where} must hold the columns 'input_ids' and 'labels', but {absent[0]!r} is missing; tokenise the "
            "examples first."
        )
    if len(dataset) == 0:
        raise DataError(f"{where} holds no examples; check the tasks, their limits and the split.")
    tokens, targets, first = [], [], 0
    columns = dataset.select_columns(["input_ids", "labels"]).with_format("arrow")
    for table in columns.iter(batch_size=10_000):
        ids, starts, lengths = _flat(table.column("input_ids"), where)
        labels, _, of_labels = _flat(table.column("labels"), where)
        if not np.array_equal(lengths, of_labels):
            row = first + int(np.flatnonzero(lengths != of_labels)[0])
            raise DataError(f"{where}, row {row}: 'labels' must be as long as 'input_ids'; encode the example again.")
        learned = labels != IGNORED
        learned[starts[lengths > 0]] = False
        count = np.add.reduceat(np.append(learned, False), starts).astype(np.int64)
        count[lengths == 0] = 0
        if (count == 0).any():
            row = first + int(np.flatnonzero(count == 0)[0])
            raise DataError(
                f"{where}, row {row}: no token after the first one is learned, so the example teaches nothing; check "
                "the learn flags of its task, or remove it."
            )
        for named, values, counted in (("ids", ids, True), ("a label", labels, learned)):
            wrong = False if vocab_size is None else counted & ((values < 0) | (values >= vocab_size))
            if np.any(wrong):
                place = int(np.flatnonzero(wrong)[0])
                row = first + int(np.searchsorted(starts, place, side="right")) - 1
                named = f"token id {values[place]}" if named == "ids" else named
                raise DataError(
                    f"{where}, row {row}: {named} lies outside the model's vocabulary of {vocab_size}; encode "
                    "the examples with the tokenizer of the model."
                )
        tokens.append(lengths)
        targets.append(count)
        first += len(lengths)
    return ExampleSizes(np.concatenate(tokens), np.concatenate(targets))


def _flat(column: pa.ChunkedArray, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values of all lists, the first place and the length of each."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    values = pc.list_flatten(column)
    if values.null_count or values.type.id not in _INTEGERS:
        raise DataError(
            f"{where}: a list of tokens or labels must hold integers only, got {values.type} with nulls or fractions."
        )
    return np.asarray(values.to_numpy()), np.cumsum(lengths) - lengths, lengths


def epoch_order(rows: int, seed: int, epoch: int, lengths: np.ndarray | None = None, batch: int = 1) -> np.ndarray:
    """The order in which one epoch visits the examples: `(rows,)` int64, a permutation.

    Without `lengths` a random permutation. With them, examples of similar length share a global batch: the permutation
    is cut into stretches of 50 global batches, each stretch is sorted by length, and the full batches are shuffled; an
    incomplete last batch stays last.

    Args:
        rows: number of examples.
        seed, epoch: the order depends on these and on nothing else that can change between runs.
        lengths: `(rows,)` tokens of each example, or None.
        batch: global batch size (per process x processes x accumulation steps).
    """
    generator = np.random.Generator(np.random.PCG64([seed % 2**63, epoch]))
    order = generator.permutation(rows)
    if lengths is None or rows <= batch:
        return order
    stretch = np.arange(rows) // (batch * _MEGABATCHES)
    order = order[np.lexsort((-lengths[order], stretch))]
    full = rows // batch
    batches = order[: full * batch].reshape(full, batch)
    return np.concatenate([batches[generator.permutation(full)].ravel(), order[full * batch :]])


class EpochSampler(Sampler[int]):
    """Yields `epoch_order(...)` of the epoch set by `set_epoch`. See the module docstring for why it exists."""

    def __init__(self, rows: int, seed: int, lengths: np.ndarray | None = None, batch: int = 1) -> None:
        self.rows, self.seed, self.lengths, self.batch = rows, seed, lengths, batch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        yield from epoch_order(self.rows, self.seed, self.epoch, self.lengths, self.batch).tolist()


@dataclass
class TaskCollator(DataCollatorForLanguageModeling):
    """TRL's collator that also keeps which task each example belongs to.

    Adds `task_ids` `(B,)` int64, the place of the example's `task` in `tasks`, where the examples have that column.
    """

    tasks: Sequence[str] = field(default_factory=list)

    @classmethod
    def extend(cls, base: DataCollatorForLanguageModeling, tasks: Sequence[str]) -> TaskCollator:
        """The same collator with tasks."""
        values = {f.name: getattr(base, f.name) for f in fields(DataCollatorForLanguageModeling)}
        return cls(**values, tasks=list(tasks))

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if "task" in examples[0]:
            batch["task_ids"] = torch.tensor([self.tasks.index(e["task"]) for e in examples])
        return batch

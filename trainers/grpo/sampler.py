"""The order of rows: groups next to each other in micro-batches, and an epoch's prompts as a function of seed and
epoch.

TRL shuffles the rows of a generation before it cuts them into micro-batches, so that a group is torn apart and its
prompt is read again and again; and its sampler draws each epoch from one stream, so that a resumed run sees another
order. Our own plumbing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import RepeatSampler


def regrouped(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows cut into as many equal micro-batches, the rows of a group (`group_ids`) next to each other.

    Groups keep the random order in which they first appear, rows of a group the order of `row_ids`. A value that is no
    row-wise tensor or list (a scalar tensor, None) is taken from the first batch.
    """
    groups, rows = (torch.cat([batch[name] for batch in batches]) for name in ("group_ids", "row_ids"))
    _, number = groups.unique(return_inverse=True)
    places = torch.arange(len(groups), device=groups.device)
    first = torch.full_like(places, len(groups)).scatter_reduce(0, number, places, "amin")
    by_row = rows.argsort()
    order = by_row[first[number][by_row].argsort(stable=True)]
    size = len(groups) // len(batches)
    parts = order.split(size)
    joined = {name: _joined([batch[name] for batch in batches]) for name in batches[0]}
    return [{name: _taken(value, part) for name, value in joined.items()} for part in parts]


def _joined(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and first.ndim > 0:
        return torch.cat(values)
    return [x for value in values for x in value] if isinstance(first, list) else first


def _taken(value: Any, part: Tensor) -> Any:
    if isinstance(value, Tensor) and value.ndim > 0:
        return value[part.to(value.device)]
    return [value[n] for n in part.tolist()] if isinstance(value, list) else value


class RepeatedEpochs(RepeatSampler):
    """TRL's `RepeatSampler` whose shuffle depends on seed and epoch alone."""

    @classmethod
    def like(cls, sampler: RepeatSampler) -> RepeatedEpochs:
        """A sampler with the settings of TRL's."""
        names = ("mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return cls(sampler.data_source, **{name: getattr(sampler, name) for name in names})

    def set_epoch(self, epoch: int) -> None:
        """Chooses the shuffle of this epoch; called before its first batch."""
        self.generator.manual_seed(((self.seed or 0) * 1_000_003 + epoch) % 2**63)

"""Batches of histories for next-item training: padded or packed rows, and noise in what the network reads.

A row of a batch is one example, or with `packed` several short ones that do not see each other. Noise changes only the history
as it is read, never what is learned. Drawn from torch's global generator, which a checkpoint keeps, so a resumed run draws on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sidtune.core.config import check_range, check_shares, check_types
from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.sequences.item_sequences import ItemSequences, SequenceExamples, padded


@dataclass
class NoiseConfig:
    """What training changes in the histories it shows (SID augmentation); all off by default.

    Attributes:
        codes: probability that a code of the history is replaced by a random one of its level.
        items: probability that an item of the history is replaced by another one that shares its first `shared_levels` codes.
        shared_levels: see `items`; at least 1.
    """

    codes: float = 0.0
    items: float = 0.0
    shared_levels: int = 2

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), "noise")
        check_shares(self, "codes", "items")
        check_range(self, 1, "shared_levels")
        if self.shared_levels != 2 and not self.items:
            raise ConfigError("noise: shared_levels is of noise on items, which is 0; set items or leave it out.")


class Neighbours:
    """Items that share the first codes: draws a random other one of each item's group.

    Args:
        codes: (N, depth) int64. levels: how many first codes make a group.
    """

    def __init__(self, codes: np.ndarray, levels: int) -> None:
        _, group = np.unique(codes[:, :levels], axis=0, return_inverse=True)
        group = group.reshape(-1)
        self._members = torch.from_numpy(np.argsort(group, kind="stable"))
        sizes = np.bincount(group)
        self._start = torch.from_numpy((np.cumsum(sizes) - sizes)[group])
        self._size = torch.from_numpy(sizes[group])
        place = np.empty(len(codes), dtype=np.int64)
        place[self._members.numpy()] = np.arange(len(codes))
        self._place = torch.from_numpy(place) - self._start

    def draw(self, rows: Tensor) -> Tensor:
        """Another item of the group of each row, evenly; the row itself where it is alone."""
        others = (self._size[rows] - 1).clamp(min=1)
        step = 1 + (torch.rand(rows.shape) * others).long().clamp(max=others - 1)
        return self._members[self._start[rows] + (self._place[rows] + step) % self._size[rows]]


def pack(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Examples into rows of at most `size` items, longest first, each into the fullest row that still takes it.

    Args:
        lengths: (n,) items of each example. size: room of a row; a longer example gets a row of its own.

    Returns:
        Lists of example numbers; every example stands in exactly one.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        room = next((r for r in range(length, size + 1) if by_room.get(r)), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, max(size, length)
        else:
            row = by_room[room].pop()
        rows[row].append(example)
        by_room.setdefault(room - length, []).append(row)
    return [np.array(row, dtype=np.int64) for row in rows]


class NextItemRows(Dataset):
    """Training rows and their collator.

    Args:
        sequences: all users. examples: of `whole_examples` or `window_examples`.
        codes: (N, depth) codes of the items. level_sizes: codes per level.
        noise: see `NoiseConfig`. packed: items of a packed row, None for one example per row.

    Raises:
        DataError: nothing to learn.
    """

    def __init__(
        self,
        sequences: ItemSequences,
        examples: SequenceExamples,
        codes: np.ndarray,
        level_sizes: tuple[int, ...],
        noise: NoiseConfig | None = None,
        packed: int | None = None,
    ) -> None:
        if not len(examples):
            raise DataError(
                "No user has two items in the training part, so there is nothing to learn; check the source."
            )
        self.sequences, self.examples, self.noise = sequences, examples, noise or NoiseConfig()
        self.codes = torch.from_numpy(np.ascontiguousarray(codes, dtype=np.int64))
        self.sizes = torch.tensor(level_sizes)
        self.neighbours = Neighbours(codes, min(self.noise.shared_levels, codes.shape[1])) if self.noise.items else None
        lengths = examples.lengths
        self.packed = packed is not None
        self.rows = [np.array([n]) for n in range(len(examples))] if packed is None else pack(lengths, packed)
        self.lengths = np.array([int(lengths[row].sum()) for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> int:
        return int(place)

    def collate(self, places: list[int]) -> dict[str, Tensor]:
        """The batch of these rows; see `NextItemNetwork` for its names."""
        rows, segments, learn = self._stretches(places)
        batch = {
            "rows": torch.from_numpy(rows),
            "segments": torch.from_numpy(segments),
            "learn": torch.from_numpy(learn),
        }
        batch["users"] = torch.from_numpy(self.examples.users[[self.rows[place][0] for place in places]])
        batch["target_codes"] = self.codes[batch["rows"].clamp(min=0)]
        return self._noisy(batch)

    def _stretches(self, places: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(B, T) item rows, segments, and which are targets."""
        chosen = [self.rows[place] for place in places]
        found = self.examples
        if not self.packed:
            one = np.concatenate(chosen)
            rows = padded(self.sequences, found.starts[one], found.stops[one])
            first = (found.firsts - found.starts)[one]
            learn = (np.arange(rows.shape[1]) >= first[:, None]) & (rows >= 0)
            return rows, np.where(rows >= 0, 0, -1), learn
        shape = (len(chosen), max(int(self.lengths[place]) for place in places))
        rows, segments, learn = np.full(shape, -1), np.full(shape, -1), np.zeros(shape, dtype=bool)
        for row, examples in enumerate(chosen):
            begin = 0
            for segment, one in enumerate(examples.tolist()):
                end = begin + int(found.stops[one] - found.starts[one])
                rows[row, begin:end] = self.sequences.rows[found.starts[one] : found.stops[one]]
                segments[row, begin:end] = segment
                learn[row, begin + int(found.firsts[one] - found.starts[one]) : end] = True
                begin = end
        return rows, segments, learn

    def _noisy(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds `codes` and changes `rows` as the network reads them; keeps the true rows as `target_rows`."""
        rows = batch["target_rows"] = batch["rows"]
        if self.neighbours is not None:
            known = rows >= 0
            chosen = known & (torch.rand(rows.shape) < self.noise.items)
            rows = torch.where(chosen, self.neighbours.draw(rows.clamp(min=0)), rows)
        codes = self.codes[rows.clamp(min=0)]
        if self.noise.codes:
            chosen = torch.rand(codes.shape) < self.noise.codes
            codes = torch.where(chosen, (torch.rand(codes.shape) * self.sizes).long(), codes)
        return {**batch, "rows": rows, "codes": codes}

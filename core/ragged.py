"""Rows: lists of different lengths end to end, token ids padded to one width, and rows that several processes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Lists of numbers of different lengths, end to end.

    Attributes:
        offsets: (n + 1,) int64, starts at 0, never falls; list i is `rows[offsets[i]:offsets[i + 1]]`.
        rows: (total,) int64 numbers.
    """

    offsets: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, place: int) -> np.ndarray:
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        return self.rows[self.offsets[place] : self.offsets[place + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64 length of each list."""
        return np.diff(self.offsets)


def offsets_of(lengths: np.ndarray | Sequence[int]) -> np.ndarray:
    """(n,) lengths → (n + 1,) int64 offsets."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def owners(offsets: np.ndarray) -> np.ndarray:
    """(total,) int64: the list that each element stands in."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def taken(offsets: np.ndarray, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chosen lists, in their order, also several times: the places of their elements, and the offsets of the new ragged array."""
    new, places = stretches(offsets[lists], offsets[lists + 1])
    return places, new


def stretches(starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the stretches [start, stop) as a ragged array, and the places that stand in them, end to end."""
    offsets = offsets_of(stops - starts)
    return offsets, np.repeat(starts - offsets[:-1], stops - starts) + np.arange(offsets[-1])


def side_by_side(
    offsets: np.ndarray, lists: np.ndarray | None = None, latest: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Chosen lists (default all) as rows of one width.

    Args:
        latest: keep the last so many elements of each list; None keeps all.

    Returns:
        (B, width) places of the elements, 0 at padding, and the (B, width) mask of real ones.

    >>> places, mask = side_by_side(np.array([0, 3, 4]), latest=2)
    >>> places.tolist(), mask.tolist()
    ([[1, 2], [3, 0]], [[True, True], [True, False]])
    """
    lists = np.arange(len(offsets) - 1) if lists is None else lists
    start, end = offsets[lists], offsets[lists + 1]
    if latest is not None:
        start = np.maximum(start, end - latest)
    at = start[:, None] + np.arange(int((end - start).max(initial=0)))
    mask = at < end[:, None]
    return np.where(mask, at, 0), mask


def pad(
    rows: Sequence[Sequence[int]], fill: int, left: bool = True, width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as (n, width) int64, and their mask, 1 where a row has a token.

    Args:
        fill: stands at padding. left: padding before the row, as decoders need it, or behind it.
        width: default the longest row.

    >>> pad([[5, 6], [7]], fill=0)[0].tolist()
    [[5, 6], [0, 7]]
    """
    width = max(map(len, rows), default=0) if width is None else width
    ids, mask = np.full((len(rows), width), fill, np.int64), np.zeros((len(rows), width), np.int64)
    for place, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[place, part], mask[place, part] = row, 1
    return ids, mask


def drawn(count: int, most: int | None, seed: int) -> np.ndarray:
    """Row numbers of at most `most` of `count` rows (None: all), drawn at random, rising."""
    if most is None or most >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def own_rows(count: int, process: int, processes: int) -> np.ndarray:
    """The rows of `count` that this process works on; all processes together have each row once."""
    return np.arange(count)[process::processes]


def gathered(rows: np.ndarray, *parts: np.ndarray | list) -> list[Any]:
    """Results of all processes in the order of their rows. Collective.

    Args:
        rows: what `own_rows` gave. parts: arrays or lists with one entry for each of them.
    """
    from accelerate.utils import gather_object

    found = gather_object([(rows, *parts)])
    order = np.argsort(np.concatenate([one[0] for one in found]))
    made: list[Any] = []
    for place, own in enumerate(parts, 1):
        if isinstance(own, list):
            entries = [entry for one in found for entry in one[place]]
            made.append([entries[row] for row in order.tolist()])
        else:
            made.append(np.concatenate([one[place] for one in found])[order])
    return made

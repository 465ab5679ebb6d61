"""Users as sequences of catalogue rows, leave-one-out parts of them, and the training examples cut out of them.

A next-item model needs no text: a user is a list of item rows, oldest first. `ItemSequences` holds all users end to end in
two arrays. By the published leave-one-out rule (SASRec, TIGER, LETTER) the last item of a user is the test target, the one
before it the valid target, and training sees only what stands before both; the history of the test target includes the
valid item. A user with fewer than three items has no targets and is all training.

Three ways to cut the same training part into examples, each learning every item but a user's first exactly once:

* `whole_examples`: one example per user, every item but the first is a target (a long user is cut into overlapping chunks);
* `window_examples`: one copy of the last `max_history` items per target, as TIGER and MiniOneRec train.

Our choice of layout; the rule is that of the papers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.tables.columns import encode
from sidtune.data_builders.tables.schema import Tables

MIN_ITEMS = 3


@dataclass(frozen=True)
class SequenceExamples:
    """Stretches of the flat rows of an `ItemSequences`, one per training example.

    Attributes:
        starts, stops: (n,) int64; example i shows `rows[starts[i]:stops[i]]`.
        firsts: (n,) int64, place of its first target; all places from there to the end are targets.
        users: (n,) int64 user of each example.
    """

    starts: np.ndarray
    stops: np.ndarray
    firsts: np.ndarray
    users: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64 items of each example."""
        return self.stops - self.starts

    @property
    def targets(self) -> int:
        """Targets of all examples together."""
        return int((self.stops - self.firsts).sum())

    def take(self, places: np.ndarray) -> SequenceExamples:
        """The examples at some places."""
        return SequenceExamples(*(array[places] for array in (self.starts, self.stops, self.firsts, self.users)))

    def cut(self, max_history: int) -> SequenceExamples:
        """The same examples with at most `max_history` items before the first target."""
        return replace(self, starts=np.maximum(self.starts, self.firsts - max_history))


@dataclass(frozen=True)
class ItemSequences:
    """Item rows of all users, end to end.

    Attributes:
        item_ids: (N,) ids of the catalogue; a row is a place in it.
        user_ids: (U,) ids of the users.
        offsets: (U + 1,) int64; user u owns `rows[offsets[u]:offsets[u + 1]]`, oldest first.
        rows: (total,) int64 item rows.
    """

    item_ids: list[str]
    user_ids: list[str]
    offsets: np.ndarray
    rows: np.ndarray

    @classmethod
    def from_tables(cls, tables: Tables) -> ItemSequences:
        """Sequences of the events of a source, by time; events of one moment keep the order of the table.

        Raises:
            DataError: no events, or an event whose item is not in the catalogue.
        """
        events = tables.events
        if not events.num_rows:
            raise DataError("The source has no events, so there are no sequences to learn; check its path.")
        found = pc.index_in(events["item_id"], value_set=tables.items["item_id"].combine_chunks())
        if found.null_count:
            raise DataError(f"{found.null_count} events name items outside the catalogue; add the items or drop them.")
        codes, ids = encode(events["user_id"])
        order = np.lexsort((events["time"].to_numpy(), codes))
        lengths = np.bincount(codes, minlength=len(ids))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        rows = found.to_numpy().astype(np.int64)[order]
        return cls(tables.items["item_id"].to_pylist(), pa.array(ids).to_pylist(), offsets, rows)

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def lengths(self) -> np.ndarray:
        """(U,) int64 items of each user."""
        return np.diff(self.offsets)

    @property
    def training_stops(self) -> np.ndarray:
        """(U,) int64 place in `rows` where the training part of each user ends."""
        return self.offsets[1:] - np.where(self.lengths >= MIN_ITEMS, 2, 0)

    @property
    def training_places(self) -> np.ndarray:
        """(total,) bool: which places of `rows` are in the training parts."""
        return np.arange(len(self.rows)) < np.repeat(self.training_stops, self.lengths)

    def training_counts(self) -> np.ndarray:
        """(N,) int64: how often each item stands in the training parts."""
        return np.bincount(self.rows[self.training_places], minlength=len(self.item_ids))

    def held_out(self, split: str, max_history: int | None = None) -> SequenceExamples:
        """One example per user with a target: the last `max_history` items before it, then the target itself.

        Args:
            split: `valid` (the item before the last) or `test` (the last).
            max_history: items of history; None for all.
        """
        if split not in ("valid", "test"):
            raise ConfigError(f"The split must be valid or test, got '{split}'.")
        users = np.flatnonzero(self.lengths >= MIN_ITEMS)
        targets = self.offsets[users + 1] - (1 if split == "test" else 2)
        starts = self.offsets[users] if max_history is None else np.maximum(self.offsets[users], targets - max_history)
        return SequenceExamples(starts, targets + 1, targets, users)

    def seen(self, examples: SequenceExamples) -> list[np.ndarray]:
        """Distinct items before the first target of each example's user, whatever part of them the example shows."""
        begin = self.offsets[examples.users]
        return [np.unique(self.rows[a:b]) for a, b in zip(begin, examples.firsts, strict=True)]

    def whole_examples(self, max_history: int = 50, overlap: int | None = None) -> SequenceExamples:
        """One example per user over the training part; every item but the first is a target.

        A user with more than `max_history + 1` items gives several chunks of that many. Each begins `overlap` items before
        the first target of its own, so every target is learned once and, past the first chunk, with at least `overlap`
        items of history.

        Args:
            max_history: most items before a target, at least 1.
            overlap: default half of `max_history`; 1 to `max_history`.
        """
        overlap = max(1, max_history // 2) if overlap is None else overlap
        if max_history < 1 or not 1 <= overlap <= max_history:
            raise ConfigError(f"overlap must be 1 to max_history = {max_history}, got {overlap}.")
        size = max_history + 1
        users = np.flatnonzero(self.training_stops - self.offsets[:-1] >= 2)
        lengths = (self.training_stops - self.offsets[:-1])[users]
        chunks = 1 + -(-np.maximum(lengths - size, 0) // (size - overlap))
        owner = np.repeat(np.arange(len(users)), chunks)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        begin = self.offsets[users][owner]
        starts = begin + number * (size - overlap)
        stops = np.minimum(starts + size, self.training_stops[users][owner])
        firsts = starts + np.where(number == 0, 1, overlap)
        return SequenceExamples(starts, stops, firsts, users[owner])

    def window_examples(self, max_history: int = 20) -> SequenceExamples:
        """One example per training target: at most `max_history` items before it, then the target."""
        if max_history < 1:
            raise ConfigError(f"max_history must be 1 or more items, got {max_history}.")
        places = np.arange(len(self.rows))
        users = np.repeat(np.arange(len(self)), self.lengths)
        kept = (places > self.offsets[users]) & (places < self.training_stops[users])
        places, users = places[kept], users[kept]
        starts = np.maximum(self.offsets[users], places - max_history)
        return SequenceExamples(starts, places + 1, places, users)


def padded(sequences: ItemSequences, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Stretches of the flat rows side by side: (n, longest) int64 item rows, -1 as padding on the right."""
    lengths = stops - starts
    places = np.arange(int(lengths.max(initial=0)))
    inside = places < lengths[:, None]
    return np.where(inside, sequences.rows[np.where(inside, starts[:, None] + places, 0)], -1)

"""What becomes of items that share a code: expansion, a suffix level, or another code for some of them.

- `expand` (default): nothing moves; a code stands for all its items, most popular first. Cost: the items behind the first
  are ranked by popularity alone.
- `suffix`: one more level numbers the items of a code (TIGER). Cost: one more token to decode, which carries no meaning.
- `next_nearest`: the first items of a code keep it, the others take the nearest last code with room. Cost: moved items fit
  worse.
- `capacity`: the assignment of least total distortion with at most `capacity` items per code. Cost: less distortion for
  about as many moved items, more time.

Moved items keep all levels but the last, so the tree above the leaves does not change. The cost of a last code is the
squared distance of the item's vector to what the quantizer decodes, one definition for every quantizer. For residual
k-means it is the distance the quantizer itself minimises.

Where it differs from what other projects do (our choices): MiniOneRec, LC-Rec and LETTER reassign colliding items for a
fixed number of rounds and keep what still collides; here the order is fixed (popularity, then id), the result does not
depend on row order, and capacity is a guarantee. A prefix with more items than its last codes can take gets the
smallest larger capacity that suffices, for that prefix alone, so nothing is ever dropped. `next_nearest` is serial
dictatorship in that order, computed for all prefixes at once by deferred acceptance (Gale and Shapley 1962), which is
the same when all codes rank the items alike. `capacity` is solved per prefix by `scipy.optimize.linear_sum_assignment`;
above `max_exact_pairs` deferred acceptance by regret (second best minus best cost, largest first) takes its place.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError
from sidtune.tokenizers.quantizers.base import Quantizer
from sidtune.tokenizers.registry import COLLISIONS
from sidtune.tokenizers.sids.arguments import check_quantizer
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vectors import check_vectors

_BLOCK_PAIRS = 1 << 22  # (item, code) costs held at once
_BLOCK_ENTRIES = 1 << 24  # float64 entries of candidate vectors held at once: 128 MiB


@dataclass
class ExpandConfig:
    """`expand` has no options."""


@dataclass
class SuffixConfig:
    """Options of `suffix`.

    Attributes:
        size: codes of the new level, default the largest group. More leaves room for new items (`extend_sids`).
    """

    size: int | None = None

    def __post_init__(self) -> None:
        check_range(self, 1, "size")


@dataclass
class NextNearestConfig:
    """Options of `next_nearest`.

    Attributes:
        capacity: items that may share a code. OneSearch shows up to five items per code.
    """

    capacity: int = 1

    def __post_init__(self) -> None:
        check_range(self, 1, "capacity")


@dataclass
class CapacityConfig(NextNearestConfig):
    """Options of `capacity`.

    Attributes:
        capacity: items that may share a code.
        max_exact_pairs: prefixes with more items x places than this are solved by deferred acceptance instead.
    """

    max_exact_pairs: int = 1 << 22

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, "max_exact_pairs", most=2**40)


class CollisionMethod(abc.ABC):
    """Base class.

    Attributes:
        name: its name in the registry.
        config_class: dataclass of its options.
        config: the options.
        notes: after `resolve`, full sentences about what could not be done as asked.
    """

    name: ClassVar[str]
    config_class: ClassVar[type]

    def __init__(self, config: Any = None) -> None:
        self.config = self.config_class() if config is None else config
        self.notes: list[str] = []

    @abc.abstractmethod
    def resolve(self, sids: SemanticIds, vectors: np.ndarray, quantizer: Quantizer, fixed: int = 0) -> SemanticIds:
        """New semantic IDs of the same items in the same order.

        Args:
            sids: the codes as the quantizer gave them, N items.
            vectors: (N - fixed, d) vectors of the items that may move.
            quantizer: the frozen quantizer.
            fixed: the first `fixed` rows keep their codes whatever happens (a trained model knows them).

        Raises:
            ConfigError: the method cannot be applied to these semantic IDs. DataError: vectors that do not fit.
        """


def make_collisions(name: str, options: dict[str, Any] | None = None) -> CollisionMethod:
    """A treatment of collisions by name. Options are its config's fields; an unknown name or option is a ConfigError."""
    return COLLISIONS.make(name, options)


class Expand(CollisionMethod):
    """Lossless expansion: the codes stay as they are."""

    name: ClassVar[str] = "expand"
    config_class: ClassVar[type] = ExpandConfig

    def resolve(self, sids: SemanticIds, vectors: np.ndarray, quantizer: Quantizer, fixed: int = 0) -> SemanticIds:
        return sids


class Suffix(CollisionMethod):
    """One more level that makes every code unique, see `SemanticIds.with_suffix`."""

    name: ClassVar[str] = "suffix"
    config_class: ClassVar[type] = SuffixConfig

    def resolve(self, sids: SemanticIds, vectors: np.ndarray, quantizer: Quantizer, fixed: int = 0) -> SemanticIds:
        if sids.suffix_level:
            return sids  # `SemanticIds.extended` has numbered new items already
        if fixed:
            raise ConfigError(
                "A suffix level cannot be added to semantic IDs that a model was trained on, because every SID would "
                "get another length; learn them again with collisions: {name: suffix}."
            )
        return sids.with_suffix(self.config.size)


class NextNearest(CollisionMethod):
    """The first `capacity` items of a code keep it, the rest take the nearest last code with room, in their order."""

    name: ClassVar[str] = "next_nearest"
    config_class: ClassVar[type] = NextNearestConfig

    def resolve(self, sids: SemanticIds, vectors: np.ndarray, quantizer: Quantizer, fixed: int = 0) -> SemanticIds:
        return _reassigned(self, sids, vectors, quantizer, fixed)

    def _moves(self, over: np.ndarray, free: np.ndarray) -> np.ndarray:
        """Which rows of crowded prefixes are placed again: here, those over the capacity of their code."""
        return over

    def _choose(self, costs: np.ndarray, group: np.ndarray, room: np.ndarray, rank: np.ndarray) -> np.ndarray:
        return deferred_acceptance(costs, group, room, rank)


class CapacityAware(NextNearest):
    """Least total squared error among all assignments of last codes with at most `capacity` items per code."""

    name: ClassVar[str] = "capacity"
    config_class: ClassVar[type] = CapacityConfig

    def resolve(self, sids: SemanticIds, vectors: np.ndarray, quantizer: Quantizer, fixed: int = 0) -> SemanticIds:
        self._inexact = 0
        made = super().resolve(sids, vectors, quantizer, fixed)
        if self._inexact:
            self.notes.append(
                f"{self._inexact} of the crowded prefixes hold too many items for the exact assignment and were solved by "
                "regret; raise max_exact_pairs to have them exact."
            )
        return made

    def _moves(self, over: np.ndarray, free: np.ndarray) -> np.ndarray:
        return free

    def _choose(self, costs: np.ndarray, group: np.ndarray, room: np.ndarray, rank: np.ndarray) -> np.ndarray:
        chosen = np.empty(len(costs), dtype=np.int64)
        starts = np.r_[np.searchsorted(group, np.arange(len(room))), len(group)]  # `group` is sorted
        for one in range(len(room)):
            rows = slice(starts[one], starts[one + 1])
            chosen[rows] = self._solve(costs[rows], room[one], rank[rows])
        return chosen

    def _solve(self, costs: np.ndarray, room: np.ndarray, rank: np.ndarray) -> np.ndarray:
        from scipy.optimize import linear_sum_assignment

        places = np.repeat(np.arange(len(room)), np.minimum(room, len(costs)))
        if len(costs) * len(places) <= self.config.max_exact_pairs:
            order = np.argsort(rank)  # so that ties do not depend on row order
            chosen = np.empty(len(costs), dtype=np.int64)
            chosen[order] = places[linear_sum_assignment(costs[np.ix_(order, places)])[1]]
            return chosen
        self._inexact += 1
        allowed = np.sort(np.where(room > 0, costs, np.inf), axis=1)
        regret = allowed[:, min(1, allowed.shape[1] - 1)] - allowed[:, 0]
        order = np.empty(len(costs), dtype=np.int64)
        order[np.lexsort((rank, -regret))] = np.arange(len(costs))
        return deferred_acceptance(costs, np.zeros(len(costs), dtype=np.int64), room[None], order)


def deferred_acceptance(costs: np.ndarray, group: np.ndarray, room: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Each item gets the cheapest code of its group that those before it in rank leave room in.

    Args:
        costs: (n, k); equal costs go to the lowest code.
        group: (n,) group of each item.
        room: (groups, k) items that each code can take; in sum at least the items of the group.
        rank: (n,) distinct; smaller is served first.

    Returns:
        (n,) int64 codes.
    """
    count, codes = costs.shape
    preference = np.argsort(np.where(room[group] > 0, costs, np.inf), axis=1, kind="stable")
    pointer, rows, seats = np.zeros(count, dtype=np.int64), np.arange(count), room.ravel()
    while True:
        # A code keeps its best proposers for now; whoever it turns away can never come back, so nobody asks twice.
        choice = preference[rows, pointer]
        seat = group * codes + choice
        order = np.lexsort((rank, seat))
        first = np.searchsorted(seat[order], seat[order], side="left")
        rejected = order[rows - first >= seats[seat[order]]]
        if not len(rejected):
            return choice
        pointer[rejected] += 1


def last_level_costs(quantizer: Quantizer, vectors: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
    """(n, k) float64 squared distances of vectors (n, d) to what each last code decodes to after prefixes (n, L - 1)."""
    size, count = quantizer.level_sizes[-1], len(vectors)
    costs = np.empty((count, size))
    step = max(1, _BLOCK_ENTRIES // (size * vectors.shape[1]))
    for start in range(0, count, step):
        part, points = prefixes[start : start + step], vectors[start : start + step]
        if part.shape[1]:
            distinct, place = np.unique(part, axis=0, return_inverse=True)
        else:
            distinct, place = part[:1], np.zeros(len(part), dtype=np.int64)
        last = np.tile(np.arange(size, dtype=np.int32), len(distinct))[:, None]
        decoded = quantizer.decode(np.concatenate([np.repeat(distinct, size, axis=0), last], axis=1))
        candidates = decoded.reshape(len(distinct), size, -1)[place.reshape(-1)].astype(np.float64)
        candidates -= points[:, None, :]
        costs[start : start + step] = np.einsum("nkd,nkd->nk", candidates, candidates)
    return costs


def places_needed(taken: np.ndarray, count: np.ndarray, capacity: int) -> np.ndarray:
    """(groups,) smallest capacity of at least `capacity` at which `count` more items fit beside `taken` (groups, k)."""
    low = np.full(len(taken), capacity, dtype=np.int64)
    high = np.maximum(low, -(-(taken.sum(axis=1) + count) // taken.shape[1]))  # room for all, even if spread evenly
    while (low < high).any():
        middle = (low + high) // 2
        enough = np.maximum(middle[:, None] - taken, 0).sum(axis=1) >= count
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    return low


def _reassigned(
    method: NextNearest, sids: SemanticIds, vectors: np.ndarray, quantizer: Quantizer, fixed: int
) -> SemanticIds:
    method.notes = []
    vectors = _check(method, sids, vectors, quantizer, fixed)
    rows, group, over = _crowded(sids, method.config.capacity, fixed)
    if not len(rows):
        return sids
    size, capacity = sids.level_sizes[-1], method.config.capacity
    moves = method._moves(over, rows >= fixed)
    count = np.bincount(group, weights=moves).astype(np.int64)
    stay = ~moves
    taken = np.zeros((len(count), size), dtype=np.int64)
    np.add.at(taken, (group[stay], sids.codes[rows[stay], -1]), 1)
    limit = places_needed(taken, count, capacity)
    room = np.maximum(limit[:, None] - taken, 0)
    codes, rows, group = sids.codes.copy(), rows[moves], group[moves]
    for first, last in _blocks(count, size):
        here = slice(*np.searchsorted(group, [first, last]))
        part = rows[here]
        costs = last_level_costs(quantizer, vectors[part - fixed], codes[part, :-1])
        rank = sids.expansion_rank[part]
        codes[part, -1] = method._choose(costs, group[here] - first, room[first:last], rank)
    full = int((limit > capacity).sum())
    if full:
        method.notes.append(
            f"In {full} of the prefixes there are more items than {size} last codes can take at {capacity} each, so up to "
            f"{int(limit.max())} items share a code there; enlarge level_sizes[-1], raise capacity, or use a suffix."
        )
    return sids.replaced(codes=codes)


def _check(
    method: CollisionMethod, sids: SemanticIds, vectors: np.ndarray, quantizer: Quantizer, fixed: int
) -> np.ndarray:
    if sids.suffix_level:
        raise ConfigError(
            f"These semantic IDs have a suffix level, so no code is shared and '{method.name}' has nothing to do; use "
            "one of the two."
        )
    check_quantizer(sids, quantizer)
    if not 0 <= fixed <= len(sids):
        raise ConfigError(f"fixed must lie in [0, {len(sids)}], got {fixed}.")
    if fixed == len(sids):
        return np.zeros((0, quantizer.dims or 0), dtype=np.float32)
    return check_vectors(vectors, quantizer.dims, rows=len(sids) - fixed)


def _crowded(sids: SemanticIds, capacity: int, fixed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of all prefixes in which a movable item is over capacity.

    Returns:
        rows (n,), sorted by group; group (n,) numbers of their prefixes from 0; over (n,) whether the row is movable and
        behind the first `capacity` items of its code (fixed rows stand first, then expansion order).
    """
    codes, offsets, rows = sids.paths()
    owner = np.repeat(np.arange(len(codes)), np.diff(offsets))
    rows = rows[np.lexsort((np.arange(len(rows)), rows >= fixed, owner))]
    over = (np.arange(len(rows)) - offsets[owner] >= capacity) & (rows >= fixed)
    changes = (codes[1:, :-1] != codes[:-1, :-1]).any(axis=1)
    group = np.r_[0, np.cumsum(changes)][owner]
    crowded = np.zeros(group[-1] + 1, dtype=bool)
    crowded[group[over]] = True
    keep = crowded[group]
    return rows[keep], (np.cumsum(crowded) - 1)[group[keep]], over[keep]


def _blocks(count: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Runs of whole groups whose cost matrices fit `_BLOCK_PAIRS` together; a larger group is a block of its own."""
    ends, first = np.cumsum(count) * size, 0
    while first < len(count):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _BLOCK_PAIRS, side="right")))
        yield first, last
        first = last

"""Filters of single requests at decode time: a request's search runs as if the other items did not exist.

`SidTrie.restrict` is the filter that all requests share. Here every request has its own: items it must not get (seen ones),
or the only items it may get (a category, what is in stock nearby). A node is legal for a request exactly if an allowed
leaf of that request lies below it, so the search stays exact: no beam is spent on what is taken out afterwards, and the
softmax runs over what is left. Leaves are marked by sparse sorted keys (request, node), so the cost follows the number of
leaves that are named and not the catalogue. Requests that name the same array object share its keys. Our choice.

A SID may stand for several items. `ItemFilter` speaks of items: it allows a leaf while any of its items is allowed, and
takes the others out when items are ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidtune.core.errors import DataError
from sidtune.core.ragged import stretches
from sidtune.decoding.items import BeamOutput, LeafItems, rank_items
from sidtune.decoding.trie import SidTrie

LeafLists = Sequence["np.ndarray | Tensor | Sequence[int] | None"]


class RequestFilter:
    """Which nodes of a trie each of B requests may pass.

    Args:
        trie: the trie that will be searched, with its own filter, if any.
        exclude: per request, leaves it must not get (repeats allowed), or None for none. Default: none at all.
        only: per request, the only leaves it may get (an empty array: none), or None for all. Default: all.

    Raises:
        DataError: neither is given, their lengths differ, or a number is no leaf of the trie.
    """

    def __init__(self, trie: SidTrie, exclude: LeafLists | None = None, only: LeafLists | None = None) -> None:
        lists = [part for part in (exclude, only) if part is not None]
        if not lists or len({len(part) for part in lists}) != 1:
            raise DataError(
                "A request filter needs `exclude`, `only` or both, with one entry per request, got lengths "
                f"{[len(part) for part in lists]}; pass None for a request without a filter."
            )
        self.trie = trie
        self.requests = len(lists[0])
        only_of = _Sets([_name(only, request) for request in range(self.requests)])
        pair_of = _Sets([(_name(exclude, request), _name(only, request)) for request in range(self.requests)])
        limited = np.array([only is not None and only[request] is not None for request in range(self.requests)])
        kept = _pairs(trie, only, only_of.first)
        legal = self._levels(kept)
        dropped = _pairs(trie, exclude, pair_of.first)
        pair, leaf = dropped // trie.num_leaves, dropped % trie.num_leaves
        # Leaves that a request may not get anyway do not count towards what takes a node away from it.
        its_only, is_limited = only_of.which[pair_of.first][pair], limited[pair_of.first][pair]
        counts = ~is_limited | np.isin(its_only * trie.num_leaves + leaf, kept)
        illegal = self._emptied(
            self._levels(dropped[counts]), legal, only_of.which[pair_of.first], limited[pair_of.first]
        )
        keys = np.concatenate([key for key, _ in legal])
        self._legal = torch.from_numpy(np.sort(keys)).to(trie.device)
        self._illegal = torch.from_numpy(np.sort(illegal)).to(trie.device)
        self._only = torch.from_numpy(np.where(limited, only_of.which, -1)).to(trie.device)
        self._pair = torch.from_numpy(pair_of.which).to(trie.device)

    def _levels(self, pairs: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per level, from the leaves up: sorted keys (set, node) above the pairs, and how many of them lie below each."""
        trie = self.trie.to("cpu")
        sets, leaves = pairs // trie.num_leaves, pairs % trie.num_leaves
        if trie.alive is not None:
            allowed = trie.alive.numpy()[leaves + trie.level_starts[trie.depth]]
            sets, leaves = sets[allowed], leaves[allowed]
        node, found = leaves + trie.level_starts[trie.depth], []
        for _ in range(trie.depth + 1):
            found.append(np.unique(sets * trie.num_nodes + node, return_counts=True))
            node = np.searchsorted(trie.child_start.numpy(), node, side="right") - 1
        return found

    def _emptied(self, dropped: list, legal: list, only_of: np.ndarray, limited: np.ndarray) -> np.ndarray:
        """Keys of the nodes whose allowed leaves are all dropped."""
        trie, found = self.trie.to("cpu"), []
        for (keys, count), (only_keys, only_count) in zip(dropped, legal, strict=True):
            pair, node = keys // trie.num_nodes, keys % trie.num_nodes
            below = _leaves_below(trie, node)
            if len(only_keys):
                wanted = only_of[pair] * trie.num_nodes + node
                place = np.searchsorted(only_keys, wanted).clip(max=len(only_keys) - 1)
                inside = np.where(only_keys[place] == wanted, only_count[place], 0)
                below = np.where(limited[pair], inside, below)
            found.append(keys[count == below])
        return np.concatenate(found)

    def __len__(self) -> int:
        return self.requests

    def part(self, rows: slice | Tensor) -> RequestFilter:
        """The filter of some of the requests; keys are shared."""
        chosen = object.__new__(RequestFilter)
        chosen.__dict__.update(self.__dict__)
        chosen._pair, chosen._only = self._pair[rows], self._only[rows]
        chosen.requests = len(chosen._pair)
        return chosen

    def to(self, device: torch.device | str) -> RequestFilter:
        """The same filter on `device`."""
        moved = object.__new__(RequestFilter)
        moved.__dict__.update(self.__dict__)
        for name in ("_legal", "_illegal", "_only", "_pair"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def allows(self, nodes: Tensor) -> Tensor:
        """(B, ...) int64 nodes give (B, ...) bool; what -1 (no node) gives is of no meaning."""
        shape = (-1, *[1] * (nodes.ndim - 1))
        only, pair = self._only.view(shape), self._pair.view(shape)
        allowed = (only < 0) | _among(self._legal, nodes + only * self.trie.num_nodes)
        return allowed & ~_among(self._illegal, nodes + pair * self.trie.num_nodes)


class _Sets:
    """Equal names are one set: `which (requests,)` its number, `first` the first request of each."""

    def __init__(self, names: list[Any]) -> None:
        first: dict[Any, int] = {}
        for request, name in enumerate(names):
            first.setdefault(name, request)
        place = {name: n for n, name in enumerate(first)}
        self.first = np.array(list(first.values()), dtype=np.int64)
        self.which = np.array([place[name] for name in names], dtype=np.int64)


def _among(keys: Tensor, wanted: Tensor) -> Tensor:
    if not len(keys):
        return torch.zeros_like(wanted, dtype=torch.bool)
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return keys[place] == wanted


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


def _name(lists: LeafLists | None, request: int) -> int | None:
    return None if lists is None or lists[request] is None else id(lists[request])


def _pairs(trie: SidTrie, lists: LeafLists | None, requests: np.ndarray) -> np.ndarray:
    """Sorted distinct `set * num_leaves + leaf` of the lists of some requests; set n is `requests[n]`."""
    if lists is None:
        return _none()
    parts = [_none() if lists[request] is None else _numbers(lists[request]) for request in requests]
    leaves = np.concatenate([*parts, _none()])
    if leaves.size and (leaves.min() < 0 or leaves.max() >= trie.num_leaves):
        raise DataError(
            f"A request filter names leaves from {leaves.min()} to {leaves.max()}, but the trie has leaves 0 to "
            f"{trie.num_leaves - 1}; pass leaf numbers of this trie (`ItemFilter` takes item rows)."
        )
    return np.unique(np.repeat(np.arange(len(parts)), [len(part) for part in parts]) * trie.num_leaves + leaves)


def _numbers(entry: Any) -> np.ndarray:
    return np.asarray(entry.cpu().numpy() if isinstance(entry, Tensor) else entry, dtype=np.int64)


def _leaves_below(trie: SidTrie, nodes: np.ndarray) -> np.ndarray:
    """Allowed leaves under each node; all nodes stand on one level."""
    child_start = trie.child_start.numpy()
    first, end = nodes, nodes + 1
    while first.size and first[0] < len(child_start) - 1:
        first, end = child_start[first], child_start[end]
    if trie.alive is None:
        return end - first
    leaf_start, running = trie.level_starts[trie.depth], trie.allowed_before()
    return running[end - leaf_start] - running[first - leaf_start]


@dataclass(frozen=True)
class ItemFilter:
    """A filter of B requests in item rows.

    Attributes:
        items: leaf → item rows of the catalogue.
        exclude: per request, item rows it must not get, or None.
        only: per request, the only item rows it may get, or None for all of them. Requests may share one array.
    """

    items: LeafItems
    exclude: Sequence[np.ndarray | None] | None = None
    only: Sequence[np.ndarray | None] | None = None

    def leaves(self, trie: SidTrie) -> RequestFilter | None:
        """The same filter in leaves: a leaf is allowed while one of its items is. None when `rank` alone does it."""
        if all(only is None and not len(dead) for dead, only, _ in self._parts):
            return None
        return RequestFilter(trie, [dead for dead, _, _ in self._parts], [only for _, only, _ in self._parts])

    def rank(self, beam: BeamOutput, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`rank_items` of a search that ran with this filter: items that are not allowed are left out of their leaf."""
        return rank_items(beam, self.items, k, exclude=[hidden for _, _, hidden in self._parts])

    def part(self, rows: Sequence[int]) -> ItemFilter:
        """The filter of some of the requests."""
        pick = lambda lists: None if lists is None else [lists[row] for row in rows]  # noqa: E731
        chosen = ItemFilter(self.items, pick(self.exclude), pick(self.only))
        chosen.__dict__["_parts"] = pick(self._parts)
        return chosen

    @cached_property
    def _parts(self) -> list[tuple[np.ndarray, np.ndarray | None, np.ndarray]]:
        """Per request: leaves it must not get, the only ones it may get or None, and rows to leave out of the others."""
        leaf_of, offsets = self.items.leaf_of, self.items.offsets
        limits: dict[int, tuple[np.ndarray, ...]] = {}
        found = []
        for request in range(len(self.exclude or self.only or ())):
            rows = self._rows(self.exclude, request)
            leaves, others = None, _none()
            if (wanted := self._rows(self.only, request)) is not None:
                key = id(self.only[request])  # type: ignore[index]
                if key not in limits:
                    only, count = np.unique(leaf_of[wanted], return_counts=True)
                    inside = self.items.rows[stretches(offsets[only], offsets[only + 1])[1]]
                    limits[key] = only, np.setdiff1d(inside, wanted), count
                leaves, others, held = limits[key]
                rows = None if rows is None else rows[np.isin(rows, wanted)]
            rows = _none() if rows is None else rows
            leaf, count = np.unique(leaf_of[rows], return_counts=True)
            most = offsets[leaf + 1] - offsets[leaf] if leaves is None else held[np.searchsorted(leaves, leaf)]
            found.append((leaf[count == most], leaves, np.concatenate([others, rows])))
        return found

    def _rows(self, lists: Sequence[np.ndarray | None] | None, request: int) -> np.ndarray | None:
        """The distinct rows of a list that can be found at all; None where the request has none."""
        if lists is None or lists[request] is None:
            return None
        rows = np.unique(np.asarray(lists[request], dtype=np.int64))
        if rows.size and (rows[0] < 0 or rows[-1] >= len(self.items.rows)):
            raise DataError(
                f"The filter of request {request} names item rows from {rows[0]} to {rows[-1]}, but the catalogue "
                f"has rows 0 to {len(self.items.rows) - 1}; pass rows of this catalogue."
            )
        return rows[self.items.leaf_of[rows] >= 0]

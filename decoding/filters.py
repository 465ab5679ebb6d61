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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidtune.core.errors import DataError
from sidtune.decoding.beam_search import BeamOutput
from sidtune.decoding.items import LeafItems, rank_items
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
        dropped = [_leaves(trie, entry) for entry in exclude] if exclude is not None else [_none()] * self.requests
        kept = [None if entry is None else _leaves(trie, entry) for entry in only or [None] * self.requests]
        sets: dict[Any, int] = {}
        keys: list[np.ndarray] = []
        which, is_only = np.zeros(self.requests, dtype=np.int64), np.zeros(self.requests, dtype=bool)
        for request in range(self.requests):
            name = _name(exclude, request), _name(only, request)
            if name not in sets:
                sets[name] = len(sets)
                keys.append(self._nodes(kept[request], dropped[request]) + sets[name] * trie.num_nodes)
            which[request], is_only[request] = sets[name], kept[request] is not None
        self._keys = torch.from_numpy(np.concatenate([*keys, _none()])).to(trie.device)
        self._which = torch.from_numpy(which).to(trie.device)
        self._only = torch.from_numpy(is_only).to(trie.device)

    def _nodes(self, kept: np.ndarray | None, dropped: np.ndarray) -> np.ndarray:
        """Sorted nodes: those that stay legal when `kept` is given, else those that `dropped` makes illegal."""
        trie = self.trie.to("cpu")
        if kept is not None:
            leaves, counts = np.setdiff1d(kept, dropped), None
        else:
            leaves, counts = dropped, True
        if trie.alive is not None:
            leaves = leaves[trie.alive.numpy()[leaves + trie.level_starts[trie.depth]]]
        child_start = trie.child_start.numpy()
        node, found = leaves + trie.level_starts[trie.depth], []
        for _ in range(trie.depth + 1):
            unique, count = np.unique(node, return_counts=True)
            node = np.searchsorted(child_start, node, side="right") - 1
            found.append(unique if counts is None else unique[count == _leaves_below(trie, unique)])
        return np.concatenate(found[::-1])

    def __len__(self) -> int:
        return self.requests

    def part(self, rows: slice | Tensor) -> RequestFilter:
        """The filter of some of the requests; keys are shared."""
        chosen = object.__new__(RequestFilter)
        chosen.__dict__.update(self.__dict__)
        chosen._which, chosen._only = self._which[rows], self._only[rows]
        chosen.requests = len(chosen._which)
        return chosen

    def to(self, device: torch.device | str) -> RequestFilter:
        """The same filter on `device`."""
        moved = object.__new__(RequestFilter)
        moved.__dict__.update(self.__dict__)
        for name in ("_keys", "_which", "_only"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def allows(self, nodes: Tensor) -> Tensor:
        """(B, ...) int64 nodes give (B, ...) bool; what -1 (no node) gives is of no meaning."""
        shape = (-1, *[1] * (nodes.ndim - 1))
        keys = nodes + (self._which * self.trie.num_nodes).view(shape)
        if not len(self._keys):
            found = torch.zeros_like(nodes, dtype=torch.bool)
        else:
            place = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
            found = self._keys[place] == keys
        return found == self._only.view(shape)


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


def _name(lists: LeafLists | None, request: int) -> int | None:
    return None if lists is None or lists[request] is None else id(lists[request])


def _leaves(trie: SidTrie, entry: Any) -> np.ndarray:
    if entry is None:
        return _none()
    leaves = np.unique(entry.cpu().numpy() if isinstance(entry, Tensor) else np.asarray(entry, dtype=np.int64))
    if leaves.size and (leaves[0] < 0 or leaves[-1] >= trie.num_leaves):
        raise DataError(
            f"A request filter names leaves from {leaves[0]} to {leaves[-1]}, but the trie has leaves 0 to "
            f"{trie.num_leaves - 1}; pass leaf numbers of this trie (`ItemFilter` takes item rows)."
        )
    return leaves.astype(np.int64)


def _leaves_below(trie: SidTrie, nodes: np.ndarray) -> np.ndarray:
    """Allowed leaves under each node; all nodes stand on one level."""
    child_start = trie.child_start.numpy()
    first, end = nodes, nodes + 1
    while first.size and first[0] < len(child_start) - 1:
        first, end = child_start[first], child_start[end]
    if trie.alive is None:
        return end - first
    leaf_start = trie.level_starts[trie.depth]
    running = np.concatenate([[0], np.cumsum(trie.alive.numpy()[leaf_start:])])
    return running[end - leaf_start] - running[first - leaf_start]


@dataclass(frozen=True)
class ItemFilter:
    """A filter of B requests in item rows.

    Attributes:
        items: leaf → item rows of the catalogue.
        exclude: per request, item rows it must not get, or None.
        only: per request, the only item rows it may get, or None for all of them.
    """

    items: LeafItems
    exclude: Sequence[np.ndarray | None] | None = None
    only: Sequence[np.ndarray | None] | None = None

    def leaves(self, trie: SidTrie) -> RequestFilter | None:
        """The same filter in leaves: a leaf is allowed while one of its items is. None when nothing is filtered."""
        if self.exclude is None and self.only is None:
            return None
        leaf_of = self._leaf_of()
        size = np.diff(self.items.offsets)
        requests = len(self.exclude if self.exclude is not None else self.only)  # type: ignore[arg-type]
        exclude, only, shared = [], [], {}
        for request in range(requests):
            rows, kept = self._of(self.exclude, request), self._of(self.only, request)
            dropped = _none() if rows is None else np.unique(rows)
            if kept is None:
                leaf, count = np.unique(leaf_of[dropped], return_counts=True)
                exclude.append(leaf[count == size[leaf]])
                only.append(None)
                continue
            key = _name(self.exclude, request), _name(self.only, request)
            if key not in shared:
                shared[key] = np.unique(leaf_of[np.setdiff1d(kept, dropped)])
            exclude.append(None)
            only.append(shared[key])
        return RequestFilter(trie, exclude, only)

    def rank(self, beam: BeamOutput, k: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """`rank_items` of a search that ran with this filter: items that are not allowed are left out of their leaf."""
        return rank_items(beam, self.items, k, exclude=self._filled(self.exclude), only=self.only, **options)

    def part(self, rows: Sequence[int]) -> ItemFilter:
        """The filter of some of the requests."""
        pick = lambda lists: None if lists is None else [lists[row] for row in rows]  # noqa: E731
        return ItemFilter(self.items, pick(self.exclude), pick(self.only))

    def _leaf_of(self) -> np.ndarray:
        leaf_of = np.empty(len(self.items.rows), dtype=np.int64)
        leaf_of[self.items.rows] = np.repeat(np.arange(len(self.items.offsets) - 1), np.diff(self.items.offsets))
        return leaf_of

    def _of(self, lists: Sequence[np.ndarray | None] | None, request: int) -> np.ndarray | None:
        rows = None if lists is None else lists[request]
        if rows is None:
            return None
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self.items.rows)):
            raise DataError(
                f"The filter of request {request} names item rows from {rows.min()} to {rows.max()}, but the catalogue "
                f"has rows 0 to {len(self.items.rows) - 1}; pass rows of this catalogue."
            )
        return rows

    def _filled(self, lists: Sequence[np.ndarray | None] | None) -> list[np.ndarray] | None:
        return None if lists is None else [_none() if rows is None else rows for rows in lists]

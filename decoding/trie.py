"""The catalogue as a prefix tree over SID codes, in two flat tensors; no Python object per item, node or beam.

Nodes are numbered breadth first: 0 is the root, then all prefixes of one code in lexicographic order, then all of two
codes, and so on. So the children of a node are one contiguous run sorted by code, and the runs of all nodes follow one
another. That leaves `codes (num_nodes,)`, the code on the edge into each node, and `child_start (num_inner + 1,)`,
where each run begins. Leaf m is row m of the lexicographically sorted unique codes, as in `SemanticIds.paths()`.

Memory is 4 bytes per node and 8 per inner node. Building is one integer sort. A filter (`restrict`) keeps every node
and leaf number and marks which nodes still have an allowed leaf below, so legal sets stay exact under it.

The systems in the specs keep a Python dictionary per prefix, or a table per position, which admits codes that no item
has; this structure is our choice.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json, write_json
from sidtune.core.hub import Published, resolve_folder

if TYPE_CHECKING:
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds

TENSOR_FILE = "sid_trie.safetensors"
META_FILE = "sid_trie.json"
_INT64_CODES = 2**62


class SidTrie(Published):
    """Legal codes after every prefix of a catalogue's SIDs. Make one with `from_codes` or `from_semantic_ids`.

    Attributes:
        level_sizes: codes per level; `depth` of them. Level l is the l-th code, counted from 0.
        level_starts: `depth + 2` node numbers; prefixes of length l are nodes
            `level_starts[l] .. level_starts[l + 1] - 1`.
        max_children: per level, the largest number of codes that may follow a prefix of that length (filters ignored).
        codes: (num_nodes,) int32, the code on the edge into each node; -1 for the root.
        child_start: (num_inner + 1,) int64, first child of each inner node.
        alive: None, or (num_nodes,) bool: nodes with an allowed leaf below (see `restrict`).
        token_ids: None, or (sum(level_sizes),) int64 token ids of all codes, level by level (see `bind`).

    >>> trie = SidTrie.from_codes(np.array([[1, 0], [0, 2], [1, 1]]))
    >>> trie.num_leaves, trie.leaf_codes(torch.arange(3)).tolist()
    (3, [[0, 2], [1, 0], [1, 1]])
    """

    token_ids: Tensor | None = None
    _allowed_before: np.ndarray | None = None

    def __init__(self, codes: Tensor, child_start: Tensor, level_sizes: tuple[int, ...], alive: Tensor | None = None):
        self.codes = codes
        self.child_start = child_start
        self.level_sizes = tuple(int(size) for size in level_sizes)
        self.alive = alive
        starts = [0, 1]
        for level in range(self.depth):
            starts.append(int(child_start[starts[level + 1]]))
        self.level_starts = tuple(starts)
        counts = child_start.diff()
        self.max_children = tuple(
            int(counts[starts[level] : starts[level + 1]].max()) for level in range(len(self.level_sizes))
        )
        self.allowed_counts = tuple(self._count_allowed(level) for level in range(self.depth + 1))

    @classmethod
    def from_codes(cls, codes: np.ndarray | Tensor, level_sizes: tuple[int, ...] | None = None) -> SidTrie:
        """Builds the trie of an (n, depth) integer array of codes; rows may repeat and come in any order.

        Args:
            codes: (n, depth) integers, `0 <= codes[:, l] < level_sizes[l]`.
            level_sizes: codes per level; default: the largest code of each level plus one.

        Raises:
            DataError: empty, not a two-dimensional integer array, or a code outside its level (names the row).
        """
        array = codes.detach().cpu().numpy() if isinstance(codes, Tensor) else np.asarray(codes)
        sizes = _check_codes(array, level_sizes)
        unique = _sorted_unique(array, sizes)
        leaves, depth = unique.shape
        differs = np.empty((leaves, depth), dtype=bool)
        differs[0] = True
        np.not_equal(unique[1:], unique[:-1], out=differs[1:])
        np.logical_or.accumulate(differs, axis=1, out=differs)
        edges, child_starts = [np.array([-1], dtype=np.int32)], []
        first_rows, total = np.zeros(1, dtype=np.int64), 1
        for level in range(depth):
            rows = np.flatnonzero(differs[:, level])
            child_starts.append(np.searchsorted(rows, first_rows) + total)
            edges.append(unique[rows, level].astype(np.int32))
            first_rows, total = rows, total + len(rows)
        child_starts.append(np.array([total]))
        return cls(torch.from_numpy(np.concatenate(edges)), torch.from_numpy(np.concatenate(child_starts)), sizes)

    @classmethod
    def from_semantic_ids(cls, sids: SemanticIds) -> SidTrie:
        """The trie of a catalogue; leaf m is row m of `sids.paths()[0]`."""
        return cls.from_codes(sids.codes, sids.level_sizes)

    @property
    def depth(self) -> int:
        return len(self.level_sizes)

    @property
    def num_nodes(self) -> int:
        """All prefixes, the empty one (root) and the complete ones (leaves) included."""
        return len(self.codes)

    @property
    def num_leaves(self) -> int:
        """Distinct SIDs of the catalogue; a filter does not change it."""
        return self.num_nodes - self.level_starts[self.depth]

    @property
    def num_allowed_leaves(self) -> int:
        """Distinct SIDs that the filter, if any, still allows."""
        return self.allowed_counts[self.depth]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __repr__(self) -> str:
        filtered = "" if self.alive is None else f", allowed_leaves={self.num_allowed_leaves}"
        return f"SidTrie(level_sizes={self.level_sizes}, leaves={self.num_leaves}, nodes={self.num_nodes}{filtered})"

    def to(self, device: torch.device | str) -> SidTrie:
        """The same trie on `device`; itself when it is there already."""
        if self.device == torch.empty(0, device=device).device:
            return self
        moved = object.__new__(SidTrie)
        moved.__dict__.update(self.__dict__)
        moved.codes, moved.child_start = self.codes.to(device), self.child_start.to(device)
        moved.alive = None if self.alive is None else self.alive.to(device)
        moved.token_ids = None if self.token_ids is None else self.token_ids.to(device)
        return moved

    def bind(self, sid_token_ids: np.ndarray | Tensor) -> SidTrie:
        """The same trie that also knows the token of each code in one model's vocabulary; tensors are shared.

        A search then needs no `sid_token_ids`. They are saved with the trie, so one folder says all of a catalogue.
        `sid_token_ids`: (sum(level_sizes),) ids, level by level, as `Vocabulary.sid_token_ids`; errors as `level_tokens`.
        """
        bound = object.__new__(SidTrie)
        bound.__dict__.update(self.__dict__)
        bound.token_ids = torch.cat(self.level_tokens(sid_token_ids))
        return bound

    def level_tokens(
        self, sid_token_ids: np.ndarray | Tensor | None = None, vocabulary: int | None = None
    ) -> list[Tensor]:
        """The token ids of each level's codes, (k_level,) int64 each, on the device of the trie.

        Args:
            sid_token_ids: as in `bind`; default those the trie was bound to.
            vocabulary: size of the model's vocabulary, None where it is not known.

        Raises:
            ConfigError: none given and none bound. DataError: not one distinct id of the vocabulary per code of all levels.
        """
        ids = self.token_ids if sid_token_ids is None else sid_token_ids
        if ids is None:
            raise ConfigError("Give `sid_token_ids`, or a trie that knows the tokens of its codes (`SidTrie.bind`).")
        ids = ids if isinstance(ids, Tensor) else torch.tensor(np.asarray(ids))
        expected = sum(self.level_sizes)
        if ids.shape != (expected,) or ids.is_floating_point():
            raise DataError(
                f"sid_token_ids must hold one integer per code of all {self.depth} levels, shape ({expected},), got "
                f"{tuple(ids.shape)}; pass the `sid_token_ids` of the vocabulary made for these SIDs."
            )
        ids = ids.to(device=self.device, dtype=torch.int64)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary) or len(ids.unique()) != expected:
            raise DataError(
                f"sid_token_ids must be distinct ids of the model's vocabulary (size {vocabulary}), got ids from {low} to "
                f"{high}; use the model, tokenizer and vocabulary of one folder."
            )
        return list(ids.split(list(self.level_sizes)))

    def children(self, nodes: Tensor, level: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The exact legal continuations of each node.

        Args:
            nodes: any shape, int64 node numbers; -1 (a dead beam) and leaves have no children.
            level: length of the nodes' prefixes when all are equally long; then the width is the constant
                `max_children[level]` and the device need not be waited for. Default: the largest count in `nodes`.

        Returns:
            codes: (*nodes.shape, C) int64, legal next codes in ascending order, 0 where there is none.
            children: same shape, their node numbers, -1 where there is none.
            mask: same shape, True where there is one.
        """
        inner = (nodes >= 0) & (nodes < len(self.child_start) - 1)
        safe = nodes.where(inner, 0)
        start = self.child_start[safe]
        count = (self.child_start[safe + 1] - start) * inner
        if level is None:
            width = int(count.max()) if count.numel() else 0
        else:
            width = self.max_children[level]
        place = torch.arange(width, device=self.device)
        mask = place < count[..., None]
        children = (start[..., None] + place).where(mask, 0)
        codes = self.codes[children].long()
        if self.alive is not None:
            mask = mask & self.alive[children]
        return codes.where(mask, 0), children.where(mask, -1), mask

    def legal_mask(self, level: int, nodes: Tensor) -> Tensor:
        """Dense legal sets: (*nodes.shape, level_sizes[level]) bool, True where the code may follow the node.

        `nodes` are prefixes of `level` codes, or -1 (nothing may follow).
        """
        codes, _, mask = self.children(nodes, level)
        size = self.level_sizes[level]
        dense = torch.zeros(*nodes.shape, size + 1, dtype=torch.bool, device=self.device)
        # The extra column takes the padding, so that it cannot overwrite code 0.
        dense.scatter_(-1, codes.where(mask, size), True)
        return dense[..., :size]

    def step(self, nodes: Tensor, codes: Tensor) -> Tensor:
        """The child of each node by its code, or -1 where that code is not legal; binary search, shapes broadcast."""
        nodes, codes = torch.broadcast_tensors(nodes, codes)
        inner = (nodes >= 0) & (nodes < len(self.child_start) - 1)
        safe = nodes.where(inner, 0)
        low, end = self.child_start[safe], self.child_start[safe + 1]
        high = end
        for _ in range(max(self.max_children).bit_length()):
            middle = (low + high) // 2
            below = (middle < high) & (self.codes[middle.clamp(max=self.num_nodes - 1)] < codes)
            low, high = (middle + 1).where(below, low), high.where(below, middle)
        found = low.clamp(max=self.num_nodes - 1)
        hit = inner & (low < end) & (self.codes[found] == codes)
        if self.alive is not None:
            hit = hit & self.alive[found]
        return found.where(hit, -1)

    def find(self, codes: Tensor) -> Tensor:
        """Node of each prefix: codes (*, l) with l <= depth gives (*,) int64, -1 where the prefix is not legal."""
        nodes = torch.zeros(codes.shape[:-1], dtype=torch.int64, device=self.device)
        for level in range(codes.shape[-1]):
            nodes = self.step(nodes, codes[..., level])
        return nodes

    def leaf_codes(self, leaves: Tensor) -> Tensor:
        """SID codes of leaves: (*,) int64 gives (*, depth) int64; rows of -1 for leaf -1."""
        node = (leaves + self.level_starts[self.depth]).where(leaves >= 0, self.num_nodes - 1)
        path = []
        for _ in range(self.depth):
            path.append(self.codes[node].long())
            node = torch.searchsorted(self.child_start, node, right=True) - 1
        return torch.stack(path[::-1], dim=-1).where((leaves >= 0)[..., None], -1)

    def restrict(self, leaf_mask: Tensor | np.ndarray) -> SidTrie:
        """A view in which a prefix is legal exactly if an allowed leaf lies below it.

        Node and leaf numbers stay as they are, tensors are shared, filters add up. Time and memory O(num_nodes).

        Args:
            leaf_mask: (num_leaves,) bool, True for the leaves that may be found. All False: nothing is legal.

        Raises:
            DataError: another shape or no booleans.
        """
        allowed = torch.as_tensor(leaf_mask, device=self.device)
        if allowed.dtype != torch.bool or allowed.shape != (self.num_leaves,):
            raise DataError(
                f"A leaf mask must be boolean of shape ({self.num_leaves},), one per leaf of the trie, "
                f"got {str(allowed.dtype).removeprefix('torch.')} of shape {tuple(allowed.shape)}; index it by leaf."
            )
        leaf_start = self.level_starts[self.depth]
        alive = torch.empty(self.num_nodes, dtype=torch.bool, device=self.device)
        alive[leaf_start:] = allowed if self.alive is None else allowed & self.alive[leaf_start:]
        for level in range(self.depth - 1, -1, -1):
            first, last, end = self.level_starts[level : level + 3]
            running = torch.nn.functional.pad(alive[last:end].cumsum(0), (1, 0))
            edges = self.child_start[first : last + 1] - last
            alive[first:last] = running[edges].diff() > 0
        restricted = SidTrie(self.codes, self.child_start, self.level_sizes, alive)
        restricted.token_ids = self.token_ids
        return restricted

    def allowed_before(self) -> np.ndarray:
        """(num_leaves + 1,) int64: how many allowed leaves stand before each one; computed once. Needs a filter."""
        if self._allowed_before is None:
            alive = self.alive[self.level_starts[self.depth] :].cpu().numpy()  # type: ignore[index]
            self._allowed_before = np.concatenate([[0], np.cumsum(alive)])
        return self._allowed_before

    def _count_allowed(self, level: int) -> int:
        first, end = self.level_starts[level], self.level_starts[level + 1]
        return end - first if self.alive is None else int(self.alive[first:end].sum())

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `sid_trie.safetensors` and `sid_trie.json` into `folder`, made if needed; other files stay."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"codes": self.codes, "child_start": self.child_start}
        if self.alive is not None:
            tensors["alive"] = self.alive
        if self.token_ids is not None:
            tensors["token_ids"] = self.token_ids
        partial = folder / f".{TENSOR_FILE}.partial"
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(folder / TENSOR_FILE)
        meta = {"format": 1, "level_sizes": list(self.level_sizes), "leaves": self.num_leaves, "nodes": self.num_nodes}
        write_json(folder / META_FILE, meta)

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | Path, **options: Any) -> SidTrie:
        """Reads what `save_pretrained` wrote, from a local folder or, where there is none of that name, from the hub.

        `options` as in `core.hub.resolve_folder`. Raises DataError when a file is missing or damaged.
        """
        folder = resolve_folder(folder_or_repo, what="SID trie", **options)
        meta = read_json(folder / META_FILE)
        try:
            tensors = load_file(folder / TENSOR_FILE)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"The file {folder / TENSOR_FILE} cannot be read ({error}); write the trie again with save_pretrained."
            ) from None
        if not _sound(meta, tensors):
            raise DataError(
                f"The files {META_FILE} and {TENSOR_FILE} in {folder} do not hold one sound trie; "
                "write it again with save_pretrained."
            )
        trie = cls(tensors["codes"], tensors["child_start"], tuple(meta["level_sizes"]), tensors.get("alive"))
        return trie if "token_ids" not in tensors else trie.bind(tensors["token_ids"])


def _check_codes(codes: np.ndarray, level_sizes: tuple[int, ...] | None) -> tuple[int, ...]:
    if codes.ndim != 2 or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise DataError(
            f"SID codes must be a non-empty integer array of shape (items, depth), got {codes.dtype} of shape "
            f"{codes.shape}; encode the items with a quantizer first."
        )
    lowest, highest = codes.min(axis=0), codes.max(axis=0)
    level_sizes = highest.astype(np.int64) + 1 if level_sizes is None else level_sizes
    sizes = tuple(int(size) for size in level_sizes)
    if len(sizes) != codes.shape[1]:
        raise DataError(
            f"The codes have {codes.shape[1]} levels but {len(sizes)} level sizes were given; pass one per level."
        )
    for level, size in enumerate(sizes):
        if lowest[level] < 0 or highest[level] >= size:
            row = int(np.flatnonzero((codes[:, level] < 0) | (codes[:, level] >= size))[0])
            raise DataError(
                f"Row {row} has code {codes[row, level]} at level {level}, expected 0 to {size - 1}; "
                "check the codes or the level sizes."
            )
    return sizes


def _sorted_unique(codes: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Lexicographically sorted distinct rows. One sort of packed integers where they fit 64 bits."""
    if math.prod(sizes) < _INT64_CODES:
        key = codes[:, 0].astype(np.int64)
        for level in range(1, len(sizes)):
            key *= sizes[level]
            key += codes[:, level].astype(np.int64)
        key.sort()
        key = key[np.concatenate(([True], key[1:] != key[:-1]))]
        unique = np.empty((len(key), len(sizes)), dtype=np.int32)
        for level in range(len(sizes) - 1, -1, -1):
            key, unique[:, level] = np.divmod(key, sizes[level])
        return unique
    ordered = codes[np.lexsort(codes.T[::-1])]
    return ordered[np.concatenate(([True], (ordered[1:] != ordered[:-1]).any(axis=1)))]


def _sound(meta: object, tensors: dict[str, Tensor]) -> bool:
    """Whether saved tensors are a trie of the saved level sizes, so that no later lookup can leave them."""
    sizes = meta.get("level_sizes") if isinstance(meta, dict) else None
    codes, start, alive = tensors.get("codes"), tensors.get("child_start"), tensors.get("alive")
    if not isinstance(sizes, list) or not sizes or not all(isinstance(s, int) and s > 0 for s in sizes):
        return False
    if codes is None or start is None or codes.dtype != torch.int32 or start.dtype != torch.int64 or len(start) < 2:
        return False
    if alive is not None and (alive.dtype != torch.bool or alive.shape != codes.shape):
        return False
    ends = [0, 1]
    for _ in sizes:
        if ends[-1] >= len(start):
            return False
        ends.append(int(start[ends[-1]]))
    if start[0] != 1 or ends[-1] != len(codes) or ends[-2] != len(start) - 1 or not bool((start.diff() > 0).all()):
        return False
    rises = codes[1:].diff() > 0
    rises[start[1:-1] - 2] = True
    if not bool(rises.all()):
        return False
    levels = [codes[ends[level + 1] : ends[level + 2]] for level in range(len(sizes))]
    return all(bool((part >= 0).all() and (part < size).all()) for part, size in zip(levels, sizes, strict=True))

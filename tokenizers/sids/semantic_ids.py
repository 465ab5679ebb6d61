"""The map between items and semantic IDs (SIDs): lossless, one code to many items.

A SID is one code per level; its text is `<a_12><b_7><c_0>`, one letter per level unless levels share one (`letters`).
Several items may share a code. Nothing is dropped then: every item keeps its row, and a decoded code expands into all its
items, most popular first, then by item id.

Where it differs from the papers: OneSearch shows up to five items per SID and leaves the map implicit, TIGER appends a
number to colliding items. Here the map is explicit, and the number is an option (`with_suffix`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json, write_files, write_json
from sidtune.core.hub import Published, resolve_folder
from sidtune.tokenizers.letters import LETTERS as LETTERS
from sidtune.tokenizers.letters import SidLetters
from sidtune.tokenizers.sids.arguments import check_codes, check_ids, check_popularity, read_ids
from sidtune.tokenizers.sids.identity import check_items, fingerprint_of, title_hashes
from sidtune.tokenizers.sids.published import read_index_json
from sidtune.tokenizers.vectors import load_tensors

CONFIG_FILE = "sid_config.json"
CODE_FILE = "codes.safetensors"
ITEM_FILE = "item_ids.parquet"


@dataclass(frozen=True)
class Collisions:
    """How many items share a code.

    Attributes:
        codes: number of distinct codes M.
        sharing_rate: share of items whose code belongs to at least one other item; 1 minus the ICR of OneSearch.
        lost_rate: `(N - M) / N`, what other projects call the collision rate: the share of items that a one-to-one map would lose.
        largest_group: items of the most crowded code.
        largest_code: text of that code (the first in code order among equals).
    """

    codes: int
    sharing_rate: float
    lost_rate: float
    largest_group: int
    largest_code: str


class SemanticIds(Published):
    """Items and their codes.

    Args:
        item_ids: N distinct strings, any text.
        codes: (N, L) integers, `0 <= codes[:, l] < level_sizes[l]`.
        level_sizes: number of codes of each level, at most 26 levels.
        popularity: (N,) finite numbers that order the items of one code, default all 0 (then by item id alone).
        suffix_level: True when the last level is the one `with_suffix` adds.
        letters: one letter per level in the token texts, default a, b, c, ...; `abcdd` lets the last two levels share one,
            the second numbered on from the first (see `letters.py`).
        extends: fingerprints of the semantic IDs that these have added items to.
        titles: (N,) uint32 hash of each item's title, 0 where unknown, by which another shop with the same item ids shows.

    Attributes:
        source: the folder they were loaded from, for messages. The others are the arguments: `item_ids` a list, `codes` int32 and
            `popularity` float64 (both read-only), `level_sizes` a tuple.

    Raises:
        DataError: empty catalogue, duplicate ids, shapes that disagree, codes out of range, popularity not finite.
        ConfigError: level sizes that are no positive integers, more than 26 levels, or letters that do not fit them.

    >>> sids = SemanticIds(["lamp", "desk", "pen"], [[1, 0], [1, 0], [0, 2]], (2, 3), popularity=[3, 9, 1])
    >>> sids.text("lamp"), sids.parse("<a_0><b_2>"), sids.collisions().largest_group
    ('<a_1><b_0>', (0, 2), 2)
    """

    def __init__(
        self,
        item_ids: Sequence[str],
        codes: np.ndarray,
        level_sizes: Sequence[int],
        popularity: np.ndarray | None = None,
        suffix_level: bool = False,
        letters: str | None = None,
        extends: Sequence[str] = (),
        titles: np.ndarray | None = None,
    ) -> None:
        self._letters = SidLetters(level_sizes, letters)
        self.level_sizes, self.letters = self._letters.level_sizes, self._letters.letters
        self.item_ids, self._id_array = check_ids(item_ids)
        self.codes = check_codes(codes, len(self.item_ids), self.level_sizes)
        self.popularity = check_popularity(popularity, len(self.item_ids))
        self.suffix_level, self.extends = bool(suffix_level), tuple(extends)
        self.titles = np.zeros(len(self.item_ids), np.uint32) if titles is None else np.asarray(titles, np.uint32)
        self.source: Path | None = None
        self._fingerprint: str | None = None

    def replaced(self, rows: np.ndarray | None = None, **changes: Any) -> SemanticIds:
        """The same with other rows (in that order) or other arguments of the constructor."""
        take = slice(None) if rows is None else rows
        kept = {name: getattr(self, name)[take] for name in ("codes", "popularity", "titles")}
        kept |= {name: getattr(self, name) for name in ("level_sizes", "suffix_level", "letters", "extends")}
        ids = self.item_ids if rows is None else [self.item_ids[row] for row in rows]
        return SemanticIds(**{"item_ids": ids, **kept, **changes})

    def fingerprint(self) -> str:
        """SHA-256 of item ids and codes, whatever the order of the rows: what a model learns by heart."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self)
        return self._fingerprint

    def with_titles(self, items: pa.Table) -> SemanticIds:
        """The same, knowing the titles of a table with `item_id` and `title`; items it lacks keep theirs."""
        rows, titles = self.rows_of_ids(items["item_id"].to_pylist()), self.titles.copy()
        titles[rows[rows >= 0]] = title_hashes(items["title"].to_pylist())[rows >= 0]
        return self.replaced(titles=titles)

    def check_items(self, items: pa.Table, where: str | Path | None = None, whole: bool = False) -> None:
        """Refuses the items of another catalogue, see `tokenizers.sids.identity.check_items`."""
        check_items(self, items, where, whole)

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def depth(self) -> int:
        """Number of levels L."""
        return len(self.level_sizes)

    @property
    def token_offsets(self) -> np.ndarray:
        """(L,) int64: where each level starts in `tokens()`; `codes + token_offsets` are positions in `tokens()`."""
        return np.concatenate([[0], np.cumsum(self.level_sizes[:-1], dtype=np.int64)]).astype(np.int64)

    def level_tokens(self, level: int) -> list[str]:
        """Token texts of one level, `<a_0>`, `<a_1>`, ...; raises ConfigError for a level that does not exist."""
        if not 0 <= level < self.depth:
            raise ConfigError(f"There is no level {level}; these semantic IDs have the levels 0 to {self.depth - 1}.")
        return self._letters.level_tokens(level)

    def level_names(self) -> list[str]:
        """One name per level for tables: its letter, or `d1`, `d2` where levels share the letter d."""
        return self._letters.level_names()

    def tokens(self) -> list[str]:
        """Token texts of all levels, level by level."""
        return [token for level in range(self.depth) for token in self.level_tokens(level)]

    @cached_property
    def _texts(self) -> np.ndarray:
        columns = [np.array(self.level_tokens(n), dtype=object)[self.codes[:, n]] for n in range(self.depth)]
        return np.sum(np.stack(columns), axis=0)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._rows

    def row_of(self, item_id: str) -> int:
        """Row of an item. Raises DataError for an unknown id."""
        try:
            return self._rows[item_id]
        except KeyError:
            raise DataError(
                f"The item '{item_id}' has no semantic ID; it is not among the {len(self)} items these IDs were made "
                "for. Add it with extended(), or learn the IDs again."
            ) from None

    def rows_of_ids(self, item_ids: Sequence[str]) -> np.ndarray:
        """(n,) int64 rows of many items, -1 for unknown ids."""
        return np.fromiter((self._rows.get(item_id, -1) for item_id in item_ids), dtype=np.int64, count=len(item_ids))

    def text(self, item_id: str) -> str:
        """SID text of an item, for example `<a_12><b_7><c_0>`. Raises DataError for an unknown id."""
        return self._texts[self.row_of(item_id)]

    def texts(self) -> dict[str, str]:
        """Item id → SID text, row order."""
        return dict(zip(self.item_ids, self._texts.tolist(), strict=True))

    def parse(self, text: str) -> tuple[int, ...] | None:
        """The code a SID text spells, used by an item or not; None unless it is exactly one code of these levels."""
        return self._letters.parse(text)

    @cached_property
    def _id_rank(self) -> np.ndarray:
        order = pc.sort_indices(self._id_array).to_numpy()
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        return rank

    @cached_property
    def expansion_rank(self) -> np.ndarray:
        """(N,) int64: place of each row when all items stand by popularity (falling), then id; the order within codes."""
        rank = np.empty(len(self), dtype=np.int64)
        rank[np.lexsort((self._id_rank, -self.popularity))] = np.arange(len(self))
        return rank

    @cached_property
    def _paths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keys = [self._id_rank, -self.popularity, *(self.codes[:, level] for level in reversed(range(self.depth)))]
        rows = np.lexsort(keys).astype(np.int64)
        ordered = self.codes[rows]
        starts = np.flatnonzero(np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)])
        arrays = np.ascontiguousarray(ordered[starts]), np.r_[starts, len(rows)].astype(np.int64), rows
        for array in arrays:
            array.flags.writeable = False
        return arrays

    def paths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distinct codes and the items behind each.

        Returns:
            `(codes, offsets, rows)`: codes (M, L) int32 in lexicographic order; the items of code m are
            `rows[offsets[m]:offsets[m + 1]]`, most popular first, then by item id (code point order). offsets (M+1,)
            and rows (N,) are int64. All read-only.
        """
        return self._paths

    def collisions(self) -> Collisions:
        """Counts of items that share a code."""
        codes, offsets, _ = self._paths
        groups = np.diff(offsets)
        return Collisions(
            codes=len(codes),
            sharing_rate=int(groups[groups > 1].sum()) / len(self),
            lost_rate=(len(self) - len(codes)) / len(self),
            largest_group=int(groups.max()),
            largest_code=self.code_text(codes[int(groups.argmax())]),
        )

    def code_text(self, code: Sequence[int]) -> str:
        """SID text of a code."""
        return self._letters.text(code)

    def with_suffix(self, size: int | None = None) -> SemanticIds:
        """New semantic IDs with one more level that makes every code unique.

        Within a code, items are numbered in expansion order (popularity, then id), so number 0 is the most popular.

        Args:
            size: number of codes of the new level, default the largest group. Choose more to leave room for `extended`.

        Raises:
            ConfigError: there is a suffix already, `size` is below the largest group, or no letter is left for it.
        """
        if self.suffix_level:
            raise ConfigError("These semantic IDs have a suffix level already; a second one would always be 0.")
        _, offsets, rows = self._paths
        groups = np.diff(offsets)
        largest = int(groups.max())
        if size is not None and size < largest:
            raise ConfigError(
                f"A suffix level of {size} codes is too small for {largest} items of one code; enlarge it."
            )
        suffix = np.empty(len(self), dtype=np.int32)
        suffix[rows] = np.arange(len(rows)) - np.repeat(offsets[:-1], groups)
        codes = np.concatenate([self.codes, suffix[:, None]], axis=1)
        sizes, letters = (*self.level_sizes, size or largest), self.letters + LETTERS[len(set(self.letters)) :][:1]
        return self.replaced(codes=codes, level_sizes=sizes, suffix_level=True, letters=letters, extends=())

    def extended(
        self, new_ids: Sequence[str], new_codes: np.ndarray, popularity: np.ndarray | None = None
    ) -> SemanticIds:
        """New semantic IDs with more items; the codes of the old ones do not change.

        Args:
            new_ids: ids that are not in use yet.
            new_codes: (n, L) codes from the frozen codebooks; with a suffix level (n, L-1), the next free numbers are
                then given in the order of `popularity` and id.
            popularity: (n,), default 0.

        Raises:
            DataError: an id in use, wrong shape or range, or a code with no free suffix left.
        """
        if not len(new_ids):
            return self
        used = [item_id for item_id in new_ids if item_id in self._rows]
        if used:
            raise DataError(f"{len(used)} new items have semantic IDs already (first: '{used[0]}'); leave them out.")
        if self.suffix_level:
            base = SemanticIds(new_ids, new_codes, self.level_sizes[:-1], popularity, letters=self.letters[:-1])
            new_codes, weight = self._next_suffixes(base), base.popularity
        else:
            weight = check_popularity(popularity, len(new_ids))
            new_codes = check_codes(new_codes, len(new_ids), self.level_sizes)
        return self.replaced(
            item_ids=[*self.item_ids, *new_ids],
            codes=np.concatenate([self.codes, new_codes]),
            popularity=np.concatenate([self.popularity, weight]),
            titles=np.concatenate([self.titles, np.zeros(len(new_ids), np.uint32)]),
            extends=(*self.extends, self.fingerprint()),
        )

    def _next_suffixes(self, new: SemanticIds) -> np.ndarray:
        codes, offsets, rows = new.paths()
        both = np.concatenate([self.codes[:, :-1], codes])
        group = np.unique(both, axis=0, return_inverse=True)[1].reshape(-1)
        taken = np.zeros(group.max() + 1, dtype=np.int64)
        np.maximum.at(taken, group[: len(self)], self.codes[:, -1] + 1)
        first = taken[group[len(self) :]]
        suffix = np.arange(len(rows)) + np.repeat(first - offsets[:-1], np.diff(offsets))
        if suffix.max() >= self.level_sizes[-1]:
            crowded = new.code_text(new.codes[rows[int(suffix.argmax())]])
            raise DataError(
                f"The code {crowded} has no free suffix left for a new item ({self.level_sizes[-1]} in all); learn the "
                "semantic IDs again, with room in with_suffix(size=...)."
            )
        column = np.empty((len(rows), 1), dtype=np.int32)
        column[rows, 0] = suffix
        return np.concatenate([new.codes, column], axis=1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes codes (safetensors), item ids with SID text (parquet) and `sid_config.json`, whole or not at all."""
        import pyarrow.parquet as pq
        from safetensors.numpy import save_file

        with write_files(folder) as scratch:
            arrays = {"codes": self.codes, "popularity": self.popularity, "titles": self.titles}
            save_file(arrays, scratch / CODE_FILE)
            columns = {"item_id": self._id_array, "sid": pa.array(self._texts, type=pa.large_string())}
            pq.write_table(pa.table(columns), scratch / ITEM_FILE)
            config = {
                "format": 1,
                "items": len(self),
                "level_sizes": list(self.level_sizes),
                "suffix_level": self.suffix_level,
                "letters": self.letters,
                "expansion_order": "popularity descending, then item_id ascending",
                "fingerprint": self.fingerprint(),
                "extends": list(self.extends),
            }
            write_json(scratch / CONFIG_FILE, config)

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | Path, **hub: Any) -> Self:
        """Loads a local folder or hub repository (`hub`: options of `resolve_folder`: subfolder, revision, token, ...).

        Raises:
            DataError: missing or damaged files, or files that do not belong together.
        """
        folder = resolve_folder(folder_or_repo, what="semantic ID", **hub)
        config = read_json(folder / CONFIG_FILE)
        tensors = load_tensors(folder / CODE_FILE)
        item_ids = read_ids(folder / ITEM_FILE)
        try:
            known = {key: config[key] for key in ("level_sizes", "suffix_level")} | {"letters": config.get("letters")}
            codes, popularity, items = tensors["codes"], tensors["popularity"], config["items"]
        except (KeyError, TypeError) as error:
            raise DataError(f"The semantic IDs in {folder} lack {error}; write the folder again.") from None
        if len(item_ids) != items:
            raise DataError(
                f"{folder / ITEM_FILE} has {len(item_ids)} items, {CONFIG_FILE} says {items}; write the folder again."
            )
        known |= {"extends": config.get("extends", ()), "titles": tensors.get("titles")}
        made = cls(item_ids, codes, popularity=popularity, **known)
        if config.get("fingerprint", made.fingerprint()) != made.fingerprint():
            raise DataError(
                f"{folder}: {CODE_FILE}, {ITEM_FILE} and {CONFIG_FILE} do not belong together; copy the whole folder again."
            )
        made.source = folder
        return made

    @classmethod
    def from_index_json(
        cls,
        path: str | Path,
        level_sizes: Sequence[int] | None = None,
        popularity: dict[str, float] | None = None,
        letters: str | None = None,
    ) -> Self:
        """Published SIDs: a JSON mapping of item id to its tokens, `{"0": ["<a_60>", "<b_159>", "<c_203>"], ...}`.

        Args:
            path: the file.
            level_sizes: codes per level, default the largest code of each level plus one.
            popularity: item id → popularity, default 0 where absent.
            letters: one letter per level, default a, b, c, ...; where levels share one, `level_sizes` must be given.

        Raises:
            DataError: unreadable file, an item given twice, a token that is none, levels that disagree.
            ConfigError: shared letters without `level_sizes`, which a file does not say.
        """
        if letters is not None and level_sizes is None and len(set(letters)) < len(letters):
            raise ConfigError(
                f"Levels that share a letter ('{letters}') need level_sizes, to know where each one starts."
            )
        item_ids, numbers = read_index_json(Path(path), letters)
        sizes = level_sizes if level_sizes is not None else (numbers.max(axis=0) + 1).tolist()
        codes = numbers if letters is None else SidLetters(sizes, letters).codes_of_numbers(numbers)
        weight = None if popularity is None else np.array([popularity.get(i, 0.0) for i in item_ids], dtype=np.float64)
        return cls(item_ids, codes, sizes, weight, letters=letters)

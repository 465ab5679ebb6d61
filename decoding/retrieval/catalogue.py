"""The items that can be found: titles, categories, stock, and the part of the trie that a filter leaves.

A filter on items is exact on two levels. The trie keeps every SID with at least one allowed item below it (`SidTrie.restrict`,
so the search never spends a beam on anything else), and the list of items behind each SID keeps the allowed ones only.
A *scope* is both, made once for a combination of categories and stock and remembered; what a single request adds (items
it excludes, items it allows) becomes an `ItemFilter` of its scope. Our choice, no paper.

A scope costs O(N) time to make and about 9 bytes a node, 16 an item and 8 a SID to keep.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sidtune.core.errors import DataError, nearest
from sidtune.core.ragged import offsets_of
from sidtune.decoding.items import LeafItems
from sidtune.decoding.retrieval.search_request import PastTurn, SearchRequest, quoted
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

CATALOGUE_FILE = "catalogue.parquet"
_COLUMNS = ("item_id", "title", "category")


@dataclass(frozen=True)
class Scope:
    """A part of the catalogue.

    Attributes:
        trie: legal SIDs of this part; node and leaf numbers are those of the whole trie.
        leaves: the items of each leaf that belong to this part.
    """

    trie: SidTrie
    leaves: LeafItems


@dataclass(frozen=True)
class Target:
    """What one request may find, in row numbers.

    Attributes:
        k: items wanted. num_beams: beams.
        scope: part of the catalogue. exclude, only: see `ItemFilter`.
    """

    k: int
    num_beams: int
    scope: Scope
    exclude: np.ndarray
    only: np.ndarray | None = None


class Catalogue:
    """Items by row of their `SemanticIds`. Not thread-safe.

    Args:
        sids: the catalogue's semantic IDs.
        titles: item id → title.
        categories: item id → names from coarse to fine; None when the categories are not known.
        remembered: how many scopes are kept.
    """

    def __init__(
        self,
        sids: SemanticIds,
        titles: Mapping[str, str | None] | None = None,
        categories: pa.Table | None = None,
        remembered: int = 8,
    ) -> None:
        self.sids, self.titles = sids, dict(titles or {})
        self.texts = sids.texts()
        self.whole = Scope(SidTrie.from_semantic_ids(sids), LeafItems.from_semantic_ids(sids))
        self._rows_of_category = None if categories is None else _rows_by_name(sids, categories)
        self._stock: np.ndarray | None = None
        self._scopes: OrderedDict[tuple, Scope] = OrderedDict()
        self._remembered = remembered

    @classmethod
    def from_table(cls, sids: SemanticIds, items: pa.Table | None) -> Catalogue:
        """From a table with `item_id`, and `title` and `category` as far as there are any."""
        if items is None:
            return cls(sids)
        names = items.column_names
        titles = (
            dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True)) if "title" in names else {}
        )
        return cls(sids, titles, items.select(["item_id", "category"]) if "category" in names else None)

    @classmethod
    def from_bundle(cls, folder: str | Path, sids: SemanticIds) -> Catalogue:
        """From the `catalogue.parquet` of a published folder, if there is one."""
        path = Path(folder) / CATALOGUE_FILE
        if not path.exists():
            return cls(sids)
        try:
            names = pq.read_schema(path).names
            return cls.from_table(sids, pq.read_table(path, columns=[n for n in _COLUMNS if n in names]))
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(
                f"The file {path} cannot be read ({' '.join(str(error).split())}); publish it again."
            ) from None

    @property
    def categories(self) -> list[str] | None:
        """All category names, or None when they are not known."""
        return None if self._rows_of_category is None else sorted(self._rows_of_category)

    @property
    def stock(self) -> int | None:
        """How many items are in stock, or None when there is no stock list."""
        return None if self._stock is None else int(self._stock.sum())

    def rows(self, item_ids: Sequence[str], where: str, unknown: str = "error") -> np.ndarray:
        """Rows of items, int64.

        Args:
            item_ids: ids. where: how messages call their place.
            unknown: `error`, or `ignore` to leave out ids that the catalogue lacks.

        Raises:
            DataError: an id is not in the catalogue.
        """
        rows = self.sids.rows_of_ids(item_ids)
        if unknown == "error" and len(rows) and rows.min() < 0:
            first = item_ids[int(np.flatnonzero(rows < 0)[0])]
            raise DataError(f"The item {quoted(first)} of {where} is not in the catalogue; leave it out.")
        return rows[rows >= 0]

    def set_stock(self, item_ids: Sequence[str], unknown: str = "ignore") -> None:
        """Sets the items in stock. Raises DataError for ids that the catalogue lacks, if `unknown` is `error`."""
        stock = np.zeros(len(self.sids), dtype=bool)
        stock[self.rows(item_ids, "the stock list", unknown)] = True
        self._stock = stock
        for key in [key for key in self._scopes if key[1]]:
            del self._scopes[key]

    def scope(self, categories: Iterable[str] = (), in_stock: bool = False) -> Scope:
        """The items of any of these categories (all if none is named), and in stock if asked.

        Raises:
            DataError: an unknown category, no categories or no stock list to choose by.
        """
        key = (tuple(sorted(set(categories))), in_stock)
        if key == ((), False):
            return self.whole
        if key not in self._scopes:
            allowed = np.ones(len(self.sids), dtype=bool)
            if key[0]:
                allowed[:] = False
                for name in key[0]:
                    allowed[self._category(name)] = True
            if in_stock:
                if self._stock is None:
                    raise DataError(
                        "There is no stock list to search by; leave in_stock_only out, or name a stock file."
                    )
                allowed &= self._stock
            self._scopes[key] = self._part(allowed)
            while len(self._scopes) > self._remembered:
                self._scopes.popitem(last=False)
        self._scopes.move_to_end(key)
        return self._scopes[key]

    def target(self, request: SearchRequest, unknown: str = "error") -> Target:
        """The rows that a request may find. Raises DataError as `rows` and `scope` do."""
        exclude = self.rows(request.exclude_items, "exclude_items", unknown)
        if request.exclude_seen:
            seen = self.rows([turn.item_id for turn in request.history], "the history", unknown)
            exclude = np.concatenate([exclude, seen])
        only = None if request.only_items is None else self.rows(request.only_items, "only_items", unknown)
        scope = self.scope(request.only_categories, request.in_stock_only)
        return Target(request.k, request.beams, scope, exclude, only)

    def known_turns(self, history: Sequence[PastTurn], unknown: str = "error") -> list[PastTurn]:
        """The turns whose item is in the catalogue. Raises DataError for another one, unless `unknown` is `ignore`."""
        known = [turn for turn in history if turn.item_id in self.sids]
        if unknown == "error" and len(known) < len(history):
            first = next(turn.item_id for turn in history if turn.item_id not in self.sids)
            raise DataError(f"The item {quoted(first)} of the history is not in the catalogue; leave it out.")
        return known

    def _category(self, name: str) -> np.ndarray:
        if self._rows_of_category is None:
            raise DataError(
                "The categories of this catalogue are not known, so only_categories cannot be used; leave it out."
            )
        if name not in self._rows_of_category:
            # Comparing a stranger's text with very many names takes long; it is only a hint.
            known = list(self._rows_of_category)[:2000]
            raise DataError(f"There is no category {quoted(name)}; {nearest(name[:100], known)}")
        return self._rows_of_category[name]

    def _part(self, allowed: np.ndarray) -> Scope:
        whole = self.whole
        counts = np.bincount(whole.leaves.leaf_of[allowed], minlength=len(whole.leaves))
        order = whole.leaves.rows
        # What is not allowed stands behind the last leaf, out of reach: `rank_items` takes N from the length of `rows`.
        rows = np.concatenate([order[allowed[order]], order[~allowed[order]]])
        return Scope(whole.trie.restrict(counts > 0), LeafItems(offsets_of(counts), rows))


def _rows_by_name(sids: SemanticIds, table: pa.Table) -> dict[str, np.ndarray]:
    """Category name → item rows."""
    rows = sids.rows_of_ids(table["item_id"].to_pylist())
    lists = table["category"].combine_chunks()
    parent = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    names = pc.list_flatten(lists).dictionary_encode()
    codes = names.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    owner = rows[parent]
    kept = (codes >= 0) & (owner >= 0)
    order = np.argsort(codes[kept], kind="stable")
    owner, codes = owner[kept][order], codes[kept][order]
    edges = np.searchsorted(codes, np.arange(len(names.dictionary) + 1))
    return {
        name: np.unique(owner[edges[place] : edges[place + 1]])
        for place, name in enumerate(names.dictionary.to_pylist())
        if name
    }

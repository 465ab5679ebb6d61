"""The items that can be found: titles, categories, brands, prices, stock, and the part of the trie that a filter leaves.

A filter on items is exact on two levels. The trie keeps every SID with at least one allowed item below it (`SidTrie.restrict`,
so the search never spends a beam on anything else), and the list of items behind each SID keeps the allowed ones only.
A *scope* is both, made once for a combination of categories, brands, prices and stock and remembered; what a single request
adds (items it excludes, items it allows) becomes an `ItemFilter` of its scope. Our choice, no paper.

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
_COLUMNS = ("item_id", "title", "category", "brand", "price")
_PLURAL = {"category": "categories", "brand": "brands", "price": "prices"}


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
        items: table with `item_id` and what is known of `category` (names from coarse to fine), `brand` and `price`.
        remembered: how many scopes are kept.
    """

    def __init__(
        self,
        sids: SemanticIds,
        titles: Mapping[str, str | None] | None = None,
        items: pa.Table | None = None,
        remembered: int = 8,
    ) -> None:
        self.sids, self.titles = sids, dict(titles or {})
        self.texts = sids.texts()
        self.whole = Scope(SidTrie.from_semantic_ids(sids), LeafItems.from_semantic_ids(sids))
        known = [] if items is None else items.column_names
        self._rows_of = {name: _rows_by_name(sids, items, name) for name in ("category", "brand") if name in known}
        self._prices = _prices(sids, items) if "price" in known else None
        self._stock: np.ndarray | None = None
        self._scopes: OrderedDict[tuple, Scope] = OrderedDict()
        self._remembered = remembered

    @classmethod
    def from_table(cls, sids: SemanticIds, items: pa.Table | None) -> Catalogue:
        """From a table with `item_id`, and `title`, `category`, `brand` and `price` as far as there are any."""
        if items is None:
            return cls(sids)
        titles = items["title"].to_pylist() if "title" in items.column_names else [None] * items.num_rows
        return cls(sids, dict(zip(items["item_id"].to_pylist(), titles, strict=True)), items)

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
        return sorted(self._rows_of["category"]) if "category" in self._rows_of else None

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

    def scope(
        self,
        categories: Iterable[str] = (),
        in_stock: bool = False,
        brands: Iterable[str] = (),
        prices: tuple[float | None, float | None] = (None, None),
    ) -> Scope:
        """The items of any of these categories and any of these brands (all if none is named), in stock and in a range of prices.

        An item whose brand or price is not known is in none.

        Raises:
            DataError: an unknown category or brand, nothing known of the items to choose by.
        """
        key = (tuple(sorted(set(categories))), in_stock, tuple(sorted(set(brands))), prices)
        if key == ((), False, (), (None, None)):
            return self.whole
        if key not in self._scopes:
            allowed = np.ones(len(self.sids), dtype=bool)
            for column, names, field in (("category", key[0], "only_categories"), ("brand", key[2], "only_brands")):
                if names:
                    allowed &= self._named(column, names, field)
            if prices != (None, None):
                if self._prices is None:
                    raise _not_known("price", "price_min and price_max")
                low, high = (
                    bound if one is None else one for one, bound in zip(prices, (-np.inf, np.inf), strict=True)
                )
                allowed &= (self._prices >= low) & (self._prices <= high)
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
        prices = (request.price_min, request.price_max)
        scope = self.scope(request.only_categories, request.in_stock_only, request.only_brands, prices)
        return Target(request.k, request.beams, scope, exclude, only)

    def known_turns(self, history: Sequence[PastTurn], unknown: str = "error") -> list[PastTurn]:
        """The turns whose item is in the catalogue. Raises DataError for another one, unless `unknown` is `ignore`."""
        known = [turn for turn in history if turn.item_id in self.sids]
        if unknown == "error" and len(known) < len(history):
            first = next(turn.item_id for turn in history if turn.item_id not in self.sids)
            raise DataError(f"The item {quoted(first)} of the history is not in the catalogue; leave it out.")
        return known

    def _named(self, column: str, names: Iterable[str], field: str) -> np.ndarray:
        """(N,) bool: the items that have any of these names in a column."""
        if column not in self._rows_of:
            raise _not_known(column, field)
        rows, found = self._rows_of[column], np.zeros(len(self.sids), dtype=bool)
        for name in names:
            if name not in rows:
                # Comparing a stranger's text with very many names takes long; it is only a hint.
                raise DataError(f"There is no {column} {quoted(name)}; {nearest(name[:100], list(rows)[:2000])}")
            found[rows[name]] = True
        return found

    def _part(self, allowed: np.ndarray) -> Scope:
        whole = self.whole
        counts = np.bincount(whole.leaves.leaf_of[allowed], minlength=len(whole.leaves))
        order = whole.leaves.rows
        # What is not allowed stands behind the last leaf, out of reach: `rank_items` takes N from the length of `rows`.
        rows = np.concatenate([order[allowed[order]], order[~allowed[order]]])
        return Scope(whole.trie.restrict(counts > 0), LeafItems(offsets_of(counts), rows))


def _not_known(column: str, field: str) -> DataError:
    return DataError(f"The {_PLURAL[column]} of this catalogue are not known, so {field} cannot be used; leave it out.")


def _rows_by_name(sids: SemanticIds, items: pa.Table, column: str) -> dict[str, np.ndarray]:
    """Name in a column of texts, or of lists of them → item rows."""
    rows, names = sids.rows_of_ids(items["item_id"].to_pylist()), items[column].combine_chunks()
    if pa.types.is_list(names.type):
        rows = rows[pc.list_parent_indices(names).to_numpy(zero_copy_only=False)]
        names = pc.list_flatten(names)
    names = names.dictionary_encode()
    codes = names.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    kept = (codes >= 0) & (rows >= 0)
    order = np.argsort(codes[kept], kind="stable")
    owner, codes = rows[kept][order], codes[kept][order]
    edges = np.searchsorted(codes, np.arange(len(names.dictionary) + 1))
    return {
        name: np.unique(owner[edges[place] : edges[place + 1]])
        for place, name in enumerate(names.dictionary.to_pylist())
        if name
    }


def _prices(sids: SemanticIds, items: pa.Table) -> np.ndarray:
    """(N,) float64 price of each item row, NaN where it is not known."""
    rows = sids.rows_of_ids(items["item_id"].to_pylist())
    found = np.full(len(sids), np.nan)
    found[rows[rows >= 0]] = items["price"].cast(pa.float64()).to_numpy()[rows >= 0]
    return found

"""Mines a pool of core keywords from a data folder: candidates, their page views, and the head of each type.

From OneSearch (section 3.1.2): named entities of one year of clicked query-item pairs, sorted by page views within each
type. Where it differs (our choice): the paper finds the entities with a model that nobody published. Here the candidates
are what a catalogue states anyway in its typed fields (brand, category, attributes, price), and a dictionary of one's
own. A candidate's page views are the clicked pairs of the training requests, all before the split, whose query or item
text holds it under the matching rule that is used later; a pair counts once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError
from sidtune.data_builders.mining.query_pairs import query_item_pairs
from sidtune.data_builders.tables.store import DataFolder
from sidtune.tokenizers.encoders.base import item_texts
from sidtune.tokenizers.keywords.matcher import KeywordMatcher, normal_form
from sidtune.tokenizers.keywords.pool import KeywordPool, check_type

# Attribute names as catalogues write them, lower-cased → type.
ATTRIBUTE_TYPES = {
    **dict.fromkeys(("color", "colour", "shade"), "color"),
    **dict.fromkeys(("material", "fabric", "metal", "upholstery", "composition"), "material"),
    **dict.fromkeys(("size", "capacity", "weight", "volume", "dimensions", "length", "power"), "specifications"),
    **dict.fromkeys(("style", "theme", "design"), "style"),
    **dict.fromkeys(("pattern", "print"), "pattern"),
    **dict.fromkeys(("gender", "age", "age group", "audience", "target audience", "target group"), "audience"),
    **dict.fromkeys(("scene", "occasion", "room", "usage"), "scene"),
    **dict.fromkeys(("function", "feature", "features", "purpose"), "function"),
    **dict.fromkeys(("origin", "country", "region", "place", "location"), "location"),
    **dict.fromkeys(("model", "model number", "model name"), "model"),
    **dict.fromkeys(("series", "collection", "product line"), "series"),
    **dict.fromkeys(("season", "seasons"), "season"),
    **dict.fromkeys(("promotion", "deal", "campaign"), "marketing"),
    **dict.fromkeys(("host", "anchor", "streamer"), "anchor"),
    **dict.fromkeys(("type", "product type", "kind"), "entity"),
    **dict.fromkeys(("finish", "shape", "condition"), "modifier"),
}
_ROUND_PRICES = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))


@dataclass
class PoolConfig:
    """How a pool is mined.

    Attributes:
        attribute_types: attribute name → type, or null to leave the attribute out; adds to and overrides
            `ATTRIBUTE_TYPES`.
        price_phrases: patterns with `{}` for a round price between the cheapest and the dearest item, such as
            "under {}". People write such words in queries, hardly ever in items.
        dictionary: file with one `keyword<TAB>type` a line; its words are candidates like those of the fields.
        head_per_type: keywords kept of each type.
        min_views: a keyword needs this many page views.
        min_chars, max_words: shortest keyword in characters, longest in words; longer field values are no keywords.
        numbers: keep keywords without a letter, such as the size "42".
        word_boundaries: as in `KeywordMatcher`.
    """

    attribute_types: dict[str, str | None] = field(default_factory=dict)
    price_phrases: Sequence[str] = ("under {}",)
    dictionary: str | None = None
    head_per_type: int = 5_000
    min_views: int = 1
    min_chars: int = 2
    max_words: int = 4
    numbers: bool = False
    word_boundaries: bool = True

    def __post_init__(self) -> None:
        for name, kind in self.attribute_types.items():
            if kind is not None:
                check_type(kind, f"the attribute '{name}'", ConfigError)
        check_range(self, 1, "head_per_type", "min_chars", "max_words")
        check_range(self, 0, "min_views")
        if any(phrase.count("{}") != 1 for phrase in self.price_phrases):
            raise ConfigError(f"Each price phrase needs one {{}} for the price, got {list(self.price_phrases)}.")


def mine_pool(data: DataFolder, config: PoolConfig | None = None) -> KeywordPool:
    """Mines a pool.

    Args:
        data: a data folder. Items give candidates and texts; of the requests, only the training split is read.
        config: options, default `PoolConfig()`.

    Returns:
        The pool, by type and falling page views. Where no training request has a query with a click, every item counts
        as one page view of its keywords, and the pool's notes say so.

    Raises:
        ConfigError, DataError: wrong options, or an unreadable dictionary.
    """
    config = config or PoolConfig()
    rows, left_out = candidates(data.items, config)
    matcher = KeywordMatcher(list(dict.fromkeys(word for word, _ in rows)), config.word_boundaries)
    asked, wanted = query_item_pairs(data.requests["train"])
    views = page_views(matcher, data.items, asked, wanted)
    by_word = dict(zip(matcher.keywords, views.tolist(), strict=True))
    whole = KeywordPool([w for w, _ in rows], [kind for _, kind in rows], [by_word[word] for word, _ in rows])
    pool = whole.head(config.head_per_type, config.min_views)
    if not len(asked):
        pool.notes.append("No training request has a query with a click, so keywords are counted in the items alone.")
    if left_out:
        names = ", ".join(f"'{name}'" for name in left_out[:10])
        pool.notes.append(
            f"{len(left_out)} attributes have no keyword type and gave no keywords ({names}); name their types in "
            "attribute_types, or null to leave them out on purpose."
        )
    return pool


def candidates(items: pa.Table, config: PoolConfig) -> tuple[list[tuple[str, str]], list[str]]:
    """Candidates of the item fields and the dictionary.

    Returns:
        Distinct (keyword, type), and the names of attributes without a type, both in order of first appearance.
    """
    fits = partial(_fits, config=config)
    rows: dict[tuple[str, str], None] = {}
    for value in pc.unique(items.column("brand")).to_pylist():
        _add(rows, [value], "brand", fits)
    for value in pc.unique(pc.list_flatten(items.column("category"))).to_pylist():
        _add(rows, [value, *_CATEGORY.split(value or "")], "entity", fits)
    types = ATTRIBUTE_TYPES | {normal_form(name): kind for name, kind in config.attribute_types.items()}
    left_out: dict[str, None] = {}
    for name, value in _attributes(items):
        if name not in types:
            left_out[name] = None
        elif types[name] is not None:
            _add(rows, [value, *_LIST.split(value)], types[name], fits)
    for phrase in config.price_phrases:
        _add(rows, [phrase.format(price) for price in _round_prices(items)], "price", lambda word: True)
    if config.dictionary is not None:
        own = KeywordPool.from_tsv(config.dictionary)
        rows.update(dict.fromkeys(zip(own.keywords, own.types, strict=True)))
    return list(rows), list(left_out)


def page_views(matcher: KeywordMatcher, items: pa.Table, asked: pa.Array, wanted: pa.Array) -> np.ndarray:
    """(K,) int64: for each keyword, the query-item pairs whose query or item text holds it.

    Args:
        matcher: of the K keywords.
        items: table in the ITEMS schema; a pair with an item that is not in it counts by its query alone.
        asked, wanted: query text and item id of each pair; without any, each item counts once.
    """
    in_items = matcher.match(item_texts(items))
    if not len(asked):
        return np.rint(in_items.sum(axis=0)).astype(np.int64)
    coded = asked.dictionary_encode()
    in_queries = matcher.match(coded.dictionary.to_pylist())
    place = {item_id: row for row, item_id in enumerate(items["item_id"].to_pylist())}
    # Unknown items become one more item, without a word.
    row = np.fromiter((place.get(item_id, len(place)) for item_id in wanted.to_pylist()), np.int64, len(wanted))
    in_items = sp.vstack([in_items, sp.csr_array((1, in_items.shape[1]))], format="csr")
    shape = (in_queries.shape[0], in_items.shape[0])
    pairs = sp.coo_array((np.ones(len(row)), (coded.indices.to_numpy(), row)), shape=shape).tocsr()
    by_query, by_item = pairs.sum(axis=1) @ in_queries, pairs.sum(axis=0) @ in_items
    in_both = (in_queries * (pairs @ in_items)).sum(axis=0)
    return np.rint(by_query + by_item - in_both).astype(np.int64)


_CATEGORY = re.compile(r"\s*[&,/>;|]\s*|\s+and\s+")
_LIST = re.compile(r"\s*[,/;|]\s*")


def _attributes(items: pa.Table) -> Iterator[tuple[str, str]]:
    """Distinct (name in normal form, value) of all attributes, nulls left out."""
    flat = pc.list_flatten(items.column("attributes").combine_chunks())
    pairs = pa.table({"name": pc.struct_field(flat, "name"), "value": pc.struct_field(flat, "value")}).drop_null()
    for row in pairs.group_by(["name", "value"], use_threads=False).aggregate([]).to_pylist():
        yield normal_form(row["name"]), row["value"]


def _add(
    rows: dict[tuple[str, str], None], values: Iterable[str | None], kind: str, fits: Callable[[str], bool]
) -> None:
    for value in values:
        word = normal_form(value or "")
        if word and fits(word):
            rows[word, kind] = None


def _fits(word: str, config: PoolConfig) -> bool:
    if len(word) < config.min_chars or len(word.split()) > config.max_words:
        return False
    return config.numbers or any(char.isalpha() for char in word)


def _round_prices(items: pa.Table) -> list[int]:
    """Round prices (1, 2, 5, 10, ...) above the cheapest and up to the dearest item."""
    prices = items.column("price").to_numpy()
    prices = prices[np.isfinite(prices) & (prices > 0)]
    return [price for price in _ROUND_PRICES if len(prices) and prices.min() < price <= prices.max()]

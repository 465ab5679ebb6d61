"""What an aligned encoder learns from a data folder: pairs of texts, ordered behaviour, held-out pairs to test it on.

    pairs = mine_pairs(data.items, training_events, data.requests["train"], MiningConfig())
    held = held_out_pairs(data.items, later_events, data.requests["test"], pairs.queries)

Everything mined comes from tables the caller cut at the split; a query is what `query_pairs.squeezed` makes of its text. OneSearch
(section 3.1.1) names the kinds of pairs and the order show < click < order; how many, how supported and how drawn is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError
from sidtune.data_builders.mining.pairs import Pairs, counted, interaction_matrix, item_cf, merged, swing
from sidtune.data_builders.mining.query_pairs import distinct_queries, query_item_pairs, squeezed_column
from sidtune.data_builders.tables.columns import among, encode, rows_of
from sidtune.data_builders.tables.history import ACTIONS, History

SHOW, CLICK, ORDER = 0, 1, 2
METHODS = ("item_cf", "swing")


@dataclass
class MiningConfig:
    """How pairs are mined.

    Attributes:
        methods: `item_cf`, `swing` or both (their union).
        k: pairs per anchor and method, at most.
        min_support: fewest users (or, for query pairs, items) that have both.
        q2i_support: fewest clicks or orders of a query-item pair.
        swing_alpha: alpha of Swing.
        max_owners: owners per item that Swing reads, see `pairs.swing`.
        actions: events that tie a user to an item.
        rank_rows: order rows drawn for each query, before equal ones are merged.
    """

    methods: list[str] = field(default_factory=lambda: list(METHODS))
    k: int = 20
    min_support: int = 2
    q2i_support: int = 1
    swing_alpha: float = 1.0
    max_owners: int = 300
    actions: list[str] = field(default_factory=lambda: ["click", "like", "order"])
    rank_rows: int = 8

    def __post_init__(self) -> None:
        for what, given, known in (("methods", self.methods, METHODS), ("actions", self.actions, ACTIONS)):
            unknown = sorted(set(given) - set(known))
            if unknown or not given:
                found = f"'{unknown[0]}'" if unknown else "nothing"
                raise ConfigError(f"'{what}' of mining holds {found}; name at least one of {', '.join(known)}.")
        check_range(self, 1, "k", "min_support", "q2i_support", "rank_rows")


@dataclass(frozen=True)
class Behaviours:
    """The strongest thing that happened to an item shown for a query, over all requests; (B,) each, by query.

    Attributes:
        query, item: int64 rows. level: int8 `SHOW` (known not to be clicked), `CLICK` or `ORDER`.
    """

    query: np.ndarray
    item: np.ndarray
    level: np.ndarray


@dataclass(frozen=True)
class MinedPairs:
    """Positives before the filter by cosine.

    Attributes:
        queries: the distinct queries; query rows count in this list, item rows in the items table.
        q2q, i2i: `left < right`, each once. q2i: query and item.
        behaviours: see there. rank: (T, 4) int64, see `behaviour_rows`.
    """

    queries: list[str]
    q2q: Pairs
    i2i: Pairs
    q2i: Pairs
    behaviours: Behaviours
    rank: np.ndarray


def mine_pairs(
    items: pa.Table, events: pa.Table, requests: pa.Table, config: MiningConfig | None = None, seed: int = 0
) -> MinedPairs:
    """Mines everything from a training log.

    Args:
        items: table in the ITEMS schema. Events and candidates of other items are left out.
        events: *training* events. requests: *training* requests.
        seed: of the drawn order rows.
    """
    config = config or MiningConfig()
    queries, count = distinct_queries(requests), items.num_rows
    wanted = events.filter(pc.is_in(events["action"], value_set=pa.array(config.actions)))
    user, users = encode(wanted["user_id"])
    item = rows_of(wanted["item_id"], items["item_id"])
    known = (item >= 0) & (user >= 0)
    i2i = _mined(user[known], item[known], len(users), count, config)
    query, chosen = _query_items(requests, queries, items)
    q2q = _mined(chosen, query, count, len(queries), config)
    found = behaviours(requests, queries, items)
    q2i = counted(query, chosen, config.k, config.q2i_support)
    return MinedPairs(queries, q2q, i2i, q2i, found, behaviour_rows(found, config.rank_rows, seed))


def behaviours(requests: pa.Table, queries: Sequence[str], items: pa.Table) -> Behaviours:
    """The level of each pair of query and shown item. A candidate whose feedback is unknown (null) tells nothing."""
    column = requests.column("candidates").combine_chunks()
    flat, parents = column.flatten(), pc.list_parent_indices(column)
    query = rows_of(squeezed_column(requests.column("query")), pa.array(list(queries), pa.string()))[parents.to_numpy()]
    item = rows_of(pc.struct_field(flat, "item_id"), items["item_id"])
    click, order = (pc.fill_null(pc.struct_field(flat, name), -1).to_numpy() for name in ("click", "order"))
    level = np.where(order > 0, ORDER, np.where(click > 0, CLICK, np.where(click == 0, SHOW, -1)))
    keep = (query >= 0) & (item >= 0) & (level >= 0)
    pairs, group = np.unique(np.stack([query[keep], item[keep]], axis=1), axis=0, return_inverse=True)
    best = np.zeros(len(pairs), dtype=np.int8)
    np.maximum.at(best, group.ravel(), level[keep].astype(np.int8))
    return Behaviours(pairs[:, 0], pairs[:, 1], best)


def behaviour_rows(found: Behaviours, per_query: int = 8, seed: int = 0) -> np.ndarray:
    """Rows (query, ordered item, clicked item, shown item) for the order margin; -1 where a query has no such item.

    For each query `per_query` rows are drawn, one random item of each level, and equal rows are merged; a query whose items
    all have one level gives none.

    Returns:
        (T, 4) int64, sorted.
    """
    if not len(found.query):
        return np.empty((0, 4), dtype=np.int64)
    draw = np.random.default_rng(seed)
    queries, place = np.unique(found.query, return_inverse=True)
    by_level = [np.repeat(queries, per_query)]
    for level in (ORDER, CLICK, SHOW):
        mine = found.level == level
        counts = np.bincount(place[mine], minlength=len(queries))  # `found` is sorted by query
        starts = np.repeat(np.cumsum(counts) - counts, per_query)
        counts = np.repeat(counts, per_query)
        chosen = starts + (draw.random(len(counts)) * counts).astype(np.int64)
        items = np.append(found.item[mine], -1)
        by_level.append(np.where(counts > 0, items[np.minimum(chosen, len(items) - 1)], -1))
    rows = np.stack(by_level, axis=1)
    return np.unique(rows[(rows[:, 1:] >= 0).sum(axis=1) >= 2], axis=0)


@dataclass(frozen=True)
class HeldOutPairs:
    """Pairs from after the split.

    Attributes:
        queries: the queries of `q2i`, which may hold new ones.
        q2i: (Q, 2) int64 distinct pairs of a query and a clicked or ordered item.
        i2i: (I, 2) int64 distinct pairs of two items that a user chose one after the other.
        q2i_new, i2i_new: masks of the pairs that the training log does not hold.
    """

    queries: list[str]
    q2i: np.ndarray
    i2i: np.ndarray
    q2i_new: np.ndarray
    i2i_new: np.ndarray


def held_out_pairs(
    items: pa.Table,
    late_events: pa.Table,
    late_requests: pa.Table,
    early_events: pa.Table,
    early_requests: pa.Table,
    actions: Sequence[str] = ("click", "like", "order"),
) -> HeldOutPairs:
    """Pairs of a later time, and which of them the earlier log does not hold.

    Args:
        items: table in the ITEMS schema; pairs with other items are left out.
        late_events, late_requests: after the split. early_events, early_requests: before it.
        actions: events that count.
    """
    queries = distinct_queries(late_requests)
    late, early = (_distinct(*_query_items(requests, queries, items)) for requests in (late_requests, early_requests))
    late_next, early_next = (_successions(events, items, actions) for events in (late_events, early_events))
    return HeldOutPairs(queries, late, late_next, ~among(late, early), ~among(late_next, early_next))


def _mined(owners: np.ndarray, things: np.ndarray, n_owners: int, n_things: int, config: MiningConfig) -> Pairs:
    matrix = interaction_matrix(owners, things, n_owners, n_things)
    made = []
    if "item_cf" in config.methods:
        made.append(item_cf(matrix, config.k, config.min_support))
    if "swing" in config.methods:
        made.append(swing(matrix, config.swing_alpha, config.k, config.min_support, config.max_owners))
    return merged(*made)


def _query_items(requests: pa.Table, queries: Sequence[str], items: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Query and item rows of every click or order of a known query on a known item, with repeats."""
    texts, ids = query_item_pairs(requests)
    query, item = rows_of(texts, pa.array(list(queries), pa.string())), rows_of(ids, items["item_id"])
    known = (query >= 0) & (item >= 0)
    return query[known], item[known]


def _successions(events: pa.Table, items: pa.Table, actions: Sequence[str]) -> np.ndarray:
    """(I, 2) distinct pairs of different items that follow each other in a user's list of distinct choices."""
    wanted = events.filter(pc.is_in(events["action"], value_set=pa.array(list(actions))))
    if not wanted.num_rows:
        return np.empty((0, 2), dtype=np.int64)
    lists = History(wanted).of_users()
    item = rows_of(wanted["item_id"], items["item_id"])[lists.rows]
    user = np.repeat(np.arange(len(lists)), lists.lengths)
    # Each item once per user, where it came first: the click and the order of one item are no succession.
    known = np.flatnonzero(item >= 0)
    _, first = np.unique(user[known] * items.num_rows + item[known], return_index=True)
    known = known[np.sort(first)]
    item, user = item[known], user[known]
    follows = user[1:] == user[:-1]
    return _distinct(item[:-1][follows], item[1:][follows])


def _distinct(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.unique(np.stack([left, right], axis=1), axis=0)

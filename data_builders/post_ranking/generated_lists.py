"""The lists of our own generator as a post-ranking table: what it says of its items, and what the log or the shop says of them.

Own design. A generator writes semantic IDs with log-probabilities, so its lists carry two fields more than a shop knows: the
SID (one-hot on each level) and the pair log-probability and logarithm of the place. History items have no such pair (missing).

In a simulated shop the table is `shop_lists.session_table` over these lists. `logged_table` makes it from any data folder:
words of titles and profiles, prices, earlier clicks. Counts of items are left out there, because those of a data folder reach to
the end of training and so contain the training requests themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import DataError
from sidtune.data_builders.post_ranking.columns import request_table
from sidtune.data_builders.post_ranking.schema import PostRankField, PostRankTable
from sidtune.data_builders.post_ranking.text_hashing import hashed_bag
from sidtune.data_builders.shop_world.items import item_table
from sidtune.data_builders.shop_world.world import ShopWorld
from sidtune.data_builders.tables.history import History
from sidtune.data_builders.tables.store import DataFolder

WIDTH = 64
Extra = Mapping[PostRankField, np.ndarray]


@dataclass(frozen=True)
class GeneratedLists:
    """Lists of one length.

    Attributes:
        requests: R requests in our schema. splits: split name of each.
        items: (R, n) rows of the items table, best first. scores: (R, n) log-probabilities, falling.
    """

    requests: pa.Table
    splits: list[str]
    items: np.ndarray
    scores: np.ndarray

    def take(self, kept: np.ndarray) -> GeneratedLists:
        """The lists of some rows."""
        splits = [self.splits[row] for row in kept.tolist()]
        return GeneratedLists(self.requests.take(kept), splits, self.items[kept], self.scores[kept])


def generator_fields(
    codes: np.ndarray, level_sizes: tuple[int, ...], scores: np.ndarray, sources: tuple[str, ...] = ()
) -> dict[PostRankField, np.ndarray]:
    """The fields that only a generator has, with their matrices.

    Args:
        codes: (N, L) codes of the items. level_sizes: L sizes.
        scores: (R, n) log-probabilities in list order.
        sources: fingerprints of the semantic IDs and of those they extend.

    Returns:
        `sid` → (N, sum of the sizes) one-hot, `generator` → (R * n, 2) log-probability and log(1 + place).
    """
    starts = np.concatenate([[0], np.cumsum(level_sizes)[:-1]])
    one_hot = np.zeros((len(codes), int(np.sum(level_sizes))), dtype=np.float32)
    np.put_along_axis(one_hot, np.asarray(codes) + starts, 1.0, axis=1)
    place = np.broadcast_to(np.log1p(np.arange(scores.shape[1])), scores.shape)
    labels = ("log probability", "log place")
    return {
        PostRankField("sid", "sid", "item", one_hot.shape[1], sources=sources): one_hot,
        PostRankField("generator", "numeric", "item", 2, labels, dynamic=True): np.stack(
            [scores.ravel(), place.ravel()], axis=1
        ),
    }


def shop_of(data: DataFolder, requests: pa.Table) -> ShopWorld:
    """The simulated shop that a data folder came from, built again from its `meta.json`.

    Args:
        data: made with the reader shop_world. requests: those that will be asked about.

    Raises:
        DataError: it is another shop: other items, other prices, or other requests.
    """
    world = ShopWorld.from_options(**data.meta["options"])
    own = item_table(world.config, world.catalogue)
    same = own.num_rows == data.items.num_rows and all(
        own[name].combine_chunks().equals(data.items[name].combine_chunks()) for name in ("item_id", "title", "price")
    )
    if same:
        rows = world.request_rows(requests["request_id"])
        same = bool((world.requests.time[rows] == requests["time"].to_numpy()).all())
    if not same:
        raise DataError(
            f"The data folder {data.path} is not the shop that its meta.json describes, so nothing is known of the truth; build "
            "it again with build_data."
        )
    return world


def logged_table(
    data: DataFolder, lists: GeneratedLists, relevance: np.ndarray, extra: Extra, history: int = 10
) -> PostRankTable:
    """The table of lists with logged feedback.

    Args:
        data: the data folder. lists: of it.
        relevance: (R, n), NaN = unknown.
        extra: of `generator_fields`.
        history: latest clicked, liked or ordered items kept, each strictly before its request.
    """
    requests, items = lists.requests, data.items
    past = History(data.events).before(requests["user_id"], requests["time"].to_numpy(), history)
    names = data.events["item_id"].take(pa.array(past.rows))
    past_items = _rows(names, items["item_id"])
    profiles = data.users["profile"].to_pylist()
    price = np.array([[np.nan if p is None or p <= 0 else np.log(p)] for p in items["price"].to_pylist()])
    fields = [
        PostRankField("profile", "text_vector", "user", WIDTH),
        PostRankField("title", "text_vector", "item", WIDTH),
        PostRankField("price", "numeric", "item", 1, ("log price",)),
    ]
    matrices = {
        "query": hashed_bag(requests["query"].to_pylist(), WIDTH),
        "user/profile": hashed_bag(
            [" ".join(f"{p['name']} {p['value']}" for p in one or ()) for one in profiles], WIDTH
        ),
        "item/title": hashed_bag(items["title"].to_pylist(), WIDTH),
        "item/price": price.reshape(-1, 1),
    }
    for one, matrix in extra.items():
        fields.append(one)
        matrices[f"{one.scopes[0]}/{one.name}"] = matrix
        if one.dynamic:
            matrices[f"history/{one.name}"] = np.full((len(past_items), one.dim), np.nan)
    query = requests["query"]
    rows = pa.array(np.arange(len(lists.items)), mask=pc.is_null(query).to_numpy(zero_copy_only=False))
    users = _rows(requests["user_id"], data.users["user_id"])
    listed, before = (lists.items, lists.scores, relevance), (past.offsets, past_items)
    return PostRankTable(
        request_table(requests["request_id"], lists.splits, query, rows, users, listed, before),
        items["item_id"].to_pylist(),
        data.users["user_id"].to_pylist(),
        tuple(fields),
        {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in matrices.items()},
        [[("title", title)] if title else [] for title in items["title"].to_pylist()],
        notes=[
            "An item is relevant when the log holds a click, like or order of it for the request, else 0, shown or not."
        ],
    )


def _rows(ids: pa.ChunkedArray, known: pa.ChunkedArray) -> np.ndarray:
    """(n,) row of each id; −1 for one that is not there."""
    return pc.index_in(ids, value_set=known.combine_chunks()).fill_null(-1).to_numpy().astype(np.int64)

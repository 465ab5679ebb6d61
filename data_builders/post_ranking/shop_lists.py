"""Simulated sessions as post-ranking requests: what a shop would know of them, and nothing of the truth but the label.

Own design. The features are observable: profile, query text (hashed words unless vectors are given), the words of an
item, its counts on earlier pages, and what the user clicked before. The label is chosen with `label`:

| label | relevance of a candidate |
|---|---|
| `best` | n − its place in the best list (n .. 1): the known truth, for ceilings and supervised targets |
| `clicks` | 1 if it is clicked on a sampled session that shows the incoming order, else 0: what a log would hold |
| `none` | unknown |

Counts and histories are of requests strictly before the request's second. An item's own stock of clicks is read from the
shop's log, not from the sessions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.ragged import owners, stretches
from sidtune.data_builders.post_ranking.columns import request_table
from sidtune.data_builders.post_ranking.schema import PostRankField, PostRankTable
from sidtune.data_builders.post_ranking.text_hashing import hashed_bag
from sidtune.data_builders.shop_world import words
from sidtune.data_builders.shop_world.items import item_table, price_bucket
from sidtune.data_builders.shop_world.requests import query_texts
from sidtune.data_builders.shop_world.sessions import ShopSessions
from sidtune.data_builders.shop_world.users import PROFILE_NAMES, PROFILE_WORDS, user_ids
from sidtune.data_builders.shop_world.world import ShopWorld

LABELS = ("best", "clicks", "none")
_D_Q = 64
_PRICES = ("budget", "mid-price", "premium")


def session_table(
    sessions: ShopSessions,
    splits: Sequence[str],
    scores: np.ndarray | None = None,
    label: str = "best",
    history: int = 10,
    query_vectors: np.ndarray | None = None,
    extra: Mapping[PostRankField, np.ndarray] | None = None,
    seed: int = 0,
) -> PostRankTable:
    """Builds the table of some sessions, row b = session b.

    Args:
        sessions: candidate lists in incoming order.
        splits: split name of each session.
        scores: (B, n) scores of whatever made the lists; default 1 / (1 + place).
        label: see the module's docstring. history: latest clicks kept.
        query_vectors: (B, d_q) vectors of the queries; default hashed words (zeros for a null query).
        extra: further item fields with their matrix: static ones (N, dim), such as item vectors or SIDs; dynamic ones
            (B * n, dim), candidates end to end, which the history lacks (NaN), such as scores.
        seed: of sampled clicks.

    Raises:
        ConfigError: an unknown label. DataError: shapes that do not fit.
    """
    if label not in LABELS:
        raise ConfigError(f"Sessions have no label '{label}': {nearest(label, LABELS)}")
    world, (count, n) = sessions.world, sessions.items.shape
    scores = np.broadcast_to(1.0 / (1.0 + np.arange(n)), (count, n)) if scores is None else np.asarray(scores)
    if len(splits) != count or scores.shape != (count, n):
        raise DataError(f"There are {count} sessions of {n} candidates, {len(splits)} splits, scores {scores.shape}.")
    texts = query_texts(world.config, world.requests).take(pa.array(sessions.rows))
    if query_vectors is None:
        query_vectors = hashed_bag(texts.to_pylist(), _D_Q)
    past = _PastClicks(world)
    history_items, offsets = past.items(sessions.rows, history)
    owner = owners(offsets)
    fields, matrices = _static(world)
    counted = ("log clicks", "log exposures", "click rate")
    fields.append(PostRankField("past", "numeric", "item", 3, counted, dynamic=True))
    matrices["candidate/past"] = past.counts(np.repeat(sessions.rows, n), sessions.items.ravel())
    matrices["history/past"] = past.counts(sessions.rows[owner], history_items)
    for one, matrix in (extra or {}).items():
        fields.append(one)
        matrices[f"{one.scopes[0]}/{one.name}"] = matrix
        if one.dynamic:
            matrices[f"history/{one.name}"] = np.full((len(history_items), one.dim), np.nan)
    matrices["query"] = query_vectors
    titles = item_table(world.config, world.catalogue)["title"].to_pylist()
    asked = [world.request_ids[sessions.rows].tolist(), list(splits), texts.cast(pa.string()), np.arange(count)]
    listed = (sessions.items, scores, _relevance(sessions, label, seed))
    users = world.requests.user[sessions.rows]
    return PostRankTable(
        request_table(*asked, users, listed, (offsets, history_items)),
        world.item_ids.tolist(),
        user_ids(world.config).tolist(),
        tuple(fields),
        {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in matrices.items()},
        [[("title", title)] for title in titles],
        notes=[f"Simulated sessions; the relevance is '{label}'."],
    )


def _relevance(sessions: ShopSessions, label: str, seed: int) -> np.ndarray:
    if label == "best":
        n = sessions.items.shape[1]
        return n - np.argsort(sessions.best, axis=1).astype(np.float64)
    if label == "clicks":
        return sessions.sample(sessions.incoming, seed).astype(np.float64)
    return np.full(sessions.items.shape, np.nan)


class _PastClicks:
    """Clicks and exposures of the shop's log before a request."""

    def __init__(self, world: ShopWorld) -> None:
        self.world = world
        # a request's past ends at the first request of its own second
        times = world.requests.time
        self.begin = np.searchsorted(times, times, side="left")
        self._step = world.config.n_requests + 1
        row, position = np.nonzero(world.log.click)
        item = world.log.item[row, position].astype(np.int64)
        user = world.requests.user[row]
        order = np.lexsort((position, row, user))
        self._user_key, self._user_item = (user * self._step + row)[order], item[order]
        self._clicked = np.sort(item * self._step + row)
        rows = np.repeat(np.arange(len(times)), world.log.item.shape[1])
        self._shown = np.sort(world.log.item.ravel().astype(np.int64) * self._step + rows)

    def items(self, rows: np.ndarray, latest: int) -> tuple[np.ndarray, np.ndarray]:
        """Flat item rows of each request's user's latest earlier clicks, oldest first, and their offsets."""
        user = self.world.requests.user[rows]
        first = np.searchsorted(self._user_key, user * self._step, side="left")
        end = np.searchsorted(self._user_key, user * self._step + self.begin[rows], side="left")
        offsets, places = stretches(np.maximum(first, end - latest), end)
        return self._user_item[places], offsets

    def counts(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """(n, 3) log clicks, log exposures and smoothed click rate of each item before each request."""
        key = items * self._step
        until = key + self.begin[rows]
        clicks, shown = (
            np.searchsorted(one, until, side="left") - np.searchsorted(one, key, side="left")
            for one in (self._clicked, self._shown)
        )
        return np.stack([np.log1p(clicks), np.log1p(shown), (clicks + 1.0) / (shown + 20.0)], axis=1)


def _static(world: ShopWorld) -> tuple[list[PostRankField], dict[str, np.ndarray]]:
    catalogue, config = world.catalogue, world.config
    of_items: list[tuple[str, np.ndarray, Sequence[str]]] = [
        ("brand", catalogue.brand, words.BRANDS[: config.n_brands]),
        ("colour", catalogue.colour, words.COLOURS),
        ("style", catalogue.style, words.STYLES),
        ("material", catalogue.material, words.MATERIALS),
        ("department", catalogue.department, [d.names[0] for d in words.DEPARTMENTS[: config.n_departments]]),
        ("price class", price_bucket(catalogue.price_level), _PRICES),
    ]
    fields, matrices = [], {}
    for column, (name, values) in enumerate(zip(PROFILE_NAMES, PROFILE_WORDS, strict=True)):
        fields.append(PostRankField(name, "categorical", "user", len(values), tuple(values)))
        matrices[f"user/{name}"] = np.eye(len(values))[world.users.profile[:, column]]
    for name, numbers, values in of_items:
        fields.append(PostRankField(name, "categorical", "item", len(values), tuple(values)))
        matrices[f"item/{name}"] = np.eye(len(values))[numbers]
    fields.append(PostRankField("price", "numeric", "item", 1, ("log price",)))
    matrices["item/price"] = np.log(catalogue.price)[:, None]
    return fields, matrices

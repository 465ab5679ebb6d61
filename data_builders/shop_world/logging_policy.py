"""The production ranker of the simulated shop, its randomised page, and the click model.

Own design; the click model is the well-known position-based one (click = examination x attraction). Everything here
is exactly computable: the page is filled tier by tier, each tier drawing uniformly without replacement from its own
stretch of ranks, so that P(item at position) = 1 / (ranks of the tier) where both belong to the same tier, else 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sidtune.data_builders.shop_world.catalogue import ShopCatalogue, stream
from sidtune.data_builders.shop_world.config import ShopWorldConfig
from sidtune.data_builders.shop_world.requests import HOME, Requests
from sidtune.data_builders.shop_world.users import Users

LOG_CHUNK = 4096
RANK_CELLS = 1 << 20
CATEGORY_MATCH = np.array([1.0, 0.6, 0.4, 0.0])


@dataclass(frozen=True)
class PageLayout:
    """Which ranks may stand at which positions.

    `exploration_slots` positions are spread evenly over the page; the other positions, from the top, are split into
    `ranked_tiers` tiers of (nearly) equal size n. A tier owns the next ceil(n * oversampling) ranks; the exploration
    slots own the `exploration_pool` ranks after those. Each tier fills its positions by a uniform draw without
    replacement from its ranks.

    Attributes:
        tiers: (positions, first rank, number of ranks) of each tier, exploration last.
        pool: how many ranks can be shown at all.
    """

    tiers: tuple[tuple[np.ndarray, int, int], ...]
    pool: int

    @classmethod
    def make(cls, config: ShopWorldConfig, oversampling: float) -> PageLayout:
        size, slots = config.page_size, config.exploration_slots
        explored = ((np.arange(slots) + 1) * size) // max(slots, 1) - 1
        ranked = np.setdiff1d(np.arange(size), explored)
        tiers, first = [], 0
        for positions in np.array_split(ranked, min(config.ranked_tiers, len(ranked))):
            width = math.ceil(round(len(positions) * oversampling, 9))
            tiers.append((positions, first, width))
            first += width
        if slots:
            tiers.append((explored, first, config.exploration_pool))
            first += config.exploration_pool
        return cls(tuple(tiers), first)

    def probability(self, size: int) -> np.ndarray:
        """(positions, ranks) P(rank stands at position)."""
        out = np.zeros((size, self.pool))
        for positions, first, width in self.tiers:
            out[positions, first : first + width] = 1.0 / width
        return out

    def draw(self, keys: np.ndarray, size: int) -> np.ndarray:
        """Ranks shown at each position: (n, pool) independent uniform keys → (n, size)."""
        shown = np.empty((len(keys), size), dtype=np.int64)
        for positions, first, width in self.tiers:
            order = np.argsort(keys[:, first : first + width], axis=1, kind="stable")
            shown[:, positions] = first + order[:, : len(positions)]
        return shown


@dataclass(frozen=True)
class Ranker:
    """The production ranker: text and category match x popularity, the same for every user.

    Attributes:
        query_of (R,): number of each request's distinct ranker input.
        order (Q, pool) int32: item rows of each distinct input, best first, as deep as any page can show.
    """

    query_of: np.ndarray
    order: np.ndarray

    @classmethod
    def make(
        cls, config: ShopWorldConfig, catalogue: ShopCatalogue, users: Users, requests: Requests, depth: int
    ) -> Ranker:
        home = requests.kind == HOME
        inputs = np.stack(
            [
                requests.scope,
                requests.asked,
                requests.brand,
                np.where(home, requests.place, -1),
                np.where(home, requests.daypart, -1),
                requests.period,
            ],
            axis=1,
        )
        shape = inputs.max(axis=0, initial=0) + 2
        _, first, query_of = np.unique(
            np.ravel_multi_index((inputs + 1).T, shape), return_index=True, return_inverse=True
        )
        distinct = inputs[first]
        order = np.empty((len(distinct), depth), dtype=np.int32)
        static = -config.ranker_popularity * np.log1p(catalogue.popularity_rank)
        step = max(1, RANK_CELLS // config.n_items)
        for start in range(0, len(distinct), step):
            part = distinct[start : start + step]
            score = _ranker_score(config, catalogue, users, part, static)
            order[start : start + step] = best(score, depth)
        return cls(query_of.ravel(), order)


def _ranker_score(
    config: ShopWorldConfig, catalogue: ShopCatalogue, users: Users, inputs: np.ndarray, static: np.ndarray
) -> np.ndarray:
    """(n, N) score of every item for distinct ranker inputs; -inf before its launch."""
    scope, asked, brand, place, daypart, period = inputs.T
    score = (config.ranker_category * CATEGORY_MATCH[catalogue.relation[scope]])[:, catalogue.leaf]
    score += static
    for rows, wanted, have in ((asked >= 0, asked, catalogue.values), (brand >= 0, brand, catalogue.brand[:, None])):
        found = (have[None, :, :] == wanted[rows, None, None]).any(axis=2)
        score[rows] += config.ranker_attribute * found
    home = place >= 0
    shift = users.place_shift[place[home]] + users.daypart_shift[daypart[home]]
    score[home] += config.ranker_context * shift[:, catalogue.department]
    score[catalogue.launch_period[None, :] > period[:, None]] = -np.inf
    return score


def best(score: np.ndarray, k: int) -> np.ndarray:
    """(n, k) columns of the k highest scores per row, best first; ties go to the lower column."""
    n_columns = score.shape[1]
    k = min(k, n_columns)
    if 4 * k < n_columns:
        # everything at or above the k-th value, so that ties at the border are seen whole
        border = -np.partition(-score, k - 1, axis=1)[:, k - 1 : k]
        width = int((score >= border).sum(axis=1).max(initial=k))
        if 4 * width < n_columns:
            top = np.sort(np.argpartition(-score, width - 1, axis=1)[:, :width], axis=1)
            inner = np.argsort(-np.take_along_axis(score, top, axis=1), axis=1, kind="stable")[:, :k]
            return np.take_along_axis(top, inner, axis=1)
    return np.argsort(-score, axis=1, kind="stable")[:, :k]


@dataclass(frozen=True)
class LogDraws:
    """Random numbers of a chunk of n requests: uniform, but `dwell`, which is standard normal.

    Attributes:
        keys (n, pool): what fills the page. click, like, order, dwell (n, page_size). like_known (n,).
    """

    keys: np.ndarray
    click: np.ndarray
    like: np.ndarray
    order: np.ndarray
    dwell: np.ndarray
    like_known: np.ndarray


def log_draws(config: ShopWorldConfig, chunk: int, n: int, pool: int) -> LogDraws:
    """The numbers of stream `log` for chunk number `chunk` (rows `chunk * LOG_CHUNK` and on)."""
    rng = stream(config, "log", chunk)
    size = config.page_size
    return LogDraws(
        keys=rng.random((n, pool)),
        click=rng.random((n, size)),
        like=rng.random((n, size)),
        order=rng.random((n, size)),
        dwell=rng.standard_normal((n, size)),
        like_known=rng.random(n),
    )


@dataclass(frozen=True)
class Log:
    """What was shown and what came of it; arrays (R, page_size), column = position.

    Attributes:
        item int32: shown item rows. click, order int8: 0 or 1. like int8: 0, 1, or -1 for unknown.
        dwell float32: seconds on a clicked item, NaN (null) where there was no click.
    """

    item: np.ndarray
    click: np.ndarray
    like: np.ndarray
    order: np.ndarray
    dwell: np.ndarray


def examination(config: ShopWorldConfig) -> np.ndarray:
    """(page_size,) P(position is examined) = (1 + position) ** -examination_decay."""
    return (1.0 + np.arange(config.page_size)) ** -config.examination_decay


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function, safe for any finite input."""
    return 1.0 / (1.0 + np.exp(-np.clip(x, -500.0, 500.0)))

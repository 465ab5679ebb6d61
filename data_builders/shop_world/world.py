"""ShopWorld: a simulated shop whose every probability is known.

Own design; no paper. Not meant as a likeness of any real shop, but as a place where estimators can be checked against
the truth: the production ranker is biased, positions matter, tastes are personal and drift, and all of it is exactly
computable.

The model (numbers are defaults). Item i has leaf c(i) in department d(i), brand b(i), colour, style, material, price
level z_i ~ N(0, 1) within its leaf (log price = leaf mean + 0.45 z_i), quality q_i ~ N(0, 1), and a popularity rank by
0.5 q_i + noise; popularity = rank ** -0.8. User u in drift period p has interests h[u, p, leaf], affinities
B[u, p, brand], K[u, p, colour], S[u, p, style] and a wanted price level w[u, p]; they come in part from the profile and
drift as stationary random walks (`users`).

1. Request r: user u, time t (in period p), place and device given the time, and a kind: plain noun, noun + attribute,
   noun + brand, department word, attribute word; or, without a query, the home page or a department's page. The leaf
   that prompts it is drawn from softmax(h[u, p, .] + X[r, d(.)]), where X = place shift + daypart shift of the
   department; asked colours, styles and brands follow softmax(query_taste * affinity). What the request *says* is its
   scope (a leaf, a department, or nothing) and the asked value or brand; feedback depends on nothing else of it.
2. Production score = 12 match(scope, i) + 3 [i has the asked value or brand] - log(1 + popularity rank), + X on the
   home page: not personal. The page is filled by tiered uniform draws (`logging_policy.PageLayout`), so that
   P(i at k | r) is exact for every position k = 0, 1, ...
3. Attraction A(r, i) = sigmoid( click_bias + B[b(i)] + K[colour(i)] + S[style(i)] - price_taste * min((z_i - w)^2, 9)
       + quality * q_i + context * X[r, d(i)] - category penalty(scope, i) - penalty [asked value or brand is missing]
       + interest * clip(h[u, p, c(i)], -3, 3) if the scope is wider than one leaf ).
4. P(click at position k) = exam(k) * A(r, i) with exam(k) = (1 + k) ** -0.4, independent between positions. Hence
   P(click on i | r) = A(r, i) * sum_k P(i at k | r) exam(k).
5. With the taste T = B + K + S - price term of step 3: P(like | click) = sigmoid(like_bias + like_taste T);
   P(order | click) = sigmoid(order_bias + order_taste T + order_quality q_i - order_price z_i + order_laptop [laptop]);
   log(dwell seconds) ~ N(dwell_log_mean + dwell_taste T, dwell_sigma^2) given a click (capped at 10^6 s), else null.
   In a random `like_unknown_share` of the requests (one coin per request) all likes are null and no like event is
   written.

Popularity has no effect on attraction but through quality: what a popular item gains beyond it is pure exposure bias.

The world is a function of its config. An evaluation rebuilds it with `ShopWorld.from_options(**options)`, where
`options` are those of the reader in `meta.json`, and finds its requests with `request_rows(request_ids)`. Item row n of
every array here is row n of the items table (ids in ascending order). The time of an action is the time of its request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.truth_guard import check_truth
from sidtune.data_builders.shop_world import words
from sidtune.data_builders.shop_world.catalogue import N_COLOURS, item_ids, make_catalogue, numbered
from sidtune.data_builders.shop_world.config import ShopWorldConfig, config_from_options
from sidtune.data_builders.shop_world.items import item_table
from sidtune.data_builders.shop_world.logged import level_of_noise, logged
from sidtune.data_builders.shop_world.logging_policy import (
    Log,
    PageLayout,
    Ranker,
    best,
    examination,
    sigmoid,
)
from sidtune.data_builders.shop_world.noise import mixed, noise_share
from sidtune.data_builders.shop_world.phenomena import Tastes
from sidtune.data_builders.shop_world.requests import make_requests, query_texts, request_draws
from sidtune.data_builders.shop_world.tables import event_table, request_table
from sidtune.data_builders.shop_world.users import make_users, user_table
from sidtune.data_builders.tables.history import Ids
from sidtune.data_builders.tables.schema import Tables

__all__ = ["ShopWorld", "ShopWorldConfig", "read"]
_CHUNK_CELLS = 1 << 21
_LAPTOP = words.DEVICES.index("laptop")


class ShopWorld:
    """A simulated shop (model in the module's docstring); deterministic in its config.

    Args:
        config: see `ShopWorldConfig`; default `ShopWorldConfig()`.

    Attributes:
        catalogue, users, requests: the true latents and requests, as arrays.
        log: what was shown and clicked (`Log`), made when first asked for.
        examination (page_size,): P(position is examined).

    Raises:
        ConfigError: a value out of range, or too few items for the page layout.
    """

    def __init__(self, config: ShopWorldConfig | None = None) -> None:
        self.config = config = config or ShopWorldConfig()
        self.phenomena = config.dials
        self.catalogue = make_catalogue(config)
        self.layouts = (
            PageLayout.make(config, config.search_oversampling),
            PageLayout.make(config, config.recommendation_oversampling),
        )
        on_sale = int((self.catalogue.launch_period == 0).sum())
        pool = max(layout.pool for layout in self.layouts)
        if pool > on_sale:
            raise ConfigError(
                f"ShopWorld: the page draws from {pool} ranks but only {on_sale} items are on sale at the start; "
                "raise 'n_items' or lower 'exploration_pool', 'recommendation_oversampling' or 'page_size'."
            )
        self.users = make_users(config, self.catalogue)
        self.requests = make_requests(config, self.catalogue, self.users, request_draws(config))
        self.examination = examination(config)
        self._column_of = np.stack(
            [
                self.catalogue.brand,
                config.n_brands + self.catalogue.colour,
                config.n_brands + N_COLOURS + self.catalogue.style,
            ]
        )
        self._penalty = np.array([0.0, config.group_penalty, config.department_penalty, config.other_penalty])

    @classmethod
    def from_options(cls, **options: Any) -> ShopWorld:
        """Rebuilds a world from the options of the reader; an unknown option is a ConfigError with the nearest name."""
        return cls(config_from_options(options))

    @cached_property
    def ranker(self) -> Ranker:
        """The production ranker's list for each distinct input."""
        depth = max(layout.pool for layout in self.layouts)
        return Ranker.make(self.config, self.catalogue, self.users, self.requests, depth)

    @cached_property
    def log(self) -> Log:
        """The logged pages and feedback, in chunks of `LOG_CHUNK` requests with a random stream each."""
        return logged(self)

    @cached_property
    def noise_level(self) -> float:
        """ā of `feed_noise`, see `noise.py`."""
        return level_of_noise(self)

    def _mixed(self, rows: np.ndarray, attraction: np.ndarray) -> np.ndarray:
        part = self.phenomena.feed_noise
        return mixed(attraction, self.requests.is_recommendation[rows], part, self.noise_level) if part else attraction

    def noise_share(self, rows: np.ndarray, attraction: np.ndarray) -> np.ndarray:
        """(n, k) P(noise | click) of items of that attraction, which holds its noise already; see `noise.py`."""
        part = self.phenomena.feed_noise
        if not part:
            return np.zeros_like(attraction)
        return noise_share(attraction, self.requests.is_recommendation[rows], part, self.noise_level)

    @cached_property
    def tastes(self) -> Tastes:
        """Latents of the market's trade-offs."""
        return Tastes.make(self.config, self.users.profile)

    def _feedback(self, rows: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(attraction, P(like|click), P(order|click), mean of log dwell), each (n, k), of items (n, k) or (1, k)."""
        config, catalogue = self.config, self.catalogue
        taste = self._taste(rows, items)
        attraction = self._mixed(rows, self._alone(rows, items, taste))
        like = sigmoid(config.like_bias + config.like_taste * taste)
        fixed = config.order_quality * catalogue.quality - config.order_price * catalogue.price_level
        trade = self.tastes.order_logit(self.phenomena, self.requests.user[rows], items, catalogue.price_level[items])
        laptop = config.order_laptop * (self.requests.device[rows, None] == _LAPTOP)
        order = sigmoid(config.order_bias + config.order_taste * taste + fixed[items] + laptop + trade)
        if self.phenomena.feed_noise:  # a click that was not meant brings neither
            meant = 1.0 - self.noise_share(rows, attraction)
            like, order = like * meant, order * meant
        return attraction, like, order, config.dwell_log_mean + config.dwell_taste * taste

    def _alone(self, rows: np.ndarray, items: np.ndarray, taste: np.ndarray) -> np.ndarray:
        """(n, k) P(click | looked at) by what the item is, 0 before its launch."""
        attraction = sigmoid(self._request_logit(rows, items) + taste)
        attraction[self.catalogue.launch_period[items] > self.requests.period[rows, None]] = 0.0
        return attraction

    def _taste(self, rows: np.ndarray, items: np.ndarray, users: np.ndarray | None = None) -> np.ndarray:
        """(n, k) the personal part T of the logit; `users` (n,) puts other users in the place of the real ones."""
        who = self.requests.user[rows] if users is None else users
        table = self.users.taste
        start = ((who * table.shape[1] + self.requests.period[rows]) * table.shape[2])[:, None]
        flat = table.ravel()
        brand, colour, style = self._column_of
        own, first = (flat, start) if self.users.by_department is None else self._own_tastes(rows, items, who)
        total = flat[start + brand[items]] + own[first + colour[items]] + own[first + style[items]]
        gap = self.catalogue.price_level[items] - own[first + table.shape[2] - 1]
        return total - self.config.price_taste * np.minimum(gap * gap, 9.0)

    def _own_tastes(self, rows: np.ndarray, items: np.ndarray, who: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The flat tastes by department, and where those of each user, period and item's department would begin with brands."""
        table = self.users.by_department
        assert table is not None
        place = (who * table.shape[1] + self.requests.period[rows])[:, None] * table.shape[2]
        return table.ravel(), (place + self.catalogue.department[items]) * table.shape[3] - self.config.n_brands

    def _request_logit(self, rows: np.ndarray, items: np.ndarray, users: np.ndarray | None = None) -> np.ndarray:
        """(n, k) the logit without T: bias, quality, context, match, and interest where the scope is wide."""
        config, catalogue, requests = self.config, self.catalogue, self.requests
        scope, asked, brand = requests.scope[rows], requests.asked[rows], requests.brand[rows]
        who = requests.user[rows] if users is None else users
        shift = self.users.place_shift[requests.place[rows]] + self.users.daypart_shift[requests.daypart[rows]]
        per_leaf = config.context * shift[:, catalogue.leaf_department] - self._penalty[catalogue.relation[scope]]
        wide = (scope >= config.n_leaves)[:, None]
        drawn = np.clip(self.users.interest[who, requests.period[rows]], -3.0, 3.0)
        per_leaf = per_leaf + np.where(wide, config.interest * drawn, 0.0)
        leaf = np.broadcast_to(catalogue.leaf[items], (len(rows), items.shape[1]))
        logit = np.take_along_axis(per_leaf, leaf, axis=1)
        logit += config.click_bias + config.quality * catalogue.quality[items]
        logit += self.tastes.click_logit(self.phenomena, items)
        for wanted, have, penalty in (
            (asked, catalogue.values, config.attribute_penalty),
            (brand, catalogue.brand[:, None], config.brand_penalty),
        ):
            some = np.flatnonzero(wanted >= 0)
            mine = items if len(items) == 1 else items[some]
            logit[some] -= penalty * ~(have[mine] == wanted[some, None, None]).any(axis=2)
        return logit

    def attraction(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, N) P(click | examined) of every item at the time of each request; 0 before an item's launch.

        Args:
            rows: request rows (n,). All (n, N) results take 8 n N bytes; ask in pieces when that is much.

        Raises:
            DataError: a row outside the requests (so for every method that takes rows).
        """
        return self._dense(rows, lambda part, items: self._feedback(part, items)[0])

    def attraction_of(self, rows: Sequence[int] | np.ndarray, items: np.ndarray) -> np.ndarray:
        """(n, k) attraction of chosen item rows (n, k), for scoring lists without the whole catalogue."""
        check_truth()
        rows, items = self._rows(rows), np.asarray(items)
        fits = items.ndim == 2 and len(items) in (1, len(rows)) and np.issubdtype(items.dtype, np.integer)
        if not fits or (items.size and not (items.min() >= 0 and items.max() < self.config.n_items)):
            raise DataError(
                f"Item rows must be whole numbers in [0, {self.config.n_items}) of shape ({len(rows)}, k), "
                f"got shape {items.shape}."
            )
        return self._feedback(rows, items)[0]

    def mean_attraction(self, rows: Sequence[int] | np.ndarray, n_others: int = 64, seed: int = 0) -> np.ndarray:
        """(n, N) attraction of the same request averaged over `n_others` random users: what is left without taste."""
        others = np.random.default_rng(seed).choice(self.config.n_users, n_others)

        def mean(part: np.ndarray, items: np.ndarray) -> np.ndarray:
            total = np.zeros((len(part), items.shape[1]))
            for other in others:
                who = np.full(len(part), other)
                total += sigmoid(self._request_logit(part, items, who) + self._taste(part, items, who))
            off_sale = self.catalogue.launch_period[items] > self.requests.period[part, None]
            return self._mixed(part, np.where(off_sale, 0.0, total / n_others))

        return self._dense(rows, mean)

    def like_given_click(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, N) P(like | click)."""
        return self._dense(rows, lambda part, items: self._feedback(part, items)[1])

    def order_given_click(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, N) P(order | click)."""
        return self._dense(rows, lambda part, items: self._feedback(part, items)[2])

    def dwell_log_mean(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, N) mean of log(dwell seconds) given a click; its standard deviation is `config.dwell_sigma`."""
        return self._dense(rows, lambda part, items: self._feedback(part, items)[3])

    def exposure_probability(self, rows: Sequence[int] | np.ndarray, by_position: bool = False) -> np.ndarray:
        """(n, N) P(item is on the page), or with `by_position` (n, N, page_size) P(item stands at the position)."""
        rows = self._rows(rows)
        size = self.config.page_size
        tables = [layout.probability(size) for layout in self.layouts]
        if not by_position:
            return self._by_rank(rows, [table.sum(axis=0) for table in tables])
        out = np.zeros((len(rows), self.config.n_items, size))
        for position in range(size):
            out[:, :, position] = self._by_rank(rows, [table[position] for table in tables])
        return out

    def examined_exposure(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, N) P(item is shown and examined) = sum over positions of P(item at position) * exam(position)."""
        size = self.config.page_size
        return self._by_rank(self._rows(rows), [self.examination @ lay.probability(size) for lay in self.layouts])

    def _by_rank(self, rows: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
        """(n, N) a weight of the production rank (per layout), put at the ranked items; 0 elsewhere."""
        out = np.zeros((len(rows), self.config.n_items))
        for weight, wanted in zip(weights, (False, True), strict=True):
            part = np.flatnonzero(self.requests.is_recommendation[rows] == wanted)
            order = self.ranker.order[self.ranker.query_of[rows[part]], : len(weight)]
            out[part[:, None], order] = weight
        return out

    def click_probability(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, N) P(item is shown and clicked), over the page's randomness: examined exposure x attraction."""
        return self.examined_exposure(rows) * self.attraction(rows)

    def order_probability(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, N) P(item is shown, clicked and ordered)."""
        return self.click_probability(rows) * self.order_given_click(rows)

    def propensity(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, page_size) P(the logged item stands at its logged position): what inverse propensities divide by."""
        rows = self._rows(rows)
        per_slot = [layout.probability(self.config.page_size).max(axis=1) for layout in self.layouts]
        return np.stack(per_slot)[self.requests.is_recommendation[rows].astype(np.int64)]

    def oracle_ranking(self, rows: Sequence[int] | np.ndarray, k: int) -> np.ndarray:
        """(n, k) item rows by exact click probability: the upper bound for logged clicks. Ties by item id.

        The bound holds for a ranker that does not know which items the page's random draws will show.
        """
        return self._top(rows, k, self.click_probability)

    def ideal_ranking(self, rows: Sequence[int] | np.ndarray, k: int) -> np.ndarray:
        """(n, k) item rows by true attraction: what a ranker free of exposure bias should return. Ties by item id."""
        return self._top(rows, k, self.attraction)

    def _top(self, rows: Sequence[int] | np.ndarray, k: int, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        if not 1 <= k <= self.config.n_items:
            raise DataError(f"A ranking needs k between 1 and {self.config.n_items} (the items), got {k}.")
        parts = [best(score(part), k) for part in self._parts(self._rows(rows))]
        return np.concatenate(parts) if parts else np.empty((0, k), dtype=np.int64)

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        step = max(1, _CHUNK_CELLS // self.config.n_items)
        return [rows[first : first + step] for first in range(0, len(rows), step)]

    def _dense(self, rows: Any, score: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        check_truth()
        rows = self._rows(rows)
        items = np.arange(self.config.n_items)[None, :]
        out = np.empty((len(rows), self.config.n_items))
        first = 0
        for part in self._parts(rows):
            out[first : first + len(part)] = score(part, items)
            first += len(part)
        return out

    def _rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.atleast_1d(np.asarray(rows))
        if rows.size == 0:
            return np.empty(0, dtype=np.int64)
        whole = rows.ndim == 1 and np.issubdtype(rows.dtype, np.integer)
        if not whole or rows.min() < 0 or rows.max() >= self.config.n_requests:
            raise DataError(
                f"Request rows must be a flat list of whole numbers in [0, {self.config.n_requests}), "
                "such as request_rows gives."
            )
        return rows.astype(np.int64)

    @cached_property
    def item_ids(self) -> np.ndarray:
        """(N,) item ids in row order."""
        return item_ids(self.config)

    @cached_property
    def request_ids(self) -> np.ndarray:
        """(R,) request ids in row order, which is the order of time."""
        return numbered("r", self.config.n_requests, 7)

    def request_rows(self, request_ids: Ids) -> np.ndarray:
        """(n,) row numbers of request ids. Raises DataError on an id that this world does not have."""
        ids = request_ids if isinstance(request_ids, (pa.Array, pa.ChunkedArray)) else pa.array(list(request_ids))
        found = pc.index_in(ids.cast(pa.string()), value_set=pa.array(self.request_ids))
        if found.null_count:
            wrong = ids.filter(pc.is_null(found))[0].as_py()
            raise DataError(
                f"The request '{wrong}' is not one of the {self.config.n_requests} requests of this ShopWorld; "
                "rebuild the world with the options that the data was made with."
            )
        return found.to_numpy().astype(np.int64)

    def to_tables(self) -> Tables:
        """The world in our schema: what a shop would have logged, without any of the truth."""
        config, log = self.config, self.log
        ids, queries = pa.array(self.request_ids, type=pa.string()), query_texts(self.config, self.requests)
        return Tables(
            items=item_table(config, self.catalogue),
            users=user_table(config, self.users),
            requests=request_table(config, self.catalogue, self.requests, log, ids, queries),
            events=event_table(config, self.requests, log, ids, queries),
            notes=[
                "Simulated shop with known truth; the options of the reader rebuild it.",
                f"Likes are unknown (null) in about {config.like_unknown_share:.0%} of requests, one coin per request.",
                "Dwell is null where there was no click.",
            ],
        )


Options = ShopWorldConfig  # of the reader


def read(path: str | None = None, **options: Any) -> Tables:
    """Reader "shop_world": simulates a shop. `path` is not used (there is nothing to read); options = config fields.

    Raises:
        ConfigError: an unknown option (with the nearest known one) or a value out of range.
    """
    return ShopWorld.from_options(**options).to_tables()

"""The market: lists shown to the requests of a simulated shop, and what they earn, exactly and drawn. `specs/market.md` 4 and 7.

    market = Market(ShopWorld.from_options(phenomena={"cascade": 0.5, "stop_after_click": 0.5}))
    served = market.serve(rows, lists)                    # (n,) request rows, (n, K) item rows, -1 for an empty place
    served.expected["click"].sum(axis=1)                  # exact expected clicks of each list
    market.serve(rows, lists, coins=3, sample=True).drawn["order"]

Two lists shown to one request flip the same coins (`coins.py`), so their difference is far less noisy than either. Own design.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.truth_guard import check_truth
from sidtune.data_builders.shop_world.coins import coins as flipped
from sidtune.data_builders.shop_world.coins import normals
from sidtune.data_builders.shop_world.crowding import crowding
from sidtune.data_builders.shop_world.examining import click_chances, sampled_clicks
from sidtune.data_builders.shop_world.logged import LOG_DWELL_CAP
from sidtune.data_builders.shop_world.logging_policy import best, sigmoid
from sidtune.data_builders.shop_world.noise import TINY
from sidtune.data_builders.shop_world.world import ShopWorld

VALUES = ("click", "order", "value", "money")
_CHUNK = 8192  # lists at a time, so that what is gathered stays in the cache


@dataclass(frozen=True)
class Served:
    """What n lists of K places earn.

    Attributes:
        expected: `click`, `wanted` (clicks without the noise of a feed), `order`, `like`, `dwell` (seconds), `money`, `value` and
            `examined` → (n, K), exact.
        drawn: the first six of them as they came out, where asked for.
    """

    expected: dict[str, np.ndarray]
    drawn: dict[str, np.ndarray] = field(default_factory=dict)


class Market:
    """A shop whose requests answer any list.

    Args:
        world: the shop, whose dials (`config.phenomena`) hold for every list.
    """

    def __init__(self, world: ShopWorld) -> None:
        self.world, self.phenomena, self.tastes = world, world.phenomena, world.tastes

    def feedback(self, rows: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(P(click | looked at), P(like | click), P(order | click), mean of log dwell), (n, K) each, of an item standing alone.

        `items` (n, K) or (1, K); −1 is an empty place, which draws nothing.
        """
        check_truth()
        return self._feedback(rows, items)

    def _feedback(self, rows: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        attraction, like, order, dwell = self.world._feedback(rows, np.maximum(items, 0))
        return np.where(items < 0, 0.0, attraction), like, order, dwell

    def scores(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """(n, K) what an upstream ranker says of P(click | looked at): true where `score_distortion` is 0, else it lies.

        Within a department the order is kept; lists that mix departments suffer.
        """
        true, part = self._feedback(rows, items)[0], self.phenomena.score_distortion
        if part == 0.0:
            return true
        department = self.world.catalogue.department[np.maximum(items, 0)]
        certain = (true <= 0.0) | (true >= 1.0)
        logit = np.log(np.where(certain, 0.5, true) / (1.0 - np.where(certain, 0.5, true)))
        lied = sigmoid(np.exp(part * self.tastes.slope[department]) * logit + part * self.tastes.shift[department])
        return np.where(certain, true, lied)

    def serve(self, rows: Any, lists: Any, *, coins: int = 0, sample: bool = False) -> Served:
        """Shows a list to each request.

        Args:
            rows: (n,) request rows. lists: (n, K) item rows, best first, K at most the page size; −1 is an empty place.
            coins: seed of the coins. sample: also draw what happens.

        Raises:
            DataError: shapes that do not fit, a row out of range, an item twice in a list.
        """
        rows, lists = self._checked(rows, lists)
        parts = []
        for first in range(0, len(rows), _CHUNK):
            part = slice(first, first + _CHUNK)
            parts.append(self._serve(rows[part], lists[part], coins, sample))
        if not parts:
            parts = [self._serve(rows, lists, coins, sample)]
        joined = [
            {name: np.concatenate([one[side][name] for one in parts]) for name in parts[0][side]} for side in (0, 1)
        ]
        return Served(*joined)

    def _serve(self, rows: np.ndarray, lists: np.ndarray, seed: int, sample: bool) -> tuple[dict, dict]:
        world, dials = self.world, self.phenomena
        attraction, like, order, dwell = self.feedback(rows, lists)
        share = world.noise_share(rows, attraction)
        attraction = attraction * crowding(world.catalogue, lists, dials)
        stops = {"stop_after_click": dials.stop_after_click, "stop_after_order": dials.stop_after_order}
        click, looked = click_chances(
            attraction, order, world.examination, cascade=dials.cascade, fatigue=dials.click_fatigue, **stops
        )
        price = world.catalogue.price[np.maximum(lists, 0)]
        of_click, of_order = self.tastes.values(dials, world.requests.user[rows])
        spread = world.config.dwell_sigma
        mean_dwell = np.exp(np.minimum(dwell + spread**2 / 2, LOG_DWELL_CAP))
        expected = {
            "click": click,
            "order": click * order,
            "like": click * like,
            "wanted": click * (1.0 - share),
            "dwell": click * ((1.0 - share) * mean_dwell + share * np.exp(-dials.noise_dwell) * mean_dwell),
            "money": click * order * price,
            "value": click * ((1.0 - share) * of_click[:, None] + of_order[:, None] * order),
            "examined": looked,
        }
        if not sample:
            return expected, {}
        key, places = rows[:, None], np.arange(lists.shape[1])[None, :]
        held = np.maximum(lists, 0)
        noise, meant = flipped(seed, "noise", key, held) < share, np.maximum(1.0 - share, TINY)
        bought = (flipped(seed, "order", key, held) < order / meant) & ~noise
        clicked = sampled_clicks(
            attraction, bought, world.examination, flipped(seed, "examiner", rows) < dials.cascade,
            flipped(seed, "examination", key, places), flipped(seed, "stop", key, places),
            flipped(seed, "attraction", key, held), fatigue=dials.click_fatigue, **stops,
        )  # fmt: skip
        seconds = np.exp(
            np.minimum(dwell - dials.noise_dwell * noise + spread * normals(seed, "watch", key, held), LOG_DWELL_CAP)
        )
        liked = clicked & (flipped(seed, "like", key, held) < like / meant) & ~noise
        drawn = {"click": clicked, "wanted": clicked & ~noise, "order": clicked & bought, "like": liked}
        return expected, {**drawn, "dwell": clicked * seconds, "money": (clicked & bought) * price}

    def _checked(self, rows: Any, lists: Any) -> tuple[np.ndarray, np.ndarray]:
        rows, lists = self.world._rows(rows), np.asarray(lists)
        most, items = self.world.config.page_size, self.world.config.n_items
        fits = lists.ndim == 2 and len(lists) == len(rows) and 1 <= lists.shape[1] <= most
        if not fits or not np.issubdtype(lists.dtype, np.integer):
            raise DataError(f"Lists must be item rows of shape ({len(rows)}, 1 to {most}), got {lists.shape}.")
        if lists.size and (lists.min() < -1 or lists.max() >= items):
            raise DataError(f"A list names an item outside the {items} of the shop; use item rows, -1 for none.")
        ordered = np.sort(lists, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise DataError("A list names an item twice; show each item once.")
        return rows, lists

    def total(self, rows: np.ndarray, lists: np.ndarray, value: str = "click") -> np.ndarray:
        """(n,) exact worth of each list: `click`, `order`, `value` (clicks and orders as the user weighs them) or `money`."""
        if value not in VALUES:
            raise ConfigError(f"A list has no value '{value}': {nearest(value, VALUES)}")
        return self.serve(rows, lists).expected[value].sum(axis=1)

    def production(self, rows: np.ndarray, k: int) -> np.ndarray:
        """(n, k) the head of the production ranker's list, without the randomness of the page."""
        ranker = self.world.ranker
        return ranker.order[ranker.query_of[self.world._rows(rows)], :k].astype(np.int64)

    def worth(self, rows: np.ndarray, value: str = "click") -> np.ndarray:
        """(n, N) what each item would earn if it were looked at and stood alone."""
        rows, items = self.world._rows(rows), np.arange(self.world.config.n_items)[None, :]
        attraction, _, order, _ = self.feedback(rows, items)
        of_click, of_order = self.tastes.values(self.phenomena, self.world.requests.user[rows])
        weight = {
            "click": np.ones(order.shape),
            "order": order,
            "money": order * self.world.catalogue.price[items],
            "value": (1.0 - self.world.noise_share(rows, attraction)) * of_click[:, None] + of_order[:, None] * order,
        }[value]
        return np.broadcast_to(attraction * weight, (len(rows), items.shape[1]))

    def ideal(self, rows: np.ndarray, k: int, value: str = "click") -> np.ndarray:
        """(n, k) the best list, exact where items do not interact and clicks are counted; else the best found (see `ideal.py`)."""
        from sidtune.data_builders.shop_world.ideal import ideal_lists

        return ideal_lists(self, self.world._rows(rows), k, value)

    def upper_bound(self, rows: np.ndarray, k: int, value: str = "click") -> np.ndarray:
        """(n,) no list of k can earn more: the best items at the best places, each looked at as often as can be."""
        worth = self.worth(rows, value)
        top = np.take_along_axis(worth, best(worth, k), axis=1)
        return top @ self.world.examination[:k]

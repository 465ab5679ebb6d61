"""Sessions of the simulated shop in which neighbours on a page take clicks from each other: the truth of post-ranking.

Own design; no paper. `ShopWorld` itself is unchanged: its attraction A(r, i) and examination exam(k) are read, and a
list (o_0, ..., o_{m-1}) shown to request r gets

    P(click at k) = exam(k) A(r, o_k) (1 − c / 2 (s(o_k, o_{k-1}) + s(o_k, o_{k+1}))),   s beyond the ends = 0,

independent between places, with the interaction c in [0, 1]. Similarity is what a shopper sees: the weighted share of
brand, colour, style, material and leaf that two items have in common. The utility of a list is its expected number of
clicks, so the best list puts attractive items first *and* apart from their likes: it is not the list sorted by
attraction. Utility is exact, the best list of up to `best_order.EXACT_UP_TO` candidates is found exactly, and feedback on
any list can be sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.shop_world.best_order import EXACT_UP_TO, best_order, order_value, random_value
from sidtune.data_builders.shop_world.world import ShopWorld


@dataclass(frozen=True)
class SessionConfig:
    """How neighbours interact.

    Attributes:
        interaction: c, 0 (none) to 1 (an item between two copies of itself gets no click).
        brand, colour, style, material, leaf: weights of what two items share; divided by their sum.

    Raises:
        ConfigError: a value out of range.
    """

    interaction: float = 0.8
    brand: float = 0.35
    colour: float = 0.25
    style: float = 0.2
    material: float = 0.1
    leaf: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.interaction <= 1.0:
            raise ConfigError(f"The interaction of sessions must lie in [0, 1], got {self.interaction}.")
        if min(self.weights.values()) < 0 or not sum(self.weights.values()) > 0:
            raise ConfigError(f"The similarity weights must not be negative and not all 0, got {self.weights}.")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each shared property."""
        return {one.name: float(getattr(self, one.name)) for one in fields(self) if one.name != "interaction"}


class ShopSessions:
    """Candidate lists of requests, with the exact value of every order of them.

    Args:
        world: the shop.
        rows: (B,) request rows.
        items: (B, n) item rows in incoming order, each item once per list, n at most the page size and `EXACT_UP_TO`.
        config: see `SessionConfig`.

    Raises:
        DataError: shapes that do not fit, a repeated item, a row out of range.
    """

    def __init__(
        self, world: ShopWorld, rows: np.ndarray, items: np.ndarray, config: SessionConfig | None = None
    ) -> None:
        self.world, self.config = world, config or SessionConfig()
        self.rows, self.items = np.asarray(rows, dtype=np.int64), np.asarray(items)
        if self.items.ndim != 2 or len(self.items) != len(self.rows) or not self.items.shape[1]:
            raise DataError(f"Sessions need candidates of shape ({len(self.rows)}, n), got {self.items.shape}.")
        most = min(world.config.page_size, EXACT_UP_TO)  # the page, and what the best list is known of
        if self.items.shape[1] > most:
            raise DataError(f"A session shows at most {most} items, got {self.items.shape[1]}; give fewer candidates.")
        ordered = np.sort(self.items, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise DataError("A session names an item twice among its candidates; keep each item once.")
        self.attraction = world.attraction_of(self.rows, self.items)
        self.weights = world.examination[: self.items.shape[1]]

    @cached_property
    def similarity(self) -> np.ndarray:
        """(B, n, n) in [0, 1], 1 on the diagonal."""
        catalogue = self.world.catalogue
        total = sum(self.config.weights.values())
        made = np.zeros((*self.items.shape, self.items.shape[1]))
        for name, weight in self.config.weights.items():
            value = getattr(catalogue, name)[self.items]
            made += weight / total * (value[:, :, None] == value[:, None, :])
        return made

    def click_probability(self, order: np.ndarray) -> np.ndarray:
        """(B, m) P(click) of each place when the candidates `order` (B, m) are shown. Raises DataError on a repeat."""
        order = self._checked(order)
        return order_value(self.attraction, self.similarity, self.weights, self.config.interaction, order)

    def utility(self, order: np.ndarray) -> np.ndarray:
        """(B,) expected clicks of the list `order` (B, m)."""
        return self.click_probability(order).sum(axis=1)

    @property
    def incoming(self) -> np.ndarray:
        """(B, n) the incoming order: 0, 1, ..."""
        return np.broadcast_to(np.arange(self.items.shape[1]), self.items.shape)

    def by_attraction(self) -> np.ndarray:
        """(B, n) candidates by falling true attraction: the best list if neighbours did not matter."""
        return np.argsort(-self.attraction, axis=1, kind="stable")

    @cached_property
    def best(self) -> np.ndarray:
        """(B, n) the best list."""
        return best_order(self.attraction, self.similarity, self.weights, self.config.interaction)

    @property
    def random_utility(self) -> np.ndarray:
        """(B,) mean utility over all orders, in closed form."""
        return random_value(self.attraction, self.similarity, self.weights, self.config.interaction)

    def sample(self, order: np.ndarray, seed: int = 0) -> np.ndarray:
        """(B, m) bool clicks on the list `order`; equal seeds give equal clicks."""
        chance = self.click_probability(order)
        return np.random.default_rng(seed).random(chance.shape) < chance

    def _checked(self, order: np.ndarray) -> np.ndarray:
        order = np.asarray(order)
        B, n = self.items.shape
        fits = order.ndim == 2 and len(order) == B and 1 <= order.shape[1] <= n
        if fits and order.size:
            ordered = np.sort(order, axis=1)
            fits = ordered.min() >= 0 and ordered.max() < n and not (ordered[:, 1:] == ordered[:, :-1]).any()
        if not fits:
            raise DataError(
                f"An order must name candidates 0..{n - 1} of each of the {B} sessions, none twice; got shape "
                f"{order.shape}."
            )
        return order


def production_candidates(world: ShopWorld, rows: np.ndarray, n: int) -> np.ndarray:
    """(B, n) item rows: the head of the production ranker's list of each request, best first.

    Raises:
        DataError: more candidates than a page can ever show.
    """
    depth = world.ranker.order.shape[1]
    if not 1 <= n <= depth:
        raise DataError(f"The production ranker gives between 1 and {depth} candidates, got {n}.")
    return world.ranker.order[world.ranker.query_of[np.asarray(rows)], :n].astype(np.int64)

"""Latents of the phenomena, drawn from streams of their own, so that a shop without them stays as it is. `specs/market.md` 3."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sidtune.data_builders.shop_world.catalogue import stream
from sidtune.data_builders.shop_world.config import ShopWorldConfig
from sidtune.data_builders.shop_world.dials import Phenomena

_BAIT = 0.7
_INTENT, _PRICE = 1.0, 0.5  # s_I, s_p
_ORDER_PRICE = 0.4
_ORDER_VALUE = 5.0  # of a click


@dataclass(frozen=True)
class Tastes:
    """What the dials of trade-offs need of items and users.

        order logit += λ_v s_I ξ_u − .4 (exp(λ_v s_p ζ_u − (λ_v s_p)² / 2) − 1) z_i
        value of a list for u: Σ P(click) (v_c + v_o O),  v_c = 1 − λ_v m_u,  v_o = 5 (1 + λ_v m_u)

    Attributes:
        bait (N,): standard normal. intent ξ, price ζ (U,): standard normal.
        slope α, shift β (D,): evenly −.5 … .5 and −1.2 … .6 over the departments, in an order of their own each.
        buyer m (U,): +1 who buys, −1 who browses; half each, older ages more often the former.
    """

    bait: np.ndarray
    intent: np.ndarray
    price: np.ndarray
    buyer: np.ndarray
    slope: np.ndarray
    shift: np.ndarray

    @classmethod
    def make(cls, config: ShopWorldConfig, profile: np.ndarray) -> Tastes:
        """Draws them; `profile` (U, 4) is that of the users."""
        of_items, of_users = stream(config, "market-items"), stream(config, "market-users")
        users = len(profile)
        intent, price, coin = of_users.standard_normal(users), of_users.standard_normal(users), of_users.random(users)
        odds = np.where(profile[:, 0] >= 2, 0.5, -0.5)  # the age band shifts the log odds by 1
        buyer = np.where(coin < 1.0 / (1.0 + np.exp(-odds)), 1.0, -1.0)
        lie, parts = stream(config, "market-scores"), config.n_departments
        slope, shift = lie.permutation(np.linspace(-0.5, 0.5, parts)), lie.permutation(np.linspace(-1.2, 0.6, parts))
        return cls(of_items.standard_normal(config.n_items), intent, price, buyer, slope, shift)

    def click_logit(self, dials: Phenomena, items: np.ndarray) -> np.ndarray | float:
        """What the logit of a click gains, in the shape of `items`; 0.0 without bait."""
        return _BAIT * dials.clickbait * self.bait[items] if dials.clickbait else 0.0

    def order_logit(
        self, dials: Phenomena, users: np.ndarray, items: np.ndarray, price_level: np.ndarray
    ) -> np.ndarray | float:
        """What the logit of an order gains; `users` (n,), `price_level` in the shape of `items` (n, k)."""
        gain = -_BAIT * dials.clickbait * self.bait[items] if dials.clickbait else 0.0
        if dials.value_spread:
            spread = dials.value_spread * _PRICE
            sensitive = np.exp(spread * self.price[users] - spread**2 / 2) - 1.0
            intent = dials.value_spread * _INTENT * self.intent[users]
            gain = gain + intent[:, None] - _ORDER_PRICE * sensitive[:, None] * price_level
        return gain

    def values(self, dials: Phenomena, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) worth of a click and of an order to each user."""
        lean = dials.value_spread * self.buyer[users]
        return 1.0 - lean, _ORDER_VALUE * (1.0 + lean)

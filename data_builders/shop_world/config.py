"""Options of the simulated shop, with their checks; the model they parametrise stands in `shop_world`.

Own design; no paper. Every field is a plain number or a mapping of such, so a config can stand in YAML and in `meta.json` as it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sidtune.core.config import build, check_range, check_types
from sidtune.core.errors import ConfigError
from sidtune.data_builders.shop_world.dials import Phenomena
from sidtune.data_builders.shop_world.words import BRANDS, DEPARTMENTS

DAY = 86_400
_SHARES = """
popularity_quality launch_share profile_share late_user_share interest_drift taste_drift recommendation_share browse_share
attribute_query_share brand_query_share department_query_share attribute_only_share like_unknown_share
activity_floor
"""
_LARGEST_WEIGHT = 100.0
_MOST_LATENTS = 500_000_000


@dataclass(frozen=True)
class ShopWorldConfig:
    """All that defines a `ShopWorld`; equal configs give equal worlds. Symbols in brackets are those of `shop_world`.

    Size:
        seed: start of all random streams.
        n_items, n_users, n_requests: rows of the tables (N, U, R).
        days, start_time: length in days and first second (unix time) of the log.
        n_departments, leaves_per_department: how much of the fixed category tree is used (at most 8 and 8).
        brands_per_department: even number; each brand sells in two departments when there are at least two.
    Catalogue:
        popularity_quality: correlation of latent quality with the score that is ranked into popularity.
        launch_share: share of items launched during the log, at the start of a drift period.
    Users:
        profile_share: share of the variance of tastes that the profile explains.
        late_user_share: share of users who arrive in the last 5-40 % of the log (cold users).
        activity_sigma: log-standard deviation of user activity above the common floor.
        activity_floor: the floor, as a share of the mean number of requests of a user.
        drift_days, interest_drift, taste_drift: length of a period, and the share of the personal variance of
            interests and tastes that is renewed from one period to the next (0 = no drift).
        department_interest, leaf_interest: standard deviations of the interest logits.
        context_shift: standard deviation of the department shift by place and by daypart.
    Requests:
        recommendation_share: share of requests with a null query; of these, `browse_share` are on a department's page.
        attribute_query_share, brand_query_share, department_query_share, attribute_only_share: shares of searches of
            these forms; the rest is the plain category noun.
        query_zipf: how often a leaf is wanted falls as its rank ** -query_zipf; 0: the log-normal weights, the same ranks.
        query_taste: how sharply the asked attribute or brand follows the user's taste.
    Production ranker:
        page_size, exploration_slots, exploration_pool, ranked_tiers, search_oversampling, recommendation_oversampling:
            the page layout, see `PageLayout`.
        ranker_category, ranker_attribute, ranker_popularity, ranker_context: weights of its score.
    Feedback:
        examination_decay: exam(position) = (1 + position) ** -examination_decay, positions from 0.
        click_bias, brand_taste, colour_taste, style_taste, price_taste, quality, interest, context, group_penalty,
            department_penalty, other_penalty, attribute_penalty, brand_penalty: the attraction logit.
        like_bias, like_taste, like_unknown_share: like given click, and the share of requests whose likes are null.
        order_bias, order_taste, order_quality, order_price, order_laptop: order given click.
        dwell_log_mean, dwell_taste, dwell_sigma: log-normal dwell in seconds given click, capped at 10^6 s.
    Market:
        phenomena: dials that are not 0, see `dials.Phenomena`.
    """

    seed: int = 0
    n_items: int = 2000
    n_users: int = 1000
    n_requests: int = 40_000
    days: int = 60
    start_time: int = 1_700_006_400
    n_departments: int = 8
    leaves_per_department: int = 8
    brands_per_department: int = 8

    popularity_quality: float = 0.5
    launch_share: float = 0.1

    profile_share: float = 0.4
    late_user_share: float = 0.1
    activity_sigma: float = 0.7
    activity_floor: float = 0.6
    drift_days: int = 10
    interest_drift: float = 0.2
    taste_drift: float = 0.05
    department_interest: float = 1.3
    leaf_interest: float = 1.3
    context_shift: float = 0.5

    recommendation_share: float = 0.2
    browse_share: float = 0.4
    attribute_query_share: float = 0.2
    brand_query_share: float = 0.1
    department_query_share: float = 0.08
    attribute_only_share: float = 0.04
    query_zipf: float = 0.0
    query_taste: float = 1.0

    page_size: int = 20
    exploration_slots: int = 3
    exploration_pool: int = 60
    ranked_tiers: int = 3
    search_oversampling: float = 1.4
    recommendation_oversampling: float = 4.0
    ranker_category: float = 12.0
    ranker_attribute: float = 3.0
    ranker_popularity: float = 1.0
    ranker_context: float = 1.0

    examination_decay: float = 0.4
    click_bias: float = -3.3
    brand_taste: float = 1.4
    colour_taste: float = 1.5
    style_taste: float = 1.5
    price_taste: float = 0.8
    quality: float = 0.4
    interest: float = 0.7
    context: float = 0.5
    group_penalty: float = 2.0
    department_penalty: float = 3.0
    other_penalty: float = 5.0
    attribute_penalty: float = 1.5
    brand_penalty: float = 1.5
    like_bias: float = -1.5
    like_taste: float = 0.4
    like_unknown_share: float = 0.3
    order_bias: float = -2.0
    order_taste: float = 0.3
    order_quality: float = 0.5
    order_price: float = 0.4
    order_laptop: float = 0.5
    dwell_log_mean: float = 3.0
    dwell_taste: float = 0.15
    dwell_sigma: float = 0.8

    phenomena: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        check_types(type(self), values, "ShopWorld")
        self._check_ranges(values)
        _ = self.dials
        self._check_limits()

    @property
    def dials(self) -> Phenomena:
        """The phenomena as a checked dataclass."""
        return build(Phenomena, self.phenomena, "phenomena")

    @property
    def n_leaves(self) -> int:
        return self.n_departments * self.leaves_per_department

    @property
    def n_brands(self) -> int:
        return self.n_departments * self.brands_per_department // (2 if self.n_departments > 1 else 1)

    @property
    def n_periods(self) -> int:
        return -(-self.days // self.drift_days)

    def _check_ranges(self, values: dict[str, Any]) -> None:
        weights = [name for name, value in values.items() if isinstance(value, float)]
        check_range(self, -_LARGEST_WEIGHT, *weights, most=_LARGEST_WEIGHT)
        check_range(self, 0, *_SHARES.split(), most=1)
        check_range(self, 1, "n_items", "n_users", "brands_per_department", "drift_days", "ranked_tiers")
        check_range(self, 1, "n_requests", most=10_000_000)
        check_range(self, 1, "days", most=36_500)
        check_range(self, 1, "n_departments", most=len(DEPARTMENTS))
        check_range(self, 1, "leaves_per_department", most=8)
        check_range(self, 1, "page_size", most=200)
        check_range(self, 1, "search_oversampling", "recommendation_oversampling", most=_LARGEST_WEIGHT)
        check_range(self, 0, "seed", "exploration_slots", "exploration_pool", most=2**63)
        check_range(self, 0, "start_time", most=10**11)
        check_range(self, 0, "context_shift", "examination_decay", "dwell_sigma", most=_LARGEST_WEIGHT)
        check_range(self, 0, "query_zipf", "activity_sigma", most=5)
        forms = ("attribute_query_share", "brand_query_share", "department_query_share", "attribute_only_share")
        if sum(values[name] for name in forms) > 1.0:
            raise ConfigError(f"ShopWorld: {', '.join(forms)} must add up to at most 1; lower one of them.")

    def _check_limits(self) -> None:
        if self.brands_per_department % 2 or self.n_brands > len(BRANDS):
            raise ConfigError(
                f"ShopWorld: 'brands_per_department' must be even and give at most {len(BRANDS)} brands, "
                f"got {self.brands_per_department} for {self.n_departments} departments."
            )
        if self.n_items < self.n_leaves:
            raise ConfigError(
                f"ShopWorld: {self.n_items} items cannot fill {self.n_leaves} leaf categories; raise 'n_items' or "
                "lower 'leaves_per_department'."
            )
        if self.exploration_slots >= self.page_size or (self.exploration_slots and not self.exploration_pool):
            raise ConfigError(
                f"ShopWorld: 'exploration_slots' ({self.exploration_slots}) must be below 'page_size' "
                f"({self.page_size}) and need an 'exploration_pool'."
            )
        if self.exploration_slots > self.exploration_pool:
            raise ConfigError("ShopWorld: 'exploration_pool' must be at least 'exploration_slots'; raise it.")
        if self.n_users * self.n_periods * (self.n_leaves + self.n_brands + 15) > _MOST_LATENTS:
            raise ConfigError(
                f"ShopWorld: tastes of {self.n_users} users in {self.n_periods} drift periods would not fit in memory; "
                "raise 'drift_days' or lower 'n_users' or 'days'."
            )


def config_from_options(options: dict[str, Any]) -> ShopWorldConfig:
    """A checked config from reader options; ConfigError names an unknown key's nearest known one.

    `zipf_exponent`, which nothing ever read, is passed over: data made with it is the same without.
    """
    options = {name: value for name, value in options.items() if name != "zipf_exponent"}
    return build(ShopWorldConfig, options, "The options of the shop_world reader")

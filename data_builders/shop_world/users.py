"""The users of the simulated shop: profiles, and interests and tastes that drift from period to period.

Own design; no paper. Each latent x of a user u (one number per leaf, brand, colour, style, and one price level) is

    x[u, p] = scale * (sqrt(s) * profile_effect(u) + sqrt(1 - s) * personal[u, p]),
    personal[u, 0] ~ N(0, 1),   personal[u, p+1] = sqrt(1 - delta) * personal[u, p] + sqrt(delta) * N(0, 1),

with s = `profile_share`, delta = `interest_drift` or `taste_drift`, and profile_effect the normalised sum of effects of
age band, gender and region: a stationary random walk, so that recent behaviour tells more than old behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from sidtune.data_builders.shop_world import words
from sidtune.data_builders.shop_world.catalogue import N_COLOURS, N_STYLES, ShopCatalogue, numbered, stream
from sidtune.data_builders.shop_world.config import ShopWorldConfig
from sidtune.data_builders.tables.schema import table_from_columns

PROFILE_NAMES = ("age", "gender", "region", "price segment")
PROFILE_WORDS = (words.AGE_BANDS, words.GENDERS, words.REGIONS, words.PRICE_SEGMENTS)


@dataclass(frozen=True)
class Users:
    """Users as arrays; U users, P periods, C leaves.

    Attributes:
        profile (U, 4): numbers into `PROFILE_WORDS`.
        interest (U, P, C): logits of wanting a leaf, without the context's shift.
        taste (U, P, F): the affinities that enter the attraction logit, already scaled; columns are brands, colours,
            styles, and last the wanted price level.
        start (U,): share of the log's duration after which the user is there.
        requests (U,): number of requests.
        place_shift (4, D), daypart_shift (4, D): shift of the interest in a department by context, for everyone.
        by_department (U, P, D, 15): the tastes in colours and styles and the wanted price level in each department, in the place of
            those of `taste`; None where tastes are the same everywhere.
    """

    profile: np.ndarray
    interest: np.ndarray
    taste: np.ndarray
    start: np.ndarray
    requests: np.ndarray
    place_shift: np.ndarray
    daypart_shift: np.ndarray
    by_department: np.ndarray | None = None


def make_users(config: ShopWorldConfig, catalogue: ShopCatalogue) -> Users:
    """Draws the users from stream `users`."""
    rng = stream(config, "users")
    U, D, C = config.n_users, config.n_departments, config.n_leaves
    profile = np.stack(
        [
            rng.choice(len(words.AGE_BANDS), U, p=[0.18, 0.27, 0.27, 0.18, 0.10]),
            rng.choice(len(words.GENDERS), U, p=[0.48, 0.46, 0.06]),
            rng.integers(0, len(words.REGIONS), U),
            np.zeros(U, dtype=np.int64),
        ],
        axis=1,
    )
    department = _latent(rng, config, profile, D, config.interest_drift) * config.department_interest
    leaf = _latent(rng, config, profile, C, config.interest_drift) * config.leaf_interest
    interest = department[:, :, catalogue.leaf_department] + leaf + np.log(catalogue.leaf_weight * C)
    scale = np.repeat(
        [config.brand_taste, config.colour_taste, config.style_taste, 1.0],
        [config.n_brands, N_COLOURS, N_STYLES, 1],
    )
    taste = _latent(rng, config, profile, len(scale), config.taste_drift) * scale
    stated = taste[:, 0, -1] + 0.4 * rng.standard_normal(U)
    profile[:, 3] = np.digitize(stated, np.quantile(stated, [1 / 3, 2 / 3]))

    late = rng.random(U) < config.late_user_share
    start = np.where(late, rng.uniform(0.6, 0.95, U), 0.0)
    return Users(
        profile=profile,
        interest=interest,
        taste=taste,
        start=start,
        requests=_requests_per_user(rng, config, late, start),
        place_shift=rng.normal(0.0, config.context_shift, (len(words.PLACES), D)),
        daypart_shift=rng.normal(0.0, config.context_shift, (len(words.DAYPARTS), D)),
        by_department=_by_department(config, profile, taste[:, :, config.n_brands :], scale[config.n_brands :]),
    )


def _by_department(
    config: ShopWorldConfig, profile: np.ndarray, common: np.ndarray, scale: np.ndarray
) -> np.ndarray | None:
    """sqrt(1 - l) of the common tastes (U, P, 15) and sqrt(l) of tastes drawn alike for each department, see `dials.py`."""
    part = config.dials.taste_by_department
    if part == 0.0:
        return None
    rng, width = stream(config, "market-tastes"), len(scale)
    own = [_latent(rng, config, profile, width, config.taste_drift) * scale for _ in range(config.n_departments)]
    return np.sqrt(1.0 - part) * common[:, :, None] + np.sqrt(part) * np.stack(own, axis=2)


def _latent(
    rng: np.random.Generator, config: ShopWorldConfig, profile: np.ndarray, width: int, drift: float
) -> np.ndarray:
    """(U, P, width) unit-variance latents, see the module's equation."""
    U, P = len(profile), config.n_periods
    weights = np.sqrt([0.4, 0.4, 0.2])
    effect = np.zeros((U, width))
    for column, (weight, values) in enumerate(zip(weights, PROFILE_WORDS, strict=False)):
        effect += weight * rng.standard_normal((len(values), width))[profile[:, column]]
    personal = np.empty((U, P, width))
    personal[:, 0] = rng.standard_normal((U, width))
    for period in range(1, P):
        fresh = rng.standard_normal((U, width))
        personal[:, period] = np.sqrt(1.0 - drift) * personal[:, period - 1] + np.sqrt(drift) * fresh
    share = config.profile_share
    return np.sqrt(share) * effect[:, None, :] + np.sqrt(1.0 - share) * personal


def _requests_per_user(
    rng: np.random.Generator, config: ShopWorldConfig, late: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """A floor (`activity_floor` of the mean) for users who are there from the start; the rest by log-normal activity."""
    floor = np.where(late, 0, int(config.activity_floor * config.n_requests / config.n_users))
    activity = rng.lognormal(0.0, config.activity_sigma, config.n_users) * (1.0 - start)
    return floor + rng.multinomial(config.n_requests - int(floor.sum()), activity / activity.sum())


def user_ids(config: ShopWorldConfig) -> np.ndarray:
    """User ids in row order: `u00000`, `u00001`, ..."""
    return numbered("u", config.n_users, 5)


def user_table(config: ShopWorldConfig, users: Users) -> pa.Table:
    """The users table: age, gender, region and price segment of everyone."""
    vocabulary = [word for values in PROFILE_WORDS for word in values]
    first = np.cumsum([0, *(len(values) for values in PROFILE_WORDS[:-1])])
    codes = (users.profile + first).ravel()
    pairs = pa.StructArray.from_arrays(
        [
            pa.array(PROFILE_NAMES).take(pa.array(np.tile(np.arange(4), config.n_users))),
            pa.array(vocabulary).take(pa.array(codes)),
        ],
        names=["name", "value"],
    )
    offsets = pa.array(np.arange(config.n_users + 1, dtype=np.int32) * 4)
    columns = {"user_id": user_ids(config), "profile": pa.ListArray.from_arrays(offsets, pairs)}
    return table_from_columns("users", columns, config.n_users)

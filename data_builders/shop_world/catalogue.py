"""The catalogue of the simulated shop: categories, brands, attributes, prices, qualities, popularity and readable text.

Own design; no paper. Only the numbers matter to the model of `shop_world`; the text states them in varied words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sidtune.data_builders.shop_world import words
from sidtune.data_builders.shop_world.config import ShopWorldConfig

N_COLOURS, N_STYLES = len(words.COLOURS), len(words.STYLES)
VALUES = words.COLOURS + words.STYLES + words.MATERIALS
STREAMS = {"catalogue": 0, "users": 1, "requests": 2, "log": 3, "market-items": 4, "market-users": 5, "market-tastes": 6,
           "market-log": 7, "market-scores": 8, "market-words": 9, "market-blanks": 10,
           "market-noise": 11}  # fmt: skip


def stream(config: ShopWorldConfig, name: str, *parts: int) -> np.random.Generator:
    """The named random stream of a world; streams are independent of one another."""
    return np.random.default_rng([config.seed, STREAMS[name], *parts])


@dataclass(frozen=True)
class ShopCatalogue:
    """Items as arrays; row number = order of item ids. C leaves, D departments, N items.

    Attributes:
        leaf_department (C,), leaf_group (C,): department and group number of each leaf.
        leaf_weight (C,): how often a leaf is wanted, over all users; sums to 1.
        relation (C + D + 1, C) int8: row = scope of a request (a leaf, C + a department, or C + D for none); value
            0 = inside the scope (or no scope), 1 = same group, 2 = same department, 3 = other.
        brand_departments (n_brands, 2), brand_tier (n_brands,): where a brand sells, its price level.
        leaf, brand, colour, style, material (N,): numbers; `material` and `style` count within their own lists.
        size (N,): position in the department's sizes.
        price_level (N,): z, about standard normal within a leaf. price (N,): in units of money.
        quality (N,): standard normal. popularity_rank (N,): from 0.
        launch_period (N,): drift period from whose start the item is on sale.
    """

    leaf_department: np.ndarray
    leaf_group: np.ndarray
    leaf_weight: np.ndarray
    relation: np.ndarray
    brand_departments: np.ndarray
    brand_tier: np.ndarray
    leaf: np.ndarray
    brand: np.ndarray
    colour: np.ndarray
    style: np.ndarray
    material: np.ndarray
    size: np.ndarray
    price_level: np.ndarray
    price: np.ndarray
    quality: np.ndarray
    popularity_rank: np.ndarray
    launch_period: np.ndarray
    text_choice: np.ndarray

    @property
    def department(self) -> np.ndarray:
        return self.leaf_department[self.leaf]

    @property
    def values(self) -> np.ndarray:
        """(N, 3) numbers into `VALUES`: colour, style, material of each item."""
        return np.stack([self.colour, N_COLOURS + self.style, N_COLOURS + N_STYLES + self.material], axis=1)


def make_catalogue(config: ShopWorldConfig) -> ShopCatalogue:
    """Draws the catalogue from stream `catalogue`."""
    rng = stream(config, "catalogue")
    D, L, N = config.n_departments, config.leaves_per_department, config.n_items
    C, n_brands = config.n_leaves, config.n_brands
    leaf_department = np.repeat(np.arange(D), L)
    names = [(d, words.DEPARTMENTS[d].leaves[l][0]) for d in range(D) for l in range(L)]
    number = {name: n for n, name in enumerate(dict.fromkeys(names))}
    leaf_group = np.array([number[name] for name in names])
    leaf_weight = rng.lognormal(0.0, 0.5, C)
    if config.query_zipf:
        leaf_weight = (1.0 + np.argsort(np.argsort(-leaf_weight))) ** -config.query_zipf
    leaf_weight /= leaf_weight.sum()
    brand_departments = _brand_departments(n_brands, D)
    brand_tier = rng.standard_normal(n_brands)

    sizes = 1 + rng.multinomial(N - C, _normalised(rng.lognormal(0.0, 0.2, C)))
    leaf = rng.permutation(np.repeat(np.arange(C), sizes))
    department = leaf_department[leaf]
    brand = _brands(rng, department, brand_departments, D)
    materials = np.array([[words.MATERIALS.index(m) for m in dept.materials] for dept in words.DEPARTMENTS])
    material = materials[department, rng.integers(0, materials.shape[1], N)]
    n_sizes = np.array([len(dept.sizes) for dept in words.DEPARTMENTS])[department]
    price_level = (brand_tier[brand] + rng.standard_normal(N)) / np.sqrt(2.0)
    leaf_price = rng.normal(4.0, 0.8, C)
    price = np.round(np.exp(leaf_price[leaf] + 0.45 * price_level), 2)
    quality = rng.standard_normal(N)
    share = config.popularity_quality
    appeal = share * quality + np.sqrt(1.0 - share**2) * rng.standard_normal(N)
    popularity_rank = np.empty(N, dtype=np.int64)
    popularity_rank[np.argsort(-appeal, kind="stable")] = np.arange(N)
    launched_late = (rng.random(N) < config.launch_share) & (config.n_periods > 1)
    launch_period = np.where(launched_late, rng.integers(1, max(config.n_periods, 2), N), 0)
    return ShopCatalogue(
        leaf_department=leaf_department,
        leaf_group=leaf_group,
        leaf_weight=leaf_weight,
        relation=_relation(leaf_department, leaf_group, D),
        brand_departments=brand_departments,
        brand_tier=brand_tier,
        leaf=leaf,
        brand=brand,
        colour=rng.choice(N_COLOURS, N, p=_normalised(np.linspace(1.6, 0.8, N_COLOURS))),
        style=rng.choice(N_STYLES, N, p=_normalised(np.linspace(1.4, 0.8, N_STYLES))),
        material=material,
        size=(rng.random(N) * n_sizes).astype(np.int64),
        price_level=price_level,
        price=price,
        quality=quality,
        popularity_rank=popularity_rank,
        launch_period=launch_period,
        text_choice=rng.integers(0, 1 << 30, (N, 7)),
    )


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def _brand_departments(n_brands: int, n_departments: int) -> np.ndarray:
    """(n_brands, 2): home department b mod D, and another one (the same if there is only one)."""
    brands = np.arange(n_brands)
    home = brands % n_departments
    step = 1 + (brands // n_departments) % max(n_departments - 1, 1)
    return np.stack([home, (home + step) % n_departments], axis=1)


def _brands(rng: np.random.Generator, department: np.ndarray, sells: np.ndarray, n_departments: int) -> np.ndarray:
    """A brand for each item among those of its department; earlier brands are somewhat larger."""
    brand = np.empty(len(department), dtype=np.int64)
    for d in range(n_departments):
        rows = np.flatnonzero(department == d)
        here = np.flatnonzero((sells == d).any(axis=1))
        brand[rows] = rng.choice(here, len(rows), p=_normalised(np.linspace(1.5, 0.7, len(here))))
    return brand


def _relation(leaf_department: np.ndarray, leaf_group: np.ndarray, n_departments: int) -> np.ndarray:
    same_department = leaf_department[:, None] == leaf_department[None, :]
    same_group = leaf_group[:, None] == leaf_group[None, :]
    of_leaf = 3 - same_department.astype(np.int8) - same_group - np.eye(len(leaf_group), dtype=np.int8)
    of_department = np.where(np.arange(n_departments)[:, None] == leaf_department[None, :], 0, 3)
    return np.concatenate([of_leaf, of_department, np.zeros((1, len(leaf_group)), dtype=np.int8)]).astype(np.int8)


def leaf_nouns(config: ShopWorldConfig) -> list[tuple[str, str, str]]:
    """The nouns of each leaf, canonical one first."""
    L = config.leaves_per_department
    return [nouns for d in words.DEPARTMENTS[: config.n_departments] for _, nouns in d.leaves[:L]]


def item_ids(config: ShopWorldConfig) -> np.ndarray:
    """Item ids in row order: `i00000`, `i00001`, ..."""
    return numbered("i", config.n_items, 5)


def numbered(letter: str, count: int, width: int) -> np.ndarray:
    """`letter` + zero-padded number; the width grows with `count`, so that text order is number order."""
    width = max(width, len(str(max(count - 1, 0))))
    return np.char.add(letter, np.char.zfill(np.arange(count).astype(str), width)).astype(object)

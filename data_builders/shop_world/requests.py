"""The requests of the simulated shop: when, where, on what device and page, and what is typed.

Own design; no paper. Every choice is an inverse-CDF look-up of one pre-drawn uniform number (`RequestDraws`), so that
a slow second implementation given the same numbers must produce the same requests.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from sidtune.data_builders.shop_world import words
from sidtune.data_builders.shop_world.catalogue import N_COLOURS, N_STYLES, VALUES, ShopCatalogue, leaf_nouns, stream
from sidtune.data_builders.shop_world.config import DAY, ShopWorldConfig
from sidtune.data_builders.shop_world.paraphrases import ASKED, LEAVES
from sidtune.data_builders.shop_world.users import Users

PLAIN, ATTRIBUTE, BRAND, DEPARTMENT, ATTRIBUTE_ONLY, HOME, BROWSE = range(7)
KINDS = ("plain", "attribute", "brand", "department", "attribute only", "home", "browse")
HOURS = np.array([2, 1, 1, 1, 1, 2, 4, 7, 8, 7, 7, 8, 10, 9, 7, 7, 8, 10, 12, 14, 15, 13, 9, 5], dtype=np.float64)
# P(place | weekend, daypart): columns home, work, commute, travel
PLACE = np.array(
    [
        [[0.92, 0.02, 0.02, 0.04], [0.35, 0.35, 0.25, 0.05], [0.30, 0.45, 0.20, 0.05], [0.80, 0.02, 0.13, 0.05]],
        [[0.92, 0.01, 0.01, 0.06], [0.82, 0.03, 0.03, 0.12], [0.72, 0.03, 0.05, 0.20], [0.82, 0.01, 0.03, 0.14]],
    ]
)
# P(device | place): columns phone, tablet, laptop
DEVICE = np.array([[0.50, 0.20, 0.30], [0.40, 0.05, 0.55], [0.92, 0.06, 0.02], [0.75, 0.15, 0.10]])
ASKED_SORT = np.array([0.45, 0.35, 0.20])  # colour, style, material
QUERY_CHUNK = 16_384
SYNONYMS = 3  # of a noun; numbers from here on are paraphrases


@dataclass(frozen=True)
class RequestDraws:
    """Uniform numbers in [0, 1), (R,) each: `day`, `hour`, `second` in order of users, the rest in order of time."""

    day: np.ndarray
    hour: np.ndarray
    second: np.ndarray
    place: np.ndarray
    device: np.ndarray
    kind: np.ndarray
    leaf: np.ndarray
    sort: np.ndarray
    value: np.ndarray
    noun: np.ndarray
    order: np.ndarray


def request_draws(config: ShopWorldConfig) -> RequestDraws:
    """The numbers of stream `requests`."""
    rng = stream(config, "requests")
    return RequestDraws(**{f.name: rng.random(config.n_requests) for f in fields(RequestDraws)})


@dataclass(frozen=True)
class Requests:
    """Requests in order of time (ties by user), all arrays (R,).

    Attributes:
        user, time, period: user row, unix seconds, drift period.
        place, daypart, device, kind: numbers into `PLACES`, `DAYPARTS`, `DEVICES`, `KINDS`.
        leaf: the leaf that prompted the request. Feedback depends on it only through `scope`.
        scope: row of `ShopCatalogue.relation`: a leaf, C + department, or C + D when the request names no category.
        asked: number into `VALUES`, -1 for none. brand: asked brand, -1 for none.
        noun, order: which synonym (from `SYNONYMS` on: which paraphrase) and which word order are typed.
    """

    user: np.ndarray
    time: np.ndarray
    period: np.ndarray
    place: np.ndarray
    daypart: np.ndarray
    device: np.ndarray
    kind: np.ndarray
    leaf: np.ndarray
    scope: np.ndarray
    asked: np.ndarray
    brand: np.ndarray
    noun: np.ndarray
    order: np.ndarray

    @property
    def is_recommendation(self) -> np.ndarray:
        return self.kind >= HOME


def pick(weights: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """Inverse-CDF choice: `weights` (n, k) or (k,) non-negative, `draw` (n,) in [0, 1) → (n,) numbers in [0, k)."""
    cumulative = np.cumsum(np.atleast_2d(weights), axis=1)
    chosen = (draw[:, None] * cumulative[:, -1:] >= cumulative).sum(axis=1)
    return np.minimum(chosen, cumulative.shape[1] - 1)


def kind_weights(config: ShopWorldConfig) -> np.ndarray:
    """(7,) probabilities of the kinds of requests, in the order of `KINDS`."""
    named = np.array(
        [
            config.attribute_query_share,
            config.brand_query_share,
            config.department_query_share,
            config.attribute_only_share,
        ]
    )
    searches = np.concatenate([[max(1.0 - named.sum(), 0.0)], named]) * (1.0 - config.recommendation_share)
    rest = np.array([1.0 - config.browse_share, config.browse_share]) * config.recommendation_share
    return np.concatenate([searches, rest])


def request_times(config: ShopWorldConfig, users: Users, draws: RequestDraws) -> tuple[np.ndarray, np.ndarray]:
    """(user, time) of each request in order of time: a uniform day of the user's stay, then the rhythm of the day."""
    user = np.repeat(np.arange(config.n_users), users.requests)
    start = users.start[user]
    day = np.minimum((config.days * (start + (1.0 - start) * draws.day)).astype(np.int64), config.days - 1)
    time = config.start_time + day * DAY + pick(HOURS, draws.hour) * 3600 + (draws.second * 3600).astype(np.int64)
    order = np.lexsort((user, time))
    return user[order], time[order]


def make_requests(config: ShopWorldConfig, catalogue: ShopCatalogue, users: Users, draws: RequestDraws) -> Requests:
    """Draws the requests, vectorised, in chunks of `QUERY_CHUNK`."""
    user, time = request_times(config, users, draws)
    seconds = time - config.start_time
    period = seconds // DAY // config.drift_days
    daypart = time % DAY // (6 * 3600)
    weekend = ((time // DAY + 3) % 7 >= 5).astype(np.int64)
    place = pick(PLACE[weekend, daypart], draws.place)
    device = pick(DEVICE[place], draws.device)
    kind = pick(kind_weights(config), draws.kind)
    leaf, asked, brand = (np.empty(len(user), dtype=np.int64) for _ in range(3))
    for first in range(0, len(user), QUERY_CHUNK):
        part = slice(first, first + QUERY_CHUNK)
        where = (user[part], period[part])
        shift = users.place_shift[place[part]] + users.daypart_shift[daypart[part]]
        logits = users.interest[where] + shift[:, catalogue.leaf_department]
        leaf[part] = pick(_softmax_weights(logits), draws.leaf[part])
        taste = users.taste[where] * config.query_taste
        if users.by_department is not None:
            own = users.by_department[(*where, catalogue.leaf_department[leaf[part]])]
            taste[:, config.n_brands :] = own * config.query_taste
        asked[part] = _asked_value(config, catalogue, taste, kind[part], leaf[part], draws, part)
        brand[part] = _asked_brand(config, catalogue, taste, kind[part], leaf[part], draws.value[part])
    scope = np.where(kind <= BRAND, leaf, config.n_leaves + config.n_departments)
    named = (kind == DEPARTMENT) | (kind == BROWSE)
    scope = np.where(named, config.n_leaves + catalogue.leaf_department[leaf], scope)
    noun = _typed_noun(config, kind, draws)
    order = (draws.order * 3).astype(np.int64)
    return Requests(user, time, period, place, daypart, device, kind, leaf, scope, asked, brand, noun, order)


def _typed_noun(config: ShopWorldConfig, kind: np.ndarray, draws: RequestDraws) -> np.ndarray:
    """Which synonym, or with probability `lexical_gap` which paraphrase (departments have none)."""
    noun, share = (draws.noun * SYNONYMS).astype(np.int64), config.dials.lexical_gap
    if not share:
        return noun
    rng = stream(config, "market-words")
    hard = (rng.random(len(noun)) < share) & (kind != DEPARTMENT)
    return np.where(hard, SYNONYMS + rng.integers(0, 2, len(noun)), noun)


def _softmax_weights(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - logits.max(axis=1, keepdims=True))


def _asked_value(
    config: ShopWorldConfig,
    catalogue: ShopCatalogue,
    taste: np.ndarray,
    kind: np.ndarray,
    leaf: np.ndarray,
    draws: RequestDraws,
    part: slice,
) -> np.ndarray:
    """Asked colour or style by the user's taste, or a material of the leaf's department; -1 where none is asked."""
    b, c = config.n_brands, config.n_brands + N_COLOURS
    draw = draws.value[part]
    colour = pick(_softmax_weights(taste[:, b:c]), draw)
    style = pick(_softmax_weights(taste[:, c : c + N_STYLES]), draw)
    of_department = np.array([[words.MATERIALS.index(m) for m in d.materials] for d in words.DEPARTMENTS])
    offered = of_department[catalogue.leaf_department[leaf]]
    material = np.take_along_axis(offered, (draw * offered.shape[1]).astype(np.int64)[:, None], axis=1)[:, 0]
    sort = pick(ASKED_SORT, draws.sort[part])
    value = np.choose(sort, [colour, N_COLOURS + style, N_COLOURS + N_STYLES + material])
    return np.where((kind == ATTRIBUTE) | (kind == ATTRIBUTE_ONLY), value, -1)


def _asked_brand(
    config: ShopWorldConfig,
    catalogue: ShopCatalogue,
    taste: np.ndarray,
    kind: np.ndarray,
    leaf: np.ndarray,
    draw: np.ndarray,
) -> np.ndarray:
    """Asked brand by the user's taste among the brands of the leaf's department; -1 where none is asked."""
    department = catalogue.leaf_department[leaf]
    sells = (catalogue.brand_departments[None] == np.arange(config.n_departments)[:, None, None]).any(axis=2)
    weights = _softmax_weights(taste[:, : config.n_brands]) * sells[department]
    return np.where(kind == BRAND, pick(weights, draw), -1)


def query_texts(config: ShopWorldConfig, requests: Requests) -> pa.Array:
    """(R,) query texts, null for recommendations; each distinct query is composed once."""
    parts = (requests.kind, requests.leaf, requests.asked + 1, requests.brand + 1, requests.noun, requests.order)
    shape = (len(KINDS), config.n_leaves, len(VALUES) + 1, config.n_brands + 1, SYNONYMS + 2, 3)
    _, first, inverse = np.unique(np.ravel_multi_index(parts, shape), return_index=True, return_inverse=True)
    distinct = np.stack(parts, axis=1)[first] - np.array([0, 0, 1, 1, 0, 0])
    nouns = leaf_nouns(config)
    texts = [_query_text(config, nouns, *row) for row in distinct.tolist()]
    return pa.array(texts, type=pa.string()).take(pa.array(inverse.ravel()))


def _query_text(
    config: ShopWorldConfig, nouns: list[tuple[str, str, str]], kind: int, leaf: int, asked: int, brand: int, *how: int
) -> str | None:
    if kind >= HOME:
        return None
    noun, order = how
    value = "" if asked < 0 else VALUES[asked] if noun < SYNONYMS else ASKED[VALUES[asked]][noun - SYNONYMS]
    if kind == ATTRIBUTE_ONLY:
        return value
    if kind == DEPARTMENT:
        return words.DEPARTMENTS[leaf // config.leaves_per_department].names[noun]
    name = nouns[leaf][noun] if noun < SYNONYMS else LEAVES[nouns[leaf][0]][noun - SYNONYMS]
    if kind == PLAIN:
        return name
    if kind == ATTRIBUTE:
        in_words = f"{name} in {value}" if asked < N_COLOURS and noun < SYNONYMS else f"{name}, {value}"
        return (f"{value} {name}", f"{name} {value}", in_words)[order] if noun < SYNONYMS else in_words
    return (f"{words.BRANDS[brand]} {name}", f"{name} {words.BRANDS[brand]}", f"{name} by {words.BRANDS[brand]}")[order]


def context_lists(config: ShopWorldConfig, catalogue: ShopCatalogue, requests: Requests) -> pa.ListArray:
    """(R,) name/value lists: place, device, daypart, page, and the department on a browse page."""
    browse = requests.kind == BROWSE
    page = np.select([requests.kind == HOME, browse], [1, 2], 0)
    departments = [d.names[0] for d in words.DEPARTMENTS[: config.n_departments]]
    vocabulary = [*words.PLACES, *words.DEVICES, *words.DAYPARTS, *words.PAGES, *departments]
    starts = np.cumsum([0, len(words.PLACES), len(words.DEVICES), len(words.DAYPARTS), len(words.PAGES)])
    codes = np.stack(
        [requests.place, requests.device, requests.daypart, page, catalogue.leaf_department[requests.leaf]], axis=1
    )
    keep = np.ones(codes.shape, dtype=bool)
    keep[:, 4] = browse
    names = np.broadcast_to(np.arange(5), codes.shape)[keep]
    pairs = pa.StructArray.from_arrays(
        [
            pa.array(["place", "device", "daypart", "page", "department"]).take(pa.array(names)),
            pa.array(vocabulary).take(pa.array((codes + starts)[keep])),
        ],
        names=["name", "value"],
    )
    offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pairs)

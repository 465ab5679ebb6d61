"""MovieLens ratings → post-ranking requests: segments of five, best-rated first, every feature from the past.

After the LLM4PR paper (arXiv 2411.01178, 3.1; segments as in PRS, 2102.12057): each user's ratings in order of time are
cut into segments of 5 that become candidate lists, the target is falling rating, and each segment gets a pseudo-query.
The paper does not say the rest; ours:

* Short tails are dropped. Equal times keep the order of the file. Splits are per user and chronological.
* Ratings before one moment (the cut, `upstream_share` of all ratings) fit the upstream ranker (`upstream_ranker`); only
  segments that begin at or after it become requests. Earlier ratings still serve as history.
* "The past" of a segment is what is strictly earlier for movies, and the user's own ratings before it in order and
  strictly earlier than its first rating: changing a rating changes nothing of a segment that begins at or before it.
* The incoming order is the upstream ranker's score, falling; ties by movie row.
* Query vectors are one random unit vector per distinct pseudo-query: they say which phrase it is and no more.

Fields. User: `vector` (id embedding, at that time), `age`, `gender`, `occupation` (categorical), `past` (mean rating,
log number of ratings). Item: `vector` (id embedding; missing for a movie without a rating before the cut), `genres`,
`decade` (categorical), `past` (mean rating, log number of ratings, upstream score) and `stars` (categorical: what the
user gave a history item; missing for candidates).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from sidtune.core.config import check_range, check_types
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.ragged import owners, stretches
from sidtune.data_builders.post_ranking.columns import request_table
from sidtune.data_builders.post_ranking.schema import PostRankField, PostRankTable
from sidtune.data_builders.post_ranking.upstream_ranker import PastMeans, fit_item_factors, fold_in
from sidtune.data_builders.readers.movielens import AGES, Ratings

PSEUDO_QUERIES = (
    "what to watch",
    "movie recommendations",
    "something good to watch tonight",
    "films for me",
    "find me a movie",
    "movies i might like",
    "suggest a film",
    "best movies to see",
)
_AGE_FROM = (18, 25, 35, 45, 50, 56)


@dataclass(frozen=True)
class SegmentConfig:
    """How segments are made.

    Attributes:
        size: ratings in a segment, at least 2. history: latest earlier ratings kept as history.
        upstream_share: share of all ratings, from the start, that fits the upstream ranker.
        valid_share, test_share: of each user's segments, the last ones; a user with fewer than 3 has train only.
        width: of the item vectors. d_q: of the query vectors.
        shrink, ridge: of the means and of the user vectors.
        seed: pseudo-queries, query vectors and the solver.

    Raises:
        ConfigError: a value out of range.
    """

    size: int = 5
    history: int = 10
    upstream_share: float = 0.4
    valid_share: float = 0.1
    test_share: float = 0.1
    width: int = 16
    d_q: int = 16
    shrink: float = 5.0
    ridge: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), "Segments")
        check_range(self, 2, "size")
        check_range(self, 1, "width", "d_q")
        check_range(self, 0, "history", "seed", "shrink", "ridge")
        if not self.shrink or not self.ridge:
            raise ConfigError(f"Segments need shrink and ridge above 0, got {self.shrink} and {self.ridge}.")
        shares = (self.upstream_share, self.valid_share, self.test_share)
        if min(shares) < 0 or max(shares) >= 1 or self.valid_share + self.test_share >= 1:
            raise ConfigError(f"The shares of segments must lie in [0, 1) and leave some for train, got {shares}.")


@dataclass(frozen=True)
class _Segments:
    """Segments as stretches of the ordered ratings, `past` = end of what is strictly earlier."""

    start: np.ndarray
    user: np.ndarray
    time: np.ndarray
    first: np.ndarray
    past: np.ndarray


def movielens_segments(ratings: Ratings, config: SegmentConfig | None = None) -> PostRankTable:
    """Builds the table; see the module's docstring.

    Args:
        ratings: of `readers.movielens.read_ratings`.
        config: see `SegmentConfig`.

    Raises:
        DataError: no segment begins after the cut.
    """
    config = config or SegmentConfig()
    order = np.lexsort((np.arange(len(ratings.time)), ratings.time, ratings.user))
    log = replace(
        ratings,
        user=ratings.user[order],
        item=ratings.item[order],
        rating=ratings.rating[order].astype(np.float64),
        time=ratings.time[order],
    )
    cut = np.sort(log.time)[min(int(config.upstream_share * len(log.time)), len(log.time) - 1)]
    segments = _segments(log, config, cut)
    movies = PastMeans(log.item, log.rating, log.time, config.shrink)
    residual = log.rating - movies.before(log.item, log.time)[0]
    old, sizes = log.time < cut, (len(ratings.user_ids), len(ratings.item_ids))
    vectors, known = fit_item_factors(log.user[old], log.item[old], residual[old], *sizes, config.width, config.seed)
    features = np.concatenate([np.ones((len(log.item), 1)), vectors[log.item]], axis=1)
    person = fold_in(features, residual, segments.first, segments.past, config.ridge)

    at = segments.start[:, None] + np.arange(config.size)
    item, rating = log.item[at], log.rating[at]
    mean, count = movies.before(item.ravel(), np.repeat(segments.time, config.size))
    score = mean.reshape(item.shape) + np.einsum("rd,rnd->rn", person, features[at])
    order = np.lexsort((item, -score), axis=-1)
    item, rating, score = (np.take_along_axis(one, order, axis=1) for one in (item, rating, score))
    offsets, history_at = stretches(np.maximum(segments.first, segments.past - config.history), segments.past)
    fields, matrices = _categories(ratings)
    candidate = [np.take_along_axis(one.reshape(item.shape), order, axis=1).ravel() for one in (mean, np.log1p(count))]
    phrases = np.random.default_rng([config.seed, 1]).standard_normal((len(PSEUDO_QUERIES), config.d_q))
    matrices |= {
        "item/vector": np.where(known[:, None], vectors, np.nan),
        "candidate/past": np.stack([*candidate, score.ravel()], axis=1),
        "candidate/stars": np.full((item.size, 5), np.nan),
        "query": phrases / np.linalg.norm(phrases, axis=1, keepdims=True),
        **_past_fields(log, segments, movies, features, person, offsets, history_at),
    }
    queries = np.random.default_rng([config.seed, 0]).integers(0, len(PSEUDO_QUERIES), len(item))
    place = (segments.start - segments.first) // config.size
    names = [f"{ratings.user_ids[user]}-{n}" for user, n in zip(segments.user.tolist(), place.tolist(), strict=True)]
    phrase = pa.array(PSEUDO_QUERIES).take(pa.array(queries))
    splits, past = _splits(segments.user, config), (offsets, log.item[history_at])
    titled = any(title is not None for title in ratings.titles)
    return PostRankTable(
        request_table(names, splits, phrase, queries, segments.user, (item, score, rating), past),
        ratings.item_ids,
        ratings.user_ids,
        _fields(fields, config.width),
        {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in matrices.items()},
        [[("title", title)] if title else [] for title in ratings.titles] if titled else [],
        notes=[f"Segments begin at or after the time {int(cut)}; the upstream ranker saw ratings before it only."],
    )


def _segments(log: Ratings, config: SegmentConfig, cut: int) -> _Segments:
    """Whole segments from each user's first rating on, kept where they begin at or after the cut."""
    at = np.arange(len(log.user))
    first, end = (np.searchsorted(log.user, log.user, side=side) for side in ("left", "right"))
    whole = ((at - first) % config.size == 0) & (at + config.size <= end)
    start = np.flatnonzero(whole & (log.time >= cut))
    if not len(start):
        raise DataError(
            f"No user has {config.size} ratings in a row after the first {config.upstream_share:.0%} of all ratings; "
            "lower upstream_share or size."
        )
    user, time = log.user[start], log.time[start]
    times, ranks = np.unique(log.time, return_inverse=True)
    key = log.user * (len(times) + 1) + ranks
    past = np.searchsorted(key, user * (len(times) + 1) + np.searchsorted(times, time), side="left")
    return _Segments(start, user, time, first[start], past)


def _past_fields(
    log: Ratings, segments: _Segments, movies: PastMeans, features: np.ndarray, person: np.ndarray,
    offsets: np.ndarray, history_at: np.ndarray,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Fields of the user and of the history as they are when the segment begins."""
    running = np.concatenate([[0.0], np.cumsum(log.rating)])
    count = (segments.past - segments.first).astype(np.float64)
    total = running[segments.past] - running[segments.first]
    mean = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    vector = np.where(count[:, None] > 0, person, np.nan)
    owner = owners(offsets)
    items = log.item[history_at]
    seen, times = movies.before(items, segments.time[owner]), np.einsum("rd,rd->r", person[owner], features[history_at])
    return {
        "request/vector": vector,
        "request/past": np.stack([mean, np.log1p(count)], axis=1),
        "history/past": np.stack([seen[0], np.log1p(seen[1]), seen[0] + times], axis=1),
        "history/stars": np.eye(5)[np.clip(np.rint(log.rating[history_at]).astype(int) - 1, 0, 4)],
    }


def _categories(ratings: Ratings) -> tuple[list[PostRankField], dict[str, np.ndarray]]:
    """Categorical fields that stay as they are, with their matrices."""
    columns: list[tuple[str, str, list[list[str]]]] = [
        ("user", name, [[one] if one else [] for one in values])
        for name, values in (
            ("age", [_age_band(age) for age in ratings.ages]),
            ("gender", ratings.genders),
            ("occupation", ratings.occupations),
        )
    ]
    decades = [[] if year is None else [f"{year // 10 * 10}s"] for year in ratings.years]
    columns += [("item", "genres", ratings.genres), ("item", "decade", decades)]
    fields, matrices = [], {}
    for side, name, rows in columns:
        values = sorted({value for row in rows for value in row if value}) or ["unknown"]
        fields.append(PostRankField(name, "categorical", side, len(values), tuple(values)))
        matrices[f"{side}/{name}"] = _one_hot(rows, values)
    return fields, matrices


def _fields(categories: list[PostRankField], width: int) -> tuple[PostRankField, ...]:
    item_past = ("mean rating", "log ratings", "ranking score")
    return (
        PostRankField("vector", "id_embedding", "user", width + 1, dynamic=True),
        *categories[:3],
        PostRankField("past", "numeric", "user", 2, ("mean rating", "log ratings"), dynamic=True),
        PostRankField("vector", "id_embedding", "item", width),
        *categories[3:],
        PostRankField("past", "numeric", "item", 3, item_past, dynamic=True),
        PostRankField("stars", "categorical", "item", 5, ("1", "2", "3", "4", "5"), dynamic=True),
    )


def _splits(user: np.ndarray, config: SegmentConfig) -> np.ndarray:
    """(R,) split names: of each user's segments the last are test, those before valid."""
    _, begin, number = np.unique(user, return_index=True, return_counts=True)
    count = np.repeat(number, number)
    from_end = count - 1 - (np.arange(len(user)) - np.repeat(begin, number))
    test = np.ceil(config.test_share * count)
    valid = test + np.ceil(config.valid_share * count)
    names = np.where(from_end < test, "test", np.where(from_end < valid, "valid", "train"))
    return np.where(count < 3, "train", names)


def _age_band(age: str | None) -> str | None:
    """ML-1M's bands for ages in years; a band stays as it is."""
    if age is None or not age.isdecimal():
        return age
    return list(AGES.values())[int(np.searchsorted(_AGE_FROM, int(age), side="right"))]


def _one_hot(rows: Sequence[Sequence[str]], values: Sequence[str]) -> np.ndarray:
    """(rows, values) 0/1; a row without any value is NaN (missing)."""
    number = {value: column for column, value in enumerate(values)}
    out = np.zeros((len(rows), len(values)))
    for row, chosen in enumerate(rows):
        out[row, [number[value] for value in chosen]] = 1.0
        if not chosen:
            out[row] = np.nan
    return out

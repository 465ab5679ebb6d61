"""Where post-ranking requests come from: MovieLens ratings, simulated sessions, our own generator, passage lists, a saved table.

`source` of `recipes.post_rank` is a mapping with `kind` and the options of that kind; an unknown key is refused. Sessions keep
their simulator, which knows what every order of a list is worth.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sidtune.core.config import build
from sidtune.core.errors import ConfigError, nearest
from sidtune.data_builders.post_ranking.movielens_segments import SegmentConfig, movielens_segments
from sidtune.data_builders.post_ranking.passage_lists import PassageFiles, passage_lists
from sidtune.data_builders.post_ranking.schema import PostRankTable
from sidtune.data_builders.post_ranking.shop_lists import LABELS, session_table
from sidtune.data_builders.post_ranking.store import load_post_rank
from sidtune.data_builders.post_ranking.text import request_of, table_from_requests
from sidtune.data_builders.readers.movielens import read_ratings
from sidtune.data_builders.shop_world.sessions import SessionConfig, ShopSessions, production_candidates
from sidtune.data_builders.shop_world.world import ShopWorld
from sidtune.recipes.llm4pr.generator import GeneratorSource, generator_table


@dataclass(frozen=True)
class MovieLensSource:
    """Options of `kind: movielens`: the folder, its layout, and fields of `SegmentConfig` as `segments`."""

    path: str
    layout: str = "auto"
    segments: dict = field(default_factory=dict)


@dataclass(frozen=True)
class ShopSource:
    """Options of `kind: shop`.

    Attributes:
        world: options of `ShopWorld`. sessions: fields of `SessionConfig`.
        count: sessions drawn from the requests. candidates: of each. label: of `session_table`.
        valid_share, test_share: of the sessions, the latest ones.
        history: latest clicks kept. seed: of the draw and of sampled clicks.
    """

    world: dict = field(default_factory=dict)
    sessions: dict = field(default_factory=dict)
    count: int = 4000
    candidates: int = 8
    label: str = "best"
    valid_share: float = 0.1
    test_share: float = 0.2
    history: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise ConfigError(f"source.label: there is no label '{self.label}': {nearest(self.label, LABELS)}")
        if min(self.valid_share, self.test_share) < 0 or self.valid_share + self.test_share >= 1:
            raise ConfigError("source: valid_share and test_share must leave some sessions for training.")
        if self.count < 10 or self.candidates < 2:
            raise ConfigError(f"source: count must be >= 10 and candidates >= 2, got {self.count}, {self.candidates}.")


@dataclass(frozen=True)
class PassageSource:
    """Options of `kind: passages`: one `PassageFiles` mapping for each split (`train`, `valid`, `test`)."""

    train: dict
    test: dict
    valid: dict | None = None


@dataclass(frozen=True)
class TableSource:
    """Options of `kind: table`: a folder that `save_post_rank` of `data_builders.post_rank_store` wrote."""

    path: str


KINDS: dict[str, type] = {
    "movielens": MovieLensSource,
    "shop": ShopSource,
    "generator": GeneratorSource,
    "passages": PassageSource,
    "table": TableSource,
}


@dataclass
class Source:
    """A table, and for simulated sessions (row b = session b) what knows their truth."""

    table: PostRankTable
    sessions: ShopSessions | None = None


def parse_source(values: dict[str, Any]) -> Any:
    """The checked options of a source. Raises ConfigError naming the nearest known kind or key."""
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ConfigError(f"source.kind: there is no source '{kind}': {nearest(str(kind), KINDS)}")
    options = build(KINDS[kind], values, "source")
    if isinstance(options, MovieLensSource):
        build(SegmentConfig, options.segments, "source.segments")
    elif isinstance(options, ShopSource):
        build(SessionConfig, options.sessions, "source.sessions")
    elif isinstance(options, PassageSource):
        for split in ("train", "valid", "test"):
            if getattr(options, split) is not None:
                build(PassageFiles, {**getattr(options, split), "split": split}, f"source.{split}")
    return options


def load_source(values: dict[str, Any], folder: str | Path | None = None) -> Source:
    """Builds the table; what is slow to make again (a generator's lists) is kept in `folder`, default nowhere.

    Raises:
        ConfigError, DataError: of the readers.
    """
    options = parse_source(values)
    if isinstance(options, GeneratorSource):
        if folder is not None:
            return Source(*generator_table(options, Path(folder)))
        with tempfile.TemporaryDirectory() as scratch:
            return Source(*generator_table(options, Path(scratch)))
    if isinstance(options, MovieLensSource):
        config = build(SegmentConfig, options.segments, "source.segments")
        return Source(movielens_segments(read_ratings(options.path, options.layout), config))
    if isinstance(options, ShopSource):
        return _shop(options)
    if isinstance(options, PassageSource):
        return Source(_passages(options))
    return Source(load_post_rank(options.path))


def _shop(options: ShopSource) -> Source:
    world = ShopWorld.from_options(**options.world)
    total = world.config.n_requests
    if options.count > total:
        raise ConfigError(f"source.count: there are only {total} requests, so {options.count} cannot be drawn.")
    rows = np.sort(np.random.default_rng(options.seed).choice(total, options.count, replace=False))
    items = production_candidates(world, rows, options.candidates)
    sessions = ShopSessions(world, rows, items, build(SessionConfig, options.sessions, "source.sessions"))
    test, valid = round(options.test_share * len(rows)), round(options.valid_share * len(rows))
    splits = ["train"] * (len(rows) - test - valid) + ["valid"] * valid + ["test"] * test
    return Source(
        session_table(sessions, splits, label=options.label, history=options.history, seed=options.seed), sessions
    )


def _passages(options: PassageSource) -> PostRankTable:
    """The splits' files as one table; their passages are told apart by id only."""
    requests, splits, texts = [], [], {}
    for split in ("train", "valid", "test"):
        values = getattr(options, split)
        if values is None:
            continue
        part = passage_lists(build(PassageFiles, {**values, "split": split}, f"source.{split}"))
        requests += [request_of(part, row) for row in range(len(part))]
        splits += [split] * len(part)
        texts |= dict(zip(part.item_ids, part.item_texts, strict=True))
    table = table_from_requests(requests, part.fields, part.d_q, splits)
    return replace(table, item_texts=[texts[name] for name in table.item_ids])

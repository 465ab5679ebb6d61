"""Where post-ranking requests come from: MovieLens ratings, simulated sessions, passage lists, a saved table.

A source is a mapping with `kind` and the options of that kind; an unknown key is refused. A kind is a dataclass of options with
`load(folder)`. `decoding.serving.generator_source` adds our own generator to these.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sidtune.core.config import build, check_range
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


@dataclass
class Source:
    """A table, and for simulated sessions (row b = session b) what knows their truth."""

    table: PostRankTable
    sessions: ShopSessions | None = None


@dataclass(frozen=True)
class MovieLensSource:
    """Options of `kind: movielens`: the folder, its layout, and fields of `SegmentConfig` as `segments`."""

    path: str
    layout: str = "auto"
    segments: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._config()

    def load(self, folder: Path) -> Source:
        """The segments of the ratings."""
        return Source(movielens_segments(read_ratings(self.path, self.layout), self._config()))

    def _config(self) -> SegmentConfig:
        return build(SegmentConfig, self.segments, "source.segments")


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
        check_range(self, 10, "count")
        check_range(self, 2, "candidates")
        check_range(self, 0, "history", "seed")
        self._config()

    def load(self, folder: Path) -> Source:
        """The sessions in the order of their requests, the latest ones for testing."""
        world = ShopWorld.from_options(**self.world)
        total = world.config.n_requests
        if self.count > total:
            raise ConfigError(f"source.count: there are only {total} requests, so {self.count} cannot be drawn.")
        rows = np.sort(np.random.default_rng(self.seed).choice(total, self.count, replace=False))
        items = production_candidates(world, rows, self.candidates)
        sessions = ShopSessions(world, rows, items, self._config())
        test, valid = round(self.test_share * len(rows)), round(self.valid_share * len(rows))
        splits = ["train"] * (len(rows) - test - valid) + ["valid"] * valid + ["test"] * test
        table = session_table(sessions, splits, label=self.label, history=self.history, seed=self.seed)
        return Source(table, sessions)

    def _config(self) -> SessionConfig:
        return build(SessionConfig, self.sessions, "source.sessions")


@dataclass(frozen=True)
class PassageSource:
    """Options of `kind: passages`: one `PassageFiles` mapping for each split (`train`, `valid`, `test`)."""

    train: dict
    test: dict
    valid: dict | None = None

    def __post_init__(self) -> None:
        self._files()

    def load(self, folder: Path) -> Source:
        """The splits' files as one table; their passages are told apart by id only."""
        requests, splits, texts = [], [], {}
        for split, files in self._files().items():
            part = passage_lists(files)
            requests += [request_of(part, row) for row in range(len(part))]
            splits += [split] * len(part)
            texts |= dict(zip(part.item_ids, part.item_texts, strict=True))
        table = table_from_requests(requests, part.fields, part.d_q, splits)
        return Source(replace(table, item_texts=[texts[name] for name in table.item_ids]))

    def _files(self) -> dict[str, PassageFiles]:
        given = {"train": self.train, "valid": self.valid, "test": self.test}
        return {
            split: build(PassageFiles, {**values, "split": split}, f"source.{split}")
            for split, values in given.items()
            if values is not None
        }


@dataclass(frozen=True)
class TableSource:
    """Options of `kind: table`: a folder that `save_post_rank` wrote."""

    path: str

    def load(self, folder: Path) -> Source:
        """The table as it was saved."""
        return Source(load_post_rank(self.path))


SOURCES: Mapping[str, type] = {
    "movielens": MovieLensSource,
    "shop": ShopSource,
    "passages": PassageSource,
    "table": TableSource,
}


def parse_source(values: dict[str, Any], kinds: Mapping[str, type] = SOURCES) -> Any:
    """The checked options of a source. Raises ConfigError naming the nearest known kind or key."""
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in kinds:
        raise ConfigError(f"source.kind: there is no source '{kind}': {nearest(str(kind), kinds)}")
    return build(kinds[kind], values, "source")


def load_source(
    values: dict[str, Any], folder: str | Path | None = None, kinds: Mapping[str, type] = SOURCES
) -> Source:
    """Builds the table; what is slow to make again (a generator's lists) is kept in `folder`, default nowhere.

    Raises:
        ConfigError, DataError: of the readers.
    """
    options = parse_source(values, kinds)
    if folder is not None:
        return options.load(Path(folder))
    with tempfile.TemporaryDirectory() as scratch:
        return options.load(Path(scratch))

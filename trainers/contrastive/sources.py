"""What `align_encoder` learns from: mined pairs filtered by the base encoder, and relevance labels; each count is told.

OneSearch keeps a mined pair only if the base encoder's cosine is above 0.6, and has hard pairs near that threshold judged. A cosine
of TF-IDF + SVD is not one of BGE, so look at the counts before trusting the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError
from sidtune.data_builders.mining.alignment_pairs import MinedPairs, MiningConfig, mine_pairs
from sidtune.data_builders.mining.pairs import cosines, keep_similar
from sidtune.data_builders.mining.relevance_labels import (
    RelevanceLabels,
    knows_relevance,
    near_threshold,
    read_relevance,
    shop_relevance,
)
from sidtune.data_builders.tables.store import DataFolder


@dataclass
class ThresholdConfig:
    """Pairs of a kind are kept above this base cosine.

    Attributes:
        q2q, i2i, q2i: thresholds in [-1, 1]; -1 keeps all.
    """

    q2q: float = 0.6
    i2i: float = 0.6
    q2i: float = 0.6

    def __post_init__(self) -> None:
        check_range(self, -1, "q2q", "i2i", "q2i", most=1)


@dataclass
class RelevanceConfig:
    """Where the scores of the relevance term come from.

    Attributes:
        source: `file`, `shop` (the simulated shop's own truth), `off`, or `auto`: the file if one is named, else the shop's
            truth if the data is a simulated shop, else off.
        file: `.parquet` or `.jsonl` with query, item_id and score.
        scale: the file's highest score.
        band: `shop` judges shown pairs whose base cosine is at most this far from `thresholds.q2i`. count: at most so many.
    """

    source: Literal["auto", "file", "shop", "off"] = "auto"
    file: str | None = None
    scale: float = 1.0
    band: float = 0.1
    count: int = 20_000

    def __post_init__(self) -> None:
        if (self.source == "file") != (self.file is not None) and self.source != "auto":
            raise ConfigError("relevance: source 'file' needs 'file', and 'file' needs source 'file' or 'auto'.")
        check_range(self, 0, "band", most=2)
        check_range(self, 1, "count", most=2**31)
        if self.scale <= 0:
            raise ConfigError(f"relevance: scale must be above 0, got {self.scale}; give the file's highest score.")

    def resolved(self, meta: dict[str, Any]) -> str:
        """The source with `auto` decided."""
        if self.source != "auto":
            return self.source
        if self.file is not None:
            return "file"
        return "shop" if knows_relevance(meta) else "off"


@dataclass
class AlignmentSource:
    """What is learned from.

    Attributes:
        queries: query texts. pairs: term → rows, as `AlignedExamples` takes them. scores: of `relevance`.
        told: JSON-ready counts of what was mined and kept, and `notes` in full sentences.
    """

    queries: list[str]
    pairs: dict[str, np.ndarray]
    scores: np.ndarray = field(default_factory=lambda: np.empty(0))
    told: dict[str, Any] = field(default_factory=dict)


def alignment_source(
    data: DataFolder,
    events: pa.Table,
    texts: list[str],
    base: Any,
    mining: MiningConfig,
    thresholds: ThresholdConfig,
    relevance: RelevanceConfig,
    seed: int = 0,
) -> AlignmentSource:
    """Mines, filters and labels.

    Args:
        data: the folder. events: its events before the split.
        texts: one text per item. base: a fitted encoder.
        seed: of drawn rows.

    Raises:
        ConfigError, DataError: as `mine_pairs`, `keep_similar`, `read_relevance`.
    """
    mined = mine_pairs(data.items, events, data.requests["train"], mining, seed)
    items = base.encode(texts, data.items["item_id"].to_pylist())
    queries = base.encode(mined.queries) if mined.queries else np.empty((0, items.shape[1]), dtype=items.dtype)
    sides = {"q2q": (queries, queries), "i2i": (items, items), "q2i": (queries, items)}
    source = AlignmentSource(mined.queries, {}, told={"queries": len(mined.queries), "notes": []})
    for kind, (left, right) in sides.items():
        kept, found = keep_similar(getattr(mined, kind), left, right, getattr(thresholds, kind))
        source.pairs[kind] = kept.rows()
        source.told[kind] = {
            "mined": len(found),
            "kept": len(kept),
            "median_cosine": float(np.median(found)) if len(found) else None,
        }
        if not len(kept):
            source.told["notes"].append(
                f"No {kind} pair lies above the cosine {getattr(thresholds, kind)}; its term is off."
            )
    source.pairs["rank"] = mined.rank
    source.told["rank"] = {"rows": len(mined.rank)}
    if not len(mined.rank):
        source.told["notes"].append("No query has items of two levels of behaviour; the order term is off.")
    _add_relevance(source, data, mined, queries, items, thresholds.q2i, relevance, seed)
    return source


def _add_relevance(
    source: AlignmentSource,
    data: DataFolder,
    mined: MinedPairs,
    queries: np.ndarray,
    items: np.ndarray,
    threshold: float,
    config: RelevanceConfig,
    seed: int,
) -> None:
    kind, dropped = config.resolved(data.meta), 0
    if kind == "file":
        labels, dropped = read_relevance(Path(config.file or ""), mined.queries, data.items, config.scale)
    elif kind == "shop":
        query, item = mined.behaviours.query, mined.behaviours.item
        near = near_threshold(cosines(query, item, queries, items), threshold, config.band, config.count, seed)
        query, item = query[near], item[near]
        score = shop_relevance(data.meta, data.requests["train"], mined.queries, query, item)
        labels = RelevanceLabels(query, item, score)
    else:
        labels = RelevanceLabels(*(np.empty(0, dtype=np.int64) for _ in range(2)), np.empty(0))
        source.told["notes"].append("No relevance scores are given; the relevance term is off.")
    source.pairs["relevance"] = np.stack([labels.query, labels.item], axis=1)
    source.scores = labels.score
    source.told["relevance"] = {"source": kind, "rows": len(labels.score), "left_out": dropped}
    if kind != "off" and not len(labels.score):
        source.told["notes"].append("No relevance score belongs to a known pair; the relevance term is off.")

"""Semantic IDs out of a data folder: item text → vectors → codes → `SemanticIds`, with their reports.

    learned = learn_semantic_ids(load_folder("runs/shop/data"), quantizer={"name": "residual_kmeans", "level_sizes": [64, 64, 64]})
    learned.sids.texts()["item-1"]       # "<a_12><b_7><c_0>"
    learned.save("runs/shop/sids")       # the folder of the step `learn-sids`

With `queries` the codebooks are trained on the queries of the training requests and the items together (OneSearch).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import write_files, write_json
from sidtune.core.ragged import drawn
from sidtune.data_builders.mining.query_pairs import distinct_queries
from sidtune.data_builders.tables.past import past_events, past_popularity
from sidtune.data_builders.tables.store import DataFolder
from sidtune.tokenizers.encoders.base import Encoder, warn_empty
from sidtune.tokenizers.encoders.collaborative import CollaborativeEncoder
from sidtune.tokenizers.keywords.fusion import MINED, KeywordFusionEncoder
from sidtune.tokenizers.keywords.mining import mine_pool
from sidtune.tokenizers.quantizers.base import Quantizer
from sidtune.tokenizers.registry import COLLISIONS, ENCODERS, QUANTIZERS, made_by
from sidtune.tokenizers.sids.collision_cost import (
    CollisionCost,
    collision_cost,
    compare_collisions,
    costs_to_markdown,
)
from sidtune.tokenizers.sids.collisions import make_collisions
from sidtune.tokenizers.sids.learned import COLLISION_FILE, VECTOR_FILE, texts_of
from sidtune.tokenizers.sids.quality import SidQuality, sid_quality
from sidtune.tokenizers.sids.query_codes import QUERY_FILE, QueryCoder, check_text_encoder, write_query_codes
from sidtune.tokenizers.sids.query_recall import QueryItemRecall, query_item_recall, query_targets
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

RECALL_FILE = "query_recall.json"
_RECALL_PAIRS = 2_000  # more say the same to a tenth of a percent


@dataclass(frozen=True)
class LearnedIds:
    """What `learn_semantic_ids` made.

    Attributes:
        sids, encoder, quantizer: the semantic IDs and the frozen parts that code new items.
        vectors: (N, d) of the items. quality: their report, with warnings.
        costs: what the treatment of collisions cost, then that of each one it was compared with.
        queries, query_codes: the Q distinct training queries and their codes (Q, L); none without `queries`.
        recall: how well codes of validation queries find their items; None without.
        collisions: name and options of the treatment. notes: of a mined keyword pool.
    """

    sids: SemanticIds
    encoder: Encoder
    quantizer: Quantizer
    vectors: np.ndarray
    quality: SidQuality
    costs: list[CollisionCost]
    queries: list[str]
    query_codes: np.ndarray
    recall: QueryItemRecall | None
    collisions: dict[str, Any]
    notes: list[str]

    @property
    def metrics(self) -> dict[str, Any]:
        """The report of quality, and of recall where there is one; JSON-ready."""
        return self.quality.to_dict() | ({} if self.recall is None else {"query_recall": self.recall.to_dict()})

    def to_markdown(self) -> str:
        """All reports, as people read them."""
        parts = ["\n".join([*self.notes, ""])] if self.notes else []
        parts.append(self.quality.to_markdown())
        if len(self.costs) > 1 or self.costs[0].method != "expand":
            parts.append(costs_to_markdown(self.costs))
        return "\n".join([*parts, *([] if self.recall is None else [self.recall.to_markdown()])])

    def write(self, folder: Path) -> None:
        """Writes every file into a folder that is there."""
        for name, part in (("encoder", self.encoder), ("quantizer", self.quantizer), ("sids", self.sids)):
            part.save_pretrained(folder / name)
        safetensors.numpy.save_file({"vectors": np.ascontiguousarray(self.vectors)}, folder / VECTOR_FILE)
        compared = {"cost": self.costs[0].to_dict(), "compared": [other.to_dict() for other in self.costs[1:]]}
        records = {"quality.json": self.quality.to_dict(), COLLISION_FILE: {"method": self.collisions, **compared}}
        records |= {} if self.recall is None else {RECALL_FILE: self.recall.to_dict()}
        for name, record in records.items():
            write_json(folder / name, record)
        if self.queries:
            write_query_codes(folder / QUERY_FILE, self.queries, self.query_codes)

    def save(self, folder: str | Path) -> None:
        """Writes the folder that later steps read; what else lies there stays."""
        with write_files(folder, (RECALL_FILE, QUERY_FILE)) as scratch:
            self.write(scratch)


def made_parts(
    encoder: Mapping[str, Any] | None, quantizer: Mapping[str, Any] | None, queries: bool, seed: int
) -> tuple[Encoder, Quantizer]:
    """Encoder and quantizer, untrained. Raises ConfigError for options that are wrong or do not go together."""
    made = made_by(ENCODERS, {"name": "tfidf_svd", **(encoder or {})}, seed)
    coder = made_by(QUANTIZERS, {"name": "residual_kmeans", **(quantizer or {})}, seed)
    if queries:
        check_text_encoder(made)
        if getattr(coder.config, "collaborative_path", None):
            raise ConfigError(
                "collaborative_path holds vectors of items only, and queries: true trains on queries too; leave out one of them."
            )
    return made, coder


def learn_semantic_ids(
    data: DataFolder,
    encoder: Mapping[str, Any] | None = None,
    quantizer: Mapping[str, Any] | None = None,
    collisions: Mapping[str, Any] | None = None,
    *,
    queries: bool = False,
    learn_share: float = 1.0,
    compare_with_others: bool = False,
    seed: int = 0,
) -> LearnedIds:
    """Learns semantic IDs of the items of a data folder.

    Args:
        encoder, quantizer, collisions: `name` in `tokenizers/registry.py` and options; default `tfidf_svd`, `residual_kmeans`,
            and `expand` (several items may share a SID).
        queries: one code space for queries and items; needs an encoder of texts.
        learn_share: learn from this share of the items, drawn by `seed`; only these get SIDs.
        compare_with_others: also measure every other treatment of collisions, with default options.
        seed: of encoder, quantizer and draw.

    Raises:
        ConfigError: unknown or wrong options. DataError: no queries, or what the encoder refuses.
    """
    made, coder = made_parts(encoder, quantizer, queries, seed)
    spec = {"name": "expand", **(collisions or {})}
    method = made_by(COLLISIONS, spec)
    asked = _queries(data) if queries else []
    rows = drawn(data.items.num_rows, max(1, round(learn_share * data.items.num_rows)), seed)
    items, popularity = data.items.take(rows), past_popularity(data)[rows]
    notes = _mine_keywords(made, data)
    if isinstance(made, CollaborativeEncoder):
        made.use_log(past_events(data))
    texts, ids = texts_of(items), items["item_id"].to_pylist()
    vectors = made.fit(texts).encode(texts, ids)
    warn_empty(made, len(texts))
    query_codes, codes = _codes(asked, vectors, made, coder)
    coded = SemanticIds(ids, codes, coder.level_sizes, popularity, letters=coder.level_letters())
    sids = method.resolve(coded, vectors, coder).with_titles(items)
    others = [name for name in COLLISIONS if name != method.name] if compare_with_others else []
    costs = [collision_cost(coded, sids, vectors, coder, method)]
    costs += compare_collisions(coded, vectors, coder, [make_collisions(name) for name in others])
    quality = sid_quality(sids, vectors=vectors, quantizer=coder, seed=seed)
    reader = QueryCoder(made, coder, sids, dict(zip(asked, query_codes, strict=True))) if asked else None
    recall = None if reader is None else _recall(reader, data, vectors, seed)
    return LearnedIds(sids, made, coder, vectors, quality, costs, asked, query_codes, recall, spec, notes)


def _queries(data: DataFolder) -> list[str]:
    """Distinct queries of the training requests."""
    queries = distinct_queries(data.requests["train"])
    if not queries:
        raise DataError(f"The training requests in {data.path} have no query; leave queries: true out for this data.")
    return queries


def _mine_keywords(encoder: Encoder, data: DataFolder) -> list[str]:
    """Gives a `keyword_fusion` encoder with `pool: mined` its pool; what there is to say of it."""
    if not isinstance(encoder, KeywordFusionEncoder) or encoder.config.pool != MINED:
        return []
    pool = mine_pool(data, encoder.config.pool_config())
    encoder.use_pool(pool)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in pool.counts().items())
    return [f"keyword pool: {counts or 'empty'}", *pool.notes]


def _codes(
    queries: list[str], vectors: np.ndarray, encoder: Encoder, quantizer: Quantizer
) -> tuple[np.ndarray, np.ndarray]:
    """Trains the quantizer on queries and items, queries first; codes of the queries (Q, L) and of the items (N, L)."""
    if not queries:
        codes = quantizer.fit_encode(vectors)
        return codes[:0], codes
    asked = encoder.encode(queries)
    if encoder.empty_texts:
        warnings.warn(
            f"{encoder.empty_texts} of {len(queries)} queries have no word the '{encoder.name}' encoder knows from the items; "
            "they share one fallback vector and hence one code. Use an encoder of a pretrained model, or items with more text.",
            stacklevel=2,
        )
    codes = quantizer.fit_encode(np.concatenate([asked, vectors]))
    return codes[: len(queries)], codes[len(queries) :]


def _recall(coder: QueryCoder, data: DataFolder, vectors: np.ndarray, seed: int) -> QueryItemRecall | None:
    """Recall of clicked items through the codes of queries, on at most `_RECALL_PAIRS` pairs of the validation split."""
    texts, rows, targets = query_targets(data.requests["valid"], coder.sids.item_ids)
    if not len(rows):
        return None
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:_RECALL_PAIRS])
    asked, rows = np.unique(rows[chosen], return_inverse=True)
    texts = [texts[row] for row in asked]
    codes = {"item_codes": coder.sids.codes, "query_codes": coder.codes(texts)}
    found = (coder.vectors(texts), vectors, coder.quantizer, targets[chosen])
    return query_item_recall(*found, query_rows=rows.reshape(-1), **codes)

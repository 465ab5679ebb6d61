"""Learns semantic IDs: item text → vectors → codes → `SemanticIds`, with a quality report beside the codes.

    sidtune learn-sids --config recipes/quickstart/learn_sids.yaml \\
        --data_dir runs/quickstart/data --output_dir runs/quickstart/sids

The output folder holds `encoder/`, `quantizer/`, `vectors.safetensors`, `sids/`, `quality.json` and `collisions.json`.
What becomes of items that share a code is `collisions: {name: ...}`, see `tokenizers/sids/collisions.py`. Items that come later get
their SIDs from the same codebooks by `extend_sids`.

With `queries: true` the codebooks are trained on the queries of the training requests and the items together (OneSearch), and
the folder also holds `queries.parquet`, the codes of these queries, and `query_recall.json`, how well codes of queries of the
validation split find their items. `tokenizers/sids/query_codes.py` codes any query from such a folder.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
import safetensors.numpy

from sidtune.core.config import SEEDS, check_range, command
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import write_folder, write_json, write_run, writes
from sidtune.core.pipeline import Step, check_there
from sidtune.core.ragged import drawn
from sidtune.data_builders.mining.query_pairs import distinct_queries
from sidtune.data_builders.tables.past import past_events, past_popularity
from sidtune.data_builders.tables.store import DataFolder, load_folder
from sidtune.tokenizers.encoders.base import Encoder, warn_empty
from sidtune.tokenizers.encoders.collaborative import CollaborativeEncoder
from sidtune.tokenizers.keywords.fusion import MINED, KeywordFusionEncoder
from sidtune.tokenizers.keywords.mining import mine_pool
from sidtune.tokenizers.quantizers.base import Quantizer
from sidtune.tokenizers.registry import COLLISIONS, ENCODERS, QUANTIZERS, made_by
from sidtune.tokenizers.sids.collision_cost import collision_cost, compare_collisions, costs_to_markdown
from sidtune.tokenizers.sids.collisions import CollisionMethod, make_collisions
from sidtune.tokenizers.sids.learned import COLLISION_FILE, VECTOR_FILE, texts_of
from sidtune.tokenizers.sids.quality import sid_quality
from sidtune.tokenizers.sids.query_codes import QUERY_FILE, QueryCoder, check_text_encoder, write_query_codes
from sidtune.tokenizers.sids.query_recall import QueryItemRecall, query_item_recall, query_targets
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

LAUNCH = "alone"

RECALL_FILE = "query_recall.json"
_RECALL_PAIRS = 2_000  # more say the same to a tenth of a percent


@dataclass
class Arguments:
    """Options of learn_sids.

    Attributes:
        data_dir: folder written by build_data.
        output_dir: folder to write.
        encoder_dir: folder of `align_encoder`, whose model then encodes (`encoder` may hold further options of `transformers`).
        encoder: `name` of an encoder in `tokenizers/registry.py` (default `tfidf_svd`) and its options.
        quantizer: `name` of a quantizer in `tokenizers/registry.py` (default `residual_kmeans`) and its options.
        collisions: `name` of a treatment of collisions in `tokenizers/registry.py` (default `expand`: several items may share
            a SID) and its options.
        suffix: short for `collisions: {name: suffix}`, a last level that makes every SID unique.
        compare_collisions: also measure every other treatment on these codes, with default options, and print one table.
        queries: one code space for queries and items: train the quantizer on the distinct queries of the training requests,
            stacked before the items. Needs an encoder of texts.
        learn_share: learn from this share of the items, drawn by `seed`; only these get SIDs. `extend_sids` adds the others
            with frozen codebooks, which for a very large catalogue is also the quicker way.
        seed: seed of encoder, quantizer and draw.
    """

    data_dir: str
    output_dir: str
    encoder_dir: str | None = None
    encoder: dict = field(default_factory=dict)
    quantizer: dict = field(default_factory=dict)
    collisions: dict = field(default_factory=dict)
    suffix: bool = False
    compare_collisions: bool = False
    queries: bool = False
    learn_share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        named = self.encoder.get("name", "transformers") != "transformers" or "model" in self.encoder
        if self.encoder_dir is not None and named:
            raise ConfigError("encoder_dir names the encoder; leave encoder.name and encoder.model out.")
        if self.suffix and self.collisions:
            raise ConfigError("Give either suffix: true or collisions, not both; suffix is collisions: {name: suffix}.")
        if not 0 < self.learn_share <= 1:
            raise ConfigError(f"learn_share is a share in (0, 1], got {self.learn_share}.")
        check_range(self, 0, "seed", most=SEEDS)
        encoder, quantizer, _ = self.parts()
        if self.queries:
            check_text_encoder(encoder)
            if getattr(quantizer.config, "collaborative_path", None):
                raise ConfigError(
                    "collaborative_path holds vectors of items only, and queries: true trains on queries too; leave out one "
                    "of them."
                )

    def parts(self) -> tuple[Encoder, Quantizer, CollisionMethod]:
        """Encoder, quantizer and treatment of collisions, untrained."""
        encoder = made_by(ENCODERS, self.encoder_spec(), self.seed)
        quantizer = made_by(QUANTIZERS, {"name": "residual_kmeans", **self.quantizer}, self.seed)
        return encoder, quantizer, made_by(COLLISIONS, self.collision_spec())

    def collision_spec(self) -> dict:
        """Name and options of the treatment of collisions."""
        return {"name": "suffix"} if self.suffix else {"name": "expand", **self.collisions}

    def depth(self) -> int:
        """Tokens of a SID."""
        return self.parts()[1].depth + (self.collision_spec()["name"] == "suffix")

    def encoder_spec(self) -> dict:
        """Name and options of the encoder."""
        if self.encoder_dir is not None:
            return {**self.encoder, "name": "transformers", "model": self.encoder_dir}
        return {"name": "tfidf_svd", **self.encoder}


def preflight(step: Step) -> None:
    """Refuses vectors that are not there."""
    options = {**step.config.quantizer, **step.config.encoder}
    check_there(step, **{name: options[name] for name in ("path", "ids_path", "collaborative_path") if name in options})


@writes("learn_sids")
def main(arguments: Arguments) -> None:
    """Learns the SIDs; prints the quality table and its warnings."""
    encoder, quantizer, method = arguments.parts()
    spec, data = arguments.collision_spec(), load_folder(arguments.data_dir)
    queries = _queries(data) if arguments.queries else []
    part = max(1, round(arguments.learn_share * data.items.num_rows))
    rows = drawn(data.items.num_rows, part, arguments.seed)
    items, popularity = data.items.take(rows), past_popularity(data)[rows]
    _mine_keywords(encoder, data)
    if isinstance(encoder, CollaborativeEncoder):
        encoder.use_log(past_events(data))
    texts, ids = texts_of(items), items["item_id"].to_pylist()
    vectors = encoder.fit(texts).encode(texts, ids)
    warn_empty(encoder, len(texts))
    asked, codes = _codes(queries, vectors, encoder, quantizer)
    coded = SemanticIds(ids, codes, quantizer.level_sizes, popularity, letters=quantizer.level_letters())
    sids = method.resolve(coded, vectors, quantizer).with_titles(items)
    others = [name for name in COLLISIONS if name != method.name] if arguments.compare_collisions else []
    costs = [collision_cost(coded, sids, vectors, quantizer, method)]
    costs += compare_collisions(coded, vectors, quantizer, [make_collisions(name) for name in others])
    quality = sid_quality(sids, vectors=vectors, quantizer=quantizer, seed=arguments.seed)
    coder = QueryCoder(encoder, quantizer, sids, dict(zip(queries, asked, strict=True))) if queries else None
    recall = None if coder is None else _recall(coder, data, vectors, arguments.seed)
    compared = {"cost": costs[0].to_dict(), "compared": [other.to_dict() for other in costs[1:]]}
    records = {"quality.json": quality.to_dict(), COLLISION_FILE: {"method": spec, **compared}}
    records |= {} if recall is None else {RECALL_FILE: recall.to_dict()}
    with write_folder(arguments.output_dir) as scratch:
        for name, part in (("encoder", encoder), ("quantizer", quantizer), ("sids", sids)):
            part.save_pretrained(scratch / name)
        safetensors.numpy.save_file({"vectors": np.ascontiguousarray(vectors)}, scratch / VECTOR_FILE)
        for name, record in records.items():
            write_json(scratch / name, record)
        if queries:
            write_query_codes(scratch / QUERY_FILE, queries, asked)
        write_run(scratch, metrics=quality.to_dict() | ({} if recall is None else {"query_recall": recall.to_dict()}))
    print(quality.to_markdown())
    if len(costs) > 1 or costs[0].method != "expand":
        print(costs_to_markdown(costs))
    if recall is not None:
        print(recall.to_markdown())


def _queries(data: DataFolder) -> list[str]:
    """Distinct queries of the training requests."""
    queries = distinct_queries(data.requests["train"])
    if not queries:
        raise DataError(f"The training requests in {data.path} have no query; leave queries: true out for this data.")
    return queries


def _mine_keywords(encoder: Encoder, data: DataFolder) -> None:
    """Gives a `keyword_fusion` encoder with `pool: mined` its pool, and says what is in it."""
    if not isinstance(encoder, KeywordFusionEncoder) or encoder.config.pool != MINED:
        return
    pool = mine_pool(data, encoder.config.pool_config())
    encoder.use_pool(pool)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in pool.counts().items())
    print("\n".join([f"keyword pool: {counts or 'empty'}", *pool.notes]) + "\n")


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


if __name__ == "__main__":
    command(main, Arguments)

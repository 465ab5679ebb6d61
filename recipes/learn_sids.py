"""Learns semantic IDs: item text → vectors → codes → `SemanticIds`, with a quality report beside the codes.

    python -m sidtune.recipes.learn_sids --config recipes/quickstart/learn_sids.yaml \\
        --data_dir runs/quickstart/data --output_dir runs/quickstart/sids

The output folder holds `encoder/`, `quantizer/`, `vectors.safetensors`, `sids/`, `quality.json` and `collisions.json`.
What becomes of items that share a code is `collisions: {name: ...}`, see `tokenizers/collisions.py`. Items that come later get
their SIDs from the same codebooks by `extend_sids`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy

from sidtune.core.config import as_dict, command
from sidtune.core.errors import ConfigError
from sidtune.core.folders import write_folder, write_json, write_run
from sidtune.core.registry import Registry
from sidtune.data_builders.store import load_folder
from sidtune.tokenizers.collision_cost import collision_cost, compare_collisions, costs_to_markdown
from sidtune.tokenizers.collisions import CollisionMethod
from sidtune.tokenizers.encoders import item_texts, warn_empty
from sidtune.tokenizers.quality import sid_quality
from sidtune.tokenizers.registry import (
    COLLISIONS,
    ENCODERS,
    QUANTIZERS,
    make_collisions,
    make_encoder,
    make_quantizer,
)
from sidtune.tokenizers.semantic_ids import SemanticIds

VECTOR_FILE = "vectors.safetensors"
COLLISION_FILE = "collisions.json"


@dataclass
class Arguments:
    """Options of learn_sids.

    Attributes:
        data_dir: folder written by build_data.
        output_dir: folder to write.
        encoder: `name` of an encoder in `tokenizers/registry.py` (default `tfidf_svd`) and its options.
        quantizer: `name` of a quantizer in `tokenizers/registry.py` (default `residual_kmeans`) and its options.
        collisions: `name` of a treatment of collisions in `tokenizers/registry.py` (default `expand`: several items may share
            a SID) and its options.
        suffix: short for `collisions: {name: suffix}`, a last level that makes every SID unique.
        compare_collisions: also measure every other treatment on these codes, with default options, and print one table.
        learn_share: learn from this share of the items, drawn by `seed`; only these get SIDs. `extend_sids` adds the others
            with frozen codebooks, which for a very large catalogue is also the quicker way.
        seed: seed of encoder, quantizer and draw.
    """

    data_dir: str
    output_dir: str
    encoder: dict = field(default_factory=dict)
    quantizer: dict = field(default_factory=dict)
    collisions: dict = field(default_factory=dict)
    suffix: bool = False
    compare_collisions: bool = False
    learn_share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.suffix and self.collisions:
            raise ConfigError("Give either suffix: true or collisions, not both; suffix is collisions: {name: suffix}.")
        if not 0 < self.learn_share <= 1:
            raise ConfigError(f"learn_share is a share in (0, 1], got {self.learn_share}.")


def main(arguments: Arguments) -> None:
    """Learns the SIDs; prints the quality table and its warnings."""
    started = time.time()
    encoder = _make(make_encoder, ENCODERS, {"name": "tfidf_svd", **arguments.encoder}, arguments.seed)
    quantizer = _make(make_quantizer, QUANTIZERS, {"name": "residual_kmeans", **arguments.quantizer}, arguments.seed)
    spec = {"name": "suffix"} if arguments.suffix else {"name": "expand", **arguments.collisions}
    method = collisions_of(spec)
    items = _learned(load_folder(arguments.data_dir).items, arguments)
    texts, ids = texts_of(items), items["item_id"].to_pylist()
    vectors = encoder.fit(texts).encode(texts, ids)
    warn_empty(encoder, len(texts))
    coded = SemanticIds(ids, quantizer.fit_encode(vectors), tuple(quantizer.level_sizes), popularity_of(items))
    sids = method.resolve(coded, vectors, quantizer)
    cost = collision_cost(coded, sids, vectors, quantizer, method)
    others = (
        [make_collisions(name) for name in COLLISIONS if name != method.name] if arguments.compare_collisions else []
    )
    compared = compare_collisions(coded, vectors, quantizer, others)
    quality = sid_quality(sids, vectors=vectors, quantizer=quantizer, seed=arguments.seed)
    with write_folder(arguments.output_dir) as scratch:
        encoder.save_pretrained(scratch / "encoder")
        quantizer.save_pretrained(scratch / "quantizer")
        sids.save_pretrained(scratch / "sids")
        safetensors.numpy.save_file({"vectors": np.ascontiguousarray(vectors)}, scratch / VECTOR_FILE)
        write_json(scratch / "quality.json", quality.to_dict())
        record = {"method": spec, "cost": cost.to_dict(), "compared": [other.to_dict() for other in compared]}
        write_json(scratch / COLLISION_FILE, record)
        write_run(
            scratch,
            step="learn_sids",
            config=as_dict(arguments),
            inputs={"data_dir": arguments.data_dir},
            metrics=quality.to_dict(),
            started=started,
        )
    print(quality.to_markdown())
    if compared or method.name != "expand":
        print(costs_to_markdown([cost, *compared]))


def texts_of(items: pa.Table) -> list[str]:
    """The encoder's input for each item. The title says most in the fewest words, so it counts twice."""
    return item_texts(items, repeats={"title": 2})


def popularity_of(items: pa.Table) -> np.ndarray:
    """(N,) float64 clicks before the split, 0 where unknown: the order of the items of one code."""
    return np.nan_to_num(items.column("clicks").to_numpy(zero_copy_only=False).astype(np.float64))


def collisions_of(spec: dict) -> CollisionMethod:
    """The treatment of collisions that `{name: ..., option: ...}` names."""
    options = {key: value for key, value in spec.items() if key != "name"}
    return make_collisions(spec["name"], options)


def _learned(items: pa.Table, arguments: Arguments) -> pa.Table:
    """The items to learn from, in their order."""
    count = max(1, round(arguments.learn_share * items.num_rows))
    if count >= items.num_rows:
        return items
    chosen = np.random.default_rng(arguments.seed).choice(items.num_rows, size=count, replace=False)
    return items.take(np.sort(chosen))


def _make(make: Callable[..., Any], registry: Registry, spec: dict, seed: int) -> Any:
    options = {key: value for key, value in spec.items() if key != "name"}
    if "seed" in {field.name for field in dataclasses.fields(registry.get(spec["name"]).config_class)}:
        options.setdefault("seed", seed)
    return make(spec["name"], options)


if __name__ == "__main__":
    command(main, Arguments)

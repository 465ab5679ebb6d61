"""Learns semantic IDs: item text → vectors → codes → `SemanticIds`, with a quality report beside the codes.

    python -m sidtune.recipes.learn_sids --config recipes/quickstart/learn_sids.yaml \\
        --data_dir runs/quickstart/data --output_dir runs/quickstart/sids

The output folder holds `encoder/`, `quantizer/`, `vectors.safetensors`, `sids/` and `quality.json`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.numpy

from sidtune.core.config import as_dict, command
from sidtune.core.folders import write_folder, write_json, write_run
from sidtune.core.registry import Registry
from sidtune.data_builders.store import load_folder
from sidtune.tokenizers.encoders import item_texts, warn_empty
from sidtune.tokenizers.quality import sid_quality
from sidtune.tokenizers.registry import ENCODERS, QUANTIZERS, make_encoder, make_quantizer
from sidtune.tokenizers.semantic_ids import SemanticIds


@dataclass
class Arguments:
    """Options of learn_sids.

    Attributes:
        data_dir: folder written by build_data.
        output_dir: folder to write.
        encoder: `name` of an encoder in `tokenizers/registry.py` (default `tfidf_svd`) and its options.
        quantizer: `name` of a quantizer in `tokenizers/registry.py` (default `residual_kmeans`) and its options.
        suffix: add a last level that makes every SID unique.
        seed: seed of encoder and quantizer.
    """

    data_dir: str
    output_dir: str
    encoder: dict = field(default_factory=dict)
    quantizer: dict = field(default_factory=dict)
    suffix: bool = False
    seed: int = 0


def main(arguments: Arguments) -> None:
    """Learns the SIDs; prints the quality table and its warnings."""
    started = time.time()
    encoder = _make(make_encoder, ENCODERS, {"name": "tfidf_svd", **arguments.encoder}, arguments.seed)
    quantizer = _make(make_quantizer, QUANTIZERS, {"name": "residual_kmeans", **arguments.quantizer}, arguments.seed)
    data = load_folder(arguments.data_dir)
    # The title says most in the fewest words, so it counts twice.
    texts, ids = item_texts(data.items, repeats={"title": 2}), data.items["item_id"].to_pylist()
    vectors = encoder.fit(texts).encode(texts, ids)
    warn_empty(encoder, len(texts))
    codes = quantizer.fit(vectors).encode(vectors)
    popularity = np.nan_to_num(data.items.column("clicks").to_numpy(zero_copy_only=False).astype(np.float64))
    sids = SemanticIds(ids, codes, tuple(quantizer.level_sizes), popularity)
    quality = sid_quality(sids, vectors=vectors, quantizer=quantizer, seed=arguments.seed)
    if arguments.suffix:
        sids = sids.with_suffix()
    with write_folder(arguments.output_dir) as scratch:
        encoder.save_pretrained(scratch / "encoder")
        quantizer.save_pretrained(scratch / "quantizer")
        sids.save_pretrained(scratch / "sids")
        safetensors.numpy.save_file({"vectors": np.ascontiguousarray(vectors)}, scratch / "vectors.safetensors")
        write_json(scratch / "quality.json", quality.to_dict())
        write_run(
            scratch,
            step="learn_sids",
            config=as_dict(arguments),
            inputs={"data_dir": arguments.data_dir},
            metrics=quality.to_dict(),
            started=started,
        )
    print(quality.to_markdown())


def _make(make: Callable[..., Any], registry: Registry, spec: dict, seed: int) -> Any:
    options = {key: value for key, value in spec.items() if key != "name"}
    if "seed" in {field.name for field in dataclasses.fields(registry.get(spec["name"]).config_class)}:
        options.setdefault("seed", seed)
    return make(spec["name"], options)


if __name__ == "__main__":
    command(main, Arguments)

"""The registries of this room: encoders (item text → vectors), quantizers (vectors → codes), treatments of collisions.

A new method is one file and one line here; recipes name it in YAML. The class named by a line must have a
`config_class` dataclass and the interface of `sidtune.tokenizers.encoders.base.Encoder`,
`sidtune.tokenizers.quantizers.base.Quantizer` or `sidtune.tokenizers.sids.collisions.CollisionMethod`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sidtune.core.registry import Registry

ENCODERS = Registry(
    "encoder",
    {
        "tfidf_svd": "sidtune.tokenizers.encoders.tfidf:TfidfSvdEncoder",
        "precomputed": "sidtune.tokenizers.encoders.precomputed:PrecomputedEncoder",
        "collaborative": "sidtune.tokenizers.encoders.collaborative:CollaborativeEncoder",
        "sentence_transformers": "sidtune.tokenizers.encoders.text:SentenceTransformersEncoder",
        "transformers": "sidtune.tokenizers.encoders.text:TransformersEncoder",
        "keyword_fusion": "sidtune.tokenizers.keywords.fusion:KeywordFusionEncoder",
    },
)
QUANTIZERS = Registry(
    "quantizer",
    {
        "residual_kmeans": "sidtune.tokenizers.quantizers.residual_kmeans:ResidualKMeans",
        "balanced_kmeans": "sidtune.tokenizers.quantizers.balanced_kmeans:BalancedKMeans",
        "rq_opq": "sidtune.tokenizers.quantizers.rq_opq:RqOpq",
        "product_quantizer": "sidtune.tokenizers.quantizers.product_quantizer:ProductQuantizer",
        "rq_vae": "sidtune.tokenizers.quantizers.rq_vae:RqVae",
        "rq_kmeans_plus": "sidtune.tokenizers.quantizers.rq_kmeans_plus:RqKMeansPlus",
        "fsq": "sidtune.tokenizers.quantizers.fsq:Fsq",
    },
)

COLLISIONS = Registry(
    "treatment of collisions",
    {
        "expand": "sidtune.tokenizers.sids.collisions:Expand",
        "suffix": "sidtune.tokenizers.sids.collisions:Suffix",
        "next_nearest": "sidtune.tokenizers.sids.collisions:NextNearest",
        "capacity": "sidtune.tokenizers.sids.collisions:CapacityAware",
    },
)


def made_by(registry: Registry, spec: dict[str, Any], seed: int | None = None) -> Any:
    """The part that `{name: ..., option: ...}` names; where it has an option `seed`, `seed` is the default."""
    options = {key: value for key, value in spec.items() if key != "name"}
    if seed is not None and "seed" in {f.name for f in dataclasses.fields(registry.get(spec["name"]).config_class)}:
        options.setdefault("seed", seed)
    return registry.make(spec["name"], options)

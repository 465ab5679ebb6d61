"""The registries of this room: encoders (item text → vectors), quantizers (vectors → codes), treatments of collisions.

A new method is one file and one line here; recipes name it in YAML. The class named by a line must have a
`config_class` dataclass and the interface of `sidtune.tokenizers.encoders.Encoder`,
`sidtune.tokenizers.quantizer.Quantizer` or `sidtune.tokenizers.collisions.CollisionMethod`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sidtune.core.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from sidtune.tokenizers.collisions import CollisionMethod
    from sidtune.tokenizers.encoders import Encoder
    from sidtune.tokenizers.quantizer import Quantizer

ENCODERS = Registry(
    "encoder",
    {
        "tfidf_svd": "sidtune.tokenizers.encoders:TfidfSvdEncoder",
        "precomputed": "sidtune.tokenizers.precomputed:PrecomputedEncoder",
        "sentence_transformers": "sidtune.tokenizers.text_encoders:SentenceTransformersEncoder",
        "transformers": "sidtune.tokenizers.text_encoders:TransformersEncoder",
        "keyword_fusion": "sidtune.tokenizers.keyword_fusion:KeywordFusionEncoder",
    },
)
QUANTIZERS = Registry(
    "quantizer",
    {
        "residual_kmeans": "sidtune.tokenizers.residual_kmeans:ResidualKMeans",
        "balanced_kmeans": "sidtune.tokenizers.balanced_kmeans:BalancedKMeans",
        "rq_opq": "sidtune.tokenizers.rq_opq:RqOpq",
        "product_quantizer": "sidtune.tokenizers.product_quantizer:ProductQuantizer",
        "rq_vae": "sidtune.tokenizers.rq_vae:RqVae",
        "rq_kmeans_plus": "sidtune.tokenizers.rq_kmeans_plus:RqKMeansPlus",
        "fsq": "sidtune.tokenizers.fsq:Fsq",
    },
)

COLLISIONS = Registry(
    "treatment of collisions",
    {
        "expand": "sidtune.tokenizers.collisions:Expand",
        "suffix": "sidtune.tokenizers.collisions:Suffix",
        "next_nearest": "sidtune.tokenizers.collisions:NextNearest",
        "capacity": "sidtune.tokenizers.collisions:CapacityAware",
    },
)


def make_encoder(name: str, options: dict[str, Any] | None = None) -> Encoder:
    """A new encoder by name. Options are its config's fields; an unknown name or option is a ConfigError."""
    return _make(ENCODERS, name, options)


def make_quantizer(name: str, options: dict[str, Any] | None = None) -> Quantizer:
    """A new quantizer by name. Options are its config's fields; an unknown name or option is a ConfigError."""
    return _make(QUANTIZERS, name, options)


def make_collisions(name: str, options: dict[str, Any] | None = None) -> CollisionMethod:
    """A treatment of collisions by name. Options are its config's fields; an unknown name or option is a ConfigError."""
    return _make(COLLISIONS, name, options)


def load_encoder(folder_or_repo: str | Path, **hub: Any) -> Encoder:
    """The encoder saved in a folder or hub repository, whatever its class (`hub`: options of `resolve_folder`)."""
    from sidtune.tokenizers.encoders import Encoder

    return Encoder.from_pretrained(folder_or_repo, **hub)


def load_quantizer(folder_or_repo: str | Path, **hub: Any) -> Quantizer:
    """The quantizer saved in a folder or hub repository, whatever its class (`hub`: options of `resolve_folder`)."""
    from sidtune.tokenizers.quantizer import Quantizer

    return Quantizer.from_pretrained(folder_or_repo, **hub)


def _make(registry: Registry, name: str, options: dict[str, Any] | None) -> Any:
    from sidtune.core.config import build

    cls = registry.get(name)
    config = build(cls.config_class, dict(options or {}), f"Options of the {registry.kind} '{name}'")
    return cls(config)

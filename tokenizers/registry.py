"""The registries of this room: encoders (item text → vectors), quantizers (vectors → codes), treatments of collisions.

A new method is one file and one line here; recipes name it in YAML. The class named by a line must have a
`config_class` dataclass and the interface of `sidtune.tokenizers.encoders.base.Encoder`,
`sidtune.tokenizers.quantizers.base.Quantizer` or `sidtune.tokenizers.sids.collisions.CollisionMethod`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sidtune.core.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from sidtune.tokenizers.encoders.base import Encoder
    from sidtune.tokenizers.quantizers.base import Quantizer
    from sidtune.tokenizers.sids.collisions import CollisionMethod

ENCODERS = Registry(
    "encoder",
    {
        "tfidf_svd": "sidtune.tokenizers.encoders.base:TfidfSvdEncoder",
        "precomputed": "sidtune.tokenizers.encoders.precomputed:PrecomputedEncoder",
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
    from sidtune.tokenizers.encoders.base import Encoder

    return Encoder.from_pretrained(folder_or_repo, **hub)


def load_quantizer(folder_or_repo: str | Path, **hub: Any) -> Quantizer:
    """The quantizer saved in a folder or hub repository, whatever its class (`hub`: options of `resolve_folder`)."""
    from sidtune.tokenizers.quantizers.base import Quantizer

    return Quantizer.from_pretrained(folder_or_repo, **hub)


def _make(registry: Registry, name: str, options: dict[str, Any] | None) -> Any:
    from sidtune.core.config import build

    cls = registry.get(name)
    config = build(cls.config_class, dict(options or {}), f"Options of the {registry.kind} '{name}'")
    return cls(config)

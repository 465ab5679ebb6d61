"""The registries of this room: encoders (item text → vectors) and quantizers (vectors → codes).

A new method is one file and one line here; recipes name it in YAML. The class named by a line must have a
`config_class` dataclass and the interface of `sidtune.tokenizers.encoders.Encoder` or
`sidtune.tokenizers.quantizer.Quantizer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sidtune.core.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from sidtune.tokenizers.encoders import Encoder
    from sidtune.tokenizers.quantizer import Quantizer

ENCODERS = Registry(
    "encoder",
    {
        "tfidf_svd": "sidtune.tokenizers.encoders:TfidfSvdEncoder",
        "precomputed": "sidtune.tokenizers.precomputed:PrecomputedEncoder",
        "sentence_transformers": "sidtune.tokenizers.text_encoders:SentenceTransformersEncoder",
        "transformers": "sidtune.tokenizers.text_encoders:TransformersEncoder",
    },
)
QUANTIZERS = Registry(
    "quantizer",
    {
        "residual_kmeans": "sidtune.tokenizers.residual_kmeans:ResidualKMeans",
    },
)


def make_encoder(name: str, options: dict[str, Any] | None = None) -> Encoder:
    """A new encoder by name. Options are its config's fields; an unknown name or option is a ConfigError."""
    return _make(ENCODERS, name, options)


def make_quantizer(name: str, options: dict[str, Any] | None = None) -> Quantizer:
    """A new quantizer by name. Options are its config's fields; an unknown name or option is a ConfigError."""
    return _make(QUANTIZERS, name, options)


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

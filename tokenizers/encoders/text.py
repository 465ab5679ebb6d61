"""Item vectors from pretrained text models: `sentence-transformers`, or `transformers` with pooling.

OneSearch trains its own aligned tower first (section 3.1.1); here a ready model is used as it is. Only the model's name
and options are saved, not its weights: the folder of a local model must stay where it is, and `revision` pins one from
the hub. Code that comes with a model repository is never run.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np

from sidtune.core.config import check_range, check_types
from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.encoders.base import Encoder, check_texts
from sidtune.tokenizers.vectors import check_vectors, unit_rows


@dataclass
class SentenceTransformersConfig:
    """Options of `SentenceTransformersEncoder`.

    Attributes:
        model: name of a sentence-transformers model, or its folder.
        revision: branch, tag or commit of the model.
        prompt: text put before every item text, for models that want one.
        batch_size: texts per batch.
        device: `cpu`, `cuda`, ... ; default: what the library picks.
        normalize: scale rows to length 1.
        empty_text: what stands in for an item without text.
    """

    model: str = ""
    revision: str | None = None
    prompt: str | None = None
    batch_size: int = 64
    device: str | None = None
    normalize: bool = True
    empty_text: str = "unknown item"

    def __post_init__(self) -> None:
        _check(self, "sentence_transformers")
        check_range(self, 1, "batch_size")


@dataclass
class TransformersConfig:
    """Options of `TransformersEncoder`.

    Attributes:
        model: name of a transformers model, or its folder. Of an encoder-decoder model the encoder is used.
        revision: branch, tag or commit of the model.
        pooling: `mean` over the text's tokens, the `cls` (first) token, the `last` token (for decoder-only embedding models),
            or `auto`: what the model's own `1_Pooling/config.json` says, `mean` where there is none.
        max_length: longer texts are cut to this many tokens, or to the fewer that the model or its tokenizer allows.
        batch_size: texts per batch.
        device: `auto` (accelerator if there is one), `cpu`, `cuda`, ...
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`. Vectors are float32 in any case.
        normalize: scale rows to length 1.
        empty_text: what stands in for an item without text.
    """

    model: str = ""
    revision: str | None = None
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    max_length: int = 256
    batch_size: int = 32
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    normalize: bool = True
    empty_text: str = "unknown item"

    def __post_init__(self) -> None:
        _check(self, "transformers")
        check_range(self, 1, "batch_size", "max_length")


def _check(config: Any, name: str) -> None:
    check_types(type(config), vars(config), f"Options of the encoder '{name}'")
    if not config.model:
        raise ConfigError(f"The {name} encoder needs 'model', the name or folder of a pretrained model.")


class _PretrainedEncoder(Encoder):
    """What both have in common: `fit` learns nothing, empty texts are replaced by `empty_text` and counted."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._model: Any = None

    def fit(self, texts: Sequence[str]) -> Self:
        """Learns nothing; checks the texts and loads the model, so that a wrong name fails before any work."""
        check_texts(texts)
        self._ready()
        return self

    def _ready(self) -> None:
        if self._model is None:
            self._load_model()

    def encode(self, texts: Sequence[str], item_ids: Sequence[str] | None = None) -> np.ndarray:
        """Vectors (n, d) float32.

        Raises:
            ConfigError: the package is not installed.
            DataError: no texts, no such model, or it returned NaN.
        """
        texts = check_texts(texts)
        filled = [text if text.strip() else self.config.empty_text for text in texts]
        self.empty_texts = sum(not text.strip() for text in texts)
        self._ready()
        vectors = check_vectors(self._vectors(filled), what=f"vectors of {self.config.model}")
        return np.ascontiguousarray(unit_rows(vectors), dtype=np.float32) if self.config.normalize else vectors

    @abc.abstractmethod
    def _load_model(self) -> None:
        """Loads `self.config.model`; a ConfigError when that is not possible."""

    @abc.abstractmethod
    def _vectors(self, texts: list[str]) -> np.ndarray:
        """(n, d) vectors of the texts."""


class SentenceTransformersEncoder(_PretrainedEncoder):
    """Encodes with `sentence_transformers.SentenceTransformer` (extra `encoders` of this package)."""

    name: ClassVar[str] = "sentence_transformers"
    config_class: ClassVar[type] = SentenceTransformersConfig

    def _load_model(self) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ConfigError(
                "The encoder 'sentence_transformers' needs the package sentence-transformers, which is not installed; "
                "run pip install 'sidtune[encoders]', or use the encoder 'tfidf_svd' or 'transformers'."
            ) from None
        try:
            self._model = SentenceTransformer(
                self.config.model, revision=self.config.revision, device=self.config.device, trust_remote_code=False
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"The model '{self.config.model}' cannot be loaded ({type(error).__name__}: {reason}); check its name."
            ) from error

    def _vectors(self, texts: list[str]) -> np.ndarray:
        options = {"prompt": self.config.prompt, "batch_size": self.config.batch_size}
        return self._model.encode(texts, convert_to_numpy=True, show_progress_bar=False, **options)


class TransformersEncoder(_PretrainedEncoder):
    """Encodes with `transformers.AutoModel` and pools the last hidden states over the real tokens."""

    name: ClassVar[str] = "transformers"
    config_class: ClassVar[type] = TransformersConfig

    def _load_model(self) -> None:
        import torch

        from sidtune.tokenizers.base_models.loading import load_text_model
        from sidtune.tokenizers.encoders.pooling import saved_pooling

        config = self.config
        model, tokenizer = load_text_model(config.model, config.revision, config.dtype)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        device = config.device
        if device == "auto":
            accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            device = str(accelerator or "cpu")
        named = saved_pooling(config.model, config.revision) if config.pooling == "auto" else config.pooling
        self._pooling = named or "mean"
        try:
            self._tokenizer, self._model = tokenizer, model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0][:160].rstrip(".")
            raise ConfigError(
                f"The device '{device}' cannot hold the encoder ({reason}); use 'auto' or 'cpu'."
            ) from None

    def _vectors(self, texts: list[str]) -> np.ndarray:
        import torch

        # Long texts first: batches of like length waste little padding, and running out of memory shows at once.
        order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
        parts = []
        with torch.inference_mode():
            for start in range(0, len(order), self.config.batch_size):
                rows = order[start : start + self.config.batch_size]
                parts.append(self._pooled([texts[n] for n in rows]).float().cpu().numpy())
        sorted_vectors = np.concatenate(parts)
        vectors = np.empty_like(sorted_vectors)
        vectors[order] = sorted_vectors
        return vectors

    def _pooled(self, texts: list[str]) -> Any:
        from sidtune.tokenizers.encoders.pooling import pooled

        positions = getattr(self._model.config, "max_position_embeddings", None) or self.config.max_length
        longest = min(self.config.max_length, self._tokenizer.model_max_length, positions)
        batch = self._tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(
            self._model.device
        )
        mask = batch["attention_mask"]
        if int(mask.sum(dim=1).min()) == 0:
            raise DataError(f"The tokenizer of {self.config.model} makes no token of some item text; set 'empty_text'.")
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        states = self._model(**inputs).last_hidden_state.float()
        return pooled(states, mask, self._pooling)

"""The offline encoder: TF-IDF + truncated SVD of the items' texts. Our choice; it needs no model and no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json, write_json
from sidtune.tokenizers.encoders.base import TENSOR_FILE, Encoder, check_texts
from sidtune.tokenizers.vectors import load_tensors, unit_rows

VOCABULARY_FILE = "vocabulary.json"

# Words, and single characters of scripts written without spaces (kana, han), or a Chinese title would be one term.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+"


@dataclass
class TfidfSvdConfig:
    """Options of `TfidfSvdEncoder`.

    Attributes:
        dims: width of the vectors. Fewer items or terms than this leave the last columns zero.
        ngram: shortest and longest n-gram of words.
        min_df: a term must occur in at least this many items.
        max_df: and in at most this share of the items.
        max_terms: keep the most frequent terms only.
        analyzer: `word`, or `char_wb` (character n-grams within words, for example with ngram [2, 4]).
        seed: seed of the randomised SVD.
        iterations: power iterations of the randomised SVD.
    """

    dims: int = 64
    ngram: Sequence[int] = (1, 2)
    min_df: int = 2
    max_df: float = 0.5
    max_terms: int = 50_000
    analyzer: Literal["word", "char_wb"] = "word"
    seed: int = 0
    iterations: int = 5

    def __post_init__(self) -> None:
        self.ngram = tuple(self.ngram)
        if len(self.ngram) != 2 or not 1 <= self.ngram[0] <= self.ngram[1]:
            raise ConfigError(f"ngram must be [shortest, longest], both at least 1, got {list(self.ngram)}.")
        check_range(self, 1, "dims", "min_df", "iterations")
        check_range(self, 1, "max_terms", most=2**31)
        check_range(self, 0, "seed", most=2**32 - 1)
        if not 0 < self.max_df <= 1:
            raise ConfigError(f"max_df of the tfidf_svd encoder is a share in (0, 1], got {self.max_df}.")


class TfidfSvdEncoder(Encoder):
    """Sublinear TF-IDF, truncated SVD, rows of length 1 (scikit-learn). Needs no model and no network.

    A text without a single known term (empty, or all its words unseen) has a zero vector; it gets the normalised mean
    vector of the fitted catalogue instead, and `empty_texts` counts it.
    """

    name: ClassVar[str] = "tfidf_svd"
    config_class: ClassVar[type] = TfidfSvdConfig

    def __init__(self, config: TfidfSvdConfig | None = None) -> None:
        super().__init__(config)
        self._vectorizer: Any = None
        self._components = np.zeros((0, 0), dtype=np.float32)
        self._fallback = np.zeros(0, dtype=np.float32)

    def _new_vectorizer(self, vocabulary: list[str] | None = None) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        config = self.config
        return TfidfVectorizer(
            analyzer=config.analyzer,
            token_pattern=_WORD if config.analyzer == "word" else None,
            ngram_range=tuple(config.ngram),
            min_df=config.min_df,
            max_df=float(config.max_df),
            max_features=config.max_terms,
            vocabulary=vocabulary,
            sublinear_tf=True,
        )

    def fit(self, texts: Sequence[str]) -> Self:
        """Learns terms, their weights and the projection.

        Raises:
            DataError: no texts, or no term that `min_df` and `max_df` let through.
        """
        from sklearn.decomposition import TruncatedSVD

        texts = check_texts(texts)
        vectorizer = self._new_vectorizer()
        if len(texts) * self.config.max_df < max(2, self.config.min_df):
            vectorizer.set_params(max_df=1.0)  # on a handful of items a share says nothing
        try:
            weights = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise DataError(
                f"No usable term was found in {len(texts)} item texts (min_df={self.config.min_df}, "
                f"max_df={self.config.max_df}); lower min_df, raise max_df, or check that the items have text."
            ) from error
        rank = min(self.config.dims, *weights.shape)
        if rank < weights.shape[1]:
            svd = TruncatedSVD(rank, n_iter=self.config.iterations, random_state=self.config.seed).fit(weights)
            components = svd.components_
        else:
            components = np.eye(rank)  # as many terms as dimensions: nothing to reduce
        self._components = np.ascontiguousarray(components, dtype=np.float32)
        # A fitted and a loaded encoder must be one code path, or their vectors would differ in the last bit.
        self._restore(vectorizer.get_feature_names_out().tolist(), vectorizer.idf_)
        vectors = unit_rows(self._project(texts))
        self._fallback = self._padded(unit_rows(vectors.mean(axis=0, keepdims=True)))[0]
        return self

    def _restore(self, terms: list[str], idf: np.ndarray) -> None:
        self._vectorizer = self._new_vectorizer(terms)
        self._vectorizer.idf_ = idf

    def _project(self, texts: list[str]) -> np.ndarray:
        return self._vectorizer.transform(texts) @ self._components.T.astype(np.float64)

    def _padded(self, vectors: np.ndarray) -> np.ndarray:
        missing = self.config.dims - vectors.shape[1]
        return np.pad(vectors, ((0, 0), (0, missing))).astype(np.float32)

    def encode(self, texts: Sequence[str], item_ids: Sequence[str] | None = None) -> np.ndarray:
        """Vectors (n, dims) float32, rows of length 1. Each row depends on its own text only."""
        if self._vectorizer is None:
            raise DataError("This tfidf_svd encoder is not fitted yet; call fit(texts) or load a saved one.")
        projected = self._project(check_texts(texts))
        empty = ~(np.linalg.norm(projected, axis=1) > 1e-9)
        vectors = self._padded(unit_rows(projected))
        vectors[empty] = self._fallback
        self.empty_texts = int(empty.sum())
        return vectors

    def _save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        if self._vectorizer is None:
            raise DataError("This tfidf_svd encoder is not fitted yet, so there is nothing to save; call fit(texts).")
        terms = self._vectorizer.get_feature_names_out().tolist()
        tensors = {"idf": self._vectorizer.idf_, "components": self._components, "fallback": self._fallback}
        write_json(folder / VOCABULARY_FILE, terms)
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / TENSOR_FILE)

    def _load(self, folder: Path) -> None:
        terms, tensors = read_json(folder / VOCABULARY_FILE), load_tensors(folder / TENSOR_FILE)
        try:
            idf, components, fallback = tensors["idf"], tensors["components"], tensors["fallback"]
            fits = len(set(terms)) == len(idf) == components.shape[1] and fallback.shape == (self.config.dims,)
        except (KeyError, IndexError, TypeError):
            fits = False
        if not fits:
            raise DataError(f"Vocabulary, weights and config in {folder} do not fit together; write the folder again.")
        self._components, self._fallback = components, fallback
        self._restore(terms, idf)

"""Item vectors: the encoder interface, the text of an item, and the offline encoder TF-IDF + truncated SVD.

An encoder is fitted on the catalogue's texts, frozen, saved without pickle, and then encodes new items with the same
weights. The papers use trained text or multimodal towers; TF-IDF + SVD is our offline default, and any tower is one
line of YAML away (`sentence_transformers`, `transformers`, or `precomputed` vectors of one's own).
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.config import as_dict, build
from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.folders import read_json, write_folder, write_json
from sidtune.core.hub import push_saved, resolve_folder
from sidtune.tokenizers.quantizers.base import load_tensors

CONFIG_FILE = "encoder_config.json"
TENSOR_FILE = "encoder.safetensors"
VOCABULARY_FILE = "vocabulary.json"
TEXT_FIELDS = ("title", "brand", "category", "attributes", "description")

# Words, and single characters of scripts written without spaces (kana, han), or a Chinese title would be one term.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+"


def item_texts(
    items: pa.Table, fields: Sequence[str] = TEXT_FIELDS, repeats: dict[str, int] | None = None
) -> list[str]:
    """The encoder's input: the chosen fields of each item, joined by spaces.

    Raw text is fine here, since it never reaches an LLM. Prompts go through the serializer instead.

    Args:
        items: table in the ITEMS schema.
        fields: which of `TEXT_FIELDS`, in order.
        repeats: field → how often it is written, a plain way to weigh fields in a bag of words. Default 1 each.

    Returns:
        One text per row; a row without any text gives "".

    Raises:
        ConfigError: unknown field, or a repeat below 1.
    """
    repeats = dict(repeats or {})
    for name in (*fields, *repeats):
        if name not in TEXT_FIELDS:
            raise ConfigError(f"Items have no text field '{name}': {nearest(name, TEXT_FIELDS)}")
    if any(times < 1 for times in repeats.values()) or not fields:
        raise ConfigError("item_texts needs at least one field and repeats of 1 or more; leave a field out to drop it.")
    columns = [_field_text(items.column(name)) for name in fields for _ in range(repeats.get(name, 1))]
    joined = pc.binary_join_element_wise(*columns, " ", null_handling="skip")
    squeezed = pc.utf8_trim_whitespace(pc.replace_substring_regex(joined, r"\s+", " "))
    return squeezed.to_pylist()


def _field_text(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=array.type)
    if not pa.types.is_list(array.type):
        return pc.fill_null(array, "")
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    values = array.flatten()
    if pa.types.is_struct(values.type):
        parts = [pc.fill_null(pc.struct_field(values, name), "") for name in ("name", "value")]
        values = pc.binary_join_element_wise(*parts, " ")
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pc.binary_join(pa.ListArray.from_arrays(offsets, pc.fill_null(values, "")), " ")


class Encoder(abc.ABC):
    """Base class: texts → vectors.

    Attributes:
        name: its name in the registry.
        config_class: dataclass of its options.
        config: the options.
        empty_texts: how many texts of the last `encode` had nothing to encode and got the fallback.
    """

    name: ClassVar[str]
    config_class: ClassVar[type]

    def __init__(self, config: Any = None) -> None:
        self.config = self.config_class() if config is None else config
        self.empty_texts = 0

    @abc.abstractmethod
    def fit(self, texts: Sequence[str]) -> Self:
        """Learns what the encoder needs from the catalogue's texts; a pretrained encoder learns nothing."""

    @abc.abstractmethod
    def encode(self, texts: Sequence[str], item_ids: Sequence[str] | None = None) -> np.ndarray:
        """Vectors (n, d) float32. `item_ids` matter only to encoders that look vectors up (`precomputed`)."""

    def _save(self, folder: Path) -> None:  # noqa: B027
        """Writes further files into the folder."""

    def _load(self, folder: Path) -> None:  # noqa: B027
        """Reads them back."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the encoder's folder (JSON + safetensors), whole or not at all."""
        with write_folder(folder) as scratch:
            self._save(scratch)
            record = {"encoder": self.name, "config": as_dict(self.config)}
            write_json(scratch / CONFIG_FILE, record)

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | Path, **hub: Any) -> Self:
        """Loads a folder or hub repository. On the base class, the class is taken from the folder.

        Args:
            folder_or_repo: local folder or repository id.
            hub: options of `sidtune.core.hub.resolve_folder`.

        Raises:
            DataError: missing or damaged files, or a folder of another encoder.
        """
        from sidtune.tokenizers.registry import ENCODERS

        folder = resolve_folder(folder_or_repo, what="encoder", **hub)
        record = read_json(folder / CONFIG_FILE)
        if not isinstance(record, dict) or "encoder" not in record or "config" not in record:
            raise DataError(f"{folder / CONFIG_FILE} does not describe an encoder; write the folder again.")
        if cls is not Encoder and record["encoder"] != cls.name:
            raise DataError(f"{folder} holds an encoder '{record['encoder']}', not a '{cls.name}'; use load_encoder.")
        target: Any = ENCODERS.get(record["encoder"]) if cls is Encoder else cls
        encoder = target(build(target.config_class, record["config"], str(folder / CONFIG_FILE)))
        encoder._load(folder)
        return encoder

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Saves into a scratch folder and uploads it; `options` (token, private, ...) are those of `push_folder`."""
        return push_saved(self, repo_id, **options)


def check_texts(texts: Sequence[str]) -> list[str]:
    """Returns the texts as a list; raises DataError when there is none or one is not a string."""
    if isinstance(texts, str):
        raise DataError("Expected a list of texts to encode, got one text; put it into a list.")
    texts = list(texts)
    if not texts:
        raise DataError("There are no item texts to encode; the catalogue is empty.")
    wrong = next((n for n, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        kind = type(texts[wrong]).__name__
        raise DataError(f"Item text {wrong} is {kind}, not a string; use '' where an item has none.")
    return texts


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 (zero rows stay zero)."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)


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
        for key in ("dims", "min_df", "max_terms", "iterations"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} of the tfidf_svd encoder must be at least 1, got {getattr(self, key)}.")
        if not 0 < self.max_df <= 1:
            raise ConfigError(f"max_df of the tfidf_svd encoder is a share in (0, 1], got {self.max_df}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed of the tfidf_svd encoder must lie in [0, 2^32), got {self.seed}.")


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
        """Vectors (n, dims) float32, rows of length 1. Each row depends on its own text only.

        Raises:
            DataError: not fitted, or no texts.
        """
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


def warn_empty(encoder: Encoder, count: int) -> None:
    """Warns once when an encoder used its fallback for some of `count` texts."""
    if encoder.empty_texts:
        warnings.warn(
            f"{encoder.empty_texts} of {count} items had no text the '{encoder.name}' encoder knows; they share one "
            "fallback vector and hence one semantic ID. Give these items a title or a description.",
            stacklevel=2,
        )

"""Item vectors: the interface of every encoder, and the text of an item.

An encoder is fitted on the catalogue's texts, frozen, saved without pickle, and then encodes new items with the same
weights. The papers use trained text or multimodal towers; TF-IDF + SVD (`tfidf.py`) is our offline default, and any tower
is one line of YAML away (`sentence_transformers`, `transformers`, or `precomputed` vectors of one's own).
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.registry import Registry
from sidtune.tokenizers.registry import ENCODERS
from sidtune.tokenizers.saved import Registered

TENSOR_FILE = "encoder.safetensors"
TEXT_FIELDS = ("title", "brand", "category", "attributes", "description")


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


class Encoder(Registered):
    """Base class: texts → vectors.

    Attributes:
        name: its name in the registry.
        config_class: dataclass of its options.
        config: the options.
        remedy: what helps items that it knows nothing of.
        empty_texts: how many texts of the last `encode` had nothing to encode and got the fallback.
    """

    kind: ClassVar[str] = "encoder"
    registry: ClassVar[Registry] = ENCODERS
    remedy: ClassVar[str] = "Give these items a title or a description."

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.empty_texts = 0

    @abc.abstractmethod
    def fit(self, texts: Sequence[str]) -> Self:
        """Learns what the encoder needs from the catalogue's texts; a pretrained encoder learns nothing."""

    @abc.abstractmethod
    def encode(self, texts: Sequence[str], item_ids: Sequence[str] | None = None) -> np.ndarray:
        """Vectors (n, d) float32. `item_ids` matter only to encoders that look vectors up (`precomputed`)."""


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


def warn_empty(encoder: Encoder, count: int) -> None:
    """Warns once when an encoder used its fallback for some of `count` texts."""
    if encoder.empty_texts:
        warnings.warn(
            f"{encoder.empty_texts} of {count} items had nothing the '{encoder.name}' encoder knows; they share one "
            f"fallback vector and hence one semantic ID. {encoder.remedy}",
            stacklevel=2,
        )


def make_encoder(name: str, options: dict[str, Any] | None = None) -> Encoder:
    """A new encoder by name. Options are its config's fields; an unknown name or option is a ConfigError."""
    return ENCODERS.make(name, options)


def load_encoder(folder_or_repo: str | Path, **hub: Any) -> Encoder:
    """The encoder saved in a folder or hub repository, whatever its class (`hub`: options of `resolve_folder`)."""
    return Encoder.from_pretrained(folder_or_repo, **hub)

"""The interface of every quantizer: vectors → codes of fixed depth → vectors.

A quantizer is trained once (`fit`) and frozen; new items get codes from the same codebooks (`encode`). Its folder holds
`quantizer_config.json` (name, config, shapes) and `codebooks.safetensors`. The interface is our choice, so that every
method can be compared on one table.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from sidtune.core.errors import DataError
from sidtune.core.folders import read_json, write_json
from sidtune.core.registry import Registry
from sidtune.tokenizers.registry import QUANTIZERS
from sidtune.tokenizers.saved import Registered
from sidtune.tokenizers.vectors import check_vectors, load_tensors

CONFIG_FILE = "quantizer_config.json"
TENSOR_FILE = "codebooks.safetensors"
CURVE_FILE = "curves.json"
ROWS = 8192  # encoded at once where a method says nothing else


def check_codes(codes: Any, level_sizes: Sequence[int]) -> np.ndarray:
    """Returns `codes` as an integer array (n, l), 1 ≤ l ≤ number of levels, every code inside its level.

    Raises:
        DataError: not integers of that shape, or a code outside its level.
    """
    array = np.asarray(codes)
    if array.ndim != 2 or array.dtype.kind not in "iu" or not 1 <= array.shape[1] <= len(level_sizes):
        raise DataError(
            f"Expected integer codes of shape (n, 1..{len(level_sizes)}) to decode, got {array.dtype} {array.shape}."
        )
    for level, size in enumerate(level_sizes[: array.shape[1]]):
        column = array[:, level]
        if len(column) and (column.min() < 0 or column.max() >= size):
            raise DataError(
                f"A code of level {level + 1} lies outside 0..{size - 1}; these codes are of another codebook."
            )
    return array


class Quantizer(Registered):
    """Base class.

    Attributes:
        name: its name in the registry.
        config_class: dataclass of its options.
        config: the options.
        curves: one record per training epoch, for methods that are trained by gradients; else empty. Saved as
            `curves.json`.
    """

    kind: ClassVar[str] = "quantizer"
    registry: ClassVar[Registry] = QUANTIZERS
    optional_files: ClassVar[tuple[str, ...]] = (CURVE_FILE,)

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.curves: list[dict[str, Any]] = []

    @property
    @abc.abstractmethod
    def level_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level."""

    @property
    def depth(self) -> int:
        """Number of levels."""
        return len(self.level_sizes)

    def level_letters(self) -> str | None:
        """Letters of the SID tokens, one per level; None, as in most quantizers, is a, b, c, ... See `tokenizers/letters.py`."""
        return None

    @property
    @abc.abstractmethod
    def dims(self) -> int | None:
        """Width of the vectors, None before `fit`."""

    @property
    @abc.abstractmethod
    def codebooks(self) -> list[np.ndarray]:
        """One float32 array (k_l, w) per level, all of one width w: what the codes stand for, d wide where a code is a
        vector, else as wide as the latent space. Raises DataError before `fit`."""

    def fit(self, vectors: np.ndarray) -> Self:
        """Learns the codebooks from vectors (n, d); raises as `fit_encode` does."""
        self.fit_encode(vectors)
        return self

    @abc.abstractmethod
    def fit_encode(self, vectors: np.ndarray) -> np.ndarray:
        """Learns the codebooks from vectors (n, d) and gives their codes (n, depth) int32.

        The same as `fit` and `encode`, except where training places its own vectors under a constraint that a new vector
        does not have (equal-size clusters).

        Raises:
            DataError: wrong shape, NaN, infinite or huge entries.
            ConfigError: options that do not go with these vectors.
        """

    def _require_fit(self) -> None:
        if self.dims is None:
            raise DataError(f"This {self.name} quantizer has no codebooks yet; call fit(vectors) or load a saved one.")

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes (n, depth) int32 of vectors (n, d) under the frozen codebooks.

        Raises:
            DataError: before `fit`, another width than the training vectors, NaN, infinite or huge entries.
        """
        self._require_fit()
        vectors, step = check_vectors(vectors, self.dims), getattr(self.config, "chunk_size", ROWS)
        return np.concatenate([self._encode(vectors[i : i + step]) for i in range(0, len(vectors), step)])

    @abc.abstractmethod
    def _encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes int32 of a block of checked vectors."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Vectors (n, d) float32 of codes (n, l), l ≤ depth; with l < depth the reconstruction of the prefix.

        Raises:
            DataError: before `fit`, more columns than levels, or a code outside its level.
        """
        self._require_fit()
        return self._decode(check_codes(codes, self.level_sizes))

    @abc.abstractmethod
    def _decode(self, codes: np.ndarray) -> np.ndarray:
        """Vectors of checked codes."""

    @abc.abstractmethod
    def _tensors(self) -> dict[str, np.ndarray]:
        """Everything `fit` learned, by name."""

    @abc.abstractmethod
    def _set_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        """Takes `_tensors` back; raises DataError when shapes do not fit the config."""

    def _about(self) -> dict[str, Any]:
        return {"dims": self.dims, "level_sizes": list(self.level_sizes)}

    def _save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        self._require_fit()
        tensors = {key: np.ascontiguousarray(value) for key, value in self._tensors().items()}
        save_file(tensors, folder / TENSOR_FILE)
        if self.curves:
            write_json(folder / CURVE_FILE, self.curves)

    def _lacks(self, tensors: dict[str, Any], *names: str) -> None:
        """Raises DataError where one of these tensors is not there."""
        for name in names:
            if name not in tensors:
                raise DataError(f"The saved {self.name} quantizer lacks the tensor '{name}'; write the folder again.")

    def _load(self, folder: Path) -> None:
        self._set_tensors(load_tensors(folder / TENSOR_FILE))
        if (folder / CURVE_FILE).exists():
            self.curves = read_json(folder / CURVE_FILE)


def make_quantizer(name: str, options: dict[str, Any] | None = None) -> Quantizer:
    """A new quantizer by name. Options are its config's fields; an unknown name or option is a ConfigError."""
    return QUANTIZERS.make(name, options)


def load_quantizer(folder_or_repo: str | Path, **hub: Any) -> Quantizer:
    """The quantizer saved in a folder or hub repository, whatever its class (`hub`: options of `resolve_folder`)."""
    return Quantizer.from_pretrained(folder_or_repo, **hub)

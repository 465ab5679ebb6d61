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

from sidtune.core.config import as_dict, build
from sidtune.core.errors import DataError
from sidtune.core.folders import read_json, write_files, write_json
from sidtune.core.hub import push_saved, resolve_folder
from sidtune.tokenizers.registry import QUANTIZERS
from sidtune.tokenizers.vectors import load_tensors

CONFIG_FILE = "quantizer_config.json"
TENSOR_FILE = "codebooks.safetensors"
CURVE_FILE = "curves.json"


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


class Quantizer(abc.ABC):
    """Base class.

    Attributes:
        name: its name in the registry.
        config_class: dataclass of its options.
        config: the options.
        curves: one record per training epoch, for methods that are trained by gradients; else empty. Saved as
            `curves.json`.
    """

    name: ClassVar[str]
    config_class: ClassVar[type]

    def __init__(self, config: Any = None) -> None:
        self.config = self.config_class() if config is None else config
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

    @abc.abstractmethod
    def fit(self, vectors: np.ndarray) -> Self:
        """Learns the codebooks from vectors (n, d)."""

    def fit_encode(self, vectors: np.ndarray) -> np.ndarray:
        """Learns the codebooks and gives the codes (n, depth) int32 of the training vectors.

        The same as `fit` and `encode`, except where training places its own vectors under a constraint that a new vector
        does not have (equal-size clusters).
        """
        return self.fit(vectors).encode(vectors)

    @abc.abstractmethod
    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes (n, depth) int32 of vectors (n, d) under the frozen codebooks."""

    @abc.abstractmethod
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Vectors (n, d) float32 of codes (n, l), l ≤ depth; with l < depth the reconstruction of the prefix."""

    @abc.abstractmethod
    def _tensors(self) -> dict[str, np.ndarray]:
        """Everything `fit` learned, by name."""

    @abc.abstractmethod
    def _set_tensors(self, tensors: dict[str, np.ndarray]) -> None:
        """Takes `_tensors` back; raises DataError when shapes do not fit the config."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folder, whole or not at all. Raises DataError before `fit`."""
        from safetensors.numpy import save_file

        tensors = {key: np.ascontiguousarray(value) for key, value in self._tensors().items()}
        with write_files(folder, [CURVE_FILE]) as scratch:
            save_file(tensors, scratch / TENSOR_FILE)
            record = {"quantizer": self.name, "dims": self.dims, "level_sizes": list(self.level_sizes)}
            write_json(scratch / CONFIG_FILE, record | {"config": as_dict(self.config)})
            if self.curves:
                write_json(scratch / CURVE_FILE, self.curves)

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | Path, **hub: Any) -> Self:
        """Loads a folder or hub repository. On the base class, the class is taken from the folder.

        Args:
            folder_or_repo: local folder or repository id.
            hub: options of `sidtune.core.hub.resolve_folder` (subfolder, revision, token, ...).

        Raises:
            DataError: missing or damaged files, or a folder of another quantizer.
        """
        folder = resolve_folder(folder_or_repo, what="quantizer", **hub)
        record = read_json(folder / CONFIG_FILE)
        if not isinstance(record, dict) or "quantizer" not in record or "config" not in record:
            raise DataError(f"{folder / CONFIG_FILE} does not describe a quantizer; write the folder again.")
        target = _class_of(cls, record["quantizer"], folder)
        quantizer = target(build(target.config_class, record["config"], str(folder / CONFIG_FILE)))
        quantizer._set_tensors(load_tensors(folder / TENSOR_FILE))
        if (folder / CURVE_FILE).exists():
            quantizer.curves = read_json(folder / CURVE_FILE)
        return quantizer

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Saves into a scratch folder and uploads it; `options` (token, private, ...) are those of `push_folder`."""
        return push_saved(self, repo_id, **options)


def _class_of(cls: type, name: str, folder: Path) -> Any:
    if cls is Quantizer:
        return QUANTIZERS.get(name)
    if name != cls.name:
        raise DataError(f"{folder} holds a quantizer '{name}', not a '{cls.name}'; load it with load_quantizer.")
    return cls


def make_quantizer(name: str, options: dict[str, Any] | None = None) -> Quantizer:
    """A new quantizer by name. Options are its config's fields; an unknown name or option is a ConfigError."""
    return QUANTIZERS.make(name, options)


def load_quantizer(folder_or_repo: str | Path, **hub: Any) -> Quantizer:
    """The quantizer saved in a folder or hub repository, whatever its class (`hub`: options of `resolve_folder`)."""
    return Quantizer.from_pretrained(folder_or_repo, **hub)

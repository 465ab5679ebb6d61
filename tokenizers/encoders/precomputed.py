"""Item vectors that were computed elsewhere: a collaborative model's, a tower's of one's own, a published array.

Published arrays come without item ids more often than not, so the matching of rows and items is an explicit choice here
(`align`); a silent shift by one row would give every item the semantic ID of its neighbour. Our choice; no paper is
involved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json, write_json
from sidtune.core.text import parse_json, read_lines, read_text
from sidtune.tokenizers.encoders.base import TENSOR_FILE, Encoder
from sidtune.tokenizers.vectors import check_vectors, load_array, load_tensors, unit_rows


@dataclass
class PrecomputedConfig:
    """Options of `PrecomputedEncoder`.

    Attributes:
        path: `.npy` file with an array (N, d), or `.safetensors` file.
        tensor: name of the tensor in a safetensors file; needed when it holds several.
        align: which row belongs to which item: `order` (row n is the n-th item of the table), `row_number` (the item id
            is the row number, as in published LETTER data) or `ids` (`ids_path` lists the item id of each row).
        ids_path: JSON list, or text file with one id a line.
        normalize: scale rows to length 1.
    """

    path: str = ""
    tensor: str | None = None
    align: Literal["order", "row_number", "ids"] = "order"
    ids_path: str | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("The precomputed encoder needs 'path', a .npy or .safetensors file of item vectors.")
        if (self.align == "ids") != (self.ids_path is not None):
            raise ConfigError("The precomputed encoder needs 'ids_path' exactly when align is 'ids'.")


class PrecomputedEncoder(Encoder):
    """Vectors that were computed elsewhere, for example a collaborative model's. Texts are not looked at.

    Rows are matched by `config.align`; with `row_number` and `ids` a wrong order of the file cannot go unnoticed. It
    has no vectors for items that are not in the file, and says so.
    """

    name: ClassVar[str] = "precomputed"
    config_class: ClassVar[type] = PrecomputedConfig

    def __init__(self, config: PrecomputedConfig) -> None:
        super().__init__(config)
        self._vectors: np.ndarray | None = None
        self._rows: dict[str, int] | None = None

    def fit(self, texts: Sequence[str]) -> Self:
        """Reads and checks the file; learns nothing. Raises DataError on a missing, damaged or ill-shaped file."""
        if self._vectors is None:
            vectors = check_vectors(_read_array(Path(self.config.path), self.config.tensor), what="precomputed vectors")
            self._vectors = np.ascontiguousarray(unit_rows(vectors), np.float32) if self.config.normalize else vectors
            if self.config.align == "ids":
                self._set_ids(_read_ids(Path(self.config.ids_path)))
        return self

    def _set_ids(self, ids: list[str]) -> None:
        rows = {item_id: row for row, item_id in enumerate(ids)}
        if len(ids) != len(self._vectors) or len(rows) != len(ids):
            raise DataError(
                f"{len(ids)} ids ({len(rows)} distinct) were given for {len(self._vectors)} precomputed vectors; each "
                "row needs one id of its own."
            )
        self._rows = rows

    def encode(self, texts: Sequence[str], item_ids: Sequence[str] | None = None) -> np.ndarray:
        """Vectors (n, d) float32 of the items.

        Args:
            texts: one per item; only their number counts.
            item_ids: needed for `align` = `row_number` or `ids`.

        Raises:
            DataError: another number of items than vectors (`order`), or an item without a vector.
        """
        vectors = self.fit(texts)._vectors
        if self.config.align == "order":
            if len(texts) != len(vectors):
                raise DataError(
                    f"{self.config.path} has {len(vectors)} vectors for {len(texts)} items; with align 'order' the "
                    "numbers must agree, with 'ids' or 'row_number' the file may hold more."
                )
            return vectors.copy()
        if item_ids is None or len(item_ids) != len(texts):
            raise DataError(f"With align '{self.config.align}' the precomputed encoder needs the item id of each text.")
        if self._rows is None:
            self._rows = {str(row): row for row in range(len(vectors))}
        missing = [item_id for item_id in item_ids if item_id not in self._rows]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(item_ids)} items have no precomputed vector (first: '{missing[0]}'); add "
                "their vectors to the file or drop the items."
            )
        return vectors[[self._rows[item_id] for item_id in item_ids]]

    def _save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        vectors = self.fit([])._vectors
        save_file({"vectors": vectors}, folder / TENSOR_FILE)
        if self.config.align == "ids":
            write_json(folder / "ids.json", list(self._rows))

    def _load(self, folder: Path) -> None:
        tensors = load_tensors(folder / TENSOR_FILE)
        if "vectors" not in tensors:
            raise DataError(f"{folder / TENSOR_FILE} lacks the tensor 'vectors'; write the encoder folder again.")
        self._vectors = check_vectors(tensors["vectors"], what="precomputed vectors")
        if self.config.align == "ids":
            self._set_ids(read_json(folder / "ids.json"))


def _read_array(path: Path, tensor: str | None) -> np.ndarray:
    if path.suffix == ".safetensors":
        tensors = load_tensors(path)
        if tensor is None and len(tensors) == 1:
            return next(iter(tensors.values()))
        if tensor not in tensors:
            raise DataError(f"{path} holds the tensors {sorted(tensors)}; set 'tensor' to the one that is meant.")
        return tensors[tensor]
    if path.suffix != ".npy":
        raise DataError(f"Expected item vectors as a .npy or .safetensors file, got '{path}'; convert it.")
    if tensor is not None:
        raise ConfigError(f"'tensor' names a part of a .safetensors file, and {path} is one array; leave it out.")
    return load_array(path)


def _read_ids(path: Path) -> list[str]:
    """One id a line; or a JSON list of texts, or of whole numbers."""
    if path.suffix != ".json":
        return read_lines(path, "id file")
    try:
        ids = parse_json(read_text(path, "id file"))
    except ValueError as error:
        raise DataError(f"The id file {path} is not readable JSON ({error}); write a list of item ids.") from None
    wrong = [one for one in ids if type(one) not in (str, int)] if isinstance(ids, list) else [ids]
    if wrong:
        raise DataError(
            f"The id file {path} must hold a JSON list of item ids, it holds {str(wrong[0])[:60]!r}; correct it."
        )
    return [str(item_id) for item_id in ids]

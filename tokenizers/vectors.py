"""What encoders, quantizers and semantic IDs share: checked vectors, rows of length 1, tensors out of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sidtune.core.errors import DataError

# Squared float32 distances overflow beyond this.
_LARGEST = 1e18


def check_vectors(
    vectors: Any, dims: int | None = None, what: str = "item vectors", rows: int | None = None
) -> np.ndarray:
    """Returns `vectors` as a contiguous float32 array (n, d).

    Raises:
        DataError: not two-dimensional and numeric, empty, another width than `dims`, another number than `rows` (one per
            item), or NaN, infinite or huge entries.
    """
    array = np.asarray(vectors)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DataError(f"Expected {what} as numbers of shape (n, d), got {array.dtype} of shape {array.shape}.")
    if array.shape[0] == 0 or array.shape[1] == 0:
        raise DataError(f"The {what} are empty (shape {array.shape}); at least one row and one column are needed.")
    if rows is not None and len(array) != rows:
        raise DataError(f"There are {len(array)} {what} for {rows} items; give one per item, in row order.")
    if dims is not None and array.shape[1] != dims:
        raise DataError(
            f"The {what} have {array.shape[1]} dimensions, but the codebooks were trained on {dims}; "
            "use the encoder they were trained with."
        )
    # Two passes and no copy of a matrix that may fill half the memory; NaN compares false, so it is caught here too.
    if not (array.max() < _LARGEST and array.min() > -_LARGEST):
        bad = np.flatnonzero(~(np.abs(array).max(axis=1) < _LARGEST))
        raise DataError(
            f"{len(bad)} of {len(array)} {what} hold NaN, infinite or huge values (first: row {bad[0]}); "
            "repair or drop these rows before quantizing."
        )
    return np.ascontiguousarray(array, dtype=np.float32)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 (zero rows stay zero)."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file; a missing or damaged one is a DataError that names it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise DataError(f"The file {path} does not exist; run the step that writes it first.") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"The file {path} is not a readable safetensors file ({error}); write it again.") from None


def load_array(path: str | Path) -> np.ndarray:
    """The array of a `.npy` file; a missing or damaged one is a DataError that names it."""
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"The vector file {path} does not exist; check the path.") from None
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is no readable .npy array of numbers ({error}); write it with numpy.save.") from None

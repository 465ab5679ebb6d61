"""Checks of what `SemanticIds` is made from and goes with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import DataError


def read_ids(path: Path) -> list[str]:
    """Item ids of a parquet file. Raises DataError when it cannot be read."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=["item_id"]).column("item_id").to_pylist()
    except FileNotFoundError:
        raise DataError(f"The file {path} does not exist; run the step that writes it first.") from None
    except (pa.ArrowException, KeyError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"The file {path} is not a readable list of item ids ({reason}); write it again.") from None


def check_ids(item_ids: Sequence[str]) -> tuple[list[str], pa.Array]:
    """The ids as a list and as an array; refuses none, doubles and what is no text."""
    ids = list(item_ids)
    if not ids:
        raise DataError("The catalogue is empty: semantic IDs need at least one item.")
    wrong = next((row for row, item_id in enumerate(ids) if not isinstance(item_id, str)), None)
    if wrong is not None:
        raise DataError(f"Item id {ids[wrong]!r} in row {wrong} is {type(ids[wrong]).__name__}; ids must be strings.")
    try:
        array = pa.array(ids, type=pa.large_string())
    except UnicodeEncodeError:
        raise DataError("An item id holds a lone surrogate, which is no valid text; repair the id.") from None
    if pc.count_distinct(array).as_py() != len(ids):
        twice = next(item_id for item_id, count in Counter(ids).items() if count > 1)
        raise DataError(f"The item id '{twice}' occurs more than once; each item needs one row, drop the others.")
    return ids, array


def check_codes(codes: np.ndarray, items: int, level_sizes: tuple[int, ...]) -> np.ndarray:
    """(N, L) int32, read-only; refuses other shapes and codes outside their level."""
    array = np.asarray(codes)
    if array.shape != (items, len(level_sizes)) or array.dtype.kind not in "iu":
        raise DataError(
            f"Expected integer codes of shape ({items}, {len(level_sizes)}) for {items} items and {len(level_sizes)} "
            f"levels, got {array.dtype} of shape {array.shape}."
        )
    bad = np.argwhere((array < 0) | (array >= np.array(level_sizes)))
    if len(bad):
        row, level = bad[0]
        raise DataError(
            f"{len(bad)} codes lie outside their level (first: row {row}, level {level + 1}, code {array[row, level]}, "
            f"allowed 0 to {level_sizes[level] - 1}); the codes and level_sizes do not belong together."
        )
    array = array.astype(np.int32, order="C")
    array.flags.writeable = False
    return array


def check_popularity(popularity: np.ndarray | None, items: int) -> np.ndarray:
    """(N,) float64, read-only; refuses what is not finite."""
    array = np.zeros(items) if popularity is None else np.array(popularity, dtype=np.float64)
    if array.shape != (items,) or not np.isfinite(array).all():
        raise DataError(f"popularity must be {items} finite numbers, one per item; it has shape {array.shape} or NaN.")
    array.flags.writeable = False
    return array


def check_quantizer(sids: Any, quantizer: Any) -> None:
    """Raises DataError when the semantic IDs (their suffix level apart) are not of this quantizer."""
    sizes, base = tuple(quantizer.level_sizes), sids.level_sizes[: sids.depth - sids.suffix_level]
    if sizes != base:
        raise DataError(
            f"The quantizer has levels of {list(sizes)} codes, the semantic IDs {list(base)}; they are of another run."
        )

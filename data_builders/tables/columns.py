"""Arrow columns as numpy codes and places; what readers, checks, tasks and mining all do with ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def one_array(column: Any) -> Any:
    """A column as one Arrow array; text that fits into none as `large_string`."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.cast(pa.large_string()).combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def encode(column: Any) -> tuple[np.ndarray, pa.Array]:
    """Text → (codes (n,) int64, -1 for null; the distinct texts in order of first occurrence)."""
    coded = one_array(column).dictionary_encode()
    codes = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, coded.dictionary.cast(pa.string())


def rows_of(values: Any, known: Any) -> np.ndarray:
    """(n,) int64: place of each value in `known`; -1 for null and unknown ones."""
    known = one_array(known)
    found = pc.fill_null(pc.index_in(values, value_set=known), -1).to_numpy().astype(np.int64)
    return np.where(pc.is_valid(values).to_numpy(zero_copy_only=False), found, -1) if known.null_count else found


def among(pairs: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(P,) which of the integer pairs (P, 2) stand in `known` (K, 2)."""
    codes = np.unique(np.concatenate([pairs, known]), axis=0, return_inverse=True)[1].ravel()
    return np.isin(codes[: len(pairs)], codes[len(pairs) :])


def repeated_rows(table: pa.Table) -> np.ndarray:
    """Places of the rows that equal an earlier row in every column, nulls alike."""
    flat = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    place = table.select(flat).append_column("", pa.array(np.arange(table.num_rows)))
    first = place.group_by(flat, use_threads=False).aggregate([("", "min")])["_min"].to_numpy()
    again = np.setdiff1d(np.arange(table.num_rows), first) if len(first) < table.num_rows else np.empty(0, np.int64)
    if not len(again) or len(flat) == table.num_columns:
        return again
    # Lists are compared row by row, where all else repeats.
    key = table[flat[0]]
    rows = np.flatnonzero(pc.is_in(key, value_set=one_array(key.take(again))).to_numpy(zero_copy_only=False))
    texts = [repr(row) for row in table.take(rows).to_pylist()]
    return rows[np.setdiff1d(np.arange(len(rows)), np.unique(texts, return_index=True)[1])]

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
    code = np.zeros(table.num_rows, np.uint64)
    for column in table.columns[:4]:
        part = pc.fill_null(column, -1).to_numpy() if pa.types.is_integer(column.type) else encode(column)[0]
        code = code * np.uint64(0x9E3779B97F4A7C15) + part.astype(np.uint64)
    ordered = np.sort(code)
    alike = ordered[1:][ordered[1:] == ordered[:-1]]
    rows = np.flatnonzero(np.isin(code, alike)) if len(alike) else np.empty(0, np.int64)
    # Few rows agree in four columns: these are compared whole.
    first: dict[str, int] = {}
    texts = [repr(row) for row in table.take(rows).to_pylist()]
    return np.array(
        [row for row, text in zip(rows.tolist(), texts, strict=True) if first.setdefault(text, row) != row], np.int64
    )

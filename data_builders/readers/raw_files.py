"""Raw source files of other projects → text, JSON and rows, with one sentence per fault that names file and line.

Shared by the readers: encoding, truncated gzip, broken JSON, missing columns and wrong folders are handled here, once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import DataError
from sidtune.core.folders import read_json, read_json_lines
from sidtune.core.shapes import misfit
from sidtune.core.text import parse_json, read_text
from sidtune.data_builders.tables.columns import encode
from sidtune.data_builders.tables.findings import Findings
from sidtune.data_builders.tables.table_files import read_table


def source_folder(path: str | Path, reader: str) -> Path:
    """The folder of a source, or a DataError that says what the reader expects."""
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"The reader '{reader}' needs the folder of its source, but {folder} {what}; check the path.")
    return folder


def one_file(folder: Path, pattern: str, *, needed: bool = True) -> Path | None:
    """The single file of a folder that matches a pattern; DataError when there are several, or none though it is
    needed."""
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise DataError(f"The folder {folder} holds {len(found)} files like {pattern} ({names}); keep one of them.")
    if not found and needed:
        present = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise DataError(f"The folder {folder} has no file {pattern} (it holds {present}); check the path.")
    return found[0] if found else None


def read_json_object(path: Path) -> tuple[dict[str, Any], int]:
    """Reads a file with one JSON object; returns it and how many keys of its top level stood twice (the first one
    counts)."""
    repeated = 0

    def first_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        made: dict[str, Any] = {}
        for key, value in pairs:
            repeated += key in made
            made.setdefault(key, value)
        return made

    try:
        value = parse_json(read_text(path), first_wins)
    except ValueError as error:
        raise DataError(f"The file {path} is not valid JSON ({error}); copy or download it again.") from None
    if not isinstance(value, dict):
        raise DataError(f"The file {path} must hold one JSON object, but holds a {type(value).__name__}.")
    return value, repeated


def typed_json_lines(path: Path, schema: pa.Schema, required: Sequence[str] = ()) -> pa.Table:
    """Reads JSON lines into typed columns; keys that the schema lacks are dropped, absent ones become null.

    Raises:
        DataError: broken lines, wrong types, or a null in a `required` column; all of them listed.
    """
    findings = Findings()
    table = read_table(path, str(path), schema, findings, extra="ignore")
    for name in required:
        nulls = pc.indices_nonzero(table[name].is_null()).to_numpy()
        findings.rows(str(path), name, nulls, f"'{name}' is missing or null", "correct or remove the line")
    findings.raise_if_any()
    return table


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, or of a `.json` file that holds one list of them."""
    if ".jsonl" not in path.name and read_text(path).lstrip()[:1] == "[":
        rows = read_json(path)
        if why := misfit(rows, [dict]):
            raise DataError(f"The file {path} is no list of objects, because {why}; correct it.")
        return rows
    return read_json_lines(path, dict)


def json_table(path: Path) -> pa.Table:
    """A file of JSON objects as a table with the types that its values have; integers among texts become text."""
    rows = json_rows(path)
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values} - {type(None)}
        if kinds == {int, str}:
            values = [str(value) if type(value) is int else value for value in values]
        elif kinds == {list, str}:
            values = [[value] if isinstance(value, str) else value for value in values]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError):
            # Values of several kinds fit no column of ours; as bytes they are refused by type, or nobody asks for them.
            columns[name] = pa.array([None if value is None else json.dumps(value).encode() for value in values])
    return pa.table(columns)


def first_rows(column: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """Row numbers of the first occurrence of each value (increasing), and how many rows are repetitions; no nulls."""
    codes, _ = encode(column)
    rows = np.sort(np.unique(codes, return_index=True)[1])
    return rows, len(codes) - len(rows)


def lists_of(columns: Sequence[pa.Array | pa.ChunkedArray], drop: Sequence[str] = ("",)) -> pa.ListArray:
    """Puts text columns side by side into one list per row, without nulls and without the values of `drop`.

    A row that keeps nothing gets null.
    """
    stacked, keep, offsets = _side_by_side(columns, drop)
    return _null_empty(offsets, stacked.filter(keep))


def pairs_of(names: Sequence[str], columns: Sequence[pa.Array | pa.ChunkedArray], drop: Sequence[str] = ("",)) -> Any:
    """Puts text columns side by side into one name/value list per row (`users.profile`), as `lists_of` does."""
    stacked, keep, offsets = _side_by_side(columns, drop)
    rows = len(stacked) // len(columns)
    labels = pa.array(names, pa.string()).take(pa.array(np.tile(np.arange(len(names)), rows)))
    return _null_empty(
        offsets, pa.StructArray.from_arrays([labels.filter(keep), stacked.filter(keep)], ["name", "value"])
    )


def _side_by_side(columns: Sequence[Any], drop: Sequence[str]) -> tuple[pa.Array, pa.Array, np.ndarray]:
    arrays = [column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in columns]
    rows, width = len(arrays[0]), len(arrays)
    order = np.arange(rows * width).reshape(width, rows).T.ravel()
    stacked = pa.concat_arrays([array.cast(pa.string()) for array in arrays]).take(pa.array(order))
    keep = pc.invert(pc.is_in(stacked, value_set=pa.array([*drop, None], pa.string())))
    counts = keep.to_numpy(zero_copy_only=False).reshape(rows, width).sum(axis=1)
    return stacked, keep, np.concatenate([[0], np.cumsum(counts)])


def _null_empty(offsets: np.ndarray, values: pa.Array) -> pa.ListArray:
    empty = pa.array(np.diff(offsets) == 0)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=empty)

"""Parquet and JSON-lines files → Arrow tables in our schemas, with every problem named instead of the first one raised.

Both formats are read by Arrow, column by column. Only when Arrow refuses a JSON-lines file is it walked line by line,
to say which lines are wrong and why. Types are widened where nothing is lost (int32 → int64, large_string → string)
and never guessed: a number written as text is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from sidtune.core.errors import DataError, Problem, nearest

SHOWN_PER_KIND = 5
_BLOCK = 16 << 20


class Findings:
    """Collects problems; of one kind it keeps the first few rows and the count of the others."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def table(self, where: str, column: str | None, what: str, fix: str) -> None:
        """Adds one problem of a whole table or column."""
        self.problems.append(Problem(where, None, column, what, fix))

    def rows(
        self,
        where: str,
        column: str | None,
        rows: Sequence[int] | np.ndarray,
        what: str | Callable[[int], str],
        fix: str,
    ) -> None:
        """Adds one problem per row, capped.

        Args:
            where: file or table.
            column: column, or None.
            rows: zero-based row numbers.
            what: the sentence, or a function from the place in `rows` (not the row number) to the sentence.
            fix: what to do.
        """
        for place in range(min(len(rows), SHOWN_PER_KIND)):
            text = what if isinstance(what, str) else what(place)
            self.problems.append(Problem(where, int(rows[place]), column, text, fix))
        if len(rows) > SHOWN_PER_KIND:
            more = len(rows) - SHOWN_PER_KIND
            self.problems.append(
                Problem(where, None, column, f"{more} more row{'s' if more > 1 else ''} with this fault", fix)
            )

    def raise_if_any(self) -> None:
        """Raises DataError with all problems, if there are any."""
        if self.problems:
            raise DataError(self.problems)


def read_table(
    path: Path, where: str, schema: pa.Schema, findings: Findings, *, extra: str = "error"
) -> pa.Table | None:
    """Reads one `.parquet` or `.jsonl` file; None when it could not be read (the reason is in `findings`).

    Args:
        path: the file.
        where: how problems call it.
        schema: what JSON lines are read as; columns absent from the file become null.
        findings: collects problems.
        extra: `error` refuses JSON keys that the schema lacks, `ignore` drops them.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path, where, findings)
    return _read_jsonl(path, where, schema, findings, extra)


def _read_parquet(path: Path, where: str, findings: Findings) -> pa.Table | None:
    fix = "write it again, it may be truncated or no parquet at all"
    try:
        table = pq.ParquetFile(path).read()
    except FileNotFoundError:
        findings.table(where, None, "the file is missing", "run the step that writes it")
        return None
    except (pa.ArrowException, OSError) as error:
        findings.table(where, None, f"the file is not readable parquet ({_short(error)})", fix)
        return None
    for name in table.column_names:
        try:
            for column in (c for c, n in zip(table.columns, table.column_names, strict=True) if n == name):
                column.validate(full=True)
        except pa.ArrowException as error:
            findings.table(where, name, f"the column is damaged ({_short(error)})", "write it again as UTF-8 text")
            return None
    return table


def _read_jsonl(path: Path, where: str, schema: pa.Schema, findings: Findings, extra: str) -> pa.Table | None:
    if not path.exists():
        findings.table(where, None, "the file is missing", "run the step that writes it")
        return None
    if path.stat().st_size == 0:
        return schema.empty_table()
    plain = schema.remove_metadata()
    options = pyarrow.json.ParseOptions(explicit_schema=plain, unexpected_field_behavior=extra)
    for block in (_BLOCK, 1 << 30):
        try:
            with path.open("rb") as stream:
                if stream.read(3) != b"\xef\xbb\xbf":
                    stream.seek(0)
                table = pyarrow.json.read_json(stream, pyarrow.json.ReadOptions(block_size=block), options)
            table.validate(full=True)
            return table.select(plain.names)
        except (pa.ArrowException, OSError) as error:
            if "straddling" in str(error) and block == _BLOCK:
                continue
            before = len(findings.problems)
            _explain_jsonl(path, where, plain, findings, extra)
            if len(findings.problems) == before:
                findings.table(
                    where, None, f"the file is not readable as JSON lines ({_short(error)})", "write it again"
                )
            return None
    return None


class _Lines:
    """Problems of the lines of one file, grouped by kind."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[str | None, str], tuple[list[int], list[str]]] = {}

    def add(self, row: int, column: str | None, what: str, fix: str) -> None:
        rows, texts = self.kinds.setdefault((column, fix), ([], []))
        rows.append(row)
        if len(texts) < SHOWN_PER_KIND:
            texts.append(what)


def _explain_jsonl(path: Path, where: str, schema: pa.Schema, findings: Findings, extra: str) -> None:
    """Walks a refused file line by line and names what is wrong in each (JSON, encoding, keys, types)."""
    found = _Lines()
    row = -1
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            row += 1
            try:
                value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_unique)
            except UnicodeDecodeError as error:
                what = f"line {number} is not UTF-8 text (byte 0x{raw[error.start]:02x} at place {error.start + 1})"
                found.add(row, None, what, "convert the file to UTF-8")
                continue
            except (json.JSONDecodeError, _DoubleKey, RecursionError) as error:
                found.add(row, None, f"line {number} is not valid JSON ({_short(error)})", "correct or remove the line")
                continue
            _explain_line(value, number, row, schema, found, extra)
    for (column, fix), (rows, texts) in found.kinds.items():
        findings.rows(where, column, rows, texts.__getitem__, fix)


def _explain_line(value: Any, number: int, row: int, schema: pa.Schema, found: _Lines, extra: str) -> None:
    if not isinstance(value, dict):
        found.add(row, None, f"line {number} is not an object but {_shown(value)}", "write one {...} a line")
        return
    for key, content in value.items():
        if key not in schema.names:
            if extra == "error":
                what = f"line {number} has the unknown key '{key}' ({nearest(key, schema.names)})"
                found.add(row, key, what, "rename or remove the key")
            continue
        wrong = _mismatch(content, schema.field(key).type, key)
        if wrong is not None:
            column, what, fix = wrong
            found.add(row, column, f"line {number} {what}", fix)


class _DoubleKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _DoubleKey(f"the key '{next(key for key in keys if keys.count(key) > 1)}' stands twice")
    return made


def _mismatch(value: Any, kind: pa.DataType, path: str) -> tuple[str, str, str] | None:
    """First place where a JSON value differs from an Arrow type: (path, what is wrong, what to do)."""
    if value is None:
        return None
    if pa.types.is_list(kind) and isinstance(value, list):
        return next((wrong for part in value if (wrong := _mismatch(part, kind.value_type, path))), None)
    if pa.types.is_struct(kind) and isinstance(value, dict):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        for key, part in value.items():
            if key not in names:
                what = f"has the unknown key '{key}' in '{path}' ({nearest(key, names)})"
                return f"{path}.{key}", what, "rename or remove the key"
            if wrong := _mismatch(part, kind.field(key).type, f"{path}.{key}"):
                return wrong
        return None
    if pa.types.is_string(kind):
        fits = isinstance(value, str) and not any(0xD800 <= ord(letter) < 0xE000 for letter in value)
    elif pa.types.is_floating(kind):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif pa.types.is_integer(kind):
        bits = kind.bit_width - 1
        fits = isinstance(value, int) and not isinstance(value, bool) and -(2**bits) <= value < 2**bits
    else:
        fits = False
    expected = describe(kind)
    return None if fits else (path, f"has {_shown(value)} where {expected} belongs", f"write {expected} or null")


def describe(kind: pa.DataType) -> str:
    """A type in words for messages."""
    if pa.types.is_string(kind):
        return "a text"
    if pa.types.is_floating(kind):
        return "a number"
    if pa.types.is_integer(kind):
        return f"an integer of {kind.bit_width} bits"
    if pa.types.is_list(kind):
        return f"a list with {describe(kind.value_type)} in each place"
    if pa.types.is_struct(kind):
        return "an object {" + ", ".join(kind.field(i).name for i in range(kind.num_fields)) + "}"
    return str(kind)


def conform(
    table: pa.Table,
    schema: pa.Schema,
    where: str,
    findings: Findings,
    *,
    required: Sequence[str] = (),
    extra: str = "error",
) -> pa.Table | None:
    """Brings a table to exactly the columns and types of a schema, losslessly.

    Args:
        table: any Arrow table.
        schema: the wanted schema.
        where: how problems call the table.
        findings: collects problems.
        required: columns that must be present; other absent columns become null.
        extra: `error` refuses columns that the schema lacks, `ignore` drops them.

    Returns:
        The table, or None when a problem was found (it is in `findings`).
    """
    before = len(findings.problems)
    names = table.column_names
    for name in sorted({n for n in names if names.count(n) > 1}):
        findings.table(where, name, f"the column stands {names.count(name)} times", "keep one of them")
    for name in required:
        if name not in names:
            kind = describe(schema.field(name).type)
            findings.table(where, name, "the column is missing", f"add it ({kind})")
    for name in names:
        if name not in schema.names and extra == "error":
            what = f"the column is not part of the schema ({nearest(name, schema.names)})"
            findings.table(where, name, what, "rename or remove it")
    columns = []
    for field in schema:
        if names.count(field.name) != 1:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        try:
            column = table.column(field.name)
            chunks = [_fit(chunk, field.type, field.name) for chunk in column.chunks]
            columns.append(pa.chunked_array(chunks, field.type))
        except _Misfit as misfit:
            findings.table(where, misfit.path, misfit.what, misfit.fix)
    return None if len(findings.problems) > before else pa.Table.from_arrays(columns, schema=schema)


class _Misfit(Exception):
    def __init__(self, path: str, what: str, fix: str) -> None:
        super().__init__(what)
        self.path, self.what, self.fix = path, what, fix


def _fit(array: pa.Array, wanted: pa.DataType, path: str) -> pa.Array:
    """Casts one array losslessly, or raises _Misfit."""
    have = array.type
    if have == wanted:
        return array
    if pa.types.is_null(have):
        return pa.nulls(len(array), wanted)
    if pa.types.is_dictionary(have):
        return _fit(array.dictionary_decode(), wanted, path)
    if pa.types.is_list(wanted) and _is_list(have):
        values = _fit(array.values if pa.types.is_list(have) else _as_list(array).values, wanted.value_type, path)
        offsets = (array if pa.types.is_list(have) else _as_list(array)).offsets.to_numpy(zero_copy_only=False)
        made = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=_mask(array))
        return made.cast(wanted)
    if pa.types.is_struct(wanted) and pa.types.is_struct(have):
        return _fit_struct(array, wanted, path)
    if not _widens(have, wanted):
        raise _Misfit(path, f"the type is {have}, expected {describe(wanted)}", f"write the column as {wanted}")
    try:
        return array.cast(wanted)
    except pa.ArrowException as error:
        raise _Misfit(path, f"a value does not fit {wanted} ({_short(error)})", "correct the value") from None


def _fit_struct(array: pa.Array, wanted: pa.DataType, path: str) -> pa.Array:
    names = [field.name for field in array.type]
    known = [field.name for field in wanted]
    for name in names:
        if name not in known:
            raise _Misfit(
                f"{path}.{name}", f"the field is not part of the schema ({nearest(name, known)})", "rename it"
            )
    parts = [
        _fit(array.field(field.name), field.type, f"{path}.{field.name}")
        if field.name in names
        else pa.nulls(len(array), field.type)
        for field in wanted
    ]
    return pa.StructArray.from_arrays(parts, fields=list(wanted), mask=_mask(array))


def _mask(array: pa.Array) -> pa.Array | None:
    return array.is_null() if array.null_count else None


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _as_list(array: pa.Array) -> pa.Array:
    return array.cast(pa.list_(array.type.value_type))


def _widens(have: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a cast keeps the meaning: text to text, integer or bool to integer, number to float."""
    if pa.types.is_string(wanted):
        return pa.types.is_large_string(have) or str(have) == "string_view"
    if pa.types.is_integer(wanted):
        return pa.types.is_integer(have) or pa.types.is_boolean(have)
    if pa.types.is_floating(wanted):
        return pa.types.is_integer(have) or pa.types.is_floating(have) or pa.types.is_decimal(have)
    return False


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."

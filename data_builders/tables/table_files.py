"""Parquet, JSON-lines and CSV files → Arrow tables in our schemas, with every problem named instead of the first one raised.

Both formats are read by Arrow, column by column. Only when Arrow refuses a JSON-lines file is it read line by line,
to say which lines are wrong and why, and to keep the rest. Types are widened where nothing is lost (int32 → int64,
large_string → string) and never guessed: a number written as text is refused. Only CSV knows nothing but text: there a
cell is what its column wants, lists and objects are JSON, and an empty cell is null.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from sidtune.core.errors import DataError, nearest
from sidtune.core.text import parse_json, read_text
from sidtune.data_builders.tables.columns import one_array
from sidtune.data_builders.tables.findings import Findings

_BLOCK = 16 << 20
_FIELD_LIMIT = 1 << 27
_INTEGER = r"^[+-]?[0-9]{1,18}$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"


def read_table(
    path: Path, where: str, schema: pa.Schema, findings: Findings, *, required: Sequence[str] = (), extra: str = "error"
) -> pa.Table:
    """Reads one `.parquet`, `.jsonl` or `.csv` file into exactly the columns and types of a schema; what cannot be read is null.

    Args:
        path: the file.
        where: how problems call it.
        schema: the wanted schema.
        findings: collects problems, and which cells have one.
        required: columns that must be present (not in JSON lines, where each row says); other absent columns become null.
        extra: `error` refuses JSON keys that the schema lacks, `ignore` drops them.
    """
    if not path.exists():
        findings.table(where, None, "the file is missing", "run the step that writes it", whole=True)
        return schema.empty_table()
    if path.suffix == ".csv":
        text = csv_table(path, where, findings)
        columns = {name: text[name] for name in schema.names if text.column_names.count(name) == 1}
        for name in columns:
            columns[name] = from_text(columns[name], schema.field(name).type, where, name, findings)
        rest = [n for n, name in enumerate(text.column_names) if name not in columns]
        arrays = [*columns.values(), *(text.column(n) for n in rest)]
        names = [*columns, *(text.column_names[n] for n in rest)]
        return conform(pa.table(arrays, names=names), schema, where, findings, required=required)
    if path.suffix != ".parquet":
        return _read_jsonl(path, where, schema, findings, extra).cast(schema)
    try:
        return conform(pq.ParquetFile(path).read(), schema, where, findings, required=required)
    except (pa.ArrowException, OSError) as error:
        fix = "write it again, it may be truncated or no parquet at all"
        findings.table(where, None, f"the file is not readable parquet ({_short(error)})", fix, whole=True)
    return schema.empty_table()


def csv_table(path: Path, where: str, findings: Findings, delimiter: str = ",") -> pa.Table:
    """A file of separated values with a header as columns of text; only an empty cell is null."""
    limit = csv.field_size_limit(_FIELD_LIMIT)
    try:
        lines = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
        rows = [row for row in lines if row]
    except (csv.Error, DataError) as error:
        what = f"the file is no CSV ({_short(error).rstrip('.')})"
        findings.table(where, None, what, "write it as UTF-8 text with commas and double quotes", whole=True)
        rows = []
    finally:
        csv.field_size_limit(limit)
    header = rows.pop(0) if rows else []
    wrong = [n for n, row in enumerate(rows) if len(row) != len(header)]
    what = [f"the row has {len(rows[n])} fields, the header {len(header)}" for n in wrong]
    findings.cells(where, None, wrong, what.__getitem__, "correct or remove the row")
    for n in wrong:
        rows[n] = [""] * len(header)
    columns = zip(*rows, strict=True) if rows else ([] for _ in header)
    return pa.table([pa.array([cell or None for cell in one], pa.string()) for one in columns], names=header)


def from_text(column: Any, kind: pa.DataType, where: str, name: str, findings: Findings) -> pa.Array:
    """Texts as values of a type (lists and objects are written as JSON); those that are none are problems and null."""
    texts = one_array(column)
    if pa.types.is_string(kind):
        return texts
    if pa.types.is_nested(kind):
        values = [_value(text, kind, name) for text in texts.to_pylist()]
        wrong = [n for n, value in enumerate(values) if value is ...]
        made = pa.array([None if value is ... else value for value in values], kind)
    else:
        pattern = _INTEGER if pa.types.is_integer(kind) else _NUMBER
        good = pc.fill_null(pc.match_substring_regex(texts, pattern), False)
        wrong = np.flatnonzero(pc.and_not(texts.is_valid(), good).to_numpy(zero_copy_only=False))
        made = pc.if_else(good, texts, None).cast(pa.float64() if pa.types.is_floating(kind) else pa.int64()).cast(kind)
    expected = describe(kind) + (", written as JSON," if pa.types.is_nested(kind) else "")
    what = [f"has {_shown(texts[int(n)].as_py())} where {expected} belongs" for n in wrong]
    findings.cells(where, name, wrong, what.__getitem__, f"write {describe(kind)} or leave the cell empty")
    return made


def _value(text: str | None, kind: pa.DataType, name: str) -> Any:
    """A nested value out of its JSON; `...` where it is none of the type."""
    try:
        value = None if text is None else parse_json(text)
    except ValueError:
        return ...
    return ... if _mismatch(value, kind, name) else value


def _read_jsonl(path: Path, where: str, schema: pa.Schema, findings: Findings, extra: str) -> pa.Table:
    plain = schema.remove_metadata()
    if path.stat().st_size == 0:
        return plain.empty_table()
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
            before, rows = len(findings.problems), _by_line(path, where, plain, findings, extra)
            if len(findings.problems) == before:
                what = f"the file is not readable as JSON lines ({_short(error)})"
                findings.table(where, None, what, "write it again", whole=True)
            return pa.Table.from_pylist(rows, schema=plain)
    return plain.empty_table()


def _by_line(path: Path, where: str, schema: pa.Schema, findings: Findings, extra: str) -> list[dict[str, Any]]:
    """Reads a refused file line by line: names what is wrong (JSON, encoding, keys, types), and keeps what is right."""
    kinds: dict[tuple[str | None, str], tuple[list[int], list[str]]] = {}
    kept: list[dict[str, Any]] = []
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.strip():
                continue
            kept.append({})
            for column, what, fix in _faults(raw, number, schema, extra, kept[-1]):
                rows, texts = kinds.setdefault((column, fix), ([], []))
                rows.append(len(kept) - 1)
                texts.append(f"line {number} {what}")
    for (column, fix), (rows, texts) in kinds.items():
        findings.cells(where, column, rows, texts.__getitem__, fix)
    return kept


def _faults(
    raw: bytes, number: int, schema: pa.Schema, extra: str, kept: dict[str, Any]
) -> Iterator[tuple[str | None, str, str]]:
    """(column, what, fix) of each fault of a line; its right values are put into `kept`."""
    try:
        value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text (byte 0x{raw[error.start]:02x} at place {error.start + 1})"
        yield None, what, "convert the file to UTF-8"
        return
    except (ValueError, RecursionError) as error:
        yield None, f"is not valid JSON ({_short(error)})", "correct or remove the line"
        return
    if not isinstance(value, dict):
        yield None, f"is not an object but {_shown(value)}", "write one {...} a line"
        return
    for key, content in value.items():
        if key not in schema.names:
            if extra == "error":
                yield key, f"has the unknown key '{key}' ({nearest(key, schema.names)})", "rename or remove the key"
        elif wrong := _mismatch(content, schema.field(key).type, key):
            yield wrong
        else:
            kept[key] = content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' stands twice")
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
    table: pa.Table, schema: pa.Schema, where: str, findings: Findings, *, required: Sequence[str] = ()
) -> pa.Table:
    """Brings a table to exactly the columns and types of a schema, losslessly; a column that does not fit becomes null.

    Args:
        table: any Arrow table.
        schema: the wanted schema.
        where: how problems call the table.
        findings: collects problems.
        required: columns that must be present; other absent columns become null.
    """
    names = table.column_names
    for name in sorted({n for n in names if names.count(n) > 1}):
        findings.table(where, name, f"the column stands {names.count(name)} times", "keep one of them", whole=True)
    for name in required:
        if name not in names:
            kind = describe(schema.field(name).type)
            findings.table(where, name, "the column is missing", f"add it ({kind})", whole=True)
    for name in names:
        if name not in schema.names:
            what = f"the column is not part of the schema ({nearest(name, schema.names)})"
            findings.table(where, name, what, "rename or remove it")
    columns = []
    for field in schema:
        columns.append(pa.nulls(table.num_rows, field.type))
        if names.count(field.name) != 1:
            continue
        column = table.column(field.name)
        try:
            column.validate(full=True)
        except pa.ArrowException as error:
            what = f"the column is damaged ({_short(error)})"
            findings.table(where, field.name, what, "write it again as UTF-8 text", whole=True)
            continue
        try:
            if misfit := _misfit(column.type, field.type, field.name):
                findings.table(where, *misfit, whole=True)
            else:
                columns[-1] = column if column.type == field.type else column.cast(field.type)
        except pa.ArrowException as error:
            what = f"a value does not fit {field.type} ({_short(error)})"
            findings.table(where, field.name, what, "correct the value", whole=True)
    return pa.Table.from_arrays(columns, schema=schema)


def _misfit(have: pa.DataType, wanted: pa.DataType, path: str) -> tuple[str, str, str] | None:
    """Why a cast to a type would lose or change something: (path, what is wrong, what to do); None where it does not."""
    if have == wanted or pa.types.is_null(have):
        return None
    if pa.types.is_dictionary(have):
        return _misfit(have.value_type, wanted, path)
    if pa.types.is_list(wanted) and any(f(have) for f in _LISTS):
        return _misfit(have.value_type, wanted.value_type, path)
    if pa.types.is_struct(wanted) and pa.types.is_struct(have):
        known = {field.name: field.type for field in wanted}
        for field in have:
            inner = f"{path}.{field.name}"
            if field.name not in known:
                return inner, f"the field is not part of the schema ({nearest(field.name, known)})", "rename it"
            if wrong := _misfit(field.type, known[field.name], inner):
                return wrong
        return None
    fits = any(test(wanted) and any(f(have) for f in from_) for test, from_ in _WIDENS)
    return None if fits else (path, f"the type is {have}, expected {describe(wanted)}", f"write the column as {wanted}")


_t = pa.types
_LISTS = (_t.is_list, _t.is_large_list, _t.is_fixed_size_list)
# Casts that keep the meaning: text to text, integer or bool to integer, number to float.
_WIDENS = (
    (_t.is_string, (_t.is_large_string, _t.is_string_view)),
    (_t.is_integer, (_t.is_integer, _t.is_boolean)),
    (_t.is_floating, (_t.is_integer, _t.is_floating, _t.is_decimal)),
)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."

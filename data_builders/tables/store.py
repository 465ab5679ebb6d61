"""Data folders: how the four tables lie on disk, and how they come back.

    items.parquet  users.parquet  events.parquet  requests/{train,valid,test}.parquet  meta.json  README.md

`README.md` is a Hugging Face dataset card, so `load_dataset(folder, "items")` and `load_dataset(folder, "requests")`
work on the folder as it stands, locally or pushed. A folder a person made by hand may hold `.jsonl` files instead of
parquet, a single `requests.parquet` without splits, and no `meta.json`; the `sidtune` reader takes those.

`meta.json`:

| key | value |
|---|---|
| `split` | `{"kind": "global_time" or "leave_one_out" or "source", "train_until": int or null, "valid_until": same}` |
| `statistics_until` | items' counts contain what happened strictly before this; null = cut per user, or no counts |
| `end` | last time that occurs; a later event is an error |
| `reader`, `counts`, `notes` | where the data came from and what was done to it |

Both `..._until` are exclusive: train is `time < train_until`, valid `train_until <= time < valid_until`, test the
rest. They are null where no single time separates the splits (leave-one-out): then each user has an own cut, see
`splits.training_cut`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sidtune.core.errors import DataError, nearest
from sidtune.core.folders import write_json
from sidtune.data_builders.tables.findings import Findings
from sidtune.data_builders.tables.schema import SCHEMAS, SPLITS, Tables
from sidtune.data_builders.tables.table_files import read_table

META_FILE = "meta.json"
REQUIRED = {
    "items": ("item_id",),
    "users": ("user_id",),
    "requests": ("request_id", "user_id", "time", "candidates"),
    "events": ("user_id", "item_id", "time", "action"),
}
SUFFIXES = (".parquet", ".jsonl", ".csv")
_ROW_GROUP = 100_000
ALL = "all"


@dataclass
class DataFolder:
    """A loaded data folder.

    Attributes:
        items, users, events: Arrow tables in the schemas of `schema.py`.
        requests: split name → Arrow table (`train`, `valid`, `test`; a split may have no rows).
        meta: see the module's docstring.
        path: where it was loaded from.
        files: table or split of the requests → name of its file, for those that have one.
    """

    items: pa.Table
    users: pa.Table
    events: pa.Table
    requests: dict[str, pa.Table]
    meta: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    files: dict[str, str] = field(default_factory=dict)


def save_tables(tables: Tables, folder: str | Path, split: dict[str, Any], meta: dict[str, Any]) -> None:
    """Writes tables as a data folder. Call it inside `core.folders.write_folder`, which makes it whole or nothing.

    Args:
        tables: with `split_of_request` set (by the reader or by `splits.apply_split`).
        folder: an existing (scratch) folder.
        split: `{"kind", "train_until", "valid_until"}`; becomes `meta["split"]`.
        meta: further keys of `meta.json`; `counts` and `notes` of the tables are added, `end` is filled in when absent.

    Raises:
        DataError: a table does not have its schema, or `split_of_request` is missing, too short or has an unknown name.
    """
    folder = Path(folder)
    for name, schema in SCHEMAS.items():
        table = getattr(tables, name)
        if not table.schema.equals(schema.arrow_schema):
            raise DataError(
                f"The table '{name}' has not the columns of its schema; build it with schema.table_from_columns."
            )
    names = split_names(tables)
    for name in ("items", "users", "events"):
        _write(getattr(tables, name), folder / f"{name}.parquet")
    (folder / "requests").mkdir(exist_ok=True)
    for part in SPLITS:
        rows = np.flatnonzero(names == part)
        whole = len(rows) == len(names)
        _write(tables.requests if whole else tables.requests.take(rows), folder / "requests" / f"{part}.parquet")
    record = {"split": split, "statistics_until": None, "reader": None, **meta}
    record["counts"] = {**tables.counts, **meta.get("counts", {})}
    record["notes"] = [*tables.notes, *meta.get("notes", [])]
    record.setdefault("end", last_time(tables.requests, tables.events))
    record["rows"] = {name: getattr(tables, name).num_rows for name in SCHEMAS}
    record["rows"]["requests_by_split"] = {part: int((names == part).sum()) for part in SPLITS}
    write_json(folder / META_FILE, record)
    (folder / "README.md").write_text(_card(names), encoding="utf-8")


def split_names(tables: Tables) -> np.ndarray:
    """`tables.split_of_request` as an array of text, checked (DataError when absent, too short or unknown)."""
    given = tables.split_of_request
    if given is None:
        raise DataError("The requests have no split yet; call splits.apply_split before saving.")
    if len(given) != tables.requests.num_rows:
        raise DataError(
            f"There are {tables.requests.num_rows} requests but {len(given)} split names; give one for each request."
        )
    names = np.asarray(given, dtype="U5") if len(given) else np.empty(0, dtype="U5")
    for name in sorted(set(np.unique(names)) - set(SPLITS)):
        raise DataError(f"The split '{name}' of a request is unknown ({nearest(str(name), SPLITS)})")
    return names


def last_time(requests: pa.Table, events: pa.Table) -> int | None:
    """Last time that occurs in requests and events, or None when both are empty."""
    times = [pc.max(table["time"]).as_py() for table in (requests, events) if table.num_rows]
    known = [time for time in times if time is not None]
    return max(known) if known else None


def _write(table: pa.Table, path: Path) -> None:
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        if table.num_rows:  # datasets cannot read a row group of no rows
            writer.write_table(table, row_group_size=_ROW_GROUP)


def load_folder(folder: str | Path) -> DataFolder:
    """Loads a data folder that `save_tables` wrote. Schemas are checked; contents are not (see
    `validate.check_folder`).

    Raises:
        DataError: a file is missing, damaged, or differs from its schema; all such problems are listed.
    """
    findings = Findings()
    loaded = read_own_folder(folder, findings, written=True)
    findings.raise_if_any()
    return loaded


def read_own_folder(folder: str | Path, findings: Findings, *, written: bool) -> DataFolder:
    """Reads a folder in our schema, collecting problems; what could not be read is null.

    Args:
        folder: the folder.
        findings: collects problems.
        written: True for a folder of `save_tables` (every file and column must be there); False for one made by hand
            (parquet, JSON lines or CSV, only `REQUIRED` columns, `users` may be missing, requests may lack splits: key
            `all`).

    Raises:
        DataError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"The data folder {folder} does not exist or is a file; check the path.")
    places = {name: (name, folder / name, written or name == "items") for name in ("items", "users", "events")}
    if (folder / "requests").is_dir():
        for path in sorted((folder / "requests").iterdir()):
            if path.suffix in SUFFIXES and path.stem not in SPLITS:
                what = f"'{path.stem}' is no split ({nearest(path.stem, SPLITS)})"
                findings.table(f"requests/{path.name}", None, what, "name the files train, valid and test")
        places |= {part: ("requests", folder / "requests" / part, written) for part in SPLITS}
    else:
        places[ALL] = ("requests", folder / "requests", written)
    files, tables = {}, {}
    for part, (name, place, needed) in places.items():
        schema = SCHEMAS[name].arrow_schema
        path = _find(folder, place, findings, needed)
        tables[part] = schema.empty_table()
        if path is not None:
            files[part] = path.relative_to(folder).as_posix()
            required = schema.names if written and path.suffix == ".parquet" else REQUIRED[name]
            tables[part] = read_table(path, files[part], schema, findings, required=required)
        elif needed:
            files[part] = place.relative_to(folder).as_posix() + SUFFIXES[0]
    three = [tables.pop(name) for name in ("items", "users", "events")]
    return DataFolder(*three, tables, read_meta(folder, findings, needed=written), folder, files)


def _find(folder: Path, place: Path, findings: Findings, needed: bool) -> Path | None:
    found = [path for suffix in SUFFIXES if (path := place.parent / f"{place.name}{suffix}").is_file()]
    if len(found) > 1:
        findings.table(found[1].name, None, f"the table also stands in {found[0].name}", "keep one of the two files")
    if not found and needed:
        where = place.relative_to(folder).as_posix() + SUFFIXES[0]
        there = ", ".join(sorted(path.name for path in place.parent.iterdir())[:6]) or "nothing"
        what = f"the file is missing in {place.parent}, which holds {there}"
        fix = f"add {' or '.join(place.name + suffix for suffix in SUFFIXES)}"
        findings.table(where, None, what, fix, whole=True)
    return found[0] if found else None


def read_meta(folder: Path, findings: Findings, *, needed: bool) -> dict[str, Any]:
    """Reads `meta.json`, collecting problems; {} when it is absent or damaged."""
    path, what = folder / META_FILE, "the file holds no JSON object"
    if not path.is_file() and not needed:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(value, dict):
            return value
    except FileNotFoundError:
        what = f"the file is missing in {folder}"
    except (ValueError, RecursionError) as error:
        what = f"the file is not readable JSON ({error})"
    findings.table(META_FILE, None, what, "build the data folder again", whole=True)
    return {}


def _card(names: np.ndarray) -> str:
    """Dataset card: the configurations `load_dataset` offers. It cannot load a split without rows, so those are left
    out."""
    lines = ["---", "configs:", "- config_name: requests", "  default: true", "  data_files:"]
    for part, hub_name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        if (names == part).any():
            lines += [f"  - split: {hub_name}", f"    path: requests/{part}.parquet"]
    for name in ("items", "users", "events"):
        lines += [f"- config_name: {name}", f"  data_files: {name}.parquet"]
    return "\n".join([*lines, "---", "", _CARD_TEXT])


_CARD_TEXT = """A sidtune data folder: items, users, events and requests as typed parquet. `meta.json` says where they
came from, how they were split by time and what was done to dirty input.
"""

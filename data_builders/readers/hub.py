"""Reader `hub`: tables out of `datasets.load_dataset`, from a local dataset folder or a Hugging Face id.

Each of the four tables names where it stands and which of its columns are ours:

    reader: hub
    path: my-org/my-shop            # or a local folder; a hub id is the only thing that needs the network
    options:
      items: {name: catalogue, columns: {item_id: asin, title: product_title}}
      events: {name: reviews, columns: {user_id: reviewer, item_id: asin, time: ts}, constants: {action: order}}

Without options the configurations `items`, `users`, `events` and `requests` (splits train, validation, test) are
read, which is what `store.save_tables` writes. Columns that are not ours are left out and named in the notes. Integer
ids become text and timestamps become seconds since 1970; every other type must fit the schema. Absent users and
requests are made from the log, as in the reader `sidtune`. Dataset scripts are never run.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, config, load_dataset, load_from_disk

from sidtune.core.config import build
from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.inputs import inputs_of
from sidtune.data_builders.readers.own import complete
from sidtune.data_builders.tables.schema import SCHEMAS, SPLITS, Tables
from sidtune.data_builders.tables.store import ALL, REQUIRED, DataFolder
from sidtune.data_builders.tables.table_files import Findings, conform

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OUR_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


@dataclass
class TableSource:
    """Where one table stands.

    Attributes:
        path: dataset folder or hub id; default: the reader's path.
        name: configuration of the dataset.
        split: split to read.
        splits: requests only: our split → theirs, for a source that prescribes the split; replaces `split`.
        data_files: file or pattern inside of the dataset.
        columns: our column → their column, where the names differ.
        constants: our column → one value for every row.
    """

    path: str | None = None
    name: str | None = None
    split: str = "train"
    splits: dict[str, str] | None = None
    data_files: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)


@dataclass
class Options:
    """Options of the reader.

    Attributes:
        items, users, requests, events: a mapping as `TableSource`; null = the source has no such table (not for
            items). All four null: our own layout.
        revision: revision of a hub dataset (commit or tag).
        requests_from_events: see the reader `sidtune`.
        cache_dir: where `datasets` keeps its Arrow files; default: its own cache. Nothing of local files stays there.
    """

    items: dict | None = None
    users: dict | None = None
    requests: dict | None = None
    events: dict | None = None
    revision: str | None = None
    requests_from_events: bool = True
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        self.sources()

    def sources(self) -> dict[str, TableSource]:
        """The tables that the source has."""
        given = {name: getattr(self, name) for name in SCHEMAS}
        if not any(given.values()):
            given = {name: {"name": name} for name in SCHEMAS}
            given["requests"]["splits"] = _OUR_SPLITS
        sources = {name: build(TableSource, value, f"reader 'hub', {name}") for name, value in given.items() if value}
        if "items" not in sources:
            raise ConfigError("reader 'hub': the option 'items' is missing; say where the catalogue stands.")
        for name, source in sources.items():
            _check_source(name, source)
        return sources


def read(path: str, **options: Any) -> Tables:
    """Reads the tables; see the module's docstring."""
    chosen = build(Options, options, "reader 'hub'")
    sources = chosen.sources()
    findings, notes = Findings(), []
    tables = {name: SCHEMAS[name].arrow_schema.empty_table() for name in SCHEMAS}
    requests = {ALL: tables["requests"]}
    for name, source in sources.items():
        if source.splits:
            parts = {
                ours: _table(path, name, source, theirs, chosen, findings, notes)
                for ours, theirs in source.splits.items()
            }
            requests = {part: parts.get(part, tables["requests"]) for part in SPLITS}
        elif name == "requests":
            requests = {ALL: _table(path, name, source, source.split, chosen, findings, notes)}
        else:
            tables[name] = _table(path, name, source, source.split, chosen, findings, notes)
    findings.raise_if_any()
    folder = DataFolder(tables["items"], tables["users"], tables["events"], requests)
    made = complete(folder, users_given="users" in sources, requests_from_events=chosen.requests_from_events)
    made.notes[:0] = list(dict.fromkeys(notes))
    return made


def _check_source(name: str, source: TableSource) -> None:
    columns = SCHEMAS[name].arrow_schema.names
    for column in [*source.columns, *source.constants]:
        if column not in columns:
            raise ConfigError(
                f"reader 'hub', {name}: there is no column '{column}' in our schema ({nearest(column, columns)})"
            )
    if source.splits and (name != "requests" or not set(source.splits) <= set(SPLITS)):
        raise ConfigError(f"reader 'hub', {name}: 'splits' belongs to requests and names train, valid and test only.")


def _table(
    path: str, name: str, source: TableSource, split: str, chosen: Options, findings: Findings, notes: list[str]
) -> pa.Table:
    schema = SCHEMAS[name].arrow_schema
    where = f"{source.path or path}, {source.name or 'default'}, {split}"
    raw = _load(source.path or path, source, split, chosen)
    theirs = {column: source.columns.get(column, column) for column in schema.names}
    for column in source.columns:
        if theirs[column] not in raw.column_names:
            what = f"the column '{theirs[column]}' is not in the dataset ({nearest(theirs[column], raw.column_names)})"
            findings.table(where, column, what, "correct the option 'columns'")
            return schema.empty_table()
    found = {ours: _soften(raw[other], ours) for ours, other in theirs.items() if other in raw.column_names}
    for column, value in source.constants.items():
        found[column] = pa.chunked_array([pa.repeat(pa.scalar(value), raw.num_rows)])
    unused = sorted(set(raw.column_names) - set(theirs.values()))
    if unused:
        notes.append(f"Columns of {source.path or path} ({name}) that are not used: {', '.join(unused)}.")
    return conform(pa.table(found), schema, where, findings, required=REQUIRED[name])


def _soften(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """The two conversions that public data sets need: integer ids to text, timestamps to seconds."""
    if name.endswith("_id") and pa.types.is_integer(column.type):
        return column.cast(pa.string())
    if name == "time" and pa.types.is_timestamp(column.type):
        return column.cast(pa.timestamp("s", tz=column.type.tz), safe=False).cast(pa.int64())
    return column


@contextlib.contextmanager
def _cache(local: Path, source: TableSource, chosen: Options) -> Iterator[str | None]:
    """Where `datasets` keeps what it makes: for local files a folder of this call alone.

    Its cache knows a local file by name and time, so that a file replaced with its old time (`cp -p`, `tar`, `rsync -t`) would be
    read as it was. What was read stays mapped when the folder is gone.
    """
    if not inputs_of({"path": str(local), "data_files": source.data_files}):
        yield chosen.cache_dir
        return
    keep = Path(chosen.cache_dir or config.HF_DATASETS_CACHE)
    keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="local-", dir=keep) as folder:
        yield folder


def _load(path: str, source: TableSource, split: str, chosen: Options) -> pa.Table:
    local = Path(path).expanduser()
    if not local.exists() and (not _HUB_ID.fullmatch(path) or path.startswith(".")):
        raise DataError(
            f"The dataset folder {path} does not exist, and it is no Hugging Face id either; check the path."
        )
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            found = load_from_disk(str(local))
            found = found[split] if isinstance(found, DatasetDict) else found
        else:
            with _cache(local, source, chosen) as cache:
                found = load_dataset(
                    str(local) if local.exists() else path,
                    source.name,
                    split=split,
                    data_files=source.data_files,
                    revision=None if local.exists() else chosen.revision,
                    cache_dir=cache,
                )
    except Exception as error:  # noqa: BLE001 - whatever the library raises, the user needs one sentence
        reason = " ".join(str(error).split())[:300]
        kind = "local dataset" if local.exists() else "hub dataset"
        part = f"configuration {source.name or 'default'}, split {split}"
        raise DataError(f"The {kind} {path} ({part}) could not be loaded: {reason}.") from None
    assert isinstance(found, Dataset)
    return found.with_format("arrow")[:]

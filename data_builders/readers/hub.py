"""Reader `hub`: tables out of `datasets.load_dataset`, from a local dataset folder or a Hugging Face id.

Each of the four tables names where it stands and which of its columns are ours:

    reader: hub
    path: my-org/my-shop            # or a local folder; a hub id is the only thing that needs the network
    options:
      items: {name: catalogue, columns: {item_id: asin, title: details.name, description: null}, flatten: [title]}
      events:
        {name: log, columns: {user_id: who, item_id: asin, time: ms}, scale: {time: 0.001}, constants: {action: order}}

Without options the configurations `items`, `users`, `events` and `requests` (splits train, validation, test) are
read, which is what `store.save_tables` writes. Columns that are not ours are left out and named in the notes. Integer
ids become text and timestamps become seconds since 1970; every other type must fit the schema. Absent users and
requests are made from the log, as in the reader `sidtune`. Dataset scripts are never run.

CSV and JSON files know no types, so `datasets` only finds them; they are read here. Ids and texts stay as they are written:
`0007` keeps its zeros, `NA` and `null` are words, and only an empty cell of a CSV file is null.
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
import pyarrow.compute as pc
from datasets import Dataset, DatasetBuilder, DatasetDict, DownloadManager, config, load_dataset_builder, load_from_disk

from sidtune.core.config import build
from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.inputs import inputs_of
from sidtune.data_builders.readers.own import complete
from sidtune.data_builders.readers.raw_files import json_table
from sidtune.data_builders.readers.reader import reader
from sidtune.data_builders.tables.findings import Findings
from sidtune.data_builders.tables.schema import SCHEMAS, SPLITS, Tables
from sidtune.data_builders.tables.store import ALL, META_FILE, REQUIRED, DataFolder
from sidtune.data_builders.tables.table_files import conform, csv_table, from_text
from sidtune.data_builders.tables.validate import validate_loaded

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
        columns: our column → their column, where the names differ; `outer.inner` reaches into an object, null leaves the
            column out.
        flatten: our columns whose lists of texts become one text, the parts joined by a blank.
        scale: our column → factor, such as 0.001 for times in milliseconds; whole numbers are rounded down.
        constants: our column → one value for every row.
    """

    path: str | None = None
    name: str | None = None
    split: str = "train"
    splits: dict[str, str] | None = None
    data_files: str | None = None
    columns: dict[str, str | None] = field(default_factory=dict)
    flatten: list[str] = field(default_factory=list)
    scale: dict[str, float] = field(default_factory=dict)
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


@reader("hub", Options, folder=False)
def read(path: str, chosen: Options) -> Tables:
    """Reads the tables; see the module's docstring."""
    sources = chosen.sources()
    findings, notes, files = Findings(), [], {}
    tables = {name: SCHEMAS[name].arrow_schema.empty_table() for name in SCHEMAS}
    requests = {ALL: tables["requests"]}
    for name, source in sources.items():
        parts = source.splits or {ALL if name == "requests" else name: source.split}
        for part, theirs in parts.items():
            place = ", ".join(filter(None, (source.path or path, source.name, source.data_files, theirs)))
            files[part] = f"{name} ({place})"
            tables[part] = _table(path, name, source, theirs, chosen, files[part], findings, notes)
        if source.splits:
            requests = {part: tables.pop(part, tables["requests"]) for part in SPLITS}
        elif name == "requests":
            requests = {ALL: tables.pop(ALL)}
    events = tables["events"]
    if "requests" not in sources and events["request_id"].null_count < events.num_rows:
        place = events.schema.get_field_index("request_id")
        nothing = pa.nulls(events.num_rows, pa.string())
        tables["events"] = events.set_column(place, events.schema.field(place), nothing)
        notes.append("The source has no requests, so the request ids of its events are left out.")
    folder = DataFolder(tables["items"], tables["users"], tables["events"], requests, files=files)
    findings.told[META_FILE, None] = None  # there is none, and a catalogue alone is a source too
    validate_loaded(folder, findings)
    findings.raise_if_any()
    made = complete(folder, users_given="users" in sources, requests_from_events=chosen.requests_from_events)
    made.notes[:0] = list(dict.fromkeys(notes))
    return made


def _check_source(name: str, source: TableSource) -> None:
    schema = SCHEMAS[name].arrow_schema
    for column in [*source.columns, *source.flatten, *source.scale, *source.constants]:
        if column not in schema.names:
            raise ConfigError(
                f"reader 'hub', {name}: there is no column '{column}' in our schema ({nearest(column, schema.names)})"
            )
    for column, factor in source.scale.items():
        if pa.types.is_nested(kind := schema.field(column).type) or pa.types.is_string(kind) or not factor > 0:
            raise ConfigError(
                f"reader 'hub', {name}: 'scale' takes numeric columns and factors above 0, got {column}: {factor}."
            )
    for column in source.flatten:
        if not pa.types.is_string(schema.field(column).type):
            raise ConfigError(f"reader 'hub', {name}: 'flatten' makes one text of a list, but '{column}' is no text.")
    if source.splits and (name != "requests" or not set(source.splits) <= set(SPLITS)):
        raise ConfigError(f"reader 'hub', {name}: 'splits' belongs to requests and names train, valid and test only.")


def _table(
    path: str,
    name: str,
    source: TableSource,
    split: str,
    chosen: Options,
    where: str,
    findings: Findings,
    notes: list[str],
) -> pa.Table:
    schema = SCHEMAS[name].arrow_schema
    raw, is_text = _load(source.path or path, source, split, chosen, where, findings)
    theirs = {column: source.columns.get(column, column) for column in schema.names}
    theirs = {ours: other for ours, other in theirs.items() if other is not None and ours not in source.constants}
    found: dict[str, Any] = {}
    for ours, other in theirs.items():
        column = _column(raw, other)
        if column is not None:
            found[ours] = _softened(column, schema.field(ours), source, is_text, where, findings)
        elif ours in source.columns:
            what = f"the column '{other}' is not in the dataset ({nearest(other, raw.column_names)})"
            findings.table(where, ours, what, "correct the option 'columns'", whole=True)
    for ours, value in source.constants.items():
        found[ours] = pa.repeat(pa.scalar(value), raw.num_rows)
    used = {other for one in theirs.values() for other in (one, one.split(".")[0])}
    if unused := sorted(set(raw.column_names) - used):
        notes.append(f"Columns of {source.path or path} ({name}) that are not used: {', '.join(unused)}.")
    required = [column for column in REQUIRED[name] if not findings.broken(where, column)]
    return conform(pa.table(found), schema, where, findings, required=required)


def _column(raw: pa.Table, name: str) -> Any:
    """A column by name, or by `outer.inner` a field of an object; None where there is none."""
    if name in raw.column_names:
        return raw[name]
    outer, *inner = name.split(".")
    column = raw[outer] if outer in raw.column_names else None
    for part in inner:
        if column is None or not pa.types.is_struct(column.type) or column.type.get_field_index(part) < 0:
            return None
        column = pc.struct_field(column, part)
    return column


def _softened(column: Any, wanted: pa.Field, source: TableSource, is_text: bool, where: str, findings: Findings) -> Any:
    """What public data sets need, and the options ask for, so that a column can fit ours."""
    name, kind = wanted.name, wanted.type
    if name in source.flatten and pa.types.is_list(column.type) and pa.types.is_string(column.type.value_type):
        texts = [None if one is None else " ".join(part for part in one if part) or None for one in column.to_pylist()]
        column = pa.array(texts, pa.string())
    if name.endswith("_id") and pa.types.is_integer(column.type):
        return column.cast(pa.string())
    if name == "time" and pa.types.is_timestamp(column.type):
        return column.cast(pa.timestamp("s", tz=column.type.tz), safe=False).cast(pa.int64())
    factor = source.scale.get(name)
    if is_text:
        column = from_text(column, kind if factor is None else pa.float64(), where, name, findings)
    if factor is None or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return column
    inverse = round(1 / factor)  # 0.001 is no binary fraction: a division by 1000 is exact where a product is not
    exact = inverse > 1 and abs(inverse * factor - 1) < 1e-9
    values = column.cast(pa.float64())
    values = pc.divide(values, float(inverse)) if exact else pc.multiply(values, factor)
    return pc.floor(values).cast(kind) if pa.types.is_integer(kind) else values


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


def _load(
    path: str, source: TableSource, split: str, chosen: Options, where: str, findings: Findings
) -> tuple[pa.Table, bool]:
    """The raw table, and whether its columns are text whatever they mean (CSV)."""
    local = Path(path).expanduser()
    if not local.exists() and (not _HUB_ID.fullmatch(path) or path.startswith(".")):
        raise DataError(
            f"The dataset folder {path} does not exist, and it is no Hugging Face id either; check the path."
        )
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            saved = load_from_disk(str(local))
            found = saved[split] if isinstance(saved, DatasetDict) else saved
            return found.with_format("arrow")[:], False
        with _cache(local, source, chosen) as cache:
            builder = load_dataset_builder(
                str(local) if local.exists() else path,
                source.name,
                data_files=source.data_files,
                revision=None if local.exists() else chosen.revision,
                cache_dir=cache,
            )
            if builder.name in ("csv", "json"):
                return _read_text_files(builder, split, where, findings), builder.name == "csv"
            builder.download_and_prepare()
            made = builder.as_dataset(split)
            assert isinstance(made, Dataset)
            return made.with_format("arrow")[:], False
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the library raises, the user needs one sentence
        reason = " ".join(str(error).split())[:300]
        kind = "local dataset" if local.exists() else "hub dataset"
        part = f"configuration {source.name or 'default'}, split {split}"
        raise DataError(f"The {kind} {path} ({part}) could not be loaded: {reason}.") from None


def _read_text_files(builder: DatasetBuilder, split: str, where: str, findings: Findings) -> pa.Table:
    """The CSV or JSON files of a split, one below the other."""
    files = builder.config.data_files or {}
    if split not in files:
        raise DataError(f"The dataset of {where} has no split '{split}' ({nearest(split, files)})")
    places = list(files[split])
    if any("://" in place for place in places):
        places = DownloadManager().download_and_extract(places)
    if builder.name == "csv":
        tables = [csv_table(Path(place), where, findings, builder.config.sep) for place in places]
    else:
        tables = [json_table(Path(place)) for place in places]
    return pa.concat_tables(
        [one for one in tables if one.num_rows] or tables[:1], promote_options="permissive"
    ).combine_chunks()

"""Reader `sidtune`: a folder in our own schema, as parquet or JSON lines.

The folder holds `items`, `events`, maybe `users` and `requests` (one file, or `requests/{train,valid,test}`), each
`.parquet` or `.jsonl`. Absent optional columns become null; absent users are derived from the log; absent requests
are made out of the events (each click, like or order with a past becomes a recommendation request). Types are never
guessed: a number written as text is refused. Everything is read column by column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.config import build
from sidtune.data_builders.tables.schema import SPLITS, Tables, table_from_columns
from sidtune.data_builders.tables.splits import need, next_item_requests, tie_events
from sidtune.data_builders.tables.store import ALL, DataFolder, read_own_folder
from sidtune.data_builders.tables.table_files import Findings
from sidtune.data_builders.tables.validate import validate_loaded


@dataclass
class Options:
    """Options of the reader.

    Attributes:
        requests_from_events: make requests out of events when the folder has none (default), or return none.
    """

    requests_from_events: bool = True


def read(path: str, **options: Any) -> Tables:
    """Reads a folder in our schema."""
    chosen = build(Options, options, "reader 'sidtune'")
    findings = Findings()
    folder = read_own_folder(path, findings, written=False)
    validate_loaded(folder, findings)
    findings.raise_if_any()
    return complete(folder, users_given="users" in folder.files, requests_from_events=chosen.requests_from_events)


def complete(folder: DataFolder, *, users_given: bool, requests_from_events: bool) -> Tables:
    """Fills in what a source in our schema left out: users, requests, and the order of the splits."""
    counts, notes = {}, []
    names: list[str] | None = None
    if ALL in folder.requests:
        requests = folder.requests[ALL]
    else:
        requests = pa.concat_tables([folder.requests[part] for part in SPLITS])
        names = [part for part in SPLITS for _ in range(folder.requests[part].num_rows)]
    users = folder.users
    if not users_given:
        users = users_of(requests, folder.events)
        counts["users_made_from_the_log"] = users.num_rows
    events = folder.events
    if not requests.num_rows and requests_from_events and events.num_rows:
        need(events, "events", ("user_id", "time", "action"))
        requests, rows = next_item_requests(events)
        names = None
        counts["requests_made_from_events"] = requests.num_rows
        notes.append("The source has no requests: each click, like or order with a past became a request for its item.")
        events = tie_events(events, rows, requests["request_id"])
    return Tables(folder.items, users, requests, events, names, counts, notes)


def users_of(*logs: pa.Table) -> pa.Table:
    """A users table (no profiles) of everybody named in the logs, in order of first occurrence."""
    ids = pa.chunked_array([chunk for log in logs for chunk in log["user_id"].chunks], pa.string())
    known = pc.drop_null(pc.unique(ids))
    return table_from_columns("users", {"user_id": known}, len(known))

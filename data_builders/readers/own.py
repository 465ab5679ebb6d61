"""Reader `sidtune`: a folder in our own schema, as parquet, JSON lines or CSV.

The folder holds `items`, `events`, maybe `users` and `requests` (one file, or `requests/{train,valid,test}`), each
`.parquet`, `.jsonl` or `.csv`. Absent optional columns become null; absent users are derived from the log; absent requests
are made out of the events (each click, like or order with a past becomes a recommendation request). Types are never
guessed: a number written as text is refused. Everything is read column by column.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sidtune.data_builders.readers.reader import reader, without_repeats
from sidtune.data_builders.tables.findings import Findings
from sidtune.data_builders.tables.schema import SPLITS, Tables, table_from_columns
from sidtune.data_builders.tables.splits import need, next_item_requests, tie_events
from sidtune.data_builders.tables.store import ALL, DataFolder, read_own_folder
from sidtune.data_builders.tables.validate import validate_loaded


@dataclass
class Options:
    """Options of the reader.

    Attributes:
        requests_from_events: make requests out of events when the folder has none (default), or return none.
    """

    requests_from_events: bool = True


@reader("sidtune", Options)
def read(folder: Path, chosen: Options) -> Tables:
    """Reads a folder in our schema."""
    findings = Findings()
    loaded = read_own_folder(folder, findings, written=False)
    validate_loaded(loaded, findings)
    findings.raise_if_any()
    return complete(loaded, users_given="users" in loaded.files, requests_from_events=chosen.requests_from_events)


def complete(folder: DataFolder, *, users_given: bool, requests_from_events: bool) -> Tables:
    """Fills in what a source in our schema left out: users, requests, and the order of the splits."""
    names: list[str] | None = None
    if ALL in folder.requests:
        requests = folder.requests[ALL]
    else:
        requests = pa.concat_tables([folder.requests[part] for part in SPLITS])
        names = [part for part in SPLITS for _ in range(folder.requests[part].num_rows)]
    made = Tables(folder.items, folder.users, requests, folder.events, names)
    if not users_given:
        made.users = users_of(made.requests, made.events)
        made.counts["users_made_from_the_log"] = made.users.num_rows
    if not made.requests.num_rows and requests_from_events and made.events.num_rows:
        made = without_repeats(made)  # a request made of each would hide that they are alike
        need(made.events, "events", ("user_id", "time", "action"))
        made.requests, rows = next_item_requests(made.events)
        made.events = tie_events(made.events, rows, made.requests["request_id"])
        made.split_of_request = None
        made.counts["requests_made_from_events"] = made.requests.num_rows
        note = "The source has no requests: each click, like or order with a past became a request for its item."
        made.notes.append(note)
    return made


def users_of(*logs: pa.Table) -> pa.Table:
    """A users table (no profiles) of everybody named in the logs, in order of first occurrence."""
    ids = pa.chunked_array([chunk for log in logs for chunk in log["user_id"].chunks], pa.string())
    known = pc.drop_null(pc.unique(ids))
    return table_from_columns("users", {"user_id": known}, len(known))

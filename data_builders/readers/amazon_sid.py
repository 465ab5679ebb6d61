"""Reader `amazon_sid`: the layout of the MiniOneRec data (`*.item.json`, `*.valid.csv`, `*.test.csv`, maybe
`*.train.csv`).

Each row of a CSV is one purchase with up to ten purchases before it (a sliding window), in the order of time of the
whole shop, without the times. The reader puts each user's windows together into one sequence and gives it integer
times:

* The rows of all files lie one after the other, `stride` (longest window + 1) apart: first train, then valid, then
  test rows. The split time T is the place of the first test row.
* What the first window of a user shows and no row buys lies before everything when the user's first row is a train or
  valid row (the publisher makes a row of every later purchase, so these are older), and between T and that row when
  the user has test rows only: training never sees those.
* What a later window shows in addition (a gap in the rows) lies between the user's previous row and this one.

So `History.before` a request ends with the row's own window, and the statement is checked here for every row and
counted (`histories_not_reproduced`). Without a train file, valid rows are training data except the last `valid_share`
of them in time, which become the valid split: a cut by time, so no validation answer is in the training part of
anybody's sequence.

Descriptions are Python lists written as text, with HTML, CSS and entities; see `text_cleaning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.text import parse_json
from sidtune.data_builders.readers.own import users_of
from sidtune.data_builders.readers.raw_files import one_file, read_json_object
from sidtune.data_builders.readers.reader import reader
from sidtune.data_builders.readers.text_cleaning import clean_html, parse_list_text
from sidtune.data_builders.tables.findings import Findings
from sidtune.data_builders.tables.history import History
from sidtune.data_builders.tables.schema import Tables, table_from_columns, table_from_rows
from sidtune.data_builders.tables.splits import candidate_lists
from sidtune.data_builders.tables.table_files import csv_table

_COLUMNS = ("user_id", "history_item_id", "item_id")
_FILES = ("train", "valid", "test")


@dataclass
class Options:
    """Options of the reader.

    Attributes:
        valid_share: share of the valid rows, the latest ones, that become the valid split when there is no train file.
        category: file name prefix (`Office_Products`) where a folder holds several; default: the only one.
    """

    valid_share: float = 0.1
    category: str = "*"

    def __post_init__(self) -> None:
        if not 0 <= self.valid_share < 1:
            raise ConfigError(f"reader 'amazon_sid': valid_share must be from 0 to below 1, got {self.valid_share}.")


@dataclass
class _Row:
    user: str
    history: list[str]
    target: str
    file: str
    title: str | None


@reader("amazon_sid", Options)
def read(folder: Path, chosen: Options) -> Tables:
    """Reads the folder; see the module's docstring for times and splits."""
    counts: dict[str, int] = {}
    items = _read_items(one_file(folder, f"{chosen.category}.item.json"), counts)
    rows = [row for file in _FILES for row in _read_rows(folder, chosen.category, file)]
    rows, counts["repeated_rows_dropped"] = _once(rows)
    if not any(row.file == "test" for row in rows) or all(row.file == "test" for row in rows):
        raise DataError(f"The folder {folder} must hold valid (or train) rows and test rows; a file is empty.")
    _add_unknown(items, rows, counts)
    events, times, windows = _sequences(rows, counts)
    split = _splits(rows, chosen.valid_share)
    tables = _tables(items, rows, events, times, split, counts)
    counts["histories_not_reproduced"] = _check_windows(tables, windows)
    return tables


def _read_items(path: Path | None, counts: dict[str, int]) -> dict[str, dict[str, Any]]:
    assert path is not None
    raw, repeated = read_json_object(path)
    counts.update(duplicate_items_dropped=repeated, html_cleaned=0, empty_titles=0, empty_descriptions=0)
    counts.update(empty_brands=0, descriptions_not_a_list=0)
    items = {}
    for key, value in raw.items():
        if not isinstance(value, dict):
            raise DataError(f"The file {path} must map item ids to objects, but '{key}' is a {type(value).__name__}.")
        texts = {}
        for name in ("title", "description", "brand"):
            dirty = value.get(name) or ""
            if not isinstance(dirty, str):
                raise DataError(
                    f"The file {path} has no text as '{name}' of item '{key}' but {dirty!r:.40}; write a text."
                )
            parts, proper = parse_list_text(dirty) if name == "description" else ([dirty], True)
            counts["descriptions_not_a_list"] += not proper
            plain = " ".join(" ".join(parts).split())
            texts[name] = clean_html(plain)
            counts["html_cleaned"] += texts[name] != plain
        counts["empty_titles"] += not texts["title"]
        counts["empty_descriptions"] += not texts["description"]
        counts["empty_brands"] += not texts["brand"]
        items[key] = {"item_id": key, "category": _category(value.get("categories"))}
        items[key].update({name: text or None for name, text in texts.items()})
    return items


def _category(value: Any) -> list[str] | None:
    parts = value if isinstance(value, list) else parse_list_text(str(value or ""))[0]
    clean = [text for part in parts if isinstance(part, str) and (text := clean_html(part))]
    return clean or None


def _read_rows(folder: Path, category: str, file: str) -> list[_Row]:
    path = one_file(folder, f"{category}.{file}.csv", needed=file == "test")
    if path is None:
        return []
    findings, where = Findings(), str(path)
    table = csv_table(path, where, findings)
    for name in _COLUMNS:
        if name not in table.column_names:
            what = f"the column is missing ({nearest(name, table.column_names)})"
            findings.table(where, name, what, "add it or correct its name", whole=True)
    findings.raise_if_any()
    texts = [table[name].to_pylist() for name in _COLUMNS]
    windows = [_window(text) for text in texts[1]]
    for name, values in zip(_COLUMNS, (texts[0], windows, texts[2]), strict=True):
        wrong = [row for row, value in enumerate(values) if value is None]
        seen = table[name].to_pylist()
        what = [
            f"{'a list of item ids' if name == _COLUMNS[1] else 'an id'} belongs here, got {seen[row]!r:.60}"
            for row in wrong
        ]
        findings.rows(where, name, wrong, what.__getitem__, "correct or remove the row")
    findings.raise_if_any()
    titles = table["item_title"].to_pylist() if "item_title" in table.column_names else [None] * table.num_rows
    return [_Row(*row, file, title) for *row, title in zip(texts[0], windows, texts[2], titles, strict=True)]


def _window(text: str | None) -> list[str] | None:
    """The item ids of a window, None where it is no list of them."""
    try:
        parts = parse_json(text or "")
    except ValueError:
        return None
    good = isinstance(parts, list) and all(isinstance(part, (int, str)) for part in parts)
    return [str(part) for part in parts] if good else None


def _once(rows: list[_Row]) -> tuple[list[_Row], int]:
    """The rows without those that can only repeat an earlier one, and how many these were.

    A row may stand twice where somebody bought one thing over and over: then its window is full of it.
    """
    longest = max((len(row.history) for row in rows), default=0)
    seen: set[tuple] = set()
    last: dict[str, tuple] = {}
    kept = []
    for row in rows:
        key = (row.user, *row.history, row.target)
        full = len(row.history) == longest
        if (key in seen and not full) or (last.get(row.user) == key and set(row.history) != {row.target}):
            continue
        seen.add(key)
        last[row.user] = key
        kept.append(row)
    return kept, len(rows) - len(kept)


def _add_unknown(items: dict[str, dict[str, Any]], rows: list[_Row], counts: dict[str, int]) -> None:
    """Items that only the rows know get an entry, with the title of a row where they are its target."""
    before = len(items)
    for row in rows:
        if row.target not in items:
            items[row.target] = {"item_id": row.target, "title": clean_html(row.title) or None}
    for row in rows:
        for item in row.history:
            items.setdefault(item, {"item_id": item})
    counts["unknown_items_added"] = len(items) - before


def _sequences(rows: list[_Row], counts: dict[str, int]) -> tuple[list[tuple], np.ndarray, list[list[str]]]:
    """Merges the windows of each user: events (user, item, time, number of the row that bought it or None), and row
    times."""
    longest = max(len(row.history) for row in rows)
    stride = longest + 1
    times = longest + stride * np.arange(1, len(rows) + 1, dtype=np.int64)
    known: dict[str, list[str]] = {}
    events: list[tuple[str, str, int, int | None]] = []
    counts.update(windows_with_a_gap=0, windows_that_restart=0)
    for number, row in enumerate(rows):
        sequence = known.setdefault(row.user, [])
        begin = longest if not sequence and row.file != "test" else int(times[number])
        overlap = _overlap(sequence, row.history, longest)
        new = row.history[overlap:]
        if sequence and new:
            counts["windows_with_a_gap"] += 1
            counts["windows_that_restart"] += overlap == 0
        events += [(row.user, item, begin - len(new) + place, None) for place, item in enumerate(new)]
        events.append((row.user, row.target, int(times[number]), number))
        sequence += [*new, row.target]
    return events, times, [row.history for row in rows]


def _overlap(sequence: list[str], window: list[str], longest: int) -> int:
    """How many items at the begin of the window are already at the end of the sequence: the longest such match."""
    for size in range(min(len(sequence), len(window), longest), 0, -1):
        if sequence[-size:] == window[:size]:
            return size
    return 0


def _splits(rows: list[_Row], valid_share: float) -> list[str]:
    if any(row.file == "train" for row in rows):
        return [row.file for row in rows]
    count = sum(row.file == "valid" for row in rows)
    train = count - round(count * valid_share)
    return ["train"] * train + ["valid"] * (count - train) + ["test"] * (len(rows) - count)


def _tables(
    items: dict[str, dict[str, Any]],
    rows: list[_Row],
    events: list[tuple],
    times: np.ndarray,
    split: list[str],
    counts: dict[str, int],
) -> Tables:
    ids = [f"{row.file}-{number}" for number, row in enumerate(rows)]
    events = sorted(events, key=lambda event: event[2])
    columns = {
        "user_id": [event[0] for event in events],
        "item_id": [event[1] for event in events],
        "time": [event[2] for event in events],
        "action": ["order"] * len(events),
        "request_id": [None if event[3] is None else ids[event[3]] for event in events],
    }
    log = table_from_columns("events", columns, len(events))
    bought = {"item_id": [row.target for row in rows], "order": [1] * len(rows)}
    requests = table_from_columns(
        "requests",
        {
            "request_id": ids,
            "user_id": [row.user for row in rows],
            "time": times,
            "candidates": candidate_lists(bought, np.arange(len(rows) + 1)),
        },
        len(rows),
    )
    users = users_of(requests, log)
    counts.update(rows=len(rows), events_from_windows_only=len(events) - len(rows))
    return Tables(table_from_rows("items", list(items.values())), users, requests, log, split, counts, _notes(rows))


def _notes(rows: list[_Row]) -> list[str]:
    notes = [
        "The source has no times. Times are ordinals: rows keep their order in the files, windows fill the rest.",
        "Purchases that only windows of test rows show lie after the split time and before the user's first test row, "
        "so training cannot see them. All other older purchases lie before every request.",
        "Candidates hold only what was bought (order = 1); what else was shown, exposures and clicks are unknown.",
    ]
    if not any(row.file == "train" for row in rows):
        notes.append(
            "The publisher's train file is absent: valid rows are the training data, the latest the valid split. "
            "Published numbers of this data set do not apply."
        )
    return notes


def _check_windows(tables: Tables, windows: list[list[str]]) -> int:
    """How many requests have a history whose end is not the window of their row (0 on the published data)."""
    found = History(tables.events).before(
        tables.requests["user_id"], tables.requests["time"].to_numpy(), max(len(window) for window in windows)
    )
    items = tables.events["item_id"].take(found.rows).to_pylist()
    lists = (items[a:b] for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True))
    return sum(mine != window for mine, window in zip(lists, windows, strict=True))

"""Validation: every problem of a data folder in one report, each with table, row, column, what is wrong and what to do.

`validate_folder` returns the list, `check_folder` raises it as one DataError, `check_tables` does the same for tables
in memory. All checks are column operations; of one kind of problem the first five rows are listed and the others
counted, so a million bad rows are still one page.

Rules: ids are unique, not null, not blank; users and items named anywhere exist; prices and dwell times are finite
and not negative; counts are not negative and clicks do not exceed exposures; labels are 0, 1 or null; a position or
an item occurs once in a request; times are integers from 0 to 100,000,000,000 (seconds; later looks like
milliseconds) and not after the stated end (`meta.end`) or, where none is stated, not after tomorrow; actions are
those of `ACTIONS`; an event belongs to a request of its own user and is not earlier than it; splits do not overlap in
time and statistics end with the training time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import DataError, Problem, nearest
from sidtune.data_builders.tables.columns import one_array
from sidtune.data_builders.tables.history import ACTIONS
from sidtune.data_builders.tables.schema import SPLITS, Tables
from sidtune.data_builders.tables.splits import KINDS
from sidtune.data_builders.tables.store import ALL, META_FILE, SUFFIXES, DataFolder, read_own_folder
from sidtune.data_builders.tables.table_files import Findings

LATEST_TIME = 100_000_000_000
_DAY = 86_400
_LABELS = ("click", "like", "order")


def validate_folder(folder: str | Path) -> list[Problem]:
    """Lists all problems of a data folder in our schema (parquet or JSON lines); an empty list means it is sound.

    A folder with `meta.json` must be complete, as `store.save_tables` writes it; one without may lack optional
    columns, the `users` table and the split of the requests.

    Raises:
        DataError: the folder does not exist.
    """
    findings = Findings()
    written = (Path(folder) / META_FILE).is_file()
    loaded = read_own_folder(folder, findings, written=written)
    validate_loaded(loaded, findings)
    return findings.problems


def validate_loaded(loaded: DataFolder, findings: Findings) -> None:
    """Adds the problems of a folder that `store.read_own_folder` read to its findings; problems name the files."""
    assert loaded.path is not None
    unread = {problem.where.split(".")[0].split("/")[0] for problem in findings.problems}
    found_users = any((loaded.path / f"users{suffix}").is_file() for suffix in SUFFIXES)
    _Checks(findings, loaded, _file_names(loaded.path), unread, users_given=found_users).run()


def check_folder(folder: str | Path) -> None:
    """Raises DataError with all problems of a data folder, see `validate_folder`."""
    problems = validate_folder(folder)
    if problems:
        raise DataError(problems)


def validate_tables(tables: Tables, meta: dict[str, Any] | None = None) -> list[Problem]:
    """Lists all problems of tables in memory, for example of what a reader returned.

    Args:
        tables: in the schemas of `schema.py`.
        meta: optional `end`, `split`, `statistics_until` as in `meta.json`.
    """
    findings = Findings()
    folder = DataFolder(tables.items, tables.users, tables.events, {ALL: tables.requests}, meta or {})
    _Checks(findings, folder, {}, set(), users_given=True).run()
    return findings.problems


def check_tables(tables: Tables, meta: dict[str, Any] | None = None) -> None:
    """Raises DataError with all problems of tables in memory, see `validate_tables`."""
    problems = validate_tables(tables, meta)
    if problems:
        raise DataError(problems)


def _file_names(folder: Path) -> dict[str, str]:
    """Table (or requests split) → file name as problems show it."""
    names = {}
    for suffix in reversed(SUFFIXES):
        for table in ("items", "users", "events"):
            if (folder / f"{table}{suffix}").is_file():
                names[table] = f"{table}{suffix}"
        if (folder / f"requests{suffix}").is_file():
            names[ALL] = f"requests{suffix}"
        for part in SPLITS:
            if (folder / "requests" / f"{part}{suffix}").is_file():
                names[part] = f"requests/{part}{suffix}"
    return names


class _Checks:
    """The rules, one method per table."""

    def __init__(
        self, findings: Findings, data: DataFolder, names: dict[str, str], unread: set[str], *, users_given: bool
    ) -> None:
        self.findings = findings
        self.data = data
        self.names = names
        self.unread = unread  # tables with file problems: nothing can be said about references into them
        self.users_given = users_given
        self.end = self._stated_end()
        self.user_ids = one_array(data.users["user_id"])
        self.item_ids = one_array(data.items["item_id"])

    def where(self, table: str) -> str:
        return self.names.get(table, "requests" if table in (ALL, *SPLITS) else table)

    def run(self) -> None:
        if "items" not in self.unread:
            self._items()
        if "users" not in self.unread:
            self._ids("users", self.data.users, "user_id", unique=True)
            self._names("users", self.data.users, "profile")
        for part, requests in self.data.requests.items():
            self._requests(part, requests)
        self._request_ids()
        if "events" not in self.unread:
            self._events()
        if META_FILE.split(".")[0] not in self.unread:
            self._splits()

    # -- tables ------------------------------------------------------------------------------------------------------

    def _items(self) -> None:
        items = self.data.items
        if not items.num_rows:
            self.findings.table(self.where("items"), None, "the catalogue is empty", "add at least one item")
            return
        self._ids("items", items, "item_id", unique=True)
        self._amount("items", items["price"], "price", "write a finite number of 0 or more, or null if unknown")
        for name in ("exposures", "clicks", "orders"):
            self._amount("items", items[name], name, "write a count of 0 or more, or null if unknown")
        over = _rows(pc.greater(items["clicks"], items["exposures"]))
        self.findings.rows(
            self.where("items"),
            "clicks",
            over,
            lambda n: f"{_at(items['clicks'], over[n])} clicks exceed {_at(items['exposures'], over[n])} exposures",
            "count both over the same time",
        )
        self._names("items", items, "attributes")
        self._no_null_parts("items", items["category"], "category")

    def _requests(self, part: str, requests: pa.Table) -> None:
        if "requests" in self.unread and not requests.num_rows:
            return
        self._ids(part, requests, "user_id", unique=False)
        self._known(part, requests["user_id"], "user_id", self.user_ids, "users")
        self._times(part, requests)
        empty = _rows(pc.equal(pc.utf8_trim_whitespace(requests["query"]), ""))
        self.findings.rows(self.where(part), "query", empty, "the query is blank", "write null for a recommendation")
        self._names(part, requests, "context")
        self._candidates(part, requests)

    def _candidates(self, part: str, requests: pa.Table) -> None:
        lists = one_array(requests["candidates"])
        shown = pc.list_flatten(lists)
        owner = pc.list_parent_indices(lists).to_numpy()
        where, findings = self.where(part), self.findings

        def report(mask: Any, column: str, what: Callable[[int], str], fix: str) -> None:
            places = _rows(mask)
            name = f"candidates.{column}" if column else "candidates"
            findings.rows(where, name, owner[places], lambda n: what(places[n]), fix)

        report(pc.is_null(shown), "", lambda _: "a candidate is null", "remove it from the list")
        shown = pa.StructArray.from_arrays(shown.flatten(), fields=list(shown.type))
        ids = shown.field("item_id")
        report(_blank(ids), "item_id", lambda _: "a candidate has no item_id", "name the item or remove the candidate")
        if "items" not in self.unread:
            unknown = pc.and_(pc.invert(pc.is_in(ids, value_set=self.item_ids)), pc.invert(_blank(ids)))
            fix = "add it to items or remove the candidate"
            report(unknown, "item_id", lambda p: f"unknown item '{_at(ids, p)}'", fix)
        for name in _LABELS:
            values = shown.field(name)
            wrong = pc.invert(pc.is_in(values, value_set=pa.array([0, 1, None], pa.int8())))
            report(wrong, name, lambda p, v=values: f"the label is {_at(v, p)}", "write 1, 0, or null if unknown")
        dwell, position = shown.field("dwell"), shown.field("position")
        fix = "write seconds of 0 or more, or null"
        report(_not_amount(dwell), "dwell", lambda p: f"the dwell time is {_at(dwell, p)}", fix)
        fix = "count positions from 0"
        report(pc.less(position, 0), "position", lambda p: f"the position is {_at(position, p)}", fix)
        self._repeated_candidates(where, owner, ids, position)

    def _repeated_candidates(self, where: str, owner: np.ndarray, ids: pa.Array, position: pa.Array) -> None:
        known = np.flatnonzero(position.is_valid().to_numpy(zero_copy_only=False))
        twice = known[_repeated(owner[known], position.take(pa.array(known)).to_numpy())]
        self.findings.rows(
            where,
            "candidates.position",
            owner[twice],
            lambda n: f"position {_at(position, twice[n])} occurs twice",
            "give every shown item an own position",
        )
        named = np.flatnonzero(pc.invert(_blank(ids)).to_numpy(zero_copy_only=False))
        codes = ids.take(pa.array(named)).dictionary_encode().indices.to_numpy(zero_copy_only=False)
        again = named[_repeated(owner[named], codes)]
        self.findings.rows(
            where,
            "candidates.item_id",
            owner[again],
            lambda n: f"item '{_at(ids, again[n])}' occurs twice",
            "keep one candidate per item",
        )

    def _request_ids(self) -> None:
        for part, requests in self.data.requests.items():
            self._ids(part, requests, "request_id", unique=True)
        parts = list(self.data.requests)
        for n, part in enumerate(parts):
            for earlier in parts[:n]:
                ids = self.data.requests[part]["request_id"]
                rows = _rows(pc.is_in(ids, value_set=one_array(self.data.requests[earlier]["request_id"])))
                what = f"occurs in {self.where(earlier)} too"
                self.findings.rows(
                    self.where(part),
                    "request_id",
                    rows,
                    lambda k, rows=rows, ids=ids, what=what: f"the id '{_at(ids, rows[k])}' {what}",
                    "keep a request in one split",
                )

    def _events(self) -> None:
        events = self.data.events
        for name, ids, table in (("user_id", self.user_ids, "users"), ("item_id", self.item_ids, "items")):
            self._ids("events", events, name, unique=False)
            self._known("events", events[name], name, ids, table)
        self._times("events", events)
        actions = events["action"]
        wrong = _rows(pc.invert(pc.is_in(actions, value_set=pa.array(ACTIONS))))
        self.findings.rows(
            self.where("events"),
            "action",
            wrong,
            lambda n: f"unknown action {_at(actions, wrong[n])!r} ({nearest(str(_at(actions, wrong[n])), ACTIONS)})",
            f"use one of {', '.join(ACTIONS)}",
        )
        empty = _rows(pc.equal(pc.utf8_trim_whitespace(events["query"]), ""))
        fix = "write null where there was none"
        self.findings.rows(self.where("events"), "query", empty, "the query is blank", fix)
        if "requests" not in self.unread:
            self._events_of_requests(events)

    def _events_of_requests(self, events: pa.Table) -> None:
        columns = ["request_id", "user_id", "time"]
        requests = pa.concat_tables([table.select(columns) for table in self.data.requests.values()])
        tied = np.flatnonzero(events["request_id"].is_valid().to_numpy())
        some = events.take(tied)
        place = pc.index_in(some["request_id"], value_set=one_array(requests["request_id"]))
        lost = tied[_rows(pc.is_null(place))]
        where, ids = self.where("events"), events["request_id"]
        fix = "add the request or write null"
        self.findings.rows(where, "request_id", lost, lambda n: f"unknown request '{_at(ids, lost[n])}'", fix)
        found = np.flatnonzero(place.is_valid().to_numpy())
        some, theirs = some.take(found), requests.take(place.drop_null())
        other = tied[found[_rows(pc.not_equal(some["user_id"], theirs["user_id"]))]]
        what = "the event's user is not the user of its request"
        self.findings.rows(where, "request_id", other, what, "name the request of this user")
        early = tied[found[_rows(pc.less(some["time"], theirs["time"]))]]
        what = "the event is earlier than the request it belongs to, so it would leak into that request's history"
        self.findings.rows(where, "time", early, what, "correct the time or the request_id")

    # -- split and meta ----------------------------------------------------------------------------------------------

    def _splits(self) -> None:
        requests, meta = self.data.requests, self.data.meta
        if "requests" not in self.unread:
            if ALL not in requests and not requests["train"].num_rows:
                what = "there are no train requests"
                self.findings.table(self.where("train"), None, what, "move the split later or add earlier requests")
            if ALL in requests and not requests[ALL].num_rows and not self.data.events.num_rows:
                self.findings.table("requests", None, "there are no requests and no events", "add requests or events")
        split = meta.get("split") or {}
        if not isinstance(split, dict) or (split and split.get("kind") not in KINDS):
            self.findings.table(META_FILE, "split", f"the split is {split!r}", f"name a kind out of {', '.join(KINDS)}")
            return
        bounds = {**split, "statistics_until": meta.get("statistics_until")}
        for name in ("train_until", "valid_until", "statistics_until"):
            if not isinstance(bounds.get(name), (int, type(None))) or isinstance(bounds.get(name), bool):
                self.findings.table(META_FILE, name, f"the value is {bounds[name]!r}", "write an integer time or null")
                return
        first, second, statistics = (bounds.get(name) for name in ("train_until", "valid_until", "statistics_until"))
        if first is not None and statistics is not None and statistics > first:
            what = f"the item counts reach to {statistics}, after the training time ends at {first}: a leak"
            fix = "count only what happened before train_until"
            self.findings.table(META_FILE, "statistics_until", what, fix)
        if first is not None and second is not None and ALL not in requests:
            if second < first:
                what = f"valid_until {second} lies before train_until {first}"
                self.findings.table(META_FILE, "split", what, "put the two moments in order")
            self._outside("train", None, first)
            self._outside("valid", first, second)
            self._outside("test", second, None)

    def _outside(self, part: str, begin: int | None, end: int | None) -> None:
        times = self.data.requests[part]["time"]
        low, high = -(2**63) if begin is None else begin, 2**63 - 1 if end is None else end
        rows = _rows(pc.or_(pc.less(times, low), pc.greater_equal(times, high)))
        limits = f"{'the beginning' if begin is None else begin} to {'the end' if end is None else f'before {end}'}"
        self.findings.rows(
            self.where(part),
            "time",
            rows,
            lambda n: f"time {_at(times, rows[n])} is outside of the split's time ({limits})",
            "split the requests by time again",
        )

    def _stated_end(self) -> int | None:
        end = self.data.meta.get("end")
        if end is not None and (not isinstance(end, int) or isinstance(end, bool)):
            self.findings.table(META_FILE, "end", f"the value is {end!r}", "write an integer time or null")
            return None
        return end

    # -- columns -----------------------------------------------------------------------------------------------------

    def _ids(self, part: str, table: pa.Table, column: str, *, unique: bool) -> None:
        if not table.num_rows:
            return
        values = one_array(table[column])
        blank = _rows(_blank(values))
        thing = column.removesuffix("_id")
        if len(blank) == len(values):
            fix = f"give every row the id of its {thing}"
            self.findings.table(self.where(part), column, "the column is missing or empty in every row", fix)
            return
        fix = f"name the {thing} or remove the row"
        self.findings.rows(self.where(part), column, blank, f"the {thing} id is null or blank", fix)
        if unique:
            coded = values.dictionary_encode(null_encoding="encode").indices
            codes = coded.to_numpy(zero_copy_only=False).astype(np.int64)
            # Codes are given in order of first occurrence: a row that raises no new maximum is a repetition.
            again = np.flatnonzero(codes[1:] <= np.maximum.accumulate(codes)[:-1]) + 1
            again = again[~np.isin(again, blank)]
            self.findings.rows(
                self.where(part),
                column,
                again,
                lambda n: f"the id '{_at(values, again[n])}' is a duplicate",
                "keep one row per id",
            )

    def _known(self, part: str, column: pa.ChunkedArray, name: str, known: pa.Array, table: str) -> None:
        if table in self.unread or (table == "users" and not self.users_given):
            return
        values = one_array(column)
        rows = _rows(pc.and_(pc.invert(pc.is_in(values, value_set=known)), pc.invert(_blank(values))))
        self.findings.rows(
            self.where(part),
            name,
            rows,
            lambda n: f"unknown {name.removesuffix('_id')} '{_at(values, rows[n])}'",
            f"add it to {self.where(table)} or remove the row",
        )

    def _amount(self, part: str, column: pa.ChunkedArray, name: str, fix: str) -> None:
        rows = _rows(_not_amount(column))
        self.findings.rows(self.where(part), name, rows, lambda n: f"the value is {_at(column, rows[n])}", fix)

    def _times(self, part: str, table: pa.Table) -> None:
        times, where = table["time"], self.where(part)
        nulls = _rows(pc.is_null(times))
        self.findings.rows(where, "time", nulls, "the time is null", "write an integer time")
        negative = _rows(pc.less(times, 0))
        fix = "write seconds since 1970 or a count from 0"
        self.findings.rows(where, "time", negative, lambda n: f"the time {_at(times, negative[n])} is negative", fix)
        absurd = _rows(pc.greater(times, LATEST_TIME))
        fix = "divide milliseconds by 1000"
        what = "is beyond the year 5000"
        self.findings.rows(where, "time", absurd, lambda n: f"the time {_at(times, absurd[n])} {what}", fix)
        limit = int(time.time()) + _DAY if self.end is None else self.end
        stated = "today" if self.end is None else f"the stated end {self.end}"
        late = _rows(pc.and_(pc.greater(times, limit), pc.less_equal(times, LATEST_TIME)))
        fix = "correct the time or remove the row"
        self.findings.rows(where, "time", late, lambda n: f"the time {_at(times, late[n])} lies after {stated}", fix)

    def _names(self, part: str, table: pa.Table, column: str) -> None:
        """Name/value lists: no null entry and no blank name."""
        lists = one_array(table[column])
        pairs = pc.list_flatten(lists)
        owner = pc.list_parent_indices(lists).to_numpy()
        blank = owner[_rows(pc.or_(pc.is_null(pairs), _blank(pc.struct_field(pairs, "name"))))]
        fix = "name it or remove it from the list"
        self.findings.rows(self.where(part), column, blank, "an entry has no name", fix)

    def _no_null_parts(self, part: str, column: pa.ChunkedArray, name: str) -> None:
        lists = one_array(column)
        owner = pc.list_parent_indices(lists).to_numpy()
        rows = owner[_rows(pc.is_null(pc.list_flatten(lists)))]
        self.findings.rows(self.where(part), name, rows, "an entry of the list is null", "remove it from the list")


def _rows(mask: Any) -> np.ndarray:
    """Places where a boolean Arrow mask is true; null counts as false."""
    return (
        np.flatnonzero(pc.fill_null(mask, False).to_numpy(zero_copy_only=False)) if len(mask) else np.empty(0, np.int64)
    )


def _blank(values: Any) -> Any:
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True)


def _not_amount(values: Any) -> Any:
    below = pc.less(values, 0)
    return pc.or_(below, pc.invert(pc.is_finite(values))) if pa.types.is_floating(values.type) else below


def _at(values: Any, row: Any) -> Any:
    return values[int(row)].as_py()


def _repeated(owner: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Places whose (owner, value) pair occurred at an earlier place."""
    order = np.lexsort((value, owner))
    same = (owner[order][1:] == owner[order][:-1]) & (value[order][1:] == value[order][:-1])
    return np.sort(order[1:][same])

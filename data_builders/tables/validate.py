"""Validation: every problem of a data folder in one report, each with table, row, column, what is wrong and what to do.

`validate_folder` returns the list, `check_folder` raises it as one DataError, `check_tables` does the same for tables
in memory. All checks are column operations; of one kind of problem the first five rows are listed and the others
counted, so a million bad rows are still one page.

Rules: ids are unique, not null, not blank, without control characters; users and items named anywhere exist; prices
and dwell times are finite and not negative; counts are not negative and clicks do not exceed exposures; labels are 0,
1 or null; a position or an item occurs once in a request; times are integers from 0 to 100,000,000,000 (seconds;
later looks like milliseconds) and not after the stated end (`meta.end`) or, where none is stated, not after tomorrow;
actions are those of `ACTIONS`; an event belongs to a request of its own user and is not earlier than it; splits do
not overlap in time and statistics end with the training time.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import DataError, Problem, nearest
from sidtune.data_builders.tables.columns import encode, one_array, repeated_rows, rows_of
from sidtune.data_builders.tables.findings import Findings
from sidtune.data_builders.tables.history import ACTIONS
from sidtune.data_builders.tables.schema import SPLITS, Tables
from sidtune.data_builders.tables.splits import KINDS
from sidtune.data_builders.tables.store import ALL, META_FILE, DataFolder, read_own_folder

LATEST_TIME = 100_000_000_000
_DAY = 86_400
_INVISIBLE = r"[\p{Cc}\x{2028}\x{2029}\x{FEFF}]"  # control characters, Unicode's line ends, a byte-order mark
_LABELS = ("click", "like", "order")


def validate_folder(folder: str | Path) -> list[Problem]:
    """Lists all problems of a data folder in our schema (parquet or JSON lines); an empty list means it is sound.

    A folder with `meta.json` must be complete, as `store.save_tables` writes it; one without may lack optional
    columns, the `users` table and the split of the requests.

    Raises:
        DataError: the folder does not exist.
    """
    findings = Findings()
    loaded = read_own_folder(folder, findings, written=(Path(folder) / META_FILE).is_file())
    validate_loaded(loaded, findings)
    return findings.sorted()


def validate_loaded(loaded: DataFolder, findings: Findings) -> None:
    """Adds the problems of a folder that `store.read_own_folder` read to its findings; problems name the files."""
    _Checks(findings, loaded, users_given="users" in loaded.files).run()


def check_folder(folder: str | Path) -> None:
    """Raises DataError with all problems of a data folder, see `validate_folder`."""
    problems = validate_folder(folder)
    if problems:
        raise DataError(problems)


def validate_tables(tables: Tables) -> list[Problem]:
    """Lists all problems of tables in memory, for example of what a reader returned."""
    findings = Findings()
    folder = DataFolder(tables.items, tables.users, tables.events, {ALL: tables.requests})
    _Checks(findings, folder, users_given=True).run()
    return findings.sorted()


def check_tables(tables: Tables) -> None:
    """Raises DataError with all problems of tables in memory, see `validate_tables`."""
    problems = validate_tables(tables)
    if problems:
        raise DataError(problems)


class _Checks:
    """The rules, one method per table."""

    def __init__(self, findings: Findings, data: DataFolder, *, users_given: bool) -> None:
        self.findings = findings
        self.data = data
        self.users_given = users_given
        self.end = self._stated_end()

    def where(self, part: str) -> str:
        return self.data.files.get(part, "requests" if part in (ALL, *SPLITS) else part)

    def broken(self, part: str, column: str | None = None) -> bool:
        return self.findings.broken(self.where(part), column)

    def run(self) -> None:
        self._items()
        self._ids("users", self.data.users, "user_id", unique=True)
        self._names("users", self.data.users, "profile")
        for part, requests in self.data.requests.items():
            self._requests(part, requests)
        self._request_ids()
        self._events()
        if not self.findings.broken(META_FILE):
            self._splits()

    def bad(
        self, part: str, column: str, mask: Any, what: Any, fix: str, values: Any = None, owner: Any = None
    ) -> None:
        """Adds a problem for every row where `mask` is true.

        Args:
            what: the sentence, in which `{}` stands for the row's entry of `values`; or a function of that entry.
            owner: rows of the table that the rows of the mask belong to, where those are candidates.
        """
        places = mask if isinstance(mask, np.ndarray) else _rows(mask)

        def sentence(n: int) -> str:
            value = None if values is None else values[int(places[n])].as_py()
            return what.format(value) if isinstance(what, str) else what(value)

        self.findings.rows(self.where(part), column, places if owner is None else owner[places], sentence, fix)

    # -- tables ------------------------------------------------------------------------------------------------------

    def _items(self) -> None:
        items = self.data.items
        if not items.num_rows and not self.broken("items"):
            self.findings.table(self.where("items"), None, "the catalogue is empty", "add at least one item")
        self._ids("items", items, "item_id", unique=True)
        for name in ("price", "exposures", "clicks", "orders"):
            kind = "finite number" if name == "price" else "count"
            fix = f"write a {kind} of 0 or more, or null if unknown"
            self.bad("items", name, _not_amount(items[name]), "the value is {}", fix, items[name])
        over = pc.greater(items["clicks"], items["exposures"])
        both = pa.StructArray.from_arrays([one_array(items[name]) for name in ("clicks", "exposures")], ["c", "e"])
        what = "{0[c]} clicks exceed {0[e]} exposures"
        self.bad("items", "clicks", over, what, "count both over the same time", both)
        self._names("items", items, "attributes")
        lists = one_array(items["category"])
        null, owner = pc.is_null(pc.list_flatten(lists)), pc.list_parent_indices(lists).to_numpy()
        self.bad("items", "category", null, "an entry of the list is null", "remove it from the list", owner=owner)

    def _requests(self, part: str, requests: pa.Table) -> None:
        self._ids(part, requests, "user_id", unique=False)
        self._known(part, "user_id", requests["user_id"], "users")
        self._times(part, requests)
        empty = pc.equal(pc.utf8_trim_whitespace(requests["query"]), "")
        self.bad(part, "query", empty, "the query is blank", "write null for a recommendation")
        self._names(part, requests, "context")
        self._candidates(part, one_array(requests["candidates"]))

    def _candidates(self, part: str, lists: pa.Array) -> None:
        shown, owner = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
        self.bad(part, "candidates", pc.is_null(shown), "a candidate is null", "remove it from the list", owner=owner)
        column = dict(zip((field.name for field in shown.type), shown.flatten(), strict=True))

        def bad(name: str, mask: Any, what: str, fix: str) -> None:
            self.bad(part, f"candidates.{name}", mask, what, fix, column[name], owner)

        ids, position = column["item_id"], column["position"]
        bad("item_id", _blank(ids), "a candidate has no item_id", "name the item or remove the candidate")
        self._known(part, "candidates.item_id", ids, "items", owner)
        for name in _LABELS:
            wrong = pc.invert(pc.is_in(column[name], value_set=pa.array([0, 1, None], pa.int8())))
            bad(name, wrong, "the label is {}", "write 1, 0, or null if unknown")
        fix = "write seconds of 0 or more, or null"
        bad("dwell", _not_amount(column["dwell"]), "the dwell time is {}", fix)
        bad("position", pc.less(position, 0), "the position is {}", "count positions from 0")
        known = np.flatnonzero(position.is_valid().to_numpy(zero_copy_only=False))
        twice = known[_repeated(owner[known], position.take(pa.array(known)).to_numpy())]
        bad("position", twice, "position {} occurs twice", "give every shown item an own position")
        named = np.flatnonzero(pc.invert(_blank(ids)).to_numpy(zero_copy_only=False))
        again = named[_repeated(owner[named], encode(ids)[0][named])]
        bad("item_id", again, "item '{}' occurs twice", "keep one candidate per item")

    def _request_ids(self) -> None:
        parts = list(self.data.requests)
        for n, part in enumerate(parts):
            self._ids(part, self.data.requests[part], "request_id", unique=True)
            ids = self.data.requests[part]["request_id"]
            for earlier in parts[:n]:
                both = pc.is_in(ids, value_set=one_array(self.data.requests[earlier]["request_id"]).drop_null())
                what = f"the id '{{}}' occurs in {self.where(earlier)} too"
                self.bad(part, "request_id", both, what, "keep a request in one split", ids)

    def _events(self) -> None:
        events = self.data.events
        for name, table in (("user_id", "users"), ("item_id", "items")):
            self._ids("events", events, name, unique=False)
            self._known("events", name, events[name], table)
        self._times("events", events)
        actions = events["action"]
        wrong = pc.invert(pc.is_in(actions, value_set=pa.array(ACTIONS)))
        fix = f"use one of {', '.join(ACTIONS)}"
        self.bad(
            "events", "action", wrong, lambda a: f"unknown action {a!r} ({nearest(str(a), ACTIONS)})", fix, actions
        )
        empty = pc.equal(pc.utf8_trim_whitespace(events["query"]), "")
        self.bad("events", "query", empty, "the query is blank", "write null where there was none")
        if not any(self.broken(part, "request_id") for part in self.data.requests):
            self._events_of_requests(events)

    def _events_of_requests(self, events: pa.Table) -> None:
        columns = ["request_id", "user_id", "time"]
        requests = pa.concat_tables([table.select(columns) for table in self.data.requests.values()])
        place = rows_of(events["request_id"], requests["request_id"])
        ids = events["request_id"]
        lost = np.flatnonzero((place < 0) & ids.is_valid().to_numpy())
        self.bad("events", "request_id", lost, "unknown request '{}'", "add the request or write null", ids)
        tied = np.flatnonzero(place >= 0)
        mine, theirs = events.take(tied), requests.take(place[tied])
        other = tied[_rows(pc.not_equal(mine["user_id"], theirs["user_id"]))]
        what = "the event's user is not the user of its request"
        self.bad("events", "request_id", other, what, "name the request of this user")
        early = tied[_rows(pc.less(mine["time"], theirs["time"]))]
        what = "the event is earlier than the request it belongs to, so it would leak into that request's history"
        self.bad("events", "time", early, what, "correct the time or the request_id")

    # -- split and meta ----------------------------------------------------------------------------------------------

    def _splits(self) -> None:
        requests, meta = self.data.requests, self.data.meta
        if ALL not in requests and not requests["train"].num_rows and not self.broken("train"):
            what = "there are no train requests"
            self.findings.table(self.where("train"), None, what, "move the split later or add earlier requests")
        read = not self.broken(ALL) and not self.broken("events")
        if ALL in requests and not requests[ALL].num_rows + self.data.events.num_rows and read:
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
        outside = pc.or_(pc.less(times, low), pc.greater_equal(times, high))
        limits = f"{'the beginning' if begin is None else begin} to {'the end' if end is None else f'before {end}'}"
        what = f"time {{}} is outside of the split's time ({limits})"
        self.bad(part, "time", outside, what, "split the requests by time again", times)

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
        values, thing = one_array(table[column]), column.removesuffix("_id")
        blank = _rows(_blank(values))
        if len(blank) == len(values) and not self.broken(part, column):
            fix = f"give every row the id of its {thing}"
            self.findings.table(self.where(part), column, "the column is missing or empty in every row", fix)
            return
        what, fix = f"the {thing} id is null or blank", f"name the {thing} or remove the row"
        self.bad(part, column, blank, what, fix)
        told = f"the {thing} id {{!r}} holds a control character"
        self.bad(part, column, _invisible(values), told, "remove it", values)
        if unique:
            coded = values.dictionary_encode(null_encoding="encode").indices
            codes = coded.to_numpy(zero_copy_only=False).astype(np.int64)
            # Codes are given in order of first occurrence: a row that raises no new maximum is a repetition.
            again = np.flatnonzero(codes[1:] <= np.maximum.accumulate(codes)[:-1]) + 1
            again = again[~np.isin(again, blank)]
            if len(again) and column == "request_id" and not self.data.meta:  # a reader drops repeated rows of a log
                again = np.setdiff1d(again, repeated_rows(table))
            self.bad(part, column, again, "the id '{}' is a duplicate", "keep one row per id", values)

    def _known(self, part: str, name: str, values: Any, table: str, owner: np.ndarray | None = None) -> None:
        """Names that a table lacks; nothing is said where not all of its own ids could be read."""
        thing = name.removesuffix("_id").removeprefix("candidates.")
        if self.broken(table, f"{thing}_id") or (table == "users" and not self.users_given):
            return
        known = one_array(getattr(self.data, table)[f"{thing}_id"])
        new = pc.and_(pc.invert(pc.is_in(values, value_set=known)), pc.invert(_blank(values)))
        fix = f"add it to {self.where(table)} or remove the {'row' if owner is None else 'candidate'}"
        self.bad(part, name, new, f"unknown {thing} '{{}}'", fix, values, owner)

    def _times(self, part: str, table: pa.Table) -> None:
        times = table["time"]
        limit = int(time.time()) + _DAY if self.end is None else self.end
        stated = "today" if self.end is None else f"the stated end {self.end}"
        late = pc.and_(pc.greater(times, limit), pc.less_equal(times, LATEST_TIME))
        for mask, what, fix in (
            (pc.is_null(times), "the time is null", "write an integer time"),
            (pc.less(times, 0), "the time {} is negative", "write seconds since 1970 or a count from 0"),
            (pc.greater(times, LATEST_TIME), "the time {} is beyond the year 5000", "divide milliseconds by 1000"),
            (late, f"the time {{}} lies after {stated}", "correct the time or remove the row"),
        ):
            self.bad(part, "time", mask, what, fix, times)

    def _names(self, part: str, table: pa.Table, column: str) -> None:
        """Name/value lists: no null entry and no blank name."""
        lists = one_array(table[column])
        pairs, owner = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
        blank = pc.or_(pc.is_null(pairs), _blank(pc.struct_field(pairs, "name")))
        self.bad(part, column, blank, "an entry has no name", "name it or remove it from the list", owner=owner)


def _rows(mask: Any) -> np.ndarray:
    """Places where a boolean Arrow mask is true; null counts as false."""
    return (
        np.flatnonzero(pc.fill_null(mask, False).to_numpy(zero_copy_only=False)) if len(mask) else np.empty(0, np.int64)
    )


def _blank(values: Any) -> Any:
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True)


def _invisible(values: Any) -> Any:
    """Which texts hold a control character; plain ASCII is told by its bytes, which is faster than a pattern."""
    letters = np.frombuffer(values.buffers()[2] or b"", np.uint8)
    if not ((letters < 32) | (letters >= 127)).any():
        return np.empty(0, np.int64)
    return pc.match_substring_regex(values, _INVISIBLE)


def _not_amount(values: Any) -> Any:
    below = pc.less(values, 0)
    return pc.or_(below, pc.invert(pc.is_finite(values))) if pa.types.is_floating(values.type) else below


def _repeated(owner: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Places whose (owner, value) pair occurred at an earlier place."""
    key = owner * (int(value.max(initial=0)) + 1) + value
    if (key[1:] > key[:-1]).all() or (np.diff(np.sort(key, kind="stable")) > 0).all():
        return np.empty(0, np.int64)
    order = np.lexsort((value, owner))
    same = (owner[order][1:] == owner[order][:-1]) & (value[order][1:] == value[order][:-1])
    return np.sort(order[1:][same])

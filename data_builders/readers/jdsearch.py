"""Reader `jdsearch`: the layout of JDsearch (tab-separated; `*behavior*.txt` or `release_data*.txt`, and
`product*.txt`).

A line is one user: the test query with its shown candidates and labels (0 nothing, 1 click, 2 cart, 3 order), and a
history with a query (-1 = none), item, action and seconds since the previous action for each step. Terms are
anonymous numbers, parted by the character 0x18, which becomes a space.

* Users get the id `user-N` (N = line). Times are seconds since the user's own first action: they order one user's
  actions only.
* Steps in a row with the same query, at most `session_gap` seconds apart, form one past request, whose candidates are
  the items of these steps (what else was shown is unknown). Steps without a query are events only.
* The test query of each user is test, the last past request valid, older ones train. A past request in the same
  second as the user's valid or test request is dropped and counted.
* A label is the strongest feedback, so 1, 2 and 3 all count as a click (our choice); 3 is an order. FLW (follow the
  product) becomes `like`, CART becomes the action `cart`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.text import read_lines
from sidtune.data_builders.readers.raw_files import first_rows, lists_of
from sidtune.data_builders.readers.reader import reader
from sidtune.data_builders.tables.history import FOREVER
from sidtune.data_builders.tables.schema import Tables, table_from_columns
from sidtune.data_builders.tables.splits import candidate_lists, leave_one_out

_LINE = ("query", "candidates", "labels", "history_queries", "history_items", "history_types", "history_gaps")
_ACTIONS = {"ORD": "order", "CART": "cart", "CLICK": "click", "FLW": "like"}
_PRODUCT_FIELDS = 13
_NO_QUERY = "-1"


@dataclass
class Options:
    """Options of the reader.

    Attributes:
        session_gap: seconds after which the same query counts as a new request.
    """

    session_gap: int = 3600

    def __post_init__(self) -> None:
        if self.session_gap < 0:
            raise ConfigError(f"reader 'jdsearch': session_gap must be 0 or more seconds, got {self.session_gap}.")


@dataclass
class _Log:
    """All steps of all users end to end: owner (user number), and one value each."""

    owner: np.ndarray
    query: pa.Array
    item: pa.Array
    action: pa.Array
    time: np.ndarray


@reader("jdsearch", Options, clock=False)
def read(folder: Path, chosen: Options) -> Tables:
    """Reads the folder; see the module's docstring."""
    counts: dict[str, int] = {}
    lines = _read_behaviour(_find(folder, ("*behavior*.txt", "release_data*.txt")))
    log, test_times = _steps(lines)
    users = [f"user-{number}" for number in range(1, len(test_times) + 1)]
    past, run_of_step = _past_requests(log, users, chosen.session_gap)
    asked = _test_requests(lines, users, test_times, counts)
    requests = pa.concat_tables([past, asked])
    split = _split(requests, past.num_rows)
    dropped = split == ""
    counts["requests_tied_with_the_split_dropped"] = int(dropped.sum())
    ids = requests["request_id"].combine_chunks()
    tied = np.where((run_of_step >= 0) & ~dropped[np.maximum(run_of_step, 0)], run_of_step, -1)
    events = _events(log, users, ids, tied)
    requests, split = requests.filter(pa.array(~dropped)), split[~dropped]
    items = _items(_find(folder, ("product*.txt",)), requests, events, counts)
    people = table_from_columns("users", {"user_id": users}, len(users))
    return Tables(items, people, requests, events, split.tolist(), counts, _NOTES)


_NOTES = [
    "Times are seconds since the user's own first action; they order the actions of one user only.",
    "All texts are anonymous term numbers.",
    "Past requests were put together from history steps with the same query; what else they showed is unknown.",
]


def _find(folder: Path, patterns: tuple[str, ...]) -> Path:
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if len(found) != 1:
        raise DataError(
            f"The folder {folder} has {len(found)} files like {' or '.join(patterns)}; exactly one is needed."
        )
    return found[0]


def _read_behaviour(path: Path) -> dict[str, Any]:
    """Columns of the behaviour file as Arrow arrays, with `path` and `first` (number of the first data line)."""
    lines = read_lines(path)
    first = 2 if lines and lines[0].startswith("query\t") else 1
    rows = [line.split("\t") for line in lines[first - 1 :]]
    for number, row in enumerate(rows, first):
        if len(row) != len(_LINE):
            raise DataError(
                f"The file {path} has {len(row)} fields in line {number}, expected {len(_LINE)}; correct it."
            )
    if not rows:
        raise DataError(f"The file {path} has no users; check the path.")
    columns = zip(_LINE, zip(*rows, strict=True), strict=True)
    return {"path": path, "first": first, **{name: pa.array(list(column), pa.string()) for name, column in columns}}


def _split_field(lines: dict[str, Any], name: str) -> pa.ListArray:
    """A field of `_`-separated values as lists; an empty field is an empty list."""
    field = lines[name]
    made = pc.split_pattern(field, "_")
    none = pa.array([], made.type.value_type)
    empty = pc.equal(field, "")
    return made if not pc.any(empty).as_py() else pc.if_else(empty, pa.scalar(none.to_pylist(), made.type), made)


def _same_lengths(lines: dict[str, Any], name: str, got: pa.ListArray, wanted: np.ndarray) -> None:
    lengths = pc.list_value_length(got).to_numpy()
    wrong = np.flatnonzero(lengths != wanted)
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"The file {lines['path']} has {lengths[row]} values of '{name}' in line {lines['first'] + row}, expected "
            f"{wanted[row]}; correct the line."
        )


def _numbers(lines: dict[str, Any], name: str, values: pa.Array, owner: np.ndarray, kind: pa.DataType) -> np.ndarray:
    try:
        return values.cast(kind).to_numpy()
    except pa.ArrowInvalid as error:
        for value, row in zip(values.to_pylist(), owner.tolist(), strict=True):
            try:
                pa.scalar(value).cast(kind)
            except pa.ArrowInvalid:
                where = f"The file {lines['path']} has '{value[:40]}' among '{name}' in line {lines['first'] + row}"
                raise DataError(f"{where}; expected numbers.") from None
        raise DataError(f"The file {lines['path']} has values of '{name}' that are no numbers ({error}).") from None


def _steps(lines: dict[str, Any]) -> tuple[_Log, np.ndarray]:
    """The history of all users, and the time of each user's test query."""
    items = _split_field(lines, "history_items")
    counts = pc.list_value_length(items).to_numpy().astype(np.int64)
    parts = {name: _split_field(lines, name) for name in ("history_queries", "history_types", "history_gaps")}
    for name, extra in (("history_queries", 0), ("history_types", 0), ("history_gaps", 1)):
        _same_lengths(lines, name, parts[name], counts + extra)
    owner = np.repeat(np.arange(len(counts)), counts)
    owner_of_gap = np.repeat(np.arange(len(counts)), counts + 1)
    gaps = _numbers(lines, "history_gaps", parts["history_gaps"].flatten(), owner_of_gap, pa.int64())
    if len(gaps) and gaps.min() < 0:
        row = int(owner_of_gap[int(np.argmin(gaps))])
        raise DataError(f"The file {lines['path']} has a negative time gap in line {lines['first'] + row}; correct it.")
    total = np.cumsum(gaps)
    ends = np.cumsum(counts + 1) - 1
    before = np.concatenate([[0], total[ends[:-1]]])
    times = total - np.repeat(before, counts + 1)
    is_step = np.ones(len(times), bool)
    is_step[ends] = False
    types = parts["history_types"].flatten()
    place = pc.index_in(types, value_set=pa.array(list(_ACTIONS)))
    if place.null_count:
        bad = int(np.flatnonzero(place.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"The file {lines['path']} has the unknown action '{types[bad].as_py()}' in line "
            f"{lines['first'] + int(owner[bad])}; known are {', '.join(_ACTIONS)}."
        )
    actions = pa.array(list(_ACTIONS.values())).take(place)
    queries = pc.replace_substring(parts["history_queries"].flatten(), "\x18", " ")
    return _Log(owner, queries, items.flatten(), actions, times[is_step]), times[ends]


def _past_requests(log: _Log, users: list[str], gap: int) -> tuple[pa.Table, np.ndarray]:
    """Requests out of runs of steps with one query, and for each step its request's row or -1."""
    steps = len(log.owner)
    codes = log.query.dictionary_encode().indices.to_numpy()
    begins = np.ones(steps, bool)
    begins[1:] = (np.diff(log.owner) != 0) | (np.diff(codes) != 0) | (np.diff(log.time) > gap)
    run = np.cumsum(begins) - 1
    first = np.flatnonzero(begins)
    asked = np.flatnonzero(pc.not_equal(log.query.take(pa.array(first)), _NO_QUERY).to_numpy(zero_copy_only=False))
    request_of_run = np.full(len(first), -1)
    request_of_run[asked] = np.arange(len(asked))
    request = request_of_run[run] if steps else np.empty(0, np.int64)
    mine = np.flatnonzero(request >= 0)
    items = log.item.dictionary_encode()
    key = request[mine] * (len(items.dictionary) + 1) + items.indices.to_numpy()[mine]
    _, where, group = np.unique(key, return_index=True, return_inverse=True)
    flags = {}
    for name, meant in (("click", ("click", "cart", "order")), ("like", ("like",)), ("order", ("order",))):
        hit = pc.is_in(log.action, value_set=pa.array(meant)).to_numpy(zero_copy_only=False)[mine]
        flags[name] = np.zeros(len(where), bool)
        np.logical_or.at(flags[name], group, hit)
    order = np.argsort(where)  # items of a request in the order of their first step
    rows = mine[where[order]]
    labels = {name: pa.array(np.ones(len(order), np.int8), mask=~flag[order]) for name, flag in flags.items()}
    lengths = np.bincount(request[rows], minlength=len(asked)) if len(rows) else np.zeros(len(asked), np.int64)
    heads = first[asked]
    columns = {
        "request_id": [f"{users[owner]}-past-{step}" for owner, step in zip(log.owner[heads], heads, strict=True)],
        "user_id": pa.array(users).take(pa.array(log.owner[heads])),
        "time": log.time[heads],
        "query": log.query.take(pa.array(heads)),
        "candidates": candidate_lists(
            {"item_id": log.item.take(pa.array(rows)), **labels}, np.concatenate([[0], np.cumsum(lengths)])
        ),
    }
    return table_from_columns("requests", columns, len(heads)), request


def _test_requests(lines: dict[str, Any], users: list[str], times: np.ndarray, counts: dict[str, int]) -> pa.Table:
    shown, labels = _split_field(lines, "candidates"), _split_field(lines, "labels")
    lengths = pc.list_value_length(shown).to_numpy().astype(np.int64)
    _same_lengths(lines, "labels", labels, lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    level = _numbers(lines, "labels", labels.flatten(), owner, pa.float64())
    if not np.isin(level, (0, 1, 2, 3)).all():
        bad = int(np.flatnonzero(~np.isin(level, (0, 1, 2, 3)))[0])
        line = lines["first"] + int(owner[bad])
        raise DataError(f"The file {lines['path']} has the label {level[bad]:g} in line {line}; expected 0, 1, 2 or 3.")
    items = shown.flatten()
    key = owner * (len(items) + 1) + items.dictionary_encode().indices.to_numpy()
    keep = np.sort(np.unique(key, return_index=True)[1])
    counts["duplicate_candidates_dropped"] = len(items) - len(keep)
    kept = np.bincount(owner[keep], minlength=len(lengths))
    offsets = np.concatenate([[0], np.cumsum(kept)])
    parts = {
        "item_id": items.take(pa.array(keep)),
        "position": np.arange(len(keep)) - np.repeat(offsets[:-1], kept),
        "click": (level[keep] >= 1).astype(np.int8),
        "order": (level[keep] == 3).astype(np.int8),
    }
    columns = {
        "request_id": [f"{user}-test" for user in users],
        "user_id": users,
        "time": times,
        "query": pc.replace_substring(lines["query"], "\x18", " "),
        "candidates": candidate_lists(parts, offsets),
    }
    return table_from_columns("requests", columns, len(users))


def _split(requests: pa.Table, past: int) -> np.ndarray:
    """Test: each user's test query; valid: the last past request of a user with two or more; "" for ties, to be
    dropped."""
    users = requests["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    times = requests["time"].to_numpy()
    limit = np.full(int(users.max()) + 1, FOREVER)
    limit[users[past:]] = times[past:]
    in_time = np.flatnonzero(np.concatenate([times[:past] < limit[users[:past]], np.ones(len(times) - past, bool)]))
    names = np.full(len(times), "", dtype="U5")
    names[in_time] = leave_one_out(requests.take(in_time), min_rows=3)
    names[past:] = "test"
    return names


def _events(log: _Log, users: list[str], request_ids: pa.Array, tied: np.ndarray) -> pa.Table:
    columns = {
        "user_id": pa.array(users).take(pa.array(log.owner)),
        "item_id": log.item,
        "time": log.time,
        "action": log.action,
        "query": pc.if_else(pc.equal(log.query, _NO_QUERY), pa.scalar(None, pa.string()), log.query),
        "request_id": request_ids.take(pa.array(tied, mask=tied < 0)),
    }
    return table_from_columns("events", columns, len(log.owner))


def _items(path: Path, requests: pa.Table, events: pa.Table, counts: dict[str, int]) -> pa.Table:
    rows = [line.replace("\x18", " ").split("\t") for line in read_lines(path)]
    first = 1 if rows and rows[0][0] == "wid" else 0
    for number, row in enumerate(rows[first:], first + 1):
        if len(row) != _PRODUCT_FIELDS:
            raise DataError(
                f"The file {path} has {len(row)} fields in line {number}, expected {_PRODUCT_FIELDS}; correct it."
            )
    columns = [pa.array(list(column), pa.string()) for column in zip(*rows[first:], strict=True)]
    columns = columns or [pa.array([], pa.string())] * _PRODUCT_FIELDS
    table = pa.table(columns, names=[str(place) for place in range(_PRODUCT_FIELDS)])
    kept, counts["duplicate_items_dropped"] = first_rows(table["0"])
    table = table.take(kept)
    used = pa.concat_arrays(
        [pc.list_flatten(requests["candidates"].combine_chunks()).field("item_id"), events["item_id"].combine_chunks()]
    )
    known = table["0"].combine_chunks()
    unknown = pc.unique(used.filter(pc.invert(pc.is_in(used, value_set=known))))
    counts["unknown_items_added"] = len(unknown)
    text = {
        name: pc.if_else(pc.equal(table[name], ""), pa.scalar(None, pa.string()), table[name]) for name in ("1", "3")
    }
    counts["empty_titles"] = text["1"].null_count
    columns = {
        "item_id": table["0"],
        "title": text["1"],
        "brand": text["3"],
        "category": lists_of([table[name] for name in ("5", "7", "9", "11")]),
    }
    sold = table_from_columns("items", columns, table.num_rows)
    return pa.concat_tables([sold, table_from_columns("items", {"item_id": unknown}, len(unknown))])

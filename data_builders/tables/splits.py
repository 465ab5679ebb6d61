"""Splits by time, what training may see, and item counts taken from the past only.

* `global_time`: one moment separates train from valid and valid from test, for everybody. Needs times that compare
  between users.
* `leave_one_out`: the last request of each user is test, the one before valid (the protocol of SASRec, TIGER and
  LETTER). Only to reproduce published numbers: a training request of one user may be later than a test request of
  another.
* `source`: the split that the source prescribes.

The default is `source` where there is one, else `global_time`.

Every bound is exclusive: a request is train when `time < train_until`. What training may read is therefore "events
strictly before the cut", one number for a global split and one per user otherwise (`TimeCut`). `assert_no_leak`
checks it each time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.config import build, check_range
from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.data_builders.tables.columns import encode, one_array, rows_of
from sidtune.data_builders.tables.history import FOREVER, TimeCut, action_strength
from sidtune.data_builders.tables.schema import SCHEMAS, Tables, table_from_columns, typed
from sidtune.data_builders.tables.store import split_names

KINDS = {
    "global_time": "two moments for all users",
    "leave_one_out": "the last two requests of each user",
    "source": "as the source prescribes",
}
_SHARES_AND_MOMENTS = {"valid_share", "test_share", "train_until", "valid_until"}


@dataclass
class SplitConfig:
    """Options of `apply_split`, checked when they are made.

    Attributes:
        kind: `global_time`, `leave_one_out` or `source` (the reader must have set `split_of_request`); null is `global_time`
            with any of the next four, `leave_one_out` with `min_rows`, else the default of the source.
        valid_share, test_share: shares of the requests, from the end; requests of one moment stay together, so the
            shares are met up to ties. A valid_share of 0 makes no valid split.
        train_until, valid_until: explicit moments instead (both, or train_until alone: then nothing is valid).
        min_rows: of `leave_one_out`: fewest requests of a user that is split, at least 2.
    """

    kind: str | None = None
    valid_share: float = 0.1
    test_share: float = 0.1
    train_until: int | None = None
    valid_until: int | None = None
    min_rows: int = 2

    def __post_init__(self) -> None:
        belongs = {"leave_one_out": {"min_rows"}, "global_time": _SHARES_AND_MOMENTS}
        given = {one.name for one in dataclasses.fields(self) if getattr(self, one.name) != one.default} - {"kind"}
        if self.kind is None:
            self.kind = next((kind for kind, own in belongs.items() if given & own), None)
        elif self.kind not in KINDS:
            raise ConfigError(f"There is no split named '{self.kind}': {nearest(self.kind, KINDS)}")
        if self.kind and (strange := sorted(given - belongs.get(self.kind, set()))):
            raise ConfigError(f"The split '{self.kind}' takes no '{strange[0]}'; leave it out or choose another kind.")
        first, second, valid, test = self.train_until, self.valid_until, self.valid_share, self.test_share
        if first is None and second is not None:
            raise ConfigError("A split with valid_until needs train_until too; set both.")
        if first is not None and second is not None and second < first:
            raise ConfigError(f"valid_until ({second}) lies before train_until ({first}); put them in order.")
        if not (0 <= valid < 1 and 0 < test < 1 and valid + test < 1):
            raise ConfigError(
                f"valid_share ({valid}) must be 0 or more, test_share ({test}) above 0, and their sum below 1."
            )
        check_range(self, 2, "min_rows")


FEEDBACK = ("click", "like", "order")


def global_time_split(times: np.ndarray, config: SplitConfig) -> tuple[np.ndarray, int, int]:
    """Splits requests at two moments.

    Args:
        times: (n,) integers, of the requests.
        config: shares or moments.

    Returns:
        (n,) split names, train_until, valid_until (both exclusive).

    Raises:
        DataError: no requests, or ties leave train or test empty.
    """
    if not len(times):
        raise DataError("There are no requests to split; check that the reader found the requests or events.")
    first, second = config.train_until, config.valid_until
    if first is None:
        ordered, count = np.sort(times), len(times)
        begin = min(count - 1, round(count * (1 - config.test_share)))
        second = int(ordered[begin])
        before = min(begin, round(count * (1 - config.test_share - config.valid_share)))
        first = int(ordered[before]) if config.valid_share else second
    second = first if second is None else second
    names = np.where(times < first, "train", np.where(times < second, "valid", "test"))
    for part in ("train", "test"):
        if not (names == part).any():
            raise DataError(
                f"The split at {first} and {second} leaves no {part} request among times "
                f"{int(times.min())} to {int(times.max())}; change the shares or name the moments."
            )
    return names, first, second


def leave_one_out(table: pa.Table, min_rows: int = 3) -> np.ndarray:
    """Split name of each row (request or event): per user the last is `test`, the one before `valid`, the rest `train`.

    Rows are ordered by (time, action strength where there is an action, row), as in `History`. A user with fewer than
    `min_rows` rows is all train. A train row in the same second as its user's valid row gets the name `""`: training
    on it would see the valid answer's moment, so callers drop it (`apply_split` counts them).

    Args:
        table: with columns `user_id` and `time`, maybe `action`.
        min_rows: smallest number of rows of a user that is split, at least 2.
    """
    users, ids = encode(table["user_id"])
    times = table["time"].to_numpy()
    strength = action_strength(table["action"]) if "action" in table.column_names else np.zeros(len(times), np.int8)
    order = np.lexsort((strength, times, users))
    counts = np.bincount(users, minlength=len(ids))
    ends = np.cumsum(counts)[users[order]]
    from_end = np.empty(len(times), dtype=np.int64)
    from_end[order] = ends - 1 - np.arange(len(times))
    names = np.where(from_end == 0, "test", np.where(from_end == 1, "valid", "train"))
    names[counts[users] < min_rows] = "train"
    valid_time = np.full(len(ids), FOREVER)
    valid_time[users[names == "valid"]] = times[names == "valid"]
    names[(names == "train") & (times >= valid_time[users])] = ""
    return names


def next_item_requests(events: pa.Table, prefix: str = "next-") -> tuple[pa.Table, np.ndarray]:
    """Makes one recommendation (or search) request out of every click, like or order that has an earlier event of its
    user.

    For sources that log actions but no requests. The request has the event's time and query, and the event's item as
    its only candidate with that action's label 1; position and the other labels are unknown (null).

    Returns:
        The requests, and (n,) the row of `events` that each request came from. Request ids are `prefix` + that row.
    """
    users, ids = encode(events["user_id"])
    times = events["time"].to_numpy()
    first = np.full(len(ids), FOREVER)
    np.minimum.at(first, users, times)
    is_feedback = pc.is_in(events["action"], value_set=pa.array(FEEDBACK)).to_numpy()
    rows = np.flatnonzero((times > first[users]) & is_feedback)
    chosen = events.take(rows).combine_chunks()
    one, none = pa.scalar(1, pa.int8()), pa.scalar(None, pa.int8())
    labels = {name: pc.if_else(pc.equal(chosen["action"], name), one, none) for name in FEEDBACK}
    columns = {
        "request_id": [f"{prefix}{row}" for row in rows.tolist()],
        **{name: chosen[name] for name in ("user_id", "time", "query")},
        "candidates": candidate_lists({"item_id": chosen["item_id"], **labels}, np.arange(len(rows) + 1)),
    }
    return table_from_columns("requests", columns, len(rows)), rows


def tie_events(events: pa.Table, rows: np.ndarray, request_ids: pa.ChunkedArray | pa.Array) -> pa.Table:
    """Writes into each event of `rows` (increasing) the id of the request that was made from it."""
    mask = np.zeros(events.num_rows, dtype=bool)
    mask[rows] = True
    old = events["request_id"].combine_chunks()
    ids = request_ids.combine_chunks() if isinstance(request_ids, pa.ChunkedArray) else request_ids
    place = events.schema.get_field_index("request_id")
    return events.set_column(place, events.schema.field(place), pc.replace_with_mask(old, pa.array(mask), ids))


def candidate_lists(parts: dict[str, Any], offsets: np.ndarray) -> pa.ListArray:
    """Builds the `candidates` column: `parts` are flat columns (absent ones become null), `offsets` (n+1,) where
    lists begin."""
    kind = SCHEMAS["requests"].arrow_schema.field("candidates").type
    fields = list(kind.value_type)
    columns = [one_array(typed(parts.get(field.name), field.type, int(offsets[-1]))) for field in fields]
    structs = pa.StructArray.from_arrays(columns, fields=fields)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs).cast(kind)


def apply_split(tables: Tables, kind: str | None = None, **options: Any) -> tuple[Tables, dict[str, Any]]:
    """Gives every request its split and proves that training cannot see the future.

    An action that came after the cut of training, on a request before it, stays in the log without its request: training
    neither learns it nor reads it.

    Args:
        tables: from a reader or a simulator.
        kind, options: of `SplitConfig`.

    Returns:
        Tables with `split_of_request`, and the `split` record of `meta.json`.

    Raises:
        ConfigError: an unknown kind, impossible numbers, or a split by time where the source has no clock.
        DataError: no split is possible, or the prescribed one leaks.
    """
    chosen = build(SplitConfig, {"kind": kind, **options}, "split")
    kind = chosen.kind or ("global_time" if tables.split_of_request is None else "source")
    check_clock(kind, tables.clock)
    need(tables.requests, "requests", ("request_id", "user_id", "time"))
    need(tables.events, "events", ("user_id", "time"))
    times = tables.requests["time"].to_numpy()
    counts = dict(tables.counts)
    requests = tables.requests
    if kind == "global_time":
        names, first, second = global_time_split(times, chosen)
        split: dict[str, Any] = {"kind": kind, "train_until": first, "valid_until": second}
    elif kind == "leave_one_out":
        names = leave_one_out(requests, chosen.min_rows)
        dropped = int((names == "").sum())
        if dropped:
            counts["requests_tied_with_the_split_dropped"] = dropped
            requests, names = requests.filter(pa.array(names != "")), names[names != ""]
        split = {"kind": kind, "train_until": None, "valid_until": None}
    else:
        if tables.split_of_request is None:
            raise DataError("The source prescribes no split; use the split kind 'global_time' or 'leave_one_out'.")
        names = split_names(tables)
        split = {"kind": kind, **_bounds_of(times, names)}
    made = dataclasses.replace(tables, requests=requests, split_of_request=names.tolist(), counts=counts)
    if kind != "source" and tables.split_of_request is not None:
        made.notes = [
            *tables.notes,
            f"The split that the source prescribes is not used; requests are split by '{kind}'.",
        ]
    late = _of_train(made, names) & _after(made.events, training_cut(requests, names, split))
    if late.any():
        counts["events_after_the_cut_untied_from_train_requests"] = int(late.sum())
        place = made.events.schema.get_field_index("request_id")
        ids = pc.if_else(pa.array(late), pa.scalar(None, pa.string()), made.events["request_id"])
        made.events = made.events.set_column(place, made.events.schema.field(place), ids)
    assert_no_leak(made, split)
    return made, split


def check_clock(kind: str | None, clock: bool) -> None:
    """Raises ConfigError where a split needs times that compare between users and the source has none."""
    if kind == "global_time" and not clock:
        raise ConfigError(
            "The times of this source are no clock, they order the actions of one user only, so no moment splits it; use the "
            "split kind 'source' or 'leave_one_out'."
        )


def need(table: pa.Table, name: str, columns: tuple[str, ...]) -> None:
    """Raises DataError when a column holds a null; `validate.check_tables` says in which rows."""
    for column in columns:
        if table[column].null_count:
            raise DataError(
                f"The {name} have {table[column].null_count} rows without '{column}'; correct them, "
                "validate.check_tables lists them."
            )


def _bounds_of(times: np.ndarray, names: np.ndarray) -> dict[str, int | None]:
    """The two moments that separate a prescribed split, or nulls where none do."""
    nothing: dict[str, int | None] = {"train_until": None, "valid_until": None}
    train, valid, test = (times[names == part] for part in ("train", "valid", "test"))
    if not len(train) or not len(valid) + len(test):
        return nothing
    train_until = int(train.max()) + 1
    valid_until = int(valid.max()) + 1 if len(valid) else train_until
    late = np.concatenate([valid, test])
    ordered = train_until <= late.min() and (not len(test) or valid_until <= test.min())
    return {"train_until": train_until, "valid_until": valid_until} if ordered else nothing


def training_cut(requests: pa.Table, names: np.ndarray, split: dict[str, Any]) -> TimeCut:
    """What training may see: strictly before `train_until`, or before a user's own first valid or test request.

    Args:
        requests: all requests (valid and test ones suffice).
        names: (n,) their split names.
        split: the `split` record.
    """
    if split.get("train_until") is not None:
        return TimeCut(default=int(split["train_until"]))
    held_out = requests.select(["user_id", "time"]).filter(pa.array(np.isin(names, ("valid", "test"))))
    users, ids = encode(held_out["user_id"])
    first = np.full(len(ids), FOREVER)
    np.minimum.at(first, users, held_out["time"].to_numpy())
    return TimeCut(FOREVER, ids, first)


def assert_no_leak(tables: Tables, split: dict[str, Any]) -> None:
    """Raises DataError unless every training request, and every event that belongs to one, precedes all (its user's)
    held-out requests, and no event of a held-out request lies in the training time."""
    names = split_names(tables)
    requests = tables.requests
    cut = training_cut(requests, names, split)
    limits = cut.of(requests["user_id"])
    late = (names == "train") & (requests["time"].to_numpy() >= limits)
    if late.any():
        row = int(np.flatnonzero(late)[0])
        raise DataError(
            f"The split leaks: {int(late.sum())} train requests are not before the held-out ones, the first is request "
            f"'{requests['request_id'][row].as_py()}' at time {requests['time'][row].as_py()} with the cut at "
            f"{int(limits[row])}; use the split kind 'global_time'."
        )
    test = requests["time"].to_numpy()[names == "test"]
    if split.get("valid_until") is not None and len(test) and test.min() < split["valid_until"]:
        raise DataError(f"The split leaks: a test request lies at {int(test.min())}, before {split['valid_until']}.")
    after = _after(tables.events, cut)
    tied = pc.is_valid(tables.events["request_id"]).to_numpy() & ~_of_train(tables, names)
    known = rows_of(tables.events["request_id"], requests["request_id"]) >= 0
    early, late = tied & known & ~after, _of_train(tables, names) & after
    for wrong, what in (
        (early, "events of held-out requests lie in the training time"),
        (late, "events of train requests lie after the training time"),
    ):
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"The split leaks: {int(wrong.sum())} {what}, the first is row {row} of events; correct its time or its "
                "request_id."
            )


def _of_train(tables: Tables, names: np.ndarray) -> np.ndarray:
    """(events,) whether each event is tied to a train request."""
    train = tables.requests["request_id"].filter(pa.array(names == "train"))
    return rows_of(tables.events["request_id"], train) >= 0


def _after(events: pa.Table, cut: TimeCut) -> np.ndarray:
    """(events,) whether each event is at or after the end of training."""
    return events["time"].to_numpy() >= cut.of(events["user_id"])


def item_statistics(
    items: pa.Table, requests: pa.Table, events: pa.Table, until: int | TimeCut | None, source: str = "auto"
) -> pa.Table:
    """Fills `exposures`, `clicks` and `orders` of the items from what happened strictly before `until`.

    Args:
        items, requests, events: tables in our schemas.
        until: a moment, a cut per user, or None for everything.
        source: `requests` counts candidates and their labels; `events` counts click and order events and leaves
            exposures unknown; `auto` takes requests where a candidate before the cut has a position or a label 0 (the
            source logged what was shown), otherwise events.

    Returns:
        The items with new counts. A count is null, not 0, where the source tells nothing about that feedback.
    """
    if source not in ("auto", "requests", "events"):
        raise ConfigError(f"source must be 'auto', 'requests' or 'events', got '{source}'.")
    cut = until if isinstance(until, TimeCut) else TimeCut(FOREVER if until is None else int(until))
    past = requests.filter(pa.array(requests["time"].to_numpy() < cut.of(requests["user_id"])))
    shown = pc.list_flatten(past["candidates"])
    shown = shown.combine_chunks() if isinstance(shown, pa.ChunkedArray) else shown
    if source == "auto":
        source = "requests" if len(shown) and _logs_impressions(shown) else "events"
    if source == "requests":
        counts = _count_candidates(items, shown)
    else:
        done = events.filter(pa.array(events["time"].to_numpy() < cut.of(events["user_id"])))
        counts = {"exposures": None}
        for column, action in (("clicks", "click"), ("orders", "order")):
            of_action = done["item_id"].filter(pc.equal(done["action"], action))
            counts[column] = _count(items, of_action) if len(of_action) else None
    for name, value in counts.items():
        column = pa.nulls(items.num_rows, pa.int64()) if value is None else pa.array(value, pa.int64())
        items = items.set_column(items.schema.get_field_index(name), items.schema.field(name), column)
    return items


def _logs_impressions(shown: pa.StructArray) -> bool:
    has_position = len(shown) > shown.field("position").null_count
    return has_position or any(pc.any(pc.equal(shown.field(name), 0)).as_py() for name in FEEDBACK)


def _count_candidates(items: pa.Table, shown: pa.StructArray) -> dict[str, np.ndarray | None]:
    ids = shown.field("item_id")
    counts: dict[str, np.ndarray | None] = {"exposures": _count(items, ids)}
    for column, label in (("clicks", "click"), ("orders", "order")):
        values = shown.field(label)
        known = len(values) > values.null_count
        counts[column] = _count(items, ids.filter(pc.fill_null(pc.equal(values, 1), False))) if known else None
    return counts


def _count(items: pa.Table, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    rows = rows_of(ids, items["item_id"])
    return np.bincount(rows[rows >= 0], minlength=items.num_rows).astype(np.int64)

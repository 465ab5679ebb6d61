"""Reader `kuaisearch`: the JSON lines of KuaiSearch (`users`, `items`, `recall`, `rank`).

* A `recall` line is a request: what was shown (in order), clicked and bought. `rank` lines of the same user, session
  and time are the same request seen item by item: they add the entrance to its context and prices to items. Rank
  lines without a recall line make a request of their own, positions in the order of the lines. Feedback that is null
  in the source is unknown, not absent: its labels are null.
* Events are the clicks and orders of the requests, at the request's time, tied to it. The lists of recent clicks and
  orders in `rank` have no times: those of a user's first request become events one second apart just before it, the
  last of the list latest (assumed); later lists repeat what the log holds already and are skipped, counted.
* The files of the public demo do not join: most items and users that the log names are not in `items` and `users`.
  `unknown` chooses: `add` (default) makes placeholders without a title, `drop` removes candidates and events of
  unknown items, and requests and events of unknown users; both are counted.
* The 30-day statistics are not read: item counts are made from the training time by `splits.item_statistics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import DataError, nearest
from sidtune.data_builders.readers.raw_files import first_rows, lists_of, pairs_of, typed_json_lines
from sidtune.data_builders.readers.reader import reader
from sidtune.data_builders.readers.text_cleaning import clean_html
from sidtune.data_builders.tables.columns import among
from sidtune.data_builders.tables.schema import Tables, table_from_columns
from sidtune.data_builders.tables.splits import candidate_lists

_INT, _TEXT = pa.int64(), pa.string()
_KEY = [("user_id", _INT), ("session_id", _INT), ("time_index", _INT), ("query", _TEXT), ("split", _TEXT)]
_IDS = pa.list_(_INT)
_RECALL = pa.schema([*_KEY, ("impressed_item_ids", _IDS), ("clicked_item_ids", _IDS), ("purchased_item_ids", _IDS)])
_RANK = pa.schema(
    [
        *_KEY,
        ("search_entrance", _TEXT),
        ("recently_clicked_item_ids", _IDS),
        ("recently_purchased_item_ids", _IDS),
        ("target_item_id", _INT),
        ("target_item_price", pa.float64()),
        ("is_clicked", _INT),
        ("is_purchased", _INT),
    ]
)
_LEVELS = [f"category_level{level}_name" for level in (1, 2, 3)]
_ITEMS = pa.schema([("item_id", _INT), *((n, _TEXT) for n in ("item_title", "brand_name", "seller_name", *_LEVELS))])
_PROFILE = ("gender", "age_bucket", "fre_country", "fre_province", "fre_city")
_USERS = pa.schema([("user_id", _INT), *((name, _TEXT) for name in _PROFILE)])
_SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid", "test": "test"}
_NOTHING = ("", "UNKNOWN")


@dataclass
class Options:
    """Options of the reader.

    Attributes:
        unknown: what to do with items and users that the log names and the catalogue lacks.
    """

    unknown: Literal["add", "drop"] = "add"


@dataclass
class _Shown:
    """Requests, and what they showed, end to end (item ids still numbers; feedback 0, 1, or -1 for unknown)."""

    keys: pa.Table  # request_id, user_id, time_index, query, split
    owner: np.ndarray
    item: np.ndarray
    click: np.ndarray
    order: np.ndarray


@reader("kuaisearch", Options)
def read(folder: Path, chosen: Options) -> Tables:
    """Reads the folder; see the module's docstring."""
    counts: dict[str, int] = {}
    recall = _read(folder, "recall", _RECALL, ("user_id", "session_id", "time_index", "impressed_item_ids"))
    rank = _read(folder, "rank", _RANK, ("user_id", "session_id", "time_index", "target_item_id"))
    shown = _requests(recall, rank, counts)
    events = _events(shown, rank, counts)
    items = _items(_read(folder, "items", _ITEMS, ("item_id",)), counts)
    users = _users(_read(folder, "users", _USERS, ("user_id",)), counts)
    requests = _request_table(shown, rank)
    names = _split(shown.keys["split"])
    if chosen.unknown == "add":
        items = _add(items, "items", "item_id", [requests_items(requests), events["item_id"]], counts)
        users = _add(users, "users", "user_id", [requests["user_id"], events["user_id"]], counts)
    else:
        requests, events, names = _drop(requests, events, names, items, users, counts)
    items = _with_prices(items, rank)
    only_one = len(set(names)) < 2
    notes = [
        "Recent clicks and orders have no times: they lie one second apart before the user's first request.",
        "Follower counts and 30-day statistics of the source are not read.",
        f"Unknown items and users: {chosen.unknown}.",
    ]
    if only_one:
        notes.append("The source prescribes no split (all its lines have the same one): split it by time.")
    return Tables(items, users, requests, events, None if only_one else names, counts, notes)


def _read(folder: Path, name: str, schema: pa.Schema, required: tuple[str, ...]) -> pa.Table:
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise DataError(f"The folder {folder} has no file {path.name}, which the reader 'kuaisearch' needs; add it.")
    return typed_json_lines(path, schema, required)


def _key_of(table: pa.Table) -> pa.Array:
    parts = [table[name].cast(_TEXT) for name in ("user_id", "session_id", "time_index")]
    return pc.binary_join_element_wise(*parts, "-").combine_chunks()


def _requests(recall: pa.Table, rank: pa.Table, counts: dict[str, int]) -> _Shown:
    """All requests in order of time, with their candidates."""
    recall = recall.append_column("request_id", _key_of(recall))
    kept, counts["duplicate_requests_dropped"] = first_rows(recall["request_id"])
    recall = recall.take(kept)
    rank = rank.append_column("request_id", _key_of(rank))
    alone = rank.filter(pc.invert(pc.is_in(rank["request_id"], value_set=recall["request_id"].combine_chunks())))
    heads = alone.take(first_rows(alone["request_id"])[0])
    counts["requests_from_rank_only"] = heads.num_rows
    columns = ["request_id", "user_id", "time_index", "query", "split"]
    keys = pa.concat_tables([recall.select(columns), heads.select(columns)])
    lists = recall["impressed_item_ids"].combine_chunks()
    place = pc.index_in(alone["request_id"], value_set=keys["request_id"].combine_chunks()).to_numpy()
    owner = np.concatenate([pc.list_parent_indices(lists).to_numpy(), place])
    item = np.concatenate([lists.flatten().to_numpy(), alone["target_item_id"].to_numpy()])
    labels = []
    for name, flag in (("clicked_item_ids", "is_clicked"), ("purchased_item_ids", "is_purchased")):
        chosen = recall[name].combine_chunks()
        pairs = np.stack([pc.list_parent_indices(chosen).to_numpy(), chosen.flatten().to_numpy()], axis=1)
        own = pc.fill_null(pc.equal(alone[flag], 1).cast(pa.int8()), -1).to_numpy()
        mine = np.stack([owner[: len(owner) - len(own)], item[: len(owner) - len(own)]], axis=1)
        known = chosen.is_valid().to_numpy(zero_copy_only=False)[mine[:, 0]]
        labels.append(np.concatenate([np.where(known, among(mine, pairs), -1), own]).astype(np.int8))
        counts[f"{name.split('_')[0]}_items_not_shown"] = int((~among(pairs, mine)).sum())
    order = np.argsort(keys["time_index"].to_numpy(), kind="stable")
    new_place = np.empty(len(order), np.int64)
    new_place[order] = np.arange(len(order))
    owner = new_place[owner]
    by_owner = np.argsort(owner, kind="stable")
    first = np.sort(np.unique(np.stack([owner, item])[:, by_owner], axis=1, return_index=True)[1])
    counts["duplicate_candidates_dropped"] = len(owner) - len(first)
    rows = by_owner[first]
    return _Shown(keys.take(order), owner[rows], item[rows], labels[0][rows], labels[1][rows])


def _request_table(shown: _Shown, rank: pa.Table) -> pa.Table:
    keys = shown.keys
    count = keys.num_rows
    lengths = np.bincount(shown.owner, minlength=count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    parts = {
        "item_id": pa.array(shown.item).cast(_TEXT),
        "position": np.arange(len(shown.owner)) - np.repeat(offsets[:-1], lengths),
        "click": pa.array(shown.click, mask=shown.click < 0),
        "order": pa.array(shown.order, mask=shown.order < 0),
    }
    place = pc.index_in(keys["request_id"], value_set=_key_of(rank))
    entrance = rank["search_entrance"].combine_chunks().take(place.combine_chunks())
    columns = {
        "request_id": keys["request_id"],
        "user_id": keys["user_id"].cast(_TEXT),
        "time": keys["time_index"],
        "query": _no_blank(keys["query"]),
        "context": pairs_of(["entrance"], [entrance], _NOTHING),
        "candidates": candidate_lists(parts, offsets),
    }
    return table_from_columns("requests", columns, count)


def _no_blank(column: pa.ChunkedArray) -> pa.ChunkedArray:
    blank = pc.equal(pc.utf8_trim_whitespace(column), "")
    return pc.if_else(blank, pa.scalar(None, _TEXT), column)


def _events(shown: _Shown, rank: pa.Table, counts: dict[str, int]) -> pa.Table:
    """Clicks and orders of the requests, and the recent lists of each user's first request."""
    keys = shown.keys
    parts = []
    for action, hit in (("click", shown.click), ("order", shown.order)):
        rows = np.flatnonzero(hit == 1)
        owner = keys.select(["request_id", "user_id", "time_index", "query"]).take(shown.owner[rows])
        parts.append(_event_rows(owner, shown.item[rows], owner["time_index"], action, owner["request_id"]))
    heads = rank.append_column("request_id", _key_of(rank))
    heads = heads.take(first_rows(heads["request_id"])[0])
    # Requests are in order of time, so the first row of a user in `keys` is the first request.
    first_ids = keys["request_id"].take(first_rows(keys["user_id"])[0])
    first = heads.filter(pc.is_in(heads["request_id"], value_set=first_ids.combine_chunks()))
    counts["recent_lists_skipped"] = heads.num_rows - first.num_rows
    for action, name in (("click", "recently_clicked_item_ids"), ("order", "recently_purchased_item_ids")):
        lists = first[name].combine_chunks()
        owner = pc.list_parent_indices(lists).to_numpy()
        lengths = np.bincount(owner, minlength=first.num_rows)
        ends = np.cumsum(lengths)
        to_end = np.repeat(ends, lengths) - np.arange(len(owner))
        rows = first.take(owner)
        times = np.maximum(rows["time_index"].to_numpy() - to_end, 0)
        parts.append(
            _event_rows(rows.set_column(3, "query", pa.nulls(len(rows), _TEXT)), lists.flatten(), times, action, None)
        )
    table = pa.concat_tables(parts)
    counts["events_from_recent_lists"] = parts[2].num_rows + parts[3].num_rows
    return table.take(np.argsort(table["time"].to_numpy(), kind="stable"))


def _event_rows(rows: pa.Table, items: Any, times: Any, action: str, ids: Any) -> pa.Table:
    columns = {
        "user_id": rows["user_id"].cast(_TEXT),
        "item_id": (items if isinstance(items, pa.Array) else pa.array(items)).cast(_TEXT),
        "time": times,
        "action": pa.repeat(pa.scalar(action), rows.num_rows),
        "query": _no_blank(rows["query"]),
        "request_id": ids if ids is not None else pa.nulls(rows.num_rows, _TEXT),
    }
    return table_from_columns("events", columns, rows.num_rows)


def _items(raw: pa.Table, counts: dict[str, int]) -> pa.Table:
    kept, counts["duplicate_items_dropped"] = first_rows(raw["item_id"])
    raw = raw.take(kept)
    dirty = raw["item_title"].to_pylist()
    titles = [clean_html(title) or None for title in dirty]
    counts["html_cleaned"] = sum(
        a != (None if b is None else " ".join(b.split())) for a, b in zip(titles, dirty, strict=True)
    )
    counts["empty_titles"] = titles.count(None)
    brand = raw["brand_name"]
    columns = {
        "item_id": raw["item_id"].cast(_TEXT),
        "title": titles,
        "brand": pc.if_else(pc.is_in(brand, value_set=pa.array(_NOTHING)), pa.scalar(None, _TEXT), brand),
        "category": lists_of([raw[name] for name in _LEVELS], _NOTHING),
        "attributes": pairs_of(["seller"], [raw["seller_name"]], _NOTHING),
    }
    return table_from_columns("items", columns, raw.num_rows)


def _with_prices(items: pa.Table, rank: pa.Table) -> pa.Table:
    """Writes the latest price that a rank line shows into each item."""
    newest = rank.filter(rank["target_item_price"].is_valid()).sort_by([("time_index", "descending")])
    newest = newest.take(first_rows(newest["target_item_id"])[0])
    place = pc.index_in(
        items["item_id"].combine_chunks(), value_set=newest["target_item_id"].combine_chunks().cast(_TEXT)
    )
    at = items.schema.get_field_index("price")
    return items.set_column(at, items.schema.field(at), newest["target_item_price"].combine_chunks().take(place))


def _users(raw: pa.Table, counts: dict[str, int]) -> pa.Table:
    kept, counts["duplicate_users_dropped"] = first_rows(raw["user_id"])
    raw = raw.take(kept)
    labels = [name.removeprefix("fre_") for name in _PROFILE]
    profile = pairs_of(labels, [raw[name] for name in _PROFILE], _NOTHING)
    return table_from_columns("users", {"user_id": raw["user_id"].cast(_TEXT), "profile": profile}, raw.num_rows)


def requests_items(requests: pa.Table) -> pa.Array:
    """Item ids of all candidates, end to end."""
    return pc.list_flatten(requests["candidates"].combine_chunks()).field("item_id")


def _add(table: pa.Table, name: str, column: str, used: list[Any], counts: dict[str, int]) -> pa.Table:
    chunks = [chunk for ids in used for chunk in (ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids])]
    ids = pc.unique(pa.chunked_array(chunks, _TEXT))
    new = ids.filter(pc.invert(pc.is_in(ids, value_set=table[column].combine_chunks())))
    counts[f"unknown_{name}_added"] = len(new)
    return pa.concat_tables([table, table_from_columns(name, {column: new}, len(new))])


def _drop(
    requests: pa.Table, events: pa.Table, names: list[str], items: pa.Table, users: pa.Table, counts: dict[str, int]
) -> tuple[pa.Table, pa.Table, list[str]]:
    """Removes what names unknown items or users, and requests that show nothing any more."""
    known_items, known_users = items["item_id"].combine_chunks(), users["user_id"].combine_chunks()
    lists = requests["candidates"].combine_chunks()
    shown = lists.flatten()
    keep = pc.is_in(shown.field("item_id"), value_set=known_items)
    owner = pc.list_parent_indices(lists).to_numpy()[keep.to_numpy(zero_copy_only=False)]
    lengths = np.bincount(owner, minlength=requests.num_rows)
    counts["candidates_of_unknown_items_dropped"] = len(shown) - len(owner)
    fewer = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), shown.filter(keep)
    ).cast(lists.type)
    place = requests.schema.get_field_index("candidates")
    requests = requests.set_column(place, requests.schema.field(place), fewer)
    stay = pc.and_(pc.is_in(requests["user_id"], value_set=known_users), pa.array(lengths > 0))
    counts["requests_dropped"] = requests.num_rows - pc.sum(stay).as_py() if requests.num_rows else 0
    names = [name for name, kept in zip(names, stay.to_pylist(), strict=True) if kept]
    requests = requests.filter(stay)
    by_item = pc.is_in(events["item_id"], value_set=known_items)
    stay = pc.and_(by_item, pc.is_in(events["user_id"], value_set=known_users))
    tied = pc.is_in(events["request_id"], value_set=requests["request_id"].combine_chunks())
    stay = pc.and_(stay, pc.or_(tied, events["request_id"].is_null()))
    counts["events_dropped"] = events.num_rows - (pc.sum(stay).as_py() or 0)
    return requests, events.filter(stay), names


def _split(column: pa.ChunkedArray) -> list[str]:
    names = column.to_pylist()
    for name in sorted({str(name) for name in names if name not in _SPLITS}):
        raise DataError(f"The log names the split '{name}', which is unknown ({nearest(name, _SPLITS)})")
    return [_SPLITS[name] for name in names]

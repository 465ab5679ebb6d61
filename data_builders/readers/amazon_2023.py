"""Reader `amazon_2023`: the Amazon Reviews 2023 of McAuley Lab (`meta_CATEGORY.jsonl` and `CATEGORY.jsonl`, maybe `.gz`, in the
folder or below it).

A review is a purchase at its `timestamp` (milliseconds, here seconds) of the product `parent_asin`; a request is made from every
purchase that has an earlier one of its user. Exactly repeated reviews of one product in one second count once.

* Descriptions are lists of texts with HTML; they become one plain text, `features` where there is no description.
* `store` is the brand, `categories` (else `main_category`) the category, plain values of `details` are attributes, the first
  large picture is the image. A price that is no number is unknown.
* Products that only reviews name get a placeholder without a title.
* `average_rating`, `rating_number` and `helpful_vote` reach into the time after any split, so they are not read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sidtune.data_builders.readers.own import complete
from sidtune.data_builders.readers.raw_files import json_rows, one_file
from sidtune.data_builders.readers.reader import reader
from sidtune.data_builders.readers.text_cleaning import clean_html
from sidtune.data_builders.tables.columns import rows_of
from sidtune.data_builders.tables.findings import Findings
from sidtune.data_builders.tables.schema import SCHEMAS, Tables, table_from_columns, table_from_rows
from sidtune.data_builders.tables.store import ALL, DataFolder

_NOTES = [
    "A review stands for a purchase; what was shown, exposures and clicks are unknown.",
    "Average ratings and numbers of ratings are not read: they count what comes after any split.",
]


@dataclass
class Options:
    """Options of the reader.

    Attributes:
        category: name of the category (`All_Beauty`) where a folder holds several; default: the only one.
        action: the action that a review stands for.
        verified: read only reviews of verified purchases.
    """

    category: str = "*"
    action: Literal["click", "like", "order"] = "order"
    verified: bool = False


@reader("amazon_2023", Options)
def read(folder: Path, chosen: Options) -> Tables:
    """Reads the folder; see the module's docstring."""
    meta = one_file(folder, f"**/meta_{chosen.category}.jsonl*")
    assert meta is not None
    name = meta.name.removeprefix("meta_").partition(".jsonl")[0]
    reviews = one_file(folder, f"**/{name}.jsonl*")
    assert reviews is not None
    findings, counts = Findings(), {"empty_titles": 0, "empty_descriptions": 0, "prices_without_number": 0}
    items = _items(meta, findings, counts)
    events = _events(reviews, chosen, findings, counts)
    findings.raise_if_any()
    unknown = events["item_id"].filter(pa.array(rows_of(events["item_id"], items["item_id"]) < 0)).unique()
    counts["unknown_items_added"] = len(unknown)
    items = pa.concat_tables([items, table_from_columns("items", {"item_id": unknown}, len(unknown))])
    nothing = {name: SCHEMAS[name].arrow_schema.empty_table() for name in ("users", "requests")}
    found = DataFolder(items, nothing["users"], events, {ALL: nothing["requests"]})
    made = complete(found, users_given=False, requests_from_events=True)
    return replace(made, counts=counts | made.counts, notes=[*_NOTES, *made.notes])


def _items(path: Path, findings: Findings, counts: dict[str, int]) -> pa.Table:
    rows: dict[str, dict[str, Any]] = {}
    nameless, repeated = [], 0
    for number, row in enumerate(json_rows(path)):
        key = row.get("parent_asin")
        if not isinstance(key, str) or not key:
            nameless.append(number)
        elif key in rows:
            repeated += 1
        else:
            rows[key] = _item(key, row, counts)
    findings.rows(str(path), "parent_asin", nameless, "the product has no id", "name it or remove the line")
    counts["duplicate_items_dropped"] = repeated
    return table_from_rows("items", list(rows.values()))


def _item(key: str, row: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
    title = clean_html(_text(row.get("title")))
    description = clean_html(_text(row.get("description")) or _text(row.get("features")))
    price, details = row.get("price"), row.get("details")
    known = type(price) in (int, float) and price >= 0
    counts["empty_titles"] += not title
    counts["empty_descriptions"] += not description
    counts["prices_without_number"] += price is not None and not known
    plain = details.items() if isinstance(details, dict) else ()
    levels = row.get("categories") or [row.get("main_category")]
    return {
        "item_id": key,
        "title": title or None,
        "description": description or None,
        "brand": clean_html(_text(row.get("store"))) or None,
        "category": [text for level in levels if (text := clean_html(_text(level)))] or None,
        "attributes": [{"name": clean_html(a), "value": text} for a, b in plain if (text := clean_html(_text(b)))]
        or None,
        "price": float(price) if known else None,
        "image": _picture(row.get("images")),
    }


def _text(value: Any) -> str:
    """A text, or a list of texts joined by blanks; anything else has none."""
    parts = value if isinstance(value, list) else [value]
    return " ".join(part for part in parts if isinstance(part, str))


def _picture(images: Any) -> str | None:
    """The first large picture of a list of objects, or of an object of lists."""
    first = images[0] if isinstance(images, list) and images else images
    sizes = first if isinstance(first, dict) else {}
    for size in ("large", "hi_res", "thumb"):
        found = sizes.get(size)
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, str) and found:
            return found
    return None


def _events(path: Path, chosen: Options, findings: Findings, counts: dict[str, int]) -> pa.Table:
    good, wrong, unverified = [], [], 0
    for number, row in enumerate(json_rows(path)):
        user, item, time = row.get("user_id"), row.get("parent_asin") or row.get("asin"), row.get("timestamp")
        if not (isinstance(user, str) and user and isinstance(item, str) and item and type(time) is int):
            wrong.append(number)
        elif chosen.verified and row.get("verified_purchase") is not True:
            unverified += 1
        else:
            good.append((user, item, time // 1000))
    what = "user_id, parent_asin or the timestamp in milliseconds is missing or of another type"
    findings.rows(str(path), None, wrong, what, "correct or remove the line")
    if chosen.verified:
        counts["unverified_reviews_dropped"] = unverified
    users, items, times = zip(*good, strict=True) if good else ((), (), ())
    table = table_from_columns(
        "events", {"user_id": users, "item_id": items, "time": times, "action": [chosen.action] * len(good)}, len(good)
    )
    return table.take(np.argsort(np.array(times, np.int64), kind="stable"))

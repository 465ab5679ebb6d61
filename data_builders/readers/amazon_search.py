"""Reader `amazon_search`: the Amazon personalised product-search sets (`query_text.txt.gz`, `train.qrels.gz`,
`test.qrels.gz`).

A qrels line `USER_QUERY 0 ITEM 1` says that the user bought the item and that the query describes its category. All
items of one user and query form one request. There are no times, no titles and no shown lists, so:

* The time of a request is the place of its first line in the files, train before test.
* A purchase stands under several queries of its user. It becomes one event, at the time of the **last** train request
  that names it: so no request can see its own answer in its history, whichever query it was first listed under.
* A test purchase is an event at the very last moment, so the history of every test request is what train lines say.
* Items are placeholders without a title.

The source prescribes train and test; it has no valid split.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidtune.core.errors import DataError
from sidtune.core.text import read_lines
from sidtune.data_builders.readers.raw_files import one_file
from sidtune.data_builders.readers.reader import reader
from sidtune.data_builders.tables.schema import Tables, table_from_columns
from sidtune.data_builders.tables.splits import candidate_lists


@dataclass
class Options:
    """Options of the reader: none."""


@reader("amazon_search", Options, clock=False)
def read(folder: Path, chosen: Options) -> Tables:
    """Reads the folder; see the module's docstring."""
    query_file = one_file(folder, "query_text.txt.gz")
    assert query_file is not None
    queries = read_lines(query_file)
    parts = [_read_qrels(one_file(folder, f"{part}.qrels.gz"), len(queries)) for part in ("train", "test")]
    (train, sold, repeated), (test, wanted, again) = parts
    keys, request_of_line = _number(train, test)
    first_test = len(set(train))
    if not first_test or len(keys) == first_test:
        raise DataError(f"The folder {folder} has no train or no test lines; copy or download it again.")
    if request_of_line[len(train) :].min() < first_test:
        raise DataError(f"The folder {folder} has a user and query both in train and in test; copy it again.")
    users, query_numbers = zip(*(key.rsplit("_", 1) for key in keys), strict=True)
    items = sold + wanted
    order = np.argsort(request_of_line, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(request_of_line, minlength=len(keys)))])
    flat = pa.array(items, pa.string()).take(pa.array(order))
    ids = [f"{'train' if place < first_test else 'test'}-{key}" for place, key in enumerate(keys)]
    requests = table_from_columns(
        "requests",
        {
            "request_id": ids,
            "user_id": list(users),
            "time": np.arange(len(keys)),
            "query": [queries[int(number)] for number in query_numbers],
            "candidates": candidate_lists({"item_id": flat, "order": np.ones(len(items), np.int8)}, offsets),
        },
        len(keys),
    )
    catalogue, people = sorted(set(items)), sorted(set(users))
    counts = {
        "lines": len(items),
        "duplicate_lines_dropped": repeated + again,
        "items_without_title": len(catalogue),
    }
    return Tables(
        items=table_from_columns("items", {"item_id": catalogue}, len(catalogue)),
        users=table_from_columns("users", {"user_id": people}, len(people)),
        requests=requests,
        events=_events(requests, request_of_line, items, first_test),
        split_of_request=["train"] * first_test + ["test"] * (len(keys) - first_test),
        counts=counts,
        notes=[
            "The source has no times: requests are numbered in the order of the files, train before test.",
            "The source has no titles: items are placeholders.",
            "A purchase listed under several queries is one event, at the last train request that names it.",
            "The source prescribes train and test only; the valid split is empty.",
        ],
    )


def _read_qrels(path: Path | None, queries: int) -> tuple[list[str], list[str], int]:
    """Keys `USER_QUERY` and items of the distinct lines, and how many lines were repeated."""
    assert path is not None
    keys, items, seen = [], [], set()
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        fields = line.split()
        user, _, query = fields[0].rpartition("_") if len(fields) == 4 else ("", "", "")
        if not user or not query.isdecimal() or int(query) >= queries or fields[3] != "1":
            raise DataError(
                f"The file {path} has in line {number} {line!r:.60}; expected 'USER_QUERY 0 ITEM 1' "
                f"with a query number below {queries}."
            )
        pair = (fields[0], fields[2])
        if pair not in seen:
            seen.add(pair)
            keys.append(fields[0])
            items.append(fields[2])
    return keys, items, len(lines) - len(keys)


def _number(*groups: list[str]) -> tuple[list[str], np.ndarray]:
    """Distinct keys in order of first occurrence, and the number of each line's key."""
    numbers: dict[str, int] = {}
    lines = [numbers.setdefault(key, len(numbers)) for keys in groups for key in keys]
    return list(numbers), np.array(lines, dtype=np.int64)


def _events(requests: pa.Table, request_of_line: np.ndarray, items: list[str], first_test: int) -> pa.Table:
    """One event per user and item, tied to the last request that names them."""
    users = requests["user_id"].combine_chunks()
    pairs: dict[tuple[str, str], int] = {}
    owners = users.to_pylist()
    for request, item in zip(request_of_line.tolist(), items, strict=True):
        pair = (owners[request], item)
        pairs[pair] = max(pairs.get(pair, -1), request)
    last = np.array(list(pairs.values()), dtype=np.int64)
    order = np.argsort(last, kind="stable")
    rows = pa.array(last[order])
    columns = {
        "user_id": users.take(rows),
        "item_id": pa.array([item for _, item in pairs], pa.string()).take(pa.array(order)),
        "time": np.where(last[order] < first_test, last[order], requests.num_rows - 1),
        "action": pa.repeat(pa.scalar("order"), len(last)),
        "query": requests["query"].combine_chunks().take(rows),
        "request_id": requests["request_id"].combine_chunks().take(rows),
    }
    return table_from_columns("events", columns, len(last))

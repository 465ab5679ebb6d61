"""Data building: rows per second and peak memory of a million interactions, and history against a pandas groupby.

    python benchmarks/data_building.py [--quick] [--json FILE]

A random shop in our own schema (1,000,000 events, 200,000 requests that show 1,000,000 candidates, 50,000 users and
items; a tenth of all with `--quick`) is written as JSON lines and as parquet and built into a data folder: read and
validate, split, item statistics, all histories, save. Each build runs in a fresh process, so its peak memory is its
own. Baselines do the same work the usual way (rows of `json.loads`; a pandas groupby with one search per user) and
must give equal results before any time counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidtune.core.folders import write_folder, write_json
from sidtune.data_builders.readers.own import read
from sidtune.data_builders.tables.findings import Findings
from sidtune.data_builders.tables.history import History, Ragged
from sidtune.data_builders.tables.schema import SCHEMAS, table_from_columns
from sidtune.data_builders.tables.splits import apply_split, candidate_lists, item_statistics, training_cut
from sidtune.data_builders.tables.store import save_tables, split_names
from sidtune.data_builders.tables.table_files import read_table

FULL = 1_000_000
SHOWN = 5
MAX_HISTORY = 50


def make_shop(interactions: int, seed: int = 0) -> dict[str, pa.Table]:
    """A random sound shop: `interactions` events and as many shown candidates; users are skewed, times span a year."""
    draw = np.random.default_rng(seed)
    people = items = max(10, interactions // 20)
    asked = interactions // SHOWN
    users = (people * draw.random(asked) ** 2).astype(np.int64)
    times = np.sort(draw.integers(1_600_000_000, 1_630_000_000, asked))
    queries = pa.array([f"query {n}" for n in range(1000)]).take(pa.array(draw.integers(0, 1000, asked)))
    start = draw.integers(0, items, (asked, 1))
    shown = ((start + np.arange(SHOWN) * 7) % items).ravel()
    clicks = draw.random(asked * SHOWN) < 0.2
    ids = pa.array([f"r{n}" for n in range(asked)])
    names = {"user": pa.array([f"u{n}" for n in range(people)]), "item": pa.array([f"i{n}" for n in range(items)])}
    of_request = np.repeat(np.arange(asked), SHOWN)
    late = draw.integers(0, 300, interactions - interactions % SHOWN)
    parts = {
        "item_id": names["item"].take(pa.array(shown)),
        "position": np.tile(np.arange(SHOWN), asked),
        "click": clicks.astype(np.int8),
        "order": (clicks & (draw.random(len(clicks)) < 0.2)).astype(np.int8),
    }
    catalogue = {"item_id": names["item"], "title": [f"a title of several words, number {n}" for n in range(items)]}
    return {
        "items": table_from_columns("items", {**catalogue, "price": draw.random(items)}, items),
        "users": table_from_columns("users", {"user_id": names["user"]}, people),
        "requests": table_from_columns(
            "requests",
            {
                "request_id": ids,
                "user_id": names["user"].take(pa.array(users)),
                "time": times,
                "query": queries,
                "candidates": candidate_lists(parts, np.arange(asked + 1) * SHOWN),
            },
            asked,
        ),
        "events": table_from_columns(
            "events",
            {
                "user_id": names["user"].take(pa.array(users[of_request])),
                "item_id": parts["item_id"],
                "time": times[of_request] + late,
                "action": pa.array(["click", "order"]).take(pa.array(parts["order"].astype(np.int64))),
                "request_id": ids.take(pa.array(of_request)),
            },
            len(of_request),
        ),
    }


def write_source(shop: dict[str, pa.Table], folder: Path) -> None:
    """Writes the shop twice: `folder/parquet` and `folder/jsonl`."""
    for kind in ("parquet", "jsonl"):
        (folder / kind).mkdir()
    for name, table in shop.items():
        pq.write_table(table, folder / "parquet" / f"{name}.parquet")
        with (folder / "jsonl" / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for batch in table.to_batches(max_chunksize=20_000):
                stream.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())


def build(source: str, output: str) -> dict[str, Any]:
    """The whole build; returns seconds per step, counts, and the peak memory of this process."""
    seconds: dict[str, float] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - started, 3)
        return result

    tables = step("read and validate", lambda: read(source))
    tables, split = step("split", lambda: apply_split(tables))
    cut = training_cut(tables.requests, split_names(tables), split)
    tables.items = step("statistics", lambda: item_statistics(tables.items, tables.requests, tables.events, cut))
    history = step("history, sort", lambda: History(tables.events))
    times = tables.requests["time"].to_numpy()
    found = step("history, requests", lambda: history.before(tables.requests["user_id"], times, MAX_HISTORY))
    whole = step("history, users", lambda: history.of_users(cut))

    def save() -> None:
        with write_folder(output, "benchmark") as scratch:
            save_tables(tables, scratch, split, {"reader": "sidtune", "statistics_until": split["train_until"]})

    step("save", save)
    return {
        "seconds": seconds,
        "events": tables.events.num_rows,
        "history_rows": len(found.rows) + len(whole.rows),
        "peak_rss_mib": round(peak_memory() / 2**20),
    }


def peak_memory() -> int:
    """Peak resident bytes of this process. `ru_maxrss` of a started process begins at its parent's, `VmHWM` does
    not."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def pandas_history(events: pa.Table, requests: pa.Table, max_len: int) -> Ragged:
    """The same histories by a pandas groupby and one search per user."""
    log = events.select(["user_id", "time", "action"]).to_pandas()
    log["strength"] = log["action"].map({"order": 0, "like": 1, "click": 2}).fillna(3)
    log = log.sort_values(["user_id", "time", "strength"], kind="stable")
    by_user = {user: (part["time"].to_numpy(), part.index.to_numpy()) for user, part in log.groupby("user_id")}
    asked = requests.select(["user_id", "time"]).to_pandas()
    lists: list[np.ndarray] = [np.empty(0, np.int64)] * len(asked)
    for user, part in asked.groupby("user_id"):
        if user not in by_user:
            continue
        times, rows = by_user[user]
        ends = np.searchsorted(times, part["time"].to_numpy())
        for place, end in zip(part.index, ends, strict=True):
            lists[place] = rows[max(0, end - max_len) : end]
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in lists])])
    return Ragged(offsets, np.concatenate(lists))


def our_history(events: pa.Table, requests: pa.Table, max_len: int) -> Ragged:
    return History(events).before(requests["user_id"], requests["time"].to_numpy(), max_len)


def loop_read(path: Path, name: str) -> pa.Table:
    """JSON lines the usual way: one dictionary per row."""
    with path.open(encoding="utf-8") as stream:
        return pa.Table.from_pylist([json.loads(line) for line in stream], schema=SCHEMAS[name].arrow_schema)


def our_read(path: Path, name: str) -> pa.Table:
    findings = Findings()
    table = read_table(path, path.name, SCHEMAS[name].arrow_schema, findings)
    findings.raise_if_any()
    return table


def timed(work: Callable[[], Any], runs: int) -> float:
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def pair(
    name: str, baseline: str, equal: bool, ours: Callable, theirs: Callable, rows: int, runs: int
) -> dict[str, Any]:
    assert equal, f"{name}: outputs differ, so no time is reported"
    ours_s, baseline_s = timed(ours, runs), timed(theirs, runs)
    return {
        "name": name,
        "baseline": baseline,
        "ours_s": round(ours_s, 4),
        "baseline_s": round(baseline_s, 4),
        "ratio": round(baseline_s / ours_s, 2),
        "equal": True,
        "rows_per_s": round(rows / ours_s),
    }


def whole_build(source: Path, folder: Path) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(build, str(source), str(folder / f"built-{source.name}")).result()
    total = sum(result["seconds"].values())
    return {
        "name": f"build a data folder from {source.name}",
        "baseline": None,
        "ours_s": round(total, 3),
        "baseline_s": None,
        "ratio": None,
        "equal": None,
        "rows_per_s": round(result["events"] / total),
        **result,
    }


def run(interactions: int, runs: int) -> list[dict[str, Any]]:
    """All rows of the result."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shop = make_shop(interactions)
        write_source(shop, folder)
        rows = [whole_build(folder / kind, folder) for kind in ("parquet", "jsonl")]
        events, requests = shop["events"], shop["requests"]
        ours, theirs = (make(events, requests, MAX_HISTORY) for make in (our_history, pandas_history))
        equal = np.array_equal(ours.offsets, theirs.offsets) and np.array_equal(ours.rows, theirs.rows)
        rows.append(
            pair(
                f"history of {requests.num_rows:,} requests in {events.num_rows:,} events",
                "pandas groupby, one search per user",
                equal,
                lambda: our_history(events, requests, MAX_HISTORY),
                lambda: pandas_history(events, requests, MAX_HISTORY),
                events.num_rows,
                runs,
            )
        )
        for table in ("events", "requests"):
            path = folder / "jsonl" / f"{table}.jsonl"
            rows.append(
                pair(
                    f"read {shop[table].num_rows:,} {table} from JSON lines",
                    "json.loads per line",
                    our_read(path, table).equals(loop_read(path, table)),
                    lambda path=path, table=table: our_read(path, table),
                    lambda path=path, table=table: loop_read(path, table),
                    shop[table].num_rows,
                    1,
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    rows = run(FULL // 10 if arguments.quick else FULL, 3)
    for row in rows:
        memory = (
            f", peak {row['peak_rss_mib']:,} MiB" if "peak_rss_mib" in row else f", {row['ratio']} x {row['baseline']}"
        )
        print(f"{row['name']}: {row['ours_s']:.2f} s, {row['rows_per_s']:,} rows/s{memory}")
        for step, seconds in row.get("seconds", {}).items():
            print(f"  {step}: {seconds:.2f} s")
    if arguments.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
            "pyarrow": pa.__version__,
        }
        write_json(arguments.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()

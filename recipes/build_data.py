"""Builds a data folder: reader → clean typed tables → split → statistics of the past → validated parquet.

    python -m sidtune.recipes.build_data --config recipes/quickstart/build_data.yaml --output_dir runs/quickstart/data
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from sidtune.core.config import as_dict, build, command
from sidtune.core.errors import ConfigError
from sidtune.core.folders import write_folder, write_run
from sidtune.data_builders import splits
from sidtune.data_builders.registry import READERS
from sidtune.data_builders.schema import Tables
from sidtune.data_builders.store import save_tables
from sidtune.data_builders.validate import check_folder


@dataclass
class SplitConfig:
    """How requests become train, valid and test.

    Attributes:
        kind: `global_time` (default), `leave_one_out` (a published protocol), or `source` (the reader prescribes it).
        valid_share: share of the requests, by time, between train and test (global_time).
        test_share: share of the latest requests (global_time).
    """

    kind: str = "global_time"
    valid_share: float = 0.05
    test_share: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("global_time", "leave_one_out", "source"):
            raise ConfigError(f"split.kind must be global_time, leave_one_out or source, got '{self.kind}'.")


@dataclass
class Arguments:
    """Options of build_data.

    Attributes:
        output_dir: data folder to write.
        reader: name of a reader in `data_builders/registry.py`.
        path: folder or id the reader reads; null for the embedded shop.
        options: options of the reader.
        split: see `SplitConfig`.
        seed: seed of the reader, where it draws anything and `options` does not set one.
    """

    output_dir: str
    reader: str = "shop_world"
    path: str | None = None
    options: dict = field(default_factory=dict)
    split: dict = field(default_factory=dict)
    seed: int = 0


def main(arguments: Arguments) -> None:
    """Builds the folder; prints what was read, what was mended, and rows per second."""
    started = time.time()
    split = build(SplitConfig, arguments.split, "split")
    read = READERS.get(arguments.reader)
    options = dict(arguments.options)
    if arguments.reader == "shop_world":
        options.setdefault("seed", arguments.seed)
    tables: Tables = read(arguments.path, **options)
    rows = tables.requests.num_rows + tables.events.num_rows
    splitting = splits.assign(tables, as_dict(split))
    with write_folder(arguments.output_dir) as scratch:
        save_tables(
            tables,
            scratch,
            split=splitting,
            meta={"reader": arguments.reader, "path": arguments.path, "options": options},
        )
        check_folder(scratch)
        seconds = time.time() - started
        metrics = {
            "items": tables.items.num_rows,
            "users": tables.users.num_rows,
            "requests": tables.requests.num_rows,
            "events": tables.events.num_rows,
            "counts": tables.counts,
            "rows_per_second": round(rows / max(seconds, 1e-9)),
        }
        source = {"path": arguments.path} if arguments.path and Path(arguments.path).exists() else {}
        write_run(
            scratch, step="build_data", config=as_dict(arguments), inputs=source, metrics=metrics, started=started
        )
    _print(arguments, metrics, tables)


def _print(arguments: Arguments, metrics: dict, tables: Tables) -> None:
    print(
        f"{arguments.output_dir}: {metrics['items']:,} items, {metrics['users']:,} users, {metrics['requests']:,} requests, "
        f"{metrics['events']:,} events ({metrics['rows_per_second']:,} rows/s)"
    )
    for name, count in tables.counts.items():
        print(f"  {name.replace('_', ' ')}: {count:,}")
    for note in tables.notes:
        print(f"  note: {note}")


if __name__ == "__main__":
    command(main, Arguments)

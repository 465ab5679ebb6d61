"""Builds a data folder: reader → clean typed tables → split → statistics of the past → validated parquet.

sidtune build-data --config recipes/quickstart/build_data.yaml --output_dir runs/quickstart/data
"""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass, field

from sidtune.core.config import SEEDS, as_dict, build, check_range, command
from sidtune.core.errors import ConfigError
from sidtune.core.folders import write_folder, write_run, writes
from sidtune.core.pipeline import Step, check_there
from sidtune.data_builders.registry import READERS, reader_options
from sidtune.data_builders.shop_world.config import config_from_options
from sidtune.data_builders.tables import splits
from sidtune.data_builders.tables.schema import SPLITS, Tables
from sidtune.data_builders.tables.store import save_tables, split_names
from sidtune.data_builders.tables.validate import check_folder, check_tables

LAUNCH = "alone"


@dataclass
class Arguments:
    """Options of build_data.

    Attributes:
        output_dir: data folder to write.
        reader: name of a reader in `data_builders/registry.py`.
        path: folder or id the reader reads; null for the embedded shop. `$NAME` and `~` are expanded.
        options: options of the reader.
        split: `kind` (`source` if the reader prescribes a split, else `global_time`; `leave_one_out` for a published protocol)
            and the other fields of `splits.SplitConfig`.
        seed: seed of the reader, where it draws anything and `options` does not set one.
    """

    output_dir: str
    reader: str = "shop_world"
    path: str | None = None
    options: dict = field(default_factory=dict)
    split: dict = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, 0, "seed", most=SEEDS)
        if self.reader == "shop_world" and self.path is not None:
            raise ConfigError(
                "path is read by no one, because reader is the embedded shop; name a reader, or leave path out."
            )
        if self.path is not None:
            self.path = os.path.expanduser(os.path.expandvars(self.path))
            if "$" in self.path:
                raise ConfigError(
                    f"The path {self.path} names an environment variable that is not set; set it or give --path."
                )
        reader_options(self.reader, self.options, self.path)
        kind = build(splits.SplitConfig, self.split, "split").kind
        splits.check_clock(kind, getattr(READERS.get(self.reader), "clock", True))


def preflight(step: Step) -> None:
    """Refuses a source that is not there, unless it is on the hub."""
    if step.config.reader not in ("hub", "shop_world"):
        check_there(step, path=step.config.path)


@writes("build_data")
def main(arguments: Arguments) -> None:
    """Builds the folder; prints what was read, what was mended, and rows per second."""
    started = time.time()
    read = READERS.get(arguments.reader)
    options = dict(arguments.options)
    if arguments.reader == "shop_world":
        # All fields, defaults too: evaluation rebuilds the world from meta.json, whatever the defaults are by then.
        options = as_dict(config_from_options({"seed": arguments.seed, **options}))
    tables: Tables = read(arguments.path, **options)
    check_tables(tables)
    rows = tables.requests.num_rows + tables.events.num_rows
    tables, split = splits.apply_split(tables, **arguments.split)
    # Counts of the items from what training may see; they end at one moment, or (null) at an own one of each user.
    cut, until = splits.training_cut(tables.requests, split_names(tables), split), split["train_until"]
    items = splits.item_statistics(tables.items, tables.requests, tables.events, cut)
    tables = dataclasses.replace(tables, items=items)
    with write_folder(arguments.output_dir) as scratch:
        meta = {"reader": arguments.reader, "options": options, "statistics_until": until}
        save_tables(tables, scratch, split=split, meta=meta)
        check_folder(scratch)
        metrics = {name: getattr(tables, name).num_rows for name in ("items", "users", "requests", "events")}
        metrics["requests_by_split"] = {part: tables.split_of_request.count(part) for part in SPLITS}
        per_second = round(rows / max(time.time() - started, 1e-9))
        write_run(scratch, metrics={**metrics, "counts": tables.counts, "rows_per_second": per_second})
    print(
        f"{arguments.output_dir}: {metrics['items']:,} items, {metrics['users']:,} users, {metrics['requests']:,} requests, "
        f"{metrics['events']:,} events ({per_second:,} rows/s)"
    )
    sizes = ", ".join(f"{part} {count:,}" for part, count in metrics["requests_by_split"].items())
    print(f"  split {split['kind']} ({splits.KINDS[split['kind']]}): {sizes}")
    for name, count in tables.counts.items():
        print(f"  {name.replace('_', ' ')}: {count:,}")
    for note in tables.notes:
        print(f"  note: {note}")


if __name__ == "__main__":
    command(main, Arguments)

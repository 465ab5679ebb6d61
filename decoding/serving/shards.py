"""A long table made in shards by any number of processes, and joined. Our own plumbing.

A shard is made by one process and written whole, so no bit of the result depends on the number of processes, and a killed run goes
on after its last finished shards. They lie in a hidden folder beside the output folder, with the plan that they were made by.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sidtune.core.errors import ConfigError, SidtuneError
from sidtune.core.folders import RUN_FILE, read_json, write_json

PLAN_FILE = "plan.json"
_POLL_S = 0.2


class Shards:
    """The parts of the result.

    Args:
        output_dir: folder of the result. size: rows of a shard.
        ids: of all rows, the first column of `schema`. schema: of the result.

    Attributes:
        folder: where they are.
    """

    def __init__(self, output_dir: str | Path, size: int, ids: list[str], schema: pa.Schema) -> None:
        self.folder, self._size, self._ids, self._schema = work_folder(output_dir), size, ids, schema

    def __len__(self) -> int:
        return -(-len(self._ids) // self._size)

    def rows(self, number: int) -> range:
        return range(number * self._size, min((number + 1) * self._size, len(self._ids)))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"

    def is_done(self, number: int) -> bool:
        """Whether the shard is there and whole; a damaged file (a crash of the machine) counts as absent."""
        try:
            return pq.read_metadata(self.path(number)).num_rows == len(self.rows(number))
        except (OSError, pa.ArrowException):
            return False

    def write(self, number: int, table: pa.Table) -> None:
        scratch = self.folder / f".{number:06d}.partial-{os.getpid()}"
        pq.write_table(table, scratch)
        os.replace(scratch, self.path(number))

    def read(self, number: int) -> pa.Table:
        table = pq.read_table(self.path(number), schema=self._schema)
        rows = self.rows(number)
        if table.column(0).to_pylist() != self._ids[rows.start : rows.stop]:
            raise SidtuneError(
                f"The shard {self.path(number)} holds other requests; delete {self.folder} and run again."
            )
        return table

    def joined(self) -> Iterator[pa.Table]:
        """All shards in their order, once the other processes have written theirs.

        No barrier of the process group: it would time out while a slower process still works.
        """
        for number in range(len(self)):
            while not self.is_done(number):
                time.sleep(_POLL_S)
        return (self.read(number) for number in range(len(self)))


def work_folder(output_dir: str | Path) -> Path:
    """Where the shards of a result lie."""
    output = Path(output_dir)
    return output.parent / f".{output.name}.shards"


def digest(plan: dict[str, Any]) -> str:
    """What `run.json` of a finished result says of its plan, as `metrics.plan`."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def settle(output_dir: str | Path, plan: dict[str, Any], restart: bool) -> bool:
    """Whether there is work left; then the plan is written beside the output. For one process.

    Raises:
        ConfigError: finished shards of another plan are there, and `restart` is not set.
    """
    record = Path(output_dir) / RUN_FILE
    if record.exists() and read_json(record).get("metrics", {}).get("plan") == digest(plan):
        return False
    folder = work_folder(output_dir)
    if restart and folder.exists():
        shutil.rmtree(folder)
    if (folder / PLAN_FILE).exists():
        old = read_json(folder / PLAN_FILE)
        differs = [key for key in {**plan, **old} if old.get(key) != plan.get(key)]
        if differs:
            raise ConfigError(
                f"{folder} holds finished shards of an interrupted run that differs in {', '.join(differs[:5])}; set "
                "restart: true to throw them away, or run with the former options and inputs to go on."
            )
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".*.partial-*"):
        stale.unlink()
    write_json(folder / PLAN_FILE, plan)
    return True

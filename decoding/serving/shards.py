"""A long table made in shards by any number of processes, and joined. Our own plumbing.

A shard is made by one process and written whole, so no bit of the result depends on the number of processes, and a killed run goes
on after its last finished shards. They lie in the work folder of the result (`core/resume.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_POLL_S = 0.2


class Shards:
    """The parts of the result.

    Args:
        folder: where they lie. size: rows of a shard. count: of all rows. schema: of the result.
    """

    def __init__(self, folder: Path, size: int, count: int, schema: pa.Schema) -> None:
        self.folder, self._size, self._count, self._schema = folder, size, count, schema

    def __len__(self) -> int:
        return -(-self._count // self._size)

    def rows(self, number: int) -> range:
        return range(number * self._size, min((number + 1) * self._size, self._count))

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
        return pq.read_table(self.path(number), schema=self._schema)

    def joined(self) -> Iterator[pa.Table]:
        """All shards in their order, once the other processes have written theirs.

        No barrier of the process group: it would time out while a slower process still works.
        """
        for number in range(len(self)):
            while not self.is_done(number):
                time.sleep(_POLL_S)
        return (self.read(number) for number in range(len(self)))

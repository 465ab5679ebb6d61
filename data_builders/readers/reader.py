"""What every reader does: its options are checked, its folder is there, and exactly repeated rows of its log count once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sidtune.core.config import build
from sidtune.data_builders.readers.raw_files import source_folder
from sidtune.data_builders.tables.columns import repeated_rows
from sidtune.data_builders.tables.schema import Tables


def reader(
    name: str, options: type, *, folder: bool = True, clock: bool = True
) -> Callable[[Callable[[Any, Any], Tables]], Callable[..., Tables]]:
    """Makes `read(path, **options) -> Tables` out of `read(folder, chosen)`, where `chosen` are the filled options.

    Args:
        name: of the reader, in `registry.py`.
        options: dataclass of its options.
        folder: whether the path must be a folder.
        clock: whether times of different users compare; without, no moment splits the source.

    Raises:
        ConfigError: an unknown option or a wrong value. DataError: no folder there, or what the reader finds wrong.
    """

    def decorated(read: Callable[[Any, Any], Tables]) -> Callable[..., Tables]:
        def run(path: str, **given: Any) -> Tables:
            chosen = build(options, given, f"reader '{name}'")
            place: str | Path = source_folder(path, name) if folder else path
            return replace(without_repeats(read(place, chosen)), clock=clock)

        functools.update_wrapper(run, read)
        run.clock = clock  # type: ignore[attr-defined]
        del run.__wrapped__  # the signature is that of `run`
        return run

    return decorated


def without_repeats(tables: Tables) -> Tables:
    """The tables without requests and events that stand a second time, every column alike; how many is counted and told."""
    counts, notes, changes = dict(tables.counts), list(tables.notes), {}
    for name in ("requests", "events"):
        table = getattr(tables, name)
        again = repeated_rows(table)
        if not len(again):
            continue
        keep = np.ones(table.num_rows, bool)
        keep[again] = False
        changes[name] = table.filter(pa.array(keep))
        if name == "requests" and tables.split_of_request is not None:
            changes["split_of_request"] = np.array(tables.split_of_request)[keep].tolist()
        counts[f"repeated_{name}_dropped"] = counts.get(f"repeated_{name}_dropped", 0) + len(again)
        notes.append(
            f"Rows of the {name} that repeat an earlier one in every column count once: {len(again):,} dropped."
        )
    return replace(tables, counts=counts, notes=notes, **changes)

"""Where next-item sequences come from: a folder, the reader of its tables, and what else lies beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.registry import READERS, reader_options
from sidtune.data_builders.sequences.item_sequences import ItemSequences
from sidtune.data_builders.tables.schema import Tables


@dataclass
class SequenceSource:
    """One data set.

    Attributes:
        path: folder of the reader; `$NAME` and `~` are expanded.
        reader: name of a reader in `data_builders/registry.py` that reads next-item data.
        options: its options.
    """

    path: str
    reader: str = "letter"
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = os.path.expanduser(os.path.expandvars(self.path))
        if "$" in self.path:
            raise ConfigError(f"source.path {self.path} names an environment variable that is not set; set it.")
        reader_options(self.reader, self.options, self.path)

    def read(self) -> tuple[Tables, ItemSequences]:
        """Its tables and sequences."""
        tables: Tables = READERS.get(self.reader)(self.path, **self.options)
        return tables, ItemSequences.from_tables(tables)

    def only_file(self, pattern: str, what: str) -> Path:
        """The one file of the folder that matches; DataError that says what it is needed for where there is none or several."""
        found = sorted(Path(self.path).glob(pattern))
        if len(found) != 1:
            raise DataError(f"{self.path} holds {len(found)} files {pattern} and needs exactly one for {what}.")
        return found[0]

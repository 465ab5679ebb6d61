"""Readers by name. A reader is one file with a dataclass `Options`, a `read` under `@reader`, and one line here."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from sidtune.core.config import build
from sidtune.core.errors import ConfigError
from sidtune.core.registry import Registry
from sidtune.data_builders.tables.schema import Tables
from sidtune.data_builders.tables.validate import check_tables

READERS = Registry(
    "reader",
    {
        "sidtune": "sidtune.data_builders.readers.own:read",
        "hub": "sidtune.data_builders.readers.hub:read",
        "amazon_2023": "sidtune.data_builders.readers.amazon_2023:read",
        "amazon_sid": "sidtune.data_builders.readers.amazon_sid:read",
        "letter": "sidtune.data_builders.readers.letter:read",
        "kuaisearch": "sidtune.data_builders.readers.kuaisearch:read",
        "jdsearch": "sidtune.data_builders.readers.jdsearch:read",
        "amazon_search": "sidtune.data_builders.readers.amazon_search:read",
        "movielens": "sidtune.data_builders.readers.movielens:read",
        "shop_world": "sidtune.data_builders.shop_world.world:read",
    },
)


def reader_options(name: str, options: dict[str, Any], path: str | None) -> Any:
    """The filled `Options` of a reader, checked before anything is read.

    Raises:
        ConfigError: an unknown reader or option, a wrong value, or no path where the reader needs one.
    """
    read = READERS.get(name)
    if path is None and inspect.signature(read).parameters["path"].default is inspect.Parameter.empty:
        raise ConfigError(f"The reader '{name}' needs the path of its source; set path.")
    return build(sys.modules[read.__module__].Options, options, f"reader '{name}'")


def read_source(name: str, path: str | None, options: dict[str, Any]) -> Tables:
    """What the reader `name` makes of a source, checked. Raises ConfigError as `reader_options`, DataError with all problems."""
    reader_options(name, options, path)
    tables = READERS.get(name)(path, **options)
    check_tables(tables)
    return tables

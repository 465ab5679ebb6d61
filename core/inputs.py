"""What a step reads, identified by content: every option that names a file or folder that is there, found by one walk."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sidtune.core.errors import DataError

RUN_FILE = "run.json"
# Options that name what is written, or where something may be kept.
_WRITTEN = {"output_dir", "cache_dir", "logging_dir", "checkpoint", "readme", "results", "root"}
# A word without a slash or an ending is a path only under such a name: `split: test` is none where a folder is called `test`.
_PATHS = re.compile(
    r"(dir|path|file|folder|base|model|backbone|templates|pool|set|stock|requests|replay|bias|compare_to)s?$"
)


def fingerprint(path: str | Path) -> str:
    """SHA-256 over names and contents of a file, of all below a folder but `run.json` and hidden ones, or of a pattern's files."""
    path = Path(path)
    digest, there = hashlib.sha256(), False
    try:
        for place in [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True))):
            there = True
            for file in sorted(_below(place)) if place.is_dir() else [place]:
                name = file.name if file is place else file.relative_to(place).as_posix()
                digest.update(os.fsencode(name) + b"\0")
                with file.open("rb") as stream:
                    while chunk := stream.read(1 << 20):
                        digest.update(chunk)
    except OSError as error:
        raise DataError(f"The input {path} cannot be read ({error}); check its files and permissions.") from None
    if not there:
        raise DataError(f"The input {path} does not exist; check the path or run the step that writes it.")
    return digest.hexdigest()


def _below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The files that a folder's fingerprint covers; links to folders are followed, but not in a circle."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _below(Path(entry.path), (*above, here))
            elif entry.is_file() and entry.name != RUN_FILE:
                yield Path(entry.path)


def inputs_of(config: Any) -> dict[str, str]:
    """Dotted option → path, for every text in a config that names something local; what names something written is left out.

    A hub id names nothing local. A path that starts at the folder of another option and leads out of it (`path: raw`,
    `data_files: ../other/items.jsonl`) is found too; what lies in that folder belongs to it already.

    >>> inputs_of({"encoder": {"path": "/no/such/file"}, "base": "Qwen/Qwen3-0.6B"})
    {}
    """
    found: dict[str, str] = {}
    _walk(config, "", [], found)
    return found


def same_inputs(record: dict[str, Any], config: Any) -> bool:
    """Whether what a config names is by content what `record`, a `run.json`, says was read.

    A record that does not list its `files` was written when only some of the inputs were recorded, and is believed about the rest.
    """
    found, recorded = inputs_of(config), record.get("inputs", {})
    if "files" in record and not set(found) <= set(recorded):
        return False
    try:
        return all(fingerprint(found.get(name, was["path"])) == was["sha256"] for name, was in recorded.items())
    except DataError:
        return False


def _walk(value: Any, name: str, bases: list[str], found: dict[str, str]) -> None:
    inner = []
    for key, one in _parts(value):
        dotted = f"{name}.{key}" if name else key
        if key in _WRITTEN:
            continue
        if not isinstance(one, (str, Path)):
            inner.append((dotted, one))
        elif path := _local(str(one), key if not key.isdigit() else "", name, bases):
            found[dotted] = path
            bases = [*bases, path]
    for dotted, one in inner:
        _walk(one, dotted, bases, found)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((one.name, getattr(value, one.name)) for one in dataclasses.fields(value))
    elif isinstance(value, dict):
        yield from ((str(key), one) for key, one in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(number), one) for number, one in enumerate(value))


def _local(text: str, key: str, name: str, bases: list[str]) -> str | None:
    path = os.path.expandvars(os.path.expanduser(text))
    if not re.search(r"/|\.\w+$", path) and not _PATHS.search(key) and not _PATHS.search(name):
        return None
    out = ".." in path.split("/")
    for place in [path, *(os.path.join(base, path) for base in bases if out)]:
        if place and (os.path.isfile(place) or os.path.isdir(place)):
            return place
        if glob.has_magic(place) and "\0" not in place and glob.glob(place, recursive=True):
            return place
    return None

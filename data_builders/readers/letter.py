"""Reader `letter`: the layout of the LETTER and TIGER data (`*.inter.json`, `*.index.json`, item vectors as `.npy`).

`*.inter.json` maps a user to the items of their sequence, oldest first; there are no times and no item texts. The
published protocol is leave-one-out: the last item of each user is test, the one before valid. Every item of a
sequence but the first becomes a request whose answer is that item. Times are the places in the user's own sequence
(0, 1, ...): they order the events of one user and say nothing between users.

The published SIDs are read by `read_sid_index`, not by the reader: whether to use them or to learn own ones is the
recipe's choice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.readers.raw_files import one_file, read_json_object
from sidtune.data_builders.readers.reader import reader
from sidtune.data_builders.tables.schema import Tables, table_from_columns
from sidtune.data_builders.tables.splits import leave_one_out, next_item_requests, tie_events

_TOKEN = re.compile(r"<([a-z])_(\d{1,9})>")
_MIN_EVENTS = 3


@dataclass
class Options:
    """Options of the reader.

    Attributes:
        action: the action that an interaction stands for (`order`: the published sets are Amazon reviews of purchases).
        category: file name prefix (`Instruments`) where a folder holds several; default: the only one.
    """

    action: str = "order"
    category: str = "*"

    def __post_init__(self) -> None:
        if self.action not in ("click", "like", "order"):
            raise ConfigError(f"reader 'letter': action must be click, like or order, got '{self.action}'.")


@reader("letter", Options, clock=False)
def read(folder: Path, chosen: Options) -> Tables:
    """Reads the folder; see the module's docstring."""
    users, items, lengths = _read_sequences(one_file(folder, f"{chosen.category}.inter.json"))
    index = one_file(folder, f"{chosen.category}.index.json", needed=False)
    catalogue = _catalogue(items, index)
    total = int(lengths.sum())
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    owner = pa.array(users, pa.string()).take(pa.array(np.repeat(np.arange(len(users)), lengths)))
    columns = {
        "user_id": owner,
        "item_id": pa.array(items, pa.string()),
        "time": np.arange(total) - starts,
        "action": pa.repeat(pa.scalar(chosen.action), total),
    }
    events = table_from_columns("events", columns, total)
    requests, rows = next_item_requests(events, prefix="place-")
    split = leave_one_out(events, _MIN_EVENTS)[rows]
    counts = {
        "items_never_bought": len(catalogue) - len(set(items)),
        "short_sequences": int((lengths < _MIN_EVENTS).sum()),
    }
    return Tables(
        items=table_from_columns("items", {"item_id": catalogue}, len(catalogue)),
        users=table_from_columns("users", {"user_id": users}, len(users)),
        requests=requests,
        events=tie_events(events, rows, requests["request_id"]),
        split_of_request=split.tolist(),
        counts=counts,
        notes=_notes(folder, index),
    )


def _read_sequences(path: Path | None) -> tuple[list[str], list[str], np.ndarray]:
    """Users, their items end to end, and the length of each sequence."""
    assert path is not None
    raw, repeated = read_json_object(path)
    if repeated:
        raise DataError(f"The file {path} names {repeated} users twice; keep one sequence per user.")
    for user, sequence in raw.items():
        if not isinstance(sequence, list) or not all(type(item) in (int, str) for item in sequence):
            raise DataError(
                f"The file {path} has no list of item ids for user '{user}' but {sequence!r:.60}; correct it."
            )
    users = [user for user, sequence in raw.items() if sequence]
    if not users:
        raise DataError(f"The file {path} has no sequences; check the path.")
    items = [str(item) for user in users for item in raw[user]]
    return users, items, np.array([len(raw[user]) for user in users], dtype=np.int64)


def _catalogue(items: list[str], index: Path | None) -> list[str]:
    """Item ids of the log and of the SID index, numbers in numeric order."""
    known = set(items) | (set(read_sid_index(index)) if index else set())
    return sorted(known, key=lambda item: (0, int(item), "") if item.isdecimal() else (1, 0, item))


def read_sid_index(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Reads published SIDs (`*.index.json`): item id → code per level.

    The file maps an item id to its level tokens, `["<a_128>", "<b_241>", "<c_146>"]`; letters must be a, b, c, ... in
    order and all items must have the same number of levels.

    Raises:
        DataError: the file is missing or damaged, or a token is not of this form; the message names the item.
    """
    raw, _ = read_json_object(Path(path))
    codes: dict[str, tuple[int, ...]] = {}
    depth = None
    for item, tokens in raw.items():
        parsed = [_TOKEN.fullmatch(token) if isinstance(token, str) else None for token in _as_list(tokens)]
        letters = "".join(match.group(1) for match in parsed if match)
        depth = len(parsed) if depth is None else depth
        if (
            not parsed
            or None in parsed
            or letters != "abcdefghijklmnopqrstuvwxyz"[: len(parsed)]
            or len(parsed) != depth
        ):
            raise DataError(
                f"The file {path} has for item '{item}' the tokens {tokens!r:.80}; expected {depth or 'some'} tokens "
                "like ['<a_1>', '<b_2>', '<c_3>'] with the letters in order."
            )
        codes[item] = tuple(int(match.group(2)) for match in parsed if match)
    return codes


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _notes(folder: Path, index: Path | None) -> list[str]:
    notes = [
        "The source has no times: times are places in the user's own sequence, which order one user's events only.",
        "The source has no item texts: titles are null.",
    ]
    if index:
        notes.append(f"Published SIDs stand in {index.name}; read them with readers.letter.read_sid_index.")
    vectors = sorted(path.name for path in folder.glob("*.npy"))
    if vectors:
        notes.append(f"Published item vectors, one row per item id in numeric order, stand in {', '.join(vectors)}.")
    return notes

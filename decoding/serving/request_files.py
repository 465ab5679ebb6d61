"""Requests of a batch run: from files in the form of the server's requests, or from a split of a data folder.

Both give, for any run of rows, the prompts and what each may find. A line of a requests file is a body of `POST /search`
with a `request_id` and without `k` and `num_beams`, which belong to the run; a parquet file has the same names as columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidtune.core.errors import DataError, Problem, SidtuneError, nearest
from sidtune.core.ragged import drawn
from sidtune.data_builders.tables.findings import SHOWN_PER_KIND
from sidtune.data_builders.tables.history import History
from sidtune.data_builders.tables.store import DataFolder
from sidtune.data_builders.tasks.behaviour import prompt_for_requests
from sidtune.data_builders.tasks.input import TaskInput
from sidtune.decoding.retrieval.catalogue import Target
from sidtune.decoding.retrieval.prompter import Prompter
from sidtune.decoding.retrieval.search_request import FIELDS, RequestLimits, load_json, parse_request

ID = "request_id"
COLUMNS = (ID, *(name for name in FIELDS if name not in ("k", "num_beams")))
_SHOWN = 20


@dataclass(frozen=True)
class Rules:
    """What holds for every request of a run.

    Attributes:
        k, num_beams: of every search.
        unknown: `error` or `ignore`, for ids that the catalogue lacks.
        exclude_seen: for every request.
        only_categories: for requests that name none.
        in_stock: only items of the stock list.
        limits: of a request in a file.
    """

    k: int
    num_beams: int
    unknown: str = "error"
    exclude_seen: bool = False
    only_categories: tuple[str, ...] = ()
    in_stock: bool = False
    limits: RequestLimits = dataclasses.field(default_factory=RequestLimits)


class Requests(Protocol):
    """Requests by row."""

    ids: list[str]

    def read(self, rows: range) -> tuple[list[list[str]], list[Target]]:
        """Prompts (pieces) and targets of consecutive rows. Raises DataError that lists what is wrong with them."""
        ...


class FileRequests:
    """Requests of one `.parquet` or `.jsonl` file, or of all such files of a folder in the order of their names.

    Args:
        path: the file or folder.
        prompter: renders.
        rules: of the run.
        extra_columns: `error`, or `ignore` for columns that are no part of a request.

    Raises:
        DataError: nothing there, unreadable, unknown or missing columns, no rows, or an id given twice.
    """

    def __init__(self, path: str | Path, prompter: Prompter, rules: Rules, extra_columns: str = "error") -> None:
        self._prompter, self._rules, self._extra = prompter, rules, extra_columns
        self._files = [_File(file, extra_columns) for file in _files_of(Path(path))]
        self._starts = np.cumsum([0, *(len(file) for file in self._files)])
        self.ids = [one for file in self._files for one in file.ids]
        if not self.ids:
            raise DataError(f"{path} holds no requests; write at least one.")
        _refuse_twice(self.ids, self._place)

    def _place(self, row: int) -> tuple[str, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._files[number].name, row - int(self._starts[number])

    def read(self, rows: range) -> tuple[list[list[str]], list[Target]]:
        prompts, targets, problems = [], [], []
        for row, values in zip(rows, self._values(rows), strict=True):
            try:
                pieces, target = self._one(values)
            except SidtuneError as error:
                fix = "correct the row" + (
                    ", or set unknown_items: ignore" if "not in the catalogue" in str(error) else ""
                )
                name, place = self._place(row)
                problems.append(Problem(name, place, None, str(error).rstrip("."), fix))
                continue
            prompts.append(pieces)
            targets.append(target)
        if problems:
            raise DataError(problems)
        return prompts, targets

    def _values(self, rows: range) -> list[Any]:
        found: list[Any] = []
        for number, file in enumerate(self._files):
            first = int(self._starts[number])
            begin, end = max(rows.start - first, 0), min(rows.stop - first, len(file))
            if begin < end:
                found += file.values(begin, end)
        return found

    def _one(self, values: Any) -> tuple[list[str], Target]:
        rules = self._rules
        if isinstance(values, dict):
            for key in values:
                if key not in COLUMNS and self._extra == "error":
                    raise DataError(_unknown(key))
            values = {key: value for key, value in values.items() if key in COLUMNS and key != ID}
        request = parse_request(values, rules.limits)
        request = dataclasses.replace(
            request,
            k=rules.k,
            num_beams=rules.num_beams,
            exclude_seen=request.exclude_seen or rules.exclude_seen,
            only_categories=request.only_categories or rules.only_categories,
            in_stock_only=request.in_stock_only or rules.in_stock,
        )
        pieces = self._prompter.pieces(request, rules.unknown)
        return pieces, self._prompter.target(request, rules.unknown)


class SplitRequests:
    """Requests of one split of a data folder, with the users' profiles and histories, rendered as in evaluation.

    Args:
        data: the folder.
        split: train, valid or test.
        prompter: renders.
        rules: of the run.
        most, seed: a random part of so many requests, in their order (None = all).

    Raises:
        DataError: the SIDs are of another catalogue, no such requests, or an id given twice.
    """

    def __init__(
        self, data: DataFolder, split: str, prompter: Prompter, rules: Rules, most: int | None = None, seed: int = 0
    ) -> None:
        prompter.sids.check_items(data.items, data.path, whole=True)
        requests, self._prompter, self._rules = data.requests[split], prompter, rules
        self._requests = requests.take(drawn(requests.num_rows, most, seed)).combine_chunks()
        self.ids = self._requests[ID].to_pylist()
        if not self.ids:
            raise DataError(f"The split '{split}' of {data.path} holds no requests; choose another one.")
        _refuse_twice(self.ids, lambda row: (f"requests/{split}", row))
        limit, texts = prompter.settings.max_history, prompter.catalogue.texts
        self._source = TaskInput.of_split(data, texts, prompter.serializer, "train", limit)
        self._history = History(data.events)

    def read(self, rows: range) -> tuple[list[list[str]], list[Target]]:
        part, rules, catalogue = self._requests.slice(rows.start, len(rows)), self._rules, self._prompter.catalogue
        prompts = prompt_for_requests(self._source, part)
        scope = catalogue.scope(rules.only_categories, rules.in_stock)
        seen = [np.zeros(0, dtype=np.int64)] * len(rows)
        if rules.exclude_seen:
            past = self._history.before(part["user_id"], part["time"].to_numpy())
            ids = self._history.events["item_id"].take(pa.array(past.rows)).to_pylist()
            seen = np.split(catalogue.rows(ids, "the history", rules.unknown), past.offsets[1:-1])
        return prompts, [Target(rules.k, rules.num_beams, scope, one) for one in seen]


class _File:
    """One file of requests; JSON lines stay bytes until they are read."""

    def __init__(self, path: Path, extra_columns: str) -> None:
        self.name = path.name
        self._table: pa.Table | None = None
        self._lines: list[bytes] = []
        if path.suffix == ".parquet":
            self._table = _read_parquet(path, extra_columns)
            self.ids = _checked_ids(self._table[ID].to_pylist(), self.name)
        else:
            self._lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
            self.ids = _checked_ids(self._line_ids(), self.name)

    def _line_ids(self) -> list[Any]:
        found, problems = [], []
        for row, line in enumerate(self._lines):
            try:
                value = load_json(line)
                if not isinstance(value, dict):
                    raise DataError("The line is no JSON object")
                found.append(value.get(ID))
            except DataError as error:
                problems.append(Problem(self.name, row, None, str(error).rstrip("."), "correct or remove the line"))
        if problems:
            raise DataError(problems)
        return found

    def __len__(self) -> int:
        return len(self._lines) if self._table is None else self._table.num_rows

    def values(self, begin: int, end: int) -> list[Any]:
        if self._table is None:
            return [load_json(line) for line in self._lines[begin:end]]
        return self._table.slice(begin, end - begin).to_pylist()


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".parquet", ".jsonl") and p.name[0] != ".")
        if not files:
            raise DataError(f"The folder {path} holds no .parquet or .jsonl file; name a file or a folder of requests.")
        return files
    if not path.exists():
        raise DataError(f"The requests {path} do not exist; check the path.")
    if path.suffix not in (".parquet", ".jsonl"):
        raise DataError(f"The requests {path} must be a .parquet or .jsonl file, or a folder of such files.")
    return [path]


def _read_parquet(path: Path, extra_columns: str) -> pa.Table:
    try:
        table = pq.ParquetFile(path).read()
        for column in table.columns:
            column.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"The file {path} is not readable parquet ({reason}); write it again.") from None
    if ID not in table.column_names:
        raise DataError(f"{path.name} has no column '{ID}', which names the rows of the result; add it (a text).")
    unknown = [name for name in table.column_names if name not in COLUMNS]
    if unknown and extra_columns == "error":
        raise DataError(f"{path.name}: " + _unknown(unknown[0]))
    return table.select([name for name in table.column_names if name in COLUMNS])


def _unknown(name: str) -> str:
    if name in ("k", "num_beams"):
        return f"'{name}' is an option of the whole run; leave the column out and pass --{name}."
    hint = nearest(str(name)[:40], COLUMNS).rstrip("?.")
    return f"The column '{str(name)[:40]}' is no part of a request ({hint}); rename it, or set extra_columns: ignore."


def _checked_ids(ids: Sequence[Any], name: str) -> list[str]:
    wrong = [row for row, one in enumerate(ids) if not isinstance(one, str) or not one]
    if wrong:
        fix = "give every request a text as its id"
        problems = [Problem(name, row, ID, f"the id is {ids[row]!r:.60}", fix) for row in wrong[:SHOWN_PER_KIND]]
        if len(wrong) > SHOWN_PER_KIND:
            problems.append(Problem(name, None, ID, f"{len(wrong) - SHOWN_PER_KIND} more rows with this fault", fix))
        raise DataError(problems)
    return list(ids)


def _refuse_twice(ids: Sequence[str], place: Callable[[int], tuple[str, int]]) -> None:
    """Raises DataError for ids that stand on an earlier row too; `place` says where a row of all is."""
    seen: set[str] = set()
    twice = [row for row, one in enumerate(ids) if one in seen or seen.add(one)]  # type: ignore[func-returns-value]
    problems = [
        Problem(*place(row), ID, f"the id '{ids[row][:60]}' stands on an earlier row too", "make ids unique")
        for row in twice[:_SHOWN]
    ]
    if problems:
        raise DataError(problems)

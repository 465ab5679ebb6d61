"""Problems of tables, collected instead of raised one by one, and which cells have one already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sidtune.core.errors import DataError, Problem

SHOWN_PER_KIND = 5


class Findings:
    """Collects problems; of one kind it keeps the first few rows and the count of the others.

    Attributes:
        problems: what was found.
        told: cells whose fault is among them and whose value is therefore null: (file, column or None for all) → rows, or
            None for every row. Nothing more is said about such a cell.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.told: dict[tuple[str, str | None], list[int] | None] = {}

    def table(self, where: str, column: str | None, what: str, fix: str, *, whole: bool = False) -> None:
        """Adds one problem of a whole table or column; with `whole` none of its cells could be read. A file of which nothing
        could be read has one problem."""
        if self.told.get((where, None), []) is None:
            return
        self.problems.append(Problem(where, None, column, what, fix))
        if whole:
            self.told[where, column and column.split(".")[0]] = None

    def rows(
        self,
        where: str,
        column: str | None,
        rows: Sequence[int] | np.ndarray,
        what: str | Callable[[int], str],
        fix: str,
    ) -> None:
        """Adds one problem per row whose fault is not told yet, capped.

        Args:
            where: file or table.
            column: column, or None.
            rows: zero-based row numbers.
            what: the sentence, or a function from the place in `rows` (not the row number) to the sentence.
            fix: what to do.
        """
        places = self._untold(where, column, np.asarray(rows, np.int64))
        for place in places[:SHOWN_PER_KIND].tolist():
            text = what if isinstance(what, str) else what(place)
            self.problems.append(Problem(where, int(rows[place]), column, text, fix))
        if (more := len(places) - SHOWN_PER_KIND) > 0:
            text = f"{more} more row{'s' if more > 1 else ''} with this fault"
            self.problems.append(Problem(where, None, column, text, fix))

    def cells(
        self, where: str, column: str | None, rows: Sequence[int] | np.ndarray, what: Callable[[int], str], fix: str
    ) -> None:
        """As `rows`, for values that could not be read and are null therefore."""
        self.rows(where, column, rows, what, fix)
        told = self.told.setdefault((where, column and column.split(".")[0]), []) if len(rows) else None
        if told is not None:
            told.extend(map(int, rows))

    def _untold(self, where: str, column: str | None, rows: np.ndarray) -> np.ndarray:
        keep = np.ones(len(rows), bool)
        for part in (None, column and column.split(".")[0]):
            if (told := self.told.get((where, part), [])) is None:
                return np.empty(0, np.int64)
            keep &= ~np.isin(rows, told)
        return np.flatnonzero(keep)

    def broken(self, where: str, column: str | None = None) -> bool:
        """Whether cells of a file, or of one of its columns, could not be read."""
        return any(self.told.get((where, part), []) != [] for part in (None, column))

    def raise_if_any(self) -> None:
        """Raises DataError with all problems, if there are any."""
        if self.problems:
            raise DataError(self.sorted())

    def sorted(self) -> list[Problem]:
        """The problems, those of files and ids first."""
        return sorted(self.problems, key=lambda one: not (one.column or "_id").endswith("_id"))

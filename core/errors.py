"""Errors a person reads: one full sentence that says what was expected, what came, and what to do.

Every command of sidtune ends with exit code 2 and such a sentence when its input is wrong; a stack trace means a defect of
sidtune itself. `nearest` builds the "did you mean" part that all messages about names share.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass


class SidtuneError(Exception):
    """Base of all errors caused by input. Its text is shown as is, without a stack trace."""


class ConfigError(SidtuneError):
    """A YAML file or a command-line option is wrong."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a data folder.

    Attributes:
        where: file or table name, for example `items.parquet`.
        row: zero-based row number, or None when the whole table is meant.
        column: column name, or None.
        what: what is wrong, with the value that was found.
        fix: what to do about it.
    """

    where: str
    row: int | None
    column: str | None
    what: str
    fix: str

    def __str__(self) -> str:
        place = self.where
        if self.row is not None:
            place += f", row {self.row}"
        if self.column is not None:
            place += f", column '{self.column}'"
        return f"{place}: {self.what}; {self.fix}."


class DataError(SidtuneError):
    """Input data is wrong. Carries *all* problems that were found.

    Args:
        problems: the problems, or a single ready sentence.
        shown: how many problems the text lists; the rest is counted.
    """

    def __init__(self, problems: list[Problem] | str, shown: int = 20) -> None:
        if isinstance(problems, str):
            self.problems: list[Problem] = []
            super().__init__(problems)
            return
        self.problems = list(problems)
        lines = [f"  {n}. {problem}" for n, problem in enumerate(self.problems[:shown], 1)]
        if len(self.problems) > shown:
            lines.append(f"  ... and {len(self.problems) - shown} more.")
        noun = "problem" if len(self.problems) == 1 else "problems"
        super().__init__(f"The data has {len(self.problems)} {noun}:\n" + "\n".join(lines))


# How torch says that a file could not be written, and `Path` and `open` that a path is none.
_OF_SYSTEM = re.compile(r"No space left on device|inline_container|PytorchStreamWriter|Symlink loop|embedded null byte")


def system_error(error: BaseException) -> SidtuneError | None:
    """An error of the operating system as one sentence, whatever library was in between; None for any other error."""
    while error.__cause__ is not None and not isinstance(error, OSError):
        error = error.__cause__
    text = " ".join(str(error).split())
    number = re.search(r"\(os error (\d+)\)", text)  # libraries in Rust
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return SidtuneError(
            f"There is not enough memory ({text[:160] or 'the system gave none'}); lower batch sizes or limits."
        )
    if isinstance(error, OSError) and error.errno:
        reason = f"{error.filename}: {os.strerror(error.errno)}" if error.filename else os.strerror(error.errno)
    elif number:
        reason = os.strerror(int(number.group(1)))
    elif isinstance(error, OSError) or (isinstance(error, (RuntimeError, ValueError)) and _OF_SYSTEM.search(text)):
        reason = text[:300]
    else:
        return None
    return SidtuneError(
        f"The system refused what was asked of it ({reason}); check path, permissions and free space, then run again."
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """The "did you mean" half-sentence: names the closest of `known`, or lists them when none is close.

    Close is a slip of the pen (two of three letters in order, in any case), or one name inside the other; more would mislead.

    >>> nearest("num_beem", ["num_beams", "seed"])
    "did you mean 'num_beams'?"
    >>> nearest("colour", ["num_beams", "seed"])
    'known are: num_beams, seed.'
    """
    choices = sorted(known)
    plain, written = name.lower(), {choice.lower(): choice for choice in reversed(choices)}
    match = difflib.get_close_matches(plain, written, n=1, cutoff=0.66)
    match += [
        one for one in sorted(written, key=len) if min(len(one), len(plain)) > 3 and (one in plain or plain in one)
    ]
    if match:
        return f"did you mean '{written[match[0]]}'?"
    listed = ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else "")
    return f"known are: {listed}." if choices else "nothing is known under such a name."

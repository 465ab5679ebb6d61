"""How a code becomes token text: `<a_12><b_7><c_0>`, one letter per level, or one letter for several levels.

Levels that share a letter share its numbers too: the second of them starts where the first one ends. OneSearch writes its
two OPQ codes so, `<d_17><d_300>` with 256 codes each (section 3.1.3 of the paper, and its released code). Every token text
still belongs to one level and one code, so `tokens()` has as many entries as there are codes in all levels either way.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from sidtune.core.config import MANY
from sidtune.core.errors import ConfigError, DataError

LETTERS = string.ascii_lowercase
_TOKEN = re.compile(r"<([a-z])_(0|[1-9][0-9]*)>")


def check_sizes(level_sizes: Sequence[int]) -> tuple[int, ...]:
    """Level sizes as integers. Raises ConfigError unless they are 1 to 26 positive integers of at most `MANY` each."""
    sizes = tuple(int(k) if isinstance(k, (int, np.integer)) and not isinstance(k, bool) else 0 for k in level_sizes)
    if not sizes or min(sizes) < 1 or max(sizes) > MANY:
        raise ConfigError(
            f"level_sizes must be one positive integer per level, at most {MANY:,}, got {list(level_sizes)}."
        )
    if len(sizes) > len(LETTERS):
        raise ConfigError(f"Semantic IDs have at most {len(LETTERS)} levels, one letter each, got {len(sizes)}.")
    return sizes


class SidLetters:
    """Letters and numbers of the codes of all levels.

    Args:
        level_sizes: codes per level.
        letters: one letter per level, for example `abcdd`; default a, b, c, ... Neighbouring levels may share a letter.

    Attributes:
        level_sizes: tuple of L integers.
        letters: as above, never None.
        shifts: (L,) int64, what is added to a code of the level to give the number in its text; 0 for the first level of
            every letter.

    Raises:
        ConfigError: level sizes that are none, not one letter per level, or letters out of their order a, b, c, ...
    """

    def __init__(self, level_sizes: Sequence[int], letters: str | None = None) -> None:
        self.level_sizes = check_sizes(level_sizes)
        depth = len(self.level_sizes)
        self.letters = LETTERS[:depth] if letters is None else _check_letters(letters, depth)
        starts = np.concatenate([[0], np.cumsum(self.level_sizes[:-1], dtype=np.int64)]).astype(np.int64)
        first = [self.letters.index(letter) for letter in self.letters]
        self.shifts = starts - starts[first]

    def level_tokens(self, level: int) -> list[str]:
        """Token texts of one level in code order; `level` must exist."""
        shift = int(self.shifts[level])
        return [f"<{self.letters[level]}_{shift + code}>" for code in range(self.level_sizes[level])]

    def level_names(self) -> list[str]:
        """One distinct name per level for tables: the letter, with a number behind it where levels share it (`d1`, `d2`)."""
        count = self.letters.count
        return [
            letter if count(letter) == 1 else f"{letter}{level - self.letters.index(letter) + 1}"
            for level, letter in enumerate(self.letters)
        ]

    def text(self, code: Sequence[int]) -> str:
        """SID text of a code, or of the first levels of one."""
        return "".join(f"<{self.letters[n]}_{int(number) + int(self.shifts[n])}>" for n, number in enumerate(code))

    def parse(self, text: str) -> tuple[int, ...] | None:
        """The code a SID text spells; None unless it is exactly one whole code of these levels."""
        parts = _TOKEN.findall(text)
        if "".join(letter for letter, _ in parts) != self.letters:
            return None
        if sum(len(number) + 4 for _, number in parts) != len(text):
            return None
        code = tuple(int(number) - int(shift) for (_, number), shift in zip(parts, self.shifts, strict=True))
        return code if all(0 <= n < size for n, size in zip(code, self.level_sizes, strict=True)) else None

    def codes_of_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """Codes (n, L) int32 of the numbers (n, L) in SID texts. Raises DataError for a number outside its level."""
        codes = np.asarray(numbers, dtype=np.int64) - self.shifts
        bad = np.argwhere((codes < 0) | (codes >= np.array(self.level_sizes)))
        if len(bad):
            row, level = bad[0]
            first, size = int(self.shifts[level]), self.level_sizes[level]
            raise DataError(
                f"Row {row} has the number {numbers[row, level]} at level {level + 1}, whose tokens are "
                f"<{self.letters[level]}_{first}> to <{self.letters[level]}_{first + size - 1}>; give the level_sizes and "
                "letters these SIDs were made with."
            )
        return codes.astype(np.int32)


def _check_letters(letters: str, depth: int) -> str:
    if not isinstance(letters, str) or len(letters) != depth:
        raise ConfigError(
            f"letters must be one letter for each of the {depth} levels, such as 'abcdd', got {letters!r}."
        )
    places = [LETTERS.find(letter) for letter in letters]
    if places[0] != 0 or any(after - before not in (0, 1) for before, after in pairwise(places)):
        raise ConfigError(
            f"letters must run a, b, c, ... and may only repeat for neighbouring levels, as in 'abcdd', got '{letters}'."
        )
    return letters

"""Core keywords in texts: one Aho-Corasick automaton over the whole pool, longest match first.

From OneSearch (section 3.1.2) and its released code: lower-cased text, and a matched word that is part of a longer
matched word is dropped ("cotton" beside "pure cotton"). All texts are matched in one pass; what overlaps what is worked
out once, on the pool itself, so that a text costs its matches and nothing else.

Where it differs from the released code (our choices): letters around a match count. "pen" is found neither in "pencil"
nor dropped because of it. Scripts without spaces (kana, han, Thai, ...) have no such borders, and there every match
counts as in the release; `word_boundaries=False` gives the release's behaviour everywhere.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from sidtune.core.errors import DataError

_BLOCK = 1 << 22  # characters matched at once
_HIT = np.dtype([("end", np.int64), ("word", np.int64)])
# Scripts whose words stand without spaces between them: a match has no border to respect there.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # kana
    (0x3400, 0x9FFF),  # han
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def normal_form(text: str) -> str:
    """The form in which keywords and texts meet: lower case, white space squeezed."""
    return " ".join(text.lower().split())


class KeywordMatcher:
    """Finds keywords in texts.

    Args:
        keywords: K distinct words or phrases, in any case.
        word_boundaries: a keyword counts only where no letter, digit or underscore touches it, in scripts with
            spaces. False finds it inside of words too.

    Raises:
        DataError: an empty keyword, or the same one twice (after lower-casing).
    """

    def __init__(self, keywords: Sequence[str], word_boundaries: bool = True) -> None:
        import ahocorasick

        self.keywords = [normal_form(keyword) for keyword in keywords]
        self.word_boundaries = word_boundaries
        self._lengths = np.array([len(keyword) for keyword in self.keywords], dtype=np.int64)
        self._automaton: Any = ahocorasick.Automaton()
        for number, keyword in enumerate(self.keywords):
            if not keyword or not self._automaton.add_word(keyword, number):
                reason = f"'{keyword}' occurs twice" if keyword else "one is empty"
                raise DataError(f"Keywords must be distinct and not empty, but {reason}; merge such rows of the pool.")
        if self.keywords:
            self._automaton.make_automaton()
        # Longest first, then pool order: the order in which the words of a text are listed.
        self._rank = np.argsort(np.argsort(-self._lengths, kind="stable"))
        self._inside = self._contained()

    def match(self, texts: Sequence[str]) -> sp.csr_array:
        """(T, K) sparse, 1.0 where a text holds a keyword under the longest-match rule; in a row longest first, then in pool order.

        A keyword that is part of another keyword found in the same text is dropped, wherever it stands.
        """
        found = self._found(texts)
        if self._inside.nnz and found.nnz:
            covered = found @ self._inside
            covered.data[:] = 1.0
            found = found - found.multiply(covered)
        found = sp.csr_array(found)
        found.eliminate_zeros()
        rows = np.repeat(np.arange(len(texts)), np.diff(found.indptr))
        order = np.lexsort((self._rank[found.indices], rows))
        return sp.csr_array((np.ones(len(order)), found.indices[order], found.indptr), shape=found.shape)

    def _found(self, texts: Sequence[str]) -> sp.csr_array:
        """(T, K) of 0 and 1: every keyword that occurs, before the longest-match rule."""
        rows, words = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for first, block in _blocks(texts) if self.keywords else ():
            row, word = self._hits(block)
            pairs = np.unique(row * len(self.keywords) + word)
            rows.append(first + pairs // len(self.keywords))
            words.append(pairs % len(self.keywords))
        row, word = np.concatenate(rows), np.concatenate(words)
        return sp.csr_array((np.ones(len(row)), (row, word)), shape=(len(texts), len(self.keywords)))

    def _hits(self, block: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Text and keyword number of every occurrence in the texts of a block."""
        # No keyword holds a line break, so no match can reach from one text into the next.
        joined = "\n".join(["", *map(normal_form, block), ""])
        hits = np.fromiter(self._automaton.iter(joined), dtype=_HIT)
        last, word = hits["end"], hits["word"]
        first = last - self._lengths[word] + 1
        points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        breaks = np.flatnonzero(points == ord("\n"))
        if self.word_boundaries:
            spaced = _spaced_letters(points)
            free = ~(spaced[first] & spaced[first - 1]) & ~(spaced[last] & spaced[last + 1])
            first, word = first[free], word[free]
        return np.searchsorted(breaks, first) - 1, word

    def _contained(self) -> sp.csr_array:
        """(K, K): 1 at (long, short) where the keyword `short` is part of the keyword `long`."""
        inside = self._found(self.keywords)
        inside = sp.csr_array(inside - sp.eye_array(len(self.keywords), format="csr"))
        inside.eliminate_zeros()
        return inside


def _blocks(texts: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The texts in blocks of about `_BLOCK` characters, with the number of the first of each."""
    first, size = 0, 0
    for number, text in enumerate(texts):
        size += len(text) + 1
        if size >= _BLOCK:
            yield first, list(texts[first : number + 1])
            first, size = number + 1, 0
    if first < len(texts):
        yield first, list(texts[first:])


def _spaced_letters(points: np.ndarray) -> np.ndarray:
    """Which code points (n,) are letters, marks, digits or underscores of a script that parts words by spaces."""
    known, which = np.unique(points, return_inverse=True)
    return np.fromiter(map(_is_spaced_letter, known.tolist()), dtype=bool, count=len(known))[which]


def _is_spaced_letter(point: int) -> bool:
    if any(low <= point <= high for low, high in _UNSPACED):
        return False
    char = chr(point)
    return char == "_" or char.isalnum() or unicodedata.category(char).startswith("M")

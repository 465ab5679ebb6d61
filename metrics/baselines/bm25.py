"""BM25 over item text: the classic answer to a query, and to a history by the text of what was clicked last.

The index is built by the library `bm25s` in its Lucene variant (Kamphuis et al. 2020): for a term t in document d,

    ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|))

summed over the terms of the query, a repeated term counting each time. Scoring is a sparse product of many queries at
once rather than the library's search, because that breaks ties arbitrarily; scores are equal.

Words are runs of letters, marks and digits after NFKC and case folding. Chinese, Japanese, Korean, Thai, Lao, Khmer
and Burmese, where spaces do not (or not well) mark words, are cut into overlapping pairs of characters. No stemming,
no list of stop words.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import bm25s
import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from sidtune.core.errors import ConfigError, DataError
from sidtune.metrics.baselines.base import Baseline
from sidtune.metrics.ranking import Relevance

FIELDS = ("title", "brand", "category", "attributes", "description")
_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ecd\u1000-\u103f\u1780-\u17d3"  # Thai, Lao, Burmese, Khmer
    "\u3005\u3041-\u3096\u30a1-\u30fa\u30fc-\u30fe"  # kana and the repetition marks
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"  # Han, Hangul, Han beyond the basic plane
)


class BM25(Baseline):
    """Text search. A request without a query is answered by the text of the item clicked last, which is not ranked itself.

    Args:
        k1: how fast repeated terms saturate.
        b: how much long texts are discounted, 0 to 1.
        fields: text columns of the items table that are searched, joined.
        exclude_seen: as in `Baseline`.
    """

    def __init__(
        self,
        k1: float = 1.5,
        b: float = 0.75,
        fields: Sequence[str] = FIELDS,
        exclude_seen: bool | None = None,
    ) -> None:
        super().__init__(exclude_seen)
        if not (k1 >= 0 and 0 <= b <= 1):
            raise ConfigError(f"BM25 needs k1 of at least 0 and b between 0 and 1, got k1={k1!r} and b={b!r}.")
        unknown = [field for field in fields if field not in FIELDS]
        if unknown or not len(fields):
            raise ConfigError(f"The fields of bm25 must be some of {', '.join(FIELDS)}, got {list(fields)}.")
        self.k1, self.b, self.fields = k1, b, tuple(fields)

    def _fit(self, items: pa.Table, events: pa.Table, requests: pa.Table | None) -> None:
        documents = [tokenise(text) for text in item_text(items, self.fields)]
        self.vocabulary: dict[str, int] = {}
        numbered = [[self.vocabulary.setdefault(w, len(self.vocabulary)) for w in words] for words in documents]
        terms = len(self.vocabulary)
        self.documents = _term_counts(numbered, terms)
        self.weights = sp.csr_matrix((terms, self.items))
        if terms:
            index = bm25s.BM25(k1=self.k1, b=self.b, method="lucene", dtype="float64", backend="numpy")
            index.index((numbered, dict(self.vocabulary)), create_empty_token=False, show_progress=False)
            parts = (index.scores["data"], index.scores["indices"], index.scores["indptr"])
            self.weights = sp.csc_matrix(parts, shape=(self.items, terms)).T.tocsr()

    def _scores(self, queries: Sequence[str | None], history: Relevance) -> tuple[sp.csr_matrix, sp.csr_matrix | None]:
        numbered = [[self.vocabulary[w] for w in tokenise(q) if w in self.vocabulary] if q else [] for q in queries]
        asked = np.fromiter((bool(q and q.strip()) for q in queries), dtype=bool, count=len(queries))
        shown = np.flatnonzero(~asked & (history.lengths > 0))
        clicked = history.rows[history.offsets[shown + 1] - 1]
        last = sp.csr_matrix((np.ones(len(shown)), (shown, clicked)), shape=(len(queries), self.items))
        wanted = _term_counts(numbered, len(self.vocabulary)) + last @ self.documents
        return sp.csr_matrix(wanted @ self.weights), last


def tokenise(text: str) -> list[str]:
    """Words of a text, in order; pairs of characters where a script has no spaces."""
    tokens: list[str] = []
    for run in _pattern().findall(unicodedata.normalize("NFKC", text).casefold()):
        if _unspaced().match(run):
            tokens.extend([run] if len(run) == 1 else [run[n : n + 2] for n in range(len(run) - 1)])
        else:
            tokens.append(run)
    return tokens


def item_text(items: pa.Table, fields: Sequence[str] = FIELDS) -> list[str]:
    """One text for each item: its fields joined by line breaks, empty ones left out; an attribute gives its value.

    Raises:
        DataError: a field is not a column of the table.
    """
    missing = [field for field in fields if field not in items.column_names]
    if missing:
        raise DataError(
            f"The items table has no column '{missing[0]}'; its columns are {', '.join(items.column_names)}."
        )
    columns = [[_flat(value) for value in items[field].to_pylist()] for field in fields]
    return ["\n".join(part for part in parts if part) for parts in zip(*columns, strict=True)]


def _flat(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_flat(part.get("value") if isinstance(part, dict) else part) for part in value)
    return value or ""


def _term_counts(numbered: list[list[int]], terms: int) -> sp.csr_matrix:
    """(documents, terms) how often each term stands in each."""
    lengths = np.fromiter((len(one) for one in numbered), dtype=np.int64, count=len(numbered))
    flat = np.fromiter((term for one in numbered for term in one), dtype=np.int64, count=int(lengths.sum()))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    counts = sp.csr_matrix((np.ones(len(flat)), flat, offsets), shape=(len(numbered), terms))
    counts.sum_duplicates()
    return counts


@functools.cache
def _unspaced() -> re.Pattern[str]:
    return re.compile(f"[{_UNSPACED}]")


@functools.cache
def _pattern() -> re.Pattern[str]:
    # `\w` leaves out combining marks, which would cut Hindi or Arabic words at each vowel sign.
    marks = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
    marks = re.sub(f"[{_UNSPACED}]", "", marks)
    word = f"[^\\W_{_UNSPACED}](?:[^\\W_{_UNSPACED}]|[{re.escape(marks)}])*"
    return re.compile(f"[{_UNSPACED}]+|{word}")

"""The pool of core keywords: words of 18 attribute types with their page views, from a file or mined from the log.

From OneSearch (section 3.1.2). `mining.mine_pool` makes a pool of a data folder; a pool can as well be a text
file of one's own, one `keyword<TAB>type<TAB>page views` a line.

Where it differs from the released code (our choice): a keyword of several types keeps all of them and has one vector;
there, the last line of the file overwrites the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidtune.core.errors import DataError, SidtuneError, nearest
from sidtune.core.folders import read_json, write_files, write_json
from sidtune.core.hub import Published, resolve_folder
from sidtune.core.text import read_lines
from sidtune.tokenizers.keywords.matcher import normal_form

KEYWORD_TYPES = (
    "entity",
    "modifier",
    "brand",
    "material",
    "style",
    "function",
    "location",
    "audience",
    "color",
    "scene",
    "specifications",
    "price",
    "model",
    "anchor",
    "series",
    "marketing",
    "season",
    "pattern",
)
POOL_FILE = "keywords.parquet"
CONFIG_FILE = "keyword_pool.json"


class KeywordPool(Published):
    """Typed keywords with their page views.

    Args:
        keywords: n words, brought to lower case with single spaces.
        types: n names of `KEYWORD_TYPES`; a keyword may stand in several rows, one per type.
        views: n page views, default 0.

    Attributes:
        keywords, types: lists of n strings.
        views: (n,) int64.
        notes: what mining left out, in full sentences.

    Raises:
        DataError: columns of unequal length, an unknown type, an empty keyword, negative views, or a row given twice.
    """

    def __init__(self, keywords: Sequence[str], types: Sequence[str], views: Sequence[int] | None = None) -> None:
        self.keywords = [normal_form(keyword) for keyword in keywords]
        self.types = list(types)
        self.views = np.array([0] * len(self.keywords) if views is None else views, dtype=np.int64)
        self.notes: list[str] = []
        if not len(self.keywords) == len(self.types) == len(self.views):
            raise DataError("A keyword pool needs as many types and page views as keywords; give one of each per row.")
        for kind in set(self.types):
            check_type(kind, "a keyword", DataError)
        if "" in self.keywords or (self.views < 0).any():
            raise DataError("A keyword pool has an empty keyword or negative page views; repair or drop such rows.")
        for (keyword, kind), count in Counter(zip(self.keywords, self.types, strict=True)).items():
            if count > 1:
                raise DataError(f"The keyword '{keyword}' of the type {kind} stands in two rows; merge them.")

    def __len__(self) -> int:
        return len(self.keywords)

    @cached_property
    def distinct(self) -> list[str]:
        """Each keyword once, in order of first appearance: what a matcher is made of."""
        return list(dict.fromkeys(self.keywords))

    def counts(self) -> dict[str, int]:
        """Type → number of keywords, for the types that occur, in the order of `KEYWORD_TYPES`."""
        return {kind: self.types.count(kind) for kind in KEYWORD_TYPES if kind in self.types}

    def head(self, per_type: int, min_views: int = 0) -> KeywordPool:
        """The `per_type` keywords with most page views of each type; equal views go by keyword."""
        order = sorted(range(len(self)), key=lambda n: (-self.views[n], self.keywords[n]))
        kept, taken = [], dict.fromkeys(KEYWORD_TYPES, 0)
        for row in order:
            if self.views[row] >= min_views and taken[self.types[row]] < per_type:
                taken[self.types[row]] += 1
                kept.append(row)
        rank = {kind: n for n, kind in enumerate(KEYWORD_TYPES)}
        kept.sort(key=lambda n: rank[self.types[n]])  # stable: views fall within each type
        return KeywordPool([self.keywords[n] for n in kept], [self.types[n] for n in kept], self.views[kept])

    @classmethod
    def from_tsv(cls, path: str | Path) -> Self:
        """Reads `keyword<TAB>type`, with page views as a third column or without; blank lines are skipped, and a row
        that occurs twice counts once.

        Raises:
            DataError: unreadable file, or a line of another form (with its number).
        """
        rows: dict[tuple[str, str], int] = {}
        for number, line in enumerate(read_lines(path, "keyword file"), start=1):
            cells = line.split("\t")
            if not line.strip():
                continue
            if (
                len(cells) not in (2, 3)
                or not normal_form(cells[0])
                or (cells[2:] and not cells[2].strip().isdecimal())
            ):
                raise DataError(
                    f"Line {number} of {path} is not 'keyword<TAB>type' or 'keyword<TAB>type<TAB>page views': {line!r}."
                )
            kind = cells[1].strip()
            check_type(kind, f"line {number} of {path}", DataError)
            rows.setdefault((normal_form(cells[0]), kind), int(cells[2]) if cells[2:] else 0)
        return cls([word for word, _ in rows], [kind for _, kind in rows], list(rows.values()))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folder (parquet and JSON), whole or not at all."""
        with write_files(folder) as scratch:
            columns = {"keyword": self.keywords, "type": self.types, "views": self.views}
            pq.write_table(pa.table(columns), scratch / POOL_FILE)
            write_json(scratch / CONFIG_FILE, {"format": 1, "keywords": len(self), "types": self.counts()})

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | Path, **hub: Any) -> Self:
        """Loads a folder or hub repository (`hub`: options of `resolve_folder`); DataError when files are missing or damaged."""
        folder = resolve_folder(folder_or_repo, what="keyword pool", **hub)
        record = read_json(folder / CONFIG_FILE)
        try:
            table = pq.read_table(folder / POOL_FILE)
            columns = [table.column(name).to_pylist() for name in ("keyword", "type", "views")]
            whole = table.num_rows == record["keywords"]
        except (pa.ArrowException, OSError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"The keyword pool in {folder} cannot be read ({reason}); write it again.") from None
        if not whole:
            raise DataError(f"{folder / POOL_FILE} has {table.num_rows} rows, {CONFIG_FILE} says another number.")
        return cls(*columns)


def read_pool(path: str | Path) -> KeywordPool:
    """A pool from a TSV file, or from a folder of `save_pretrained`."""
    return KeywordPool.from_tsv(path) if Path(path).is_file() else KeywordPool.from_pretrained(path)


def check_type(kind: str, where: str, error: type[SidtuneError]) -> None:
    """Raises `error` unless `kind` is one of `KEYWORD_TYPES`; `where` says where it stands."""
    if kind not in KEYWORD_TYPES:
        raise error(f"There is no keyword type '{kind}' (at {where}): {nearest(str(kind), KEYWORD_TYPES)}")

"""Which catalogue semantic IDs are of: their fingerprint, and the refusal of other items."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sidtune.core.errors import DataError


def fingerprint_of(sids: Any) -> str:
    """SHA-256 of item ids and codes; the same for every order of the rows."""
    order = sorted(range(len(sids)), key=sids.item_ids.__getitem__)
    digest = hashlib.sha256(json.dumps([sids.item_ids[row] for row in order]).encode())
    digest.update(np.ascontiguousarray(sids.codes[order], "<i4"))
    return digest.hexdigest()


def title_hashes(titles: Sequence[str | None]) -> np.ndarray:
    """(N,) uint32, 0 for a missing title."""
    return np.fromiter((0 if t is None else zlib.crc32(t.encode()) or 1 for t in titles), np.uint32, len(titles))


def check_items(sids: Any, items: pa.Table, where: str | Path | None = None, whole: bool = False) -> None:
    """Refuses the items of another catalogue.

    Args:
        sids: the semantic IDs.
        items: table with `item_id`, and `title` if it has one.
        where: the folder of the table, for messages.
        whole: also refuse items without a code, and another order of the rows.

    Raises:
        DataError: items with a code that the table lacks, or titles most of which are others than when the codes were made.
    """
    ids = items["item_id"].to_pylist()
    rows = sids.rows_of_ids(ids)
    known = rows >= 0
    lacking, strange = len(sids) - len(np.unique(rows[known])), int((~known).sum())
    told = rows[known & (sids.titles[rows] != 0)]
    problem = None
    if lacking or (whole and strange):
        problem = (
            f"{lacking} of the {len(sids)} items with a code are not among the items, {strange} items have no code"
        )
    elif len(told) and "title" in items.column_names:
        now = np.zeros(len(sids), np.uint32)
        now[rows[known]] = title_hashes(items["title"].to_pylist())[known]
        if (now != sids.titles)[told].mean() > 0.5:
            problem = "the items have the same ids, but most of their titles are others"
    if problem is None and whole and sids.item_ids != ids:
        problem = "the same items stand in another order"
    if problem is not None:
        codes, table = (f" in {folder}" if folder else "" for folder in (sids.source, where))
        raise DataError(
            f"The semantic IDs{codes} and the items{table} do not belong together: {problem}; use the folders of one run, or "
            "learn or extend the semantic IDs with these items."
        )

"""A post-ranking table on disk: `requests.parquet`, `fields.json`, `texts.parquet` files and one `.npy` per matrix.

Own layout. Matrices are plain arrays that are memory-mapped when loaded, so that a large catalogue costs no memory
until a batch reads it; nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidtune.core.errors import DataError
from sidtune.core.folders import write_json
from sidtune.data_builders.post_ranking.schema import PostRankField, PostRankTable

_PAIRS = pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))


def save_post_rank(table: PostRankTable, folder: str | Path) -> None:
    """Writes a table into an existing folder; call it inside `core.folders.write_folder`."""
    folder = Path(folder)
    pq.write_table(table.requests, folder / "requests.parquet", compression="zstd")
    for name, ids, texts in (
        ("items", table.item_ids, table.item_texts),
        ("users", table.user_ids, table.user_texts),
    ):
        pairs = [[{"name": n, "value": v} for n, v in row] for row in texts] if len(texts) else [None] * len(ids)
        made = pa.table([pa.array(list(ids), pa.string()), pa.array(pairs, _PAIRS)], names=["id", "texts"])
        pq.write_table(made, folder / f"{name}.parquet", compression="zstd")
    (folder / "matrices").mkdir(exist_ok=True)
    for key, matrix in table.matrices.items():
        np.save(_file(folder, key), np.ascontiguousarray(matrix, dtype=np.float32), allow_pickle=False)
    write_json(
        folder / "fields.json",
        {
            "fields": [dataclasses.asdict(one) for one in table.fields],
            "matrices": sorted(table.matrices),
            "notes": table.notes,
        },
    )


def load_post_rank(folder: str | Path) -> PostRankTable:
    """Loads what `save_post_rank` wrote, matrices memory-mapped.

    Raises:
        DataError: a file is missing or damaged, or the parts do not fit.
    """
    folder = Path(folder)
    try:
        known = json.loads((folder / "fields.json").read_text(encoding="utf-8-sig"))
        fields = tuple(
            PostRankField(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()})
            for one in known["fields"]
        )
        matrices = {key: np.load(_file(folder, key), "r", allow_pickle=False) for key in known["matrices"]}
        requests = pq.read_table(folder / "requests.parquet")
        sides = [pq.read_table(folder / f"{name}.parquet") for name in ("items", "users")]
        ids = [side["id"].to_pylist() for side in sides]
        texts = [_texts(side["texts"]) for side in sides]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"The folder {folder} holds no complete post-ranking table ({error}); build it again or check the path."
        ) from None
    return PostRankTable(requests, ids[0], ids[1], fields, matrices, texts[0], texts[1], known.get("notes", []))


def _file(folder: Path, key: str) -> Path:
    return folder / "matrices" / f"{key.replace('/', '.')}.npy"


def _texts(column: pa.ChunkedArray) -> list[list[tuple[str, str]]]:
    rows = column.to_pylist()
    if not rows or all(row is None for row in rows):
        return []
    return [[(pair["name"], pair["value"]) for pair in row or ()] for row in rows]

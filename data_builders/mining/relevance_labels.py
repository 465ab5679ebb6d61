"""Relevance of query-item pairs for the regression term: from a file of judgements, or from the simulated shop's truth.

OneSearch (section 3.1.1) has an LLM score the hard pairs near the cosine threshold. Here those scores come from a file, whoever
judged; for a shop of `ShopWorld`, whose truth is known, they are read off the world instead:

    y = part(relation of the item's category to what the query names) * (1 if the asked value and brand are met, else 1/2)

with part = 1, 2/3, 1/3, 0 for inside, same kind of category, same department, other. It is a stand-in for a judge who reads query
and item: it knows neither the user nor the clicks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.mining.query_pairs import squeezed_column
from sidtune.data_builders.tables.columns import rows_of
from sidtune.data_builders.tables.schema import REQUESTS

_SCHEMA = pa.schema([("query", pa.string()), ("item_id", pa.string()), ("score", pa.float64())])
_PART = np.array([1.0, 2 / 3, 1 / 3, 0.0])


@dataclass(frozen=True)
class RelevanceLabels:
    """Judged pairs.

    Attributes:
        query, item: (J,) int64 rows. score: (J,) float64 in [0, 1].
    """

    query: np.ndarray
    item: np.ndarray
    score: np.ndarray


def read_relevance(
    path: str | Path, queries: Sequence[str], items: pa.Table, scale: float = 1.0
) -> tuple[RelevanceLabels, int]:
    """Judgements of a `.parquet` or `.jsonl` file with the columns query, item_id and score.

    Args:
        queries: known queries; rows with another query or item are left out and counted.
        scale: the file's highest score; scores are divided by it (3 for judgements 0 to 3).

    Returns:
        The labels of known pairs, and how many rows were left out.

    Raises:
        ConfigError: scale not above 0.
        DataError: the file is missing or damaged, a column is missing or null, or a score lies outside [0, scale].
    """
    if not scale > 0:
        raise ConfigError(f"The scale of relevance scores must be above 0, got {scale}.")
    table = _read(Path(path))
    score = table["score"].to_numpy() / scale
    wrong = np.flatnonzero(~((score >= 0) & (score <= 1)))
    if len(wrong):
        raise DataError(
            f"{path}, row {wrong[0]}: the score {table['score'][int(wrong[0])].as_py()} lies outside [0, {scale:g}]; name "
            "the highest score of your judgements as the scale."
        )
    query = rows_of(squeezed_column(table["query"]), pa.array(list(queries), pa.string()))
    item = rows_of(table["item_id"], items["item_id"])
    known = (query >= 0) & (item >= 0)
    return RelevanceLabels(query[known], item[known], score[known]), int((~known).sum())


def _read(path: Path) -> pa.Table:
    from sidtune.data_builders.tables.findings import Findings
    from sidtune.data_builders.tables.table_files import read_table

    findings = Findings()
    table = read_table(path, path.name, _SCHEMA, findings, required=_SCHEMA.names)
    findings.raise_if_any()
    if not table.num_rows:
        raise DataError(f"The relevance file {path} holds no rows; give it the columns query, item_id and score.")
    for name in _SCHEMA.names:
        nulls = np.flatnonzero(table[name].is_null().to_numpy())
        findings.rows(path.name, name, nulls, "the value is missing or null", "fill it or remove the row")
    findings.raise_if_any()
    return table


def knows_relevance(meta: dict[str, Any]) -> bool:
    """Whether a data folder's `meta.json` says that it is a simulated shop whose truth can be rebuilt."""
    return meta.get("reader") == "shop_world" and isinstance(meta.get("options"), dict)


def shop_relevance(
    meta: dict[str, Any], requests: pa.Table, queries: Sequence[str], query: np.ndarray, item: np.ndarray
) -> np.ndarray:
    """(J,) float64 true relevance of pairs of query and item rows in a simulated shop (formula in the module's docstring).

    Args:
        meta: of the data folder, see `knows_relevance`.
        requests: requests of the shop that hold every query of `queries`; a query means what its first request means.
        query, item: (J,) rows of `queries` and of the items table.

    Raises:
        DataError: the world of `meta` does not have these requests, or a query occurs in none of them.
    """
    from sidtune.data_builders.shop_world.world import ShopWorld

    if not knows_relevance(meta):
        raise DataError("The data folder is no simulated shop, so its relevance is unknown; give a file of judgements.")
    world = ShopWorld.from_options(**meta["options"])
    asked = requests.select([name for name in ("request_id", "query") if name in REQUESTS])
    first = rows_of(pa.array(list(queries), pa.string()), squeezed_column(asked["query"]))
    if len(first) and first.min() < 0:
        raise DataError(
            f"The query '{queries[int(np.argmin(first))]}' occurs in no request, so it has no known meaning."
        )
    rows = world.request_rows(asked["request_id"])[first][query]
    wanted, catalogue = world.requests, world.catalogue
    part = _PART[catalogue.relation[wanted.scope[rows], catalogue.leaf[item]]]
    value, brand = wanted.asked[rows], wanted.brand[rows]
    met = (value < 0) | (catalogue.values[item] == value[:, None]).any(axis=1)
    met &= (brand < 0) | (catalogue.brand[item] == brand)
    return part * np.where(met, 1.0, 0.5)


def near_threshold(cosine: np.ndarray, threshold: float, band: float, count: int, seed: int = 0) -> np.ndarray:
    """Places of at most `count` pairs whose cosine lies within `band` of the threshold, drawn by `seed`, ascending.

    Raises:
        ConfigError: band below 0 or count below 1.
    """
    if band < 0 or count < 1:
        raise ConfigError(
            f"The band of hard pairs must be 0 or more and their number 1 or more, got {band} and {count}."
        )
    near = np.flatnonzero(np.abs(cosine - threshold) <= band)
    if len(near) > count:
        near = np.sort(np.random.default_rng(seed).choice(near, count, replace=False))
    return near

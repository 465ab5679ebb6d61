"""Do queries and items meet in code space? Recall of the wanted item through the codes of the query alone.

OneSearch codes queries and items with one set of codebooks (section 3.1.3), so that the codes of a query already point
at its items. Two readings of that, both our choice, and both beside the number that says what they are worth:

* *Prefix*: the share of requests whose target shares the first 1..L codes of the query, beside the share of the
  catalogue that shares them. A coarse level is easy to share; the ratio of the two (lift) is what it tells.
* *Nearest codes*: the share of requests whose target is among the k items nearest to the query, by cosine of decoded
  codes, beside the same with the vectors themselves, before anything is lost (or noise left out) by quantizing.

Items of one code are equally near, so a hit counts with the probability that it has in a random order of these items
(as in `neighbours.py`): neither row order nor luck matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.mining.query_pairs import query_item_pairs
from sidtune.tokenizers.quantizers.base import Quantizer, check_codes
from sidtune.tokenizers.vectors import check_vectors, unit_rows

_CELLS = 1 << 24  # similarities held at once
_TIE = 1e-6  # cosines closer than this are equal: float32 sums differ by as much


@dataclass(frozen=True)
class QueryItemRecall:
    """What the codes of queries tell about their items.

    Attributes:
        requests: number R of query-target pairs.
        items: number N of items.
        prefix_share: for l = 1..L, the share of requests whose target shares the query's first l codes.
        prefix_chance: the mean share of the catalogue that shares them, what a random target would reach.
        recall: k → share of requests whose target is among the k items nearest by decoded codes.
        vector_recall: the same by the vectors, before any quantizing.
        chance: k → min(k, N) / N.
    """

    requests: int
    items: int
    prefix_share: list[float]
    prefix_chance: list[float]
    recall: dict[int, float]
    vector_recall: dict[int, float]
    chance: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def to_markdown(self) -> str:
        lines = ["| items found from the query's codes | by codes | by vectors | by chance |", "|---|---|---|---|"]
        lines += [
            f"| recall@{k} | {self.recall[k]:.2%} | {self.vector_recall[k]:.2%} | {self.chance[k]:.2%} |"
            for k in self.recall
        ]
        lines += ["", "| first codes shared with the wanted item | requests | by chance |", "|---|---|---|"]
        pairs = zip(self.prefix_share, self.prefix_chance, strict=True)
        lines += [f"| {level} | {share:.2%} | {chance:.3%} |" for level, (share, chance) in enumerate(pairs, start=1)]
        return "\n".join(lines) + "\n"


def query_item_recall(
    query_vectors: np.ndarray,
    item_vectors: np.ndarray,
    quantizer: Quantizer,
    targets: np.ndarray,
    ks: Sequence[int] = (10, 100),
    *,
    query_rows: np.ndarray | None = None,
    item_codes: np.ndarray | None = None,
    query_codes: np.ndarray | None = None,
) -> QueryItemRecall:
    """Measures how well the codes of queries find the items that were wanted.

    Args:
        query_vectors, item_vectors: (Q, d) and (N, d), of one encoder.
        quantizer: fitted; encodes what has no codes yet and decodes all.
        targets: (R,) row of the wanted item, one per request.
        ks: list lengths.
        query_rows: (R,) row of each request's query, default 0..Q-1 (then R = Q).
        item_codes: (N, ≥ L) codes of the items, for example `SemanticIds.codes`; a suffix level is left out. Default
            `quantizer.encode(item_vectors)`.
        query_codes: (Q, L), default `quantizer.encode(query_vectors)`.

    Raises:
        ConfigError: a list length below 1.
        DataError: no request, rows that do not exist, or arrays that do not fit together.
    """
    if not len(ks) or min(ks) < 1:
        raise ConfigError(f"ks must be list lengths of 1 or more, got {list(ks)}.")
    queries = check_vectors(query_vectors, quantizer.dims, what="query vectors")
    items = check_vectors(item_vectors, quantizer.dims)
    asked = np.arange(len(queries)) if query_rows is None else np.asarray(query_rows)
    wanted = np.asarray(targets)
    _check_rows(asked, wanted, len(queries), len(items))
    item_codes = _codes(item_codes, items, quantizer, "item_codes")
    query_codes = _codes(query_codes, queries, quantizer, "query_codes")
    share, chance = _prefixes(query_codes[asked], item_codes, wanted)
    distinct, group, counts = np.unique(item_codes, axis=0, return_inverse=True, return_counts=True)
    by_code = _recall(
        quantizer.decode(query_codes), asked, quantizer.decode(distinct), group.reshape(-1)[wanted], counts, ks
    )
    by_vector = _recall(queries, asked, items, wanted, np.ones(len(items), dtype=np.int64), ks)
    by_chance = {int(k): min(int(k), len(items)) / len(items) for k in ks}
    return QueryItemRecall(len(wanted), len(items), share, chance, by_code, by_vector, by_chance)


def query_targets(requests: pa.Table, item_ids: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """What `query_item_recall` needs from a data folder: the queries of a split and the items clicked or ordered.

    Args:
        requests: table in the REQUESTS schema, usually the test split.
        item_ids: the items in row order, for example `SemanticIds.item_ids`; pairs with another item are left out.

    Returns:
        Distinct query texts (Q,), and for every pair the row of its query (R,) and of its item (R,), both int64. All
        empty when no request has a query.
    """
    asked, wanted = query_item_pairs(requests)
    place = {item_id: row for row, item_id in enumerate(item_ids)}
    rows = np.fromiter((place.get(item_id, -1) for item_id in wanted.to_pylist()), np.int64, len(wanted))
    known = rows >= 0
    coded = asked.filter(pa.array(known)).dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64), rows[known]


def _check_rows(asked: np.ndarray, wanted: np.ndarray, queries: int, items: int) -> None:
    if not len(wanted):
        raise DataError("There are no requests to measure recall on; this data has no query with a clicked item.")
    for rows, count, what in ((asked, queries, "queries"), (wanted, items, "items")):
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(rows) != len(wanted):
            raise DataError(
                f"Expected one row number of the {what} per request, {len(wanted)} in all, got {rows.dtype} "
                f"{rows.shape}; give targets and query_rows of one length."
            )
        if rows.min() < 0 or rows.max() >= count:
            raise DataError(f"A row of the {what} lies outside 0..{count - 1}; check the order of the vectors.")


def _codes(codes: np.ndarray | None, vectors: np.ndarray, quantizer: Quantizer, what: str) -> np.ndarray:
    if codes is None:
        return quantizer.encode(vectors)
    codes = np.asarray(codes)
    if codes.ndim != 2 or len(codes) != len(vectors) or codes.shape[1] < quantizer.depth:
        raise DataError(
            f"{what} must be codes of shape ({len(vectors)}, {quantizer.depth}), one row per vector, got {codes.shape}."
        )
    return check_codes(codes[:, : quantizer.depth], quantizer.level_sizes)


def _prefixes(asked: np.ndarray, items: np.ndarray, wanted: np.ndarray) -> tuple[list[float], list[float]]:
    """Per level: share of requests whose target has the query's prefix, and mean share of items that have it."""
    shared = np.logical_and.accumulate(asked == items[wanted], axis=1).mean(axis=0)
    chance = []
    for level in range(items.shape[1]):
        both = np.concatenate([items, asked])[:, : level + 1]
        group = np.unique(both, axis=0, return_inverse=True)[1].reshape(-1)
        counts = np.bincount(group[: len(items)], minlength=group.max() + 1)
        chance.append(float(counts[group[len(items) :]].mean() / len(items)))
    return [float(value) for value in shared], chance


def _recall(
    queries: np.ndarray,
    asked: np.ndarray,
    base: np.ndarray,
    target: np.ndarray,
    counts: np.ndarray,
    ks: Sequence[int],
) -> dict[int, float]:
    """Expected recall: `base` (M, d) stands for `counts` (M,) items each, `target` (R,) is the row that is wanted."""
    near, far = unit_rows(base).astype(np.float32), unit_rows(queries).astype(np.float32)
    hits, lengths = np.zeros(len(ks)), np.array(ks, dtype=np.float64)
    step = max(1, _CELLS // len(near))
    weight = counts.astype(np.float64)
    for start in range(0, len(target), step):
        rows = slice(start, start + step)
        cosine = far[asked[rows]] @ near.T
        own = cosine[np.arange(len(cosine)), target[rows]][:, None]
        before = (cosine > own + _TIE) @ weight
        tied = (np.abs(cosine - own) <= _TIE) @ weight
        hits += np.clip((lengths - before[:, None]) / tied[:, None], 0.0, 1.0).sum(axis=0)
    return {int(k): float(hit / len(target)) for k, hit in zip(ks, hits, strict=True)}

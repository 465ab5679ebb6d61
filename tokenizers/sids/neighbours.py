"""Nearest neighbours of items in vector space and in code space, for the quality report. Our choice throughout.

Items of one code have the same decoded vector, so "the k nearest in the decoded space" is not one set: it is a set of
codes, the last of which may fit only in part. The overlap here is its expected value over the order within codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sidtune.tokenizers.quantizers.base import Quantizer
from sidtune.tokenizers.vectors import unit_rows

_BLOCK = 1024  # rows whose candidates are gathered at once
_SPARE = 16  # candidates beyond k that are ranked again exactly, so that near-ties cannot depend on faiss's rounding


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(unit_rows(vectors), dtype=np.float32)


def nearest_rows(vectors: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """(n, k) int64, nearest first: the k < N cosine-nearest other rows of each of the `rows` (n,) of `vectors` (N, d).

    Equal similarities (to 1e-6) go by row number; a zero vector is as near to everything as to anything else.
    """
    import faiss

    unit = _unit(vectors)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
    return np.concatenate([_ranked(unit, index, block, k) for block in blocks])


def _ranked(unit: np.ndarray, index: Any, rows: np.ndarray, k: int) -> np.ndarray:
    found = index.search(unit[rows], min(len(unit), k + 1 + _SPARE))[1]
    exact = np.round(np.einsum("nkd,nd->nk", unit[found], unit[rows], dtype=np.float64), 6)
    exact[found == rows[:, None]] = -np.inf
    order = np.lexsort((found, -exact), axis=1)[:, :k]
    return np.take_along_axis(found, order, axis=1)


def shared_levels(codes: np.ndarray, rows: np.ndarray, others: np.ndarray) -> float:
    """Mean length of the common code prefix of `rows` (n,) and `others` (n, k), codes (N, L)."""
    same = codes[others] == codes[rows][:, None, :]
    return float(np.logical_and.accumulate(same, axis=2).sum(axis=2).mean())


def neighbour_overlap(codes: np.ndarray, quantizer: Quantizer, rows: np.ndarray, near: np.ndarray) -> float:
    """Mean expected share of the true neighbours `near` (n, k) of the items `rows` (n,) among the k nearest in the decoded space
    of `codes` (N, L)."""
    import faiss

    k = near.shape[1]
    distinct, group, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    decoded = _unit(quantizer.decode(distinct))
    index = faiss.IndexFlatIP(decoded.shape[1])
    index.add(decoded)
    # k + 1 codes hold at least k items besides the row itself.
    found = index.search(decoded[group[rows]], min(len(decoded), k + 1))[1]
    members = counts[found] - (found == group[rows][:, None])
    before = np.cumsum(members, axis=1) - members
    share = np.clip((k - before) / np.maximum(members, 1), 0.0, 1.0)
    hit = found[:, None, :] == group[near][:, :, None]
    return float((hit * share[:, None, :]).sum(axis=2).mean())

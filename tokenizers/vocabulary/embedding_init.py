"""First values of the rows of new SID tokens: from the codebook, from the item texts, or the mean row.

All three start at the mean of the old rows, so that a new token begins about as likely as an average one and the
softmax of the old tokens hardly moves. The papers do not say how they initialise; everything here is our choice:

- codebook: mean row + projected centroid. The centroids of a level are centred, mapped into the embedding space by a
  random map with orthonormal rows (after PCA when they have more dimensions than the embedding), and scaled so that
  their mean squared length is that of the old rows around their mean. Cosines between the centroids of a level
  therefore become, exactly, cosines between its rows around the mean row.
- text: mean embedding of the text tokens of the items that carry the code, pulled to the mean row by `shrink`
  pseudo-items, so that a code of one item does not copy its title.
- mean: the mean row.

To all of them comes Gaussian noise, `noise` times the standard deviation of the old values; it tells equal rows apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch
from transformers import PreTrainedTokenizerBase

from sidtune.core.errors import DataError

if TYPE_CHECKING:
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds

INITS = ("codebook", "text", "mean")


class OldRows:
    """Mean and spread of the rows (V, d) of a matrix that were there before.

    Attributes:
        rows: (V, d) float32 numpy.
        mean: (d,) float64, the mean row.
        spread: root of the mean squared distance from the mean row.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows.detach().float().cpu().numpy()
        self.mean = self.rows.mean(axis=0, dtype=np.float64)
        self.spread = float(np.sqrt(np.square(self.rows - self.mean.astype(np.float32)).sum(axis=1).mean()))

    @property
    def deviation(self) -> float:
        """Standard deviation of one coordinate."""
        return self.spread / np.sqrt(len(self.mean))


def check_codebooks(
    codebooks: Sequence[np.ndarray] | None, level_sizes: Sequence[int], suffix_level: bool
) -> list[np.ndarray]:
    """The codebooks as float64 (k_l, d_c), one per level; a suffix level has none.

    Raises:
        DataError: missing, of another number or size than the levels, of differing width, or not finite.
    """
    if not codebooks:
        raise DataError(
            "init 'codebook' needs the codebooks of the quantizer; pass codebooks=, or use 'text' or 'mean'."
        )
    expected = len(level_sizes) - int(suffix_level)
    if len(codebooks) != expected:
        raise DataError(
            f"Expected {expected} codebooks for semantic IDs of {len(level_sizes)} levels"
            f"{' of which the last is a suffix' if suffix_level else ''}, got {len(codebooks)}; pass those of the "
            "quantizer that made these semantic IDs."
        )
    arrays = [np.asarray(book, dtype=np.float64) for book in codebooks]
    for level, (book, size) in enumerate(zip(arrays, level_sizes, strict=False), 1):
        if book.ndim != 2 or len(book) != size or book.shape[1] != arrays[0].shape[-1]:
            raise DataError(
                f"The codebook of level {level} has the shape {book.shape}, expected ({size}, {arrays[0].shape[-1]}); "
                "pass those of the quantizer that made these semantic IDs."
            )
        if not np.isfinite(book).all():
            raise DataError(f"The codebook of level {level} holds NaN or infinity; learn the semantic IDs again.")
    return arrays


def orthonormal_map(centred: np.ndarray, width: int, seed: int) -> np.ndarray:
    """(d_c, width) map of centred centroids: PCA to at most `width` dimensions, then a random orthonormal embedding.

    It keeps lengths and angles exactly when d_c <= width.
    """
    given = centred.shape[1]
    keep = np.eye(given)
    if given > width:
        keep = np.linalg.svd(centred, full_matrices=len(centred) < given)[2][:width].T
    random = np.random.default_rng(seed).standard_normal((width, keep.shape[1]))
    basis, triangle = np.linalg.qr(random)
    signs = np.where(np.diag(triangle) < 0, -1.0, 1.0)  # makes the random map independent of the LAPACK build
    return keep @ (basis * signs).T


def codebook_rows(old: OldRows, codebooks: list[np.ndarray], level_sizes: Sequence[int], seed: int) -> np.ndarray:
    """(sum level_sizes, d) rows; levels without a codebook get the mean row."""
    centred = [book - book.mean(axis=0) for book in codebooks]
    projection = orthonormal_map(np.concatenate(centred), len(old.mean), seed)
    blocks = []
    for level, size in enumerate(level_sizes):
        rows = np.zeros((size, len(old.mean)))
        if level < len(centred):
            rows = centred[level] @ projection
            length = np.sqrt(np.square(rows).sum(axis=1).mean())
            rows = rows * (old.spread / length) if length > 0 else rows
        blocks.append(old.mean + rows)
    return np.concatenate(blocks)


def check_texts(item_texts: Mapping[str, str] | Sequence[str] | None, sids: SemanticIds) -> list[str]:
    """One text per item in row order; items without one get "".

    Raises:
        DataError: no texts, or a sequence of another length than the items.
    """
    if item_texts is None:
        raise DataError("init 'text' needs the item texts; pass item_texts=, or use 'codebook' or 'mean'.")
    if isinstance(item_texts, Mapping):
        texts = [item_texts.get(item_id) or "" for item_id in sids.item_ids]
    else:
        texts = [text or "" for text in item_texts]
    if len(texts) != len(sids.item_ids):
        raise DataError(f"Expected {len(sids.item_ids)} item texts, one per item, got {len(texts)}.")
    if not any(texts):
        raise DataError("init 'text' found no text for any item; pass the titles by item id, or use 'codebook'.")
    return texts


def token_shares(tokenizer: PreTrainedTokenizerBase, texts: list[str], rows: int) -> sp.csr_matrix:
    """(N, rows) sparse: the share of each old token in each text; a text without old tokens is an empty row."""
    lists = tokenizer(texts, add_special_tokens=False)["input_ids"]
    lengths = np.fromiter((len(ids) for ids in lists), dtype=np.int64, count=len(lists))
    flat = np.fromiter((i for ids in lists for i in ids), dtype=np.int64, count=int(lengths.sum()))
    item = np.repeat(np.arange(len(lists)), lengths)
    old = flat < rows
    counts = sp.coo_matrix((np.ones(old.sum()), (item[old], flat[old])), shape=(len(lists), rows)).tocsr()
    total = np.asarray(counts.sum(axis=1)).ravel()
    return sp.diags(1.0 / np.maximum(total, 1.0)) @ counts


def text_rows(old: OldRows, sids: SemanticIds, shares: sp.csr_matrix, shrink: float) -> np.ndarray:
    """(sum level_sizes, d) rows: `(sum of the items' mean embeddings + shrink * mean row) / (items + shrink)`."""
    embedded = shares @ old.rows.astype(np.float64)
    has_text = np.flatnonzero(np.diff(shares.indptr))
    blocks = []
    for level, size in enumerate(sids.level_sizes):
        codes = sids.codes[has_text, level]
        carry = sp.csr_matrix((np.ones(len(codes)), (codes, has_text)), shape=(size, len(sids.item_ids)))
        count = np.asarray(carry.sum(axis=1)).ravel()
        weight = count + shrink
        total = carry @ embedded + shrink * old.mean
        blocks.append(np.where(weight[:, None] > 0, total / np.maximum(weight, 1e-12)[:, None], old.mean))
    return np.concatenate(blocks)


def noisy(rows: np.ndarray, old: OldRows, noise: float, seed: int) -> torch.Tensor:
    """`rows` as float32 with Gaussian noise of `noise` standard deviations of the old values."""
    random = np.random.default_rng(seed).standard_normal(rows.shape)
    return torch.from_numpy((rows + noise * old.deviation * random).astype(np.float32))

"""Did the new rows learn what their codes mean? A report to be made after the warm-up stage.

For every level: Spearman's rank correlation between (a) the cosines of its rows around the mean old row and (b) the
cosines of its centroids around their mean. Right after "codebook" it is near 1 by construction, after "mean" near
0; a warm-up that works raises it from there. For a few codes the nearest old text tokens are shown beside titles of items
that carry them. Our choice; no paper is involved, and no peer evaluates this stage at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr
from torch import nn
from transformers import PreTrainedTokenizerBase

from sidtune.core.errors import DataError
from sidtune.tokenizers.vocabulary.extension import Vocabulary
from sidtune.tokenizers.vocabulary.trainable_tokens import token_matrix

if TYPE_CHECKING:
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds

_MOST_CODES = 1000  # pairs of more codes than this are drawn from a random subset


def row_neighbours(
    model: nn.Module,
    vocabulary: Vocabulary,
    sids: SemanticIds,
    item_vectors: np.ndarray,
    tokenizer: PreTrainedTokenizerBase | None = None,
    item_titles: Mapping[str, str] | None = None,
    k: int = 3,
    codes_shown: int = 8,
    head: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares the rows of the SID tokens with the items that carry them.

    Args:
        model: the model, in any training mode.
        vocabulary: its vocabulary.
        sids: the semantic IDs.
        item_vectors: (N, d) vectors of the items, row order of `sids`; a code's centroid is the mean of its items.
        tokenizer: with it, the examples name the `k` nearest old tokens of a row.
        item_titles: item id → title, shown in the examples.
        k: neighbours and titles per example.
        codes_shown: examples: the codes of the first level with the most items.
        head: look at the output head instead of the embedding.
        seed: seed of the subset drawn of a level with more than 1000 codes.

    Returns:
        `{"levels": [{"level": 1, "codes": used codes, "spearman": float or None}, ...], "examples": [{"token", "items",
        "nearest_tokens", "titles"}, ...]}`. Spearman is None below three used codes or without variation.

    Raises:
        DataError: vectors that do not fit the items, or semantic IDs that do not fit the vocabulary.
    """
    vocabulary.check(tokenizer, sids)
    vectors = np.asarray(item_vectors, dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != len(sids.item_ids) or not np.isfinite(vectors).all():
        raise DataError(
            f"Expected finite item vectors of shape ({len(sids.item_ids)}, d), got {vectors.shape}; give one per item."
        )
    matrix = token_matrix(model, head).float().numpy()
    old = matrix[: vocabulary.base_vocab_size]
    mean = old.mean(axis=0, dtype=np.float64)
    levels = []
    for level, size in enumerate(sids.level_sizes):
        codes = sids.codes[:, level]
        count = np.bincount(codes, minlength=size)
        used = np.flatnonzero(count)
        totals = np.zeros((size, vectors.shape[1]))
        np.add.at(totals, codes, vectors)
        centroids = totals[used] / count[used, None]
        rows = matrix[vocabulary.level_token_ids(level)[used]] - mean
        rho = _rank_agreement(rows, centroids - centroids.mean(axis=0), seed)
        levels.append({"level": level + 1, "codes": len(used), "spearman": rho})
    examples = _examples(matrix, mean, vocabulary, sids, tokenizer, item_titles or {}, k, codes_shown)
    return {"levels": levels, "examples": examples}


def _rank_agreement(rows: np.ndarray, centroids: np.ndarray, seed: int) -> float | None:
    if len(rows) > _MOST_CODES:
        chosen = np.random.default_rng(seed).choice(len(rows), _MOST_CODES, replace=False)
        rows, centroids = rows[chosen], centroids[chosen]
    if len(rows) < 3:
        return None
    above = np.triu_indices(len(rows), 1)
    ours, theirs = _cosines(rows, rows)[above], _cosines(centroids, centroids)[above]
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return None
    return float(spearmanr(ours, theirs).statistic)


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    def unit(array: np.ndarray) -> np.ndarray:
        return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)

    return unit(left) @ unit(right).T


def _examples(
    matrix: np.ndarray,
    mean: np.ndarray,
    vocabulary: Vocabulary,
    sids: SemanticIds,
    tokenizer: PreTrainedTokenizerBase | None,
    titles: Mapping[str, str],
    k: int,
    shown: int,
) -> list[dict[str, Any]]:
    count = np.bincount(sids.codes[:, 0], minlength=sids.level_sizes[0])
    chosen = [int(code) for code in np.argsort(-count, kind="stable")[:shown] if count[code]]
    names: Sequence[str] = sids.level_tokens(0)
    examples = []
    for code in chosen:
        items = np.flatnonzero(sids.codes[:, 0] == code)
        items = items[np.argsort(-sids.popularity[items], kind="stable")][:k]
        example: dict[str, Any] = {"token": names[code], "items": int(count[code])}
        if tokenizer is not None:
            row = matrix[vocabulary.level_token_ids(0)[code]] - mean
            near = _cosines(row[None], matrix[: vocabulary.base_vocab_size] - mean)[0]
            example["nearest_tokens"] = [tokenizer.decode([int(n)]) for n in np.argsort(-near, kind="stable")[:k]]
        example["titles"] = [titles[sids.item_ids[n]] for n in items if titles.get(sids.item_ids[n])]
        examples.append(example)
    return examples

"""Small parts of the post-ranking processor: parts of a request, and rows to arrays.

Missing values become NaN here, the only sign of "missing" that the adapters know. Our own code, no paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sidtune.core.errors import DataError
from sidtune.data_builders.post_ranking.schema import PostRankRequest
from sidtune.data_builders.post_ranking.targets import target_order
from sidtune.models.post_ranking.config import FieldSpec


def presented(request: PostRankRequest, order: Sequence[int] | np.ndarray) -> PostRankRequest:
    """The request with the candidates of the given numbers only, in that order."""
    order = [int(place) for place in order]
    return replace(
        request,
        candidates=[request.candidates[place] for place in order],
        item_ids=[request.item_ids[place] for place in order],
        relevance=np.asarray(request.relevance, np.float32)[order] if len(request.relevance) else request.relevance,
        item_texts=[request.item_texts[place] for place in order] if len(request.item_texts) else (),
        init_scores=None if request.init_scores is None else np.asarray(request.init_scores)[order],
    )


def main_target(relevance: np.ndarray) -> np.ndarray:
    """The order of falling relevance; raises DataError where some relevance is unknown."""
    if np.isnan(relevance).any():
        raise DataError(
            "A main-task answer needs the relevance of every candidate, but some are unknown (NaN); leave such requests out, or "
            "pass `targets`."
        )
    return target_order(relevance)


def fitted(value: Any, dim: int, what: str, request: str) -> np.ndarray:
    """A (dim,) float32 vector; raises DataError for another length."""
    found = np.asarray(value, dtype=np.float32).reshape(-1)
    if len(found) != dim:
        raise DataError(f"The {what} of request '{request}' has {len(found)} numbers, but the model wants {dim}.")
    return found


def field_value(spec: FieldSpec, values: Any, request: str) -> np.ndarray:
    """One row of a field, NaN where it is missing."""
    value = values.get(spec.name)
    if value is None:
        return np.full(spec.dim, np.nan, np.float32)
    return fitted(value, spec.dim, f"{spec.side} field '{spec.name}'", request)


def marked(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Values with NaN where they are not present."""
    return np.where(present[..., None], values, np.float32(np.nan))


def tensors(value: Any) -> Any:
    """Arrays, or a dict of them, as tensors."""
    if isinstance(value, dict):
        return {key: torch.from_numpy(np.ascontiguousarray(one)) for key, one in value.items()}
    return torch.from_numpy(np.ascontiguousarray(value))

"""Parts of the GRPO objective that TRL lacks, as pure tensor functions.

TRL's surrogates stay TRL's. Added here: the surrogate of a searched list (credit "list"), and the weight that TRL's
aggregations give a row, which that surrogate must share.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSSES = (*CLIPPED, "cispo", "sapo", "vespo")  # TRL's


def list_surrogate(log_probs: Tensor, old: Tensor, coefficients: Tensor, low: float, high: float) -> Tensor:
    """(R,) loss of the searched lists: clipped ratios weighted by each item's coefficient
    (`advantages.list_credit`).

    Args:
        log_probs: (R, K) log-probability of each item. old: the same when the list was searched, -inf at dead places.
        coefficients: (R, K), 0 at dead places.
        low, high: how far the ratio may leave 1 downwards and upwards.
    """
    alive = old > float("-inf")
    ratio = (log_probs - old).where(alive, 0.0).exp()
    value = torch.minimum(ratio * coefficients, ratio.clamp(1 - low, 1 + high) * coefficients)
    return -value.where(alive, 0.0).sum(1)


def row_weights(
    loss_type: str, mask: Tensor, max_completion_length: int, accumulation: float, global_normalizer: Tensor | None
) -> Tensor:
    """(B,) what TRL's aggregation multiplies the summed token losses of each row by.

    Args:
        loss_type: one of TRL's with a row-wise or token-wise mean.
        mask: (B, T) tokens in the loss. accumulation: micro-batches of an optimizer step (1 in evaluation).
        global_normalizer: what "dapo", "cispo" and "vespo" divide by in this micro-batch.
    """
    rows, tokens = len(mask), mask.sum(1).clamp(min=1.0)
    if loss_type in ("grpo", "sapo"):
        return 1 / (tokens * rows * accumulation)
    one = torch.ones_like(tokens, dtype=torch.float32)
    if loss_type == "bnpo":
        return one / (mask.sum().clamp(min=1.0) * accumulation)
    if loss_type == "dr_grpo":
        return one / (rows * max_completion_length * accumulation)
    if loss_type == "luspo":
        return one / (rows * accumulation)
    return one / global_normalizer

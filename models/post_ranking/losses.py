"""The loss of post-ranking: the token mean over main-task answers plus `aux_weight` times that over auxiliary answers.

The paper (LLM4PR, arXiv 2411.01178) gives no weight and no normalisation; one mean over both would weigh the main task about
(n + 1) / 2 times as much. Means are those of the batch at hand (`accepts_loss_kwargs = False` of the model, so that
transformers' Trainer divides by the accumulation steps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sidtune.models.post_ranking.permutation import permutation_losses

IGNORE = -100
MAIN, AUX, ADAPTATION = 0, 1, 2


@dataclass
class PostRankOutput(ModelOutput):
    """Result of a forward pass: `loss`, `logits` (B, T, V), and the token means `main_loss` and `aux_loss` (0 where a batch has
    no such answer)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    main_loss: Tensor | None = None
    aux_loss: Tensor | None = None


def answer_loss(
    logits: Tensor,
    targets: Tensor,
    task_id: Tensor | None,
    aux_weight: float,
    label_token_ids: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, main, aux): negative log-likelihood per answer token, a mean for each task.

    Args:
        logits: (B, P, V) that predict `targets` (B, P), -100 outside of answers.
        task_id: (B,) 0 main, 1 auxiliary, 2 feature adaptation (counted as main); None is all main.
        aux_weight: weight of the auxiliary mean.
        label_token_ids: with them, main answers are scored by `permutation_losses`; without, over the whole vocabulary.
    """
    keep = targets != IGNORE
    task = torch.zeros_like(targets[:, 0]) if task_id is None else task_id
    if label_token_ids is None:
        losses = nn.functional.cross_entropy(logits[keep].float(), targets[keep], reduction="none")
        of_aux = (task == AUX)[:, None].expand_as(keep)[keep]
    else:
        listed = task == MAIN
        chosen, answer = permutation_losses(logits[listed], targets[listed], label_token_ids)
        keep = keep & ~listed[:, None]
        said = nn.functional.cross_entropy(logits[keep].float(), targets[keep], reduction="none")
        losses = torch.cat([chosen[answer], said])
        of_aux = torch.cat([torch.zeros_like(answer[answer]), (task == AUX)[:, None].expand_as(keep)[keep]])
    means = [(losses * part).sum() / part.sum().clamp(min=1) for part in (~of_aux, of_aux)]
    return means[0] + aux_weight * means[1], means[0], means[1]

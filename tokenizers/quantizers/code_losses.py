"""Gradients through a code choice, and the loss terms of learned quantizers, as plain functions of tensors.

- straight-through (van den Oord et al. 2017): forward the code vector, backward the identity.
- rotation trick (Fifty et al. 2024): forward the code vector, backward the rotation and rescaling that takes the encoder's
  output to it, `q = (|q| / |e|) R e` with R and the ratio held constant. For residual codes we apply either to the sum of
  the code vectors, not level by level (our choice: level by level the straight-through gradients cancel but for the first).
- Sinkhorn assignment (as in LC-Rec): codes of a batch under a uniform marginal, in the log domain, so that small
  temperatures do not overflow (our choice).
- contrastive and diversity terms of LETTER (Wang et al. 2024). The diversity term draws positives by index instead of
  rejection, so a cluster of one code cannot loop forever; such codes have no positive and are left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-6


def straight_through(encoded: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` (B, h) with the gradient of `encoded` (B, h)."""
    return encoded + (quantized - encoded).detach()


def rotation_trick(encoded: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` (B, h), differentiable in `encoded` (B, h) through `(|q| / |e|) R`, R held constant.

    R = I - 2 r rᵀ + 2 q̂ êᵀ with r the unit vector along ê + q̂. Where a vector has length zero or the two are opposite, R is
    undefined and the straight-through gradient is used.
    """
    e, q = encoded.detach(), quantized.detach()
    e_length, q_length = e.norm(dim=1, keepdim=True), q.norm(dim=1, keepdim=True)
    e_hat, q_hat = e / e_length.clamp_min(_TINY), q / q_length.clamp_min(_TINY)
    both = e_hat + q_hat
    safe = (e_length > _TINY) & (q_length > _TINY) & (both.norm(dim=1, keepdim=True) > _TINY)
    r = both / both.norm(dim=1, keepdim=True).clamp_min(_TINY)
    turned = (
        encoded
        - 2 * (encoded * r).sum(dim=1, keepdim=True) * r
        + 2 * (encoded * e_hat).sum(dim=1, keepdim=True) * q_hat
    )
    rotated = turned * (q_length / e_length.clamp_min(_TINY))
    # The rotated vector equals q up to rounding; the forward value shall be q itself.
    rotated = rotated + (q - rotated).detach()
    return torch.where(safe, rotated, straight_through(encoded, quantized))


def sinkhorn(distances: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assignment (B, k) of a batch: rows sum to 1, columns to B / k after enough iterations.

    Args:
        distances: (B, k) squared distances; they are centred and scaled to [-1, 1] first, as in LC-Rec.
        epsilon: temperature of the entropic term.
        iterations: alternating normalisations; the last one is over columns, then rows.
    """
    high, low = distances.max(), distances.min()
    centred = (distances - (high + low) / 2) / ((high - low) / 2).clamp_min(_TINY)
    scores = -centred.double() / epsilon
    target = math.log(len(distances) / distances.shape[1])
    for _ in range(iterations):
        scores = scores - torch.logsumexp(scores, dim=0, keepdim=True) + target
        scores = scores - torch.logsumexp(scores, dim=1, keepdim=True)
    return scores.exp()


def contrastive(quantized: Tensor, other: Tensor) -> Tensor:
    """LETTER's alignment: `-mean_i log softmax_j(<z_i, h_j>)[i]` of codes (B, h) and collaborative vectors (B, h)."""
    logits = quantized @ other.T
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def diversity(codes: Tensor, codebook: Tensor, clusters: Tensor, generator: torch.Generator) -> Tensor:
    """LETTER's spread of code vectors: each used code is drawn to a random other code of its cluster, away from the rest.

    `-mean_i log( exp<e_i, e_+> / Σ_{j≠i} exp<e_i, e_j> )` over the codes i of the batch.

    Args:
        codes: (B,) code of each item.
        codebook: (k, h).
        clusters: (k,) cluster of each code.
        generator: on the CPU; draws the positives.

    Returns:
        the mean, 0 where no code has another in its cluster.
    """
    if len(codebook) < 2:
        return codebook.sum() * 0
    order = torch.argsort(clusters, stable=True)
    sizes = torch.bincount(clusters)
    first = torch.cumsum(sizes, 0) - sizes
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    place = place - first[clusters]  # position of each code within its cluster
    size = sizes[clusters[codes]]
    draw = torch.rand(len(codes), generator=generator).to(codes.device)
    step = 1 + (draw * (size - 1)).long().clamp(max=(size - 2).clamp_min(0))
    positive = order[first[clusters[codes]] + (place[codes] + step) % size]
    paired = size > 1
    # A code alone in its cluster gets any other target: its loss is dropped, but an infinite one would spoil gradients.
    positive = torch.where(paired, positive, (codes + 1) % len(codebook))
    logits = (codebook[codes] @ codebook.T).scatter(1, codes[:, None], float("-inf"))
    loss = F.cross_entropy(logits, positive, reduction="none")
    return torch.where(paired, loss, 0.0).sum() / paired.sum().clamp_min(1)

"""The five terms that align a text encoder with behaviour (OneSearch, section 3.1.1, Eq. 1).

    L = w_q2q L_q2q + w_i2i L_i2i + w_q2i L_q2i + w_rank L_rank + w_rel L_rel

With s the cosine of two texts:

    L_nce(a, b) = mean over i of -log softmax_j( s(a_i, b_j) / tau )[i]                       for q2q, i2i and q2i
    L_rank      = mean of relu(m_o - s(q, order) + s(q, click)) + relu(m_c - s(q, click) + s(q, show))
    L_rel       = mean of (s(q, item) - y)², y in [0, 1]

The paper gives neither these forms nor weights, temperature or margins: forms and defaults (all weights 1, tau 0.05, margins 0.1)
are those of the project's notes. Ours on top: a column j leaves the softmax of row i where b_j is no negative of it, because b_j
is the text of b_i or of a_i itself, or because a_j is the same text as a_i; where a query has an ordered and a shown item but none
that was only clicked, the two must lie m_o + m_c apart, which is what both terms ask of the three together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError

CONTRASTIVE = ("q2q", "i2i", "q2i")
TERMS = (*CONTRASTIVE, "rank", "relevance")


@dataclass
class AlignedLossConfig:
    """Weights and constants of the loss.

    Attributes:
        q2q, i2i, q2i, rank, relevance: weight of each term, 0 leaves it out.
        temperature: tau of the contrastive terms.
        order_margin: how much nearer an ordered item shall be to its query than a clicked one.
        click_margin: how much nearer a clicked item shall be than one that was only shown.
    """

    q2q: float = 1.0
    i2i: float = 1.0
    q2i: float = 1.0
    rank: float = 1.0
    relevance: float = 1.0
    temperature: float = 0.05
    order_margin: float = 0.1
    click_margin: float = 0.1

    def __post_init__(self) -> None:
        check_range(self, 0, *TERMS, "order_margin", "click_margin")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"The temperature of the aligned loss must be above 0, got {self.temperature}.")
        if not any(self.weight(term) for term in TERMS):
            raise ConfigError("All weights of the aligned loss are 0, so nothing would be learned; raise one.")

    def weight(self, term: str) -> float:
        """Weight of a term of `TERMS`."""
        return float(getattr(self, term))


def info_nce(left: Tensor, right: Tensor, left_texts: Tensor, right_texts: Tensor, temperature: float) -> Tensor:
    """Contrastive loss of matching rows; the other rows of `right` are the negatives, but for what is none.

    Args:
        left, right: (B, d) vectors of length 1.
        left_texts, right_texts: (B,) int64, equal numbers for equal texts, over both sides.

    Returns:
        Scalar mean over the rows; a row without any negative gives 0.
    """
    logits = left @ right.T / temperature
    same = right_texts[None, :] == right_texts[:, None]
    same |= left_texts[None, :] == left_texts[:, None]
    same |= right_texts[None, :] == left_texts[:, None]
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(left), device=left.device))


def order_margin(
    query: Tensor, order: Tensor, click: Tensor, show: Tensor, known: Tensor, order_margin: float, click_margin: float
) -> Tensor:
    """Margin loss that keeps ordered before clicked before shown items.

    Args:
        query, order, click, show: (B, d) vectors of length 1; whatever stands where an item is missing.
        known: (B, 3) bool, which of order, click and show there are; at least two in each row.
        order_margin, click_margin: see `AlignedLossConfig`.

    Returns:
        Scalar mean over the rows.
    """
    s_order, s_click, s_show = ((query * other).sum(dim=-1) for other in (order, click, show))
    has_order, has_click, has_show = known.unbind(dim=1)
    upper = F.relu(order_margin - s_order + s_click) * (has_order & has_click)
    lower = F.relu(click_margin - s_click + s_show) * (has_click & has_show)
    across = F.relu(order_margin + click_margin - s_order + s_show) * (has_order & ~has_click & has_show)
    return (upper + lower + across).mean()


def aligned_loss(
    vectors: Tensor, places: Mapping[str, Tensor], config: AlignedLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum over the terms a batch has rows for.

    Args:
        vectors: (U, d) of length 1, one for each distinct text of the batch.
        places: term → (B, 2) int64 rows of `vectors`; `rank` → (B, 4) query, order, click, show with -1 for a missing item;
            `relevance_score` → (B,) beside `relevance`.
        config: weights and constants.

    Returns:
        The loss, and each term before its weight (detached).
    """
    total, parts = vectors.new_zeros(()), {}
    for term in TERMS:
        rows = places.get(term)
        if rows is None or not len(rows) or not config.weight(term):
            continue
        if term in CONTRASTIVE:
            a, b = rows.unbind(dim=1)
            value = info_nce(vectors[a], vectors[b], a, b, config.temperature)
        elif term == "rank":
            found = vectors[rows.clamp(min=0)].unbind(dim=1)
            value = order_margin(*found, rows[:, 1:] >= 0, config.order_margin, config.click_margin)
        else:
            cosine = (vectors[rows[:, 0]] * vectors[rows[:, 1]]).sum(dim=-1)
            value = F.mse_loss(cosine, places["relevance_score"].to(cosine.dtype))
        total = total + config.weight(term) * value
        parts[term] = value.detach()
    return total, parts

"""A PRS-style generator with list evaluator (Feng et al. 2021, arXiv 2102.12057).

PRS's beam search weighs two hand-set estimates; ours takes the lists from a learned item scorer by Plackett-Luce beam search,
always adds the incoming order, and its evaluator (a bidirectional LSTM over the shown list, as DPWN) predicts what each place
earns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidtune.benchmarks.rivals.rerankers.features import RerankerFeatures
from sidtune.benchmarks.rivals.rerankers.listwise import Reranker, list_loss, scores_of
from sidtune.data_builders.post_ranking.schema import PostRankBatch

PlaceValues = Callable[[PostRankBatch, Tensor], Tensor]


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    return torch.gather(x, 1, order[..., None].expand(-1, -1, x.shape[-1]))


def beam_lists(scores: Tensor, mask: Tensor, beams: int) -> Tensor:
    """(B, beams', n) the likeliest orders under Plackett-Luce with these scores, best first, pads last in each.

    Args:
        scores: (B, n), anything at pads. mask: (B, n), real candidates. beams: width; a list with fewer orders than
            that repeats its best one.
    """
    B, n = scores.shape
    order = torch.zeros(B, 1, 0, dtype=torch.long, device=scores.device)
    value = torch.zeros(B, 1, device=scores.device)
    free = torch.ones(B, 1, n, dtype=torch.bool, device=scores.device)
    lowest = torch.finfo(scores.dtype).min
    for _ in range(n):
        real = free & mask[:, None, :]
        next_pad = free & (free.cumsum(dim=2) == 1)
        allowed = torch.where(real.any(dim=2, keepdim=True), real, next_pad)
        step = scores[:, None, :].masked_fill(~allowed, lowest).log_softmax(dim=-1).masked_fill(~allowed, -torch.inf)
        total = (value[..., None] + step).reshape(B, -1)
        value, flat = total.topk(min(beams, total.shape[1]), dim=1)
        parent, item = flat // n, flat % n
        order = torch.cat([_gathered(order, parent), item[..., None]], dim=2)
        free = torch.gather(free, 1, parent[..., None].expand(-1, -1, n)).scatter(2, item[..., None], False)
    return torch.where(torch.isneginf(value)[..., None], order[:, :1], order)


class PrsEvaluator(Reranker):
    """Lists by beam search over an item scorer; a bidirectional LSTM says what each is worth; the best one is shown.

    Args:
        features: the inputs. hidden: width. beams: lists compared, the incoming one besides.
        place_values: what the places of a shown order earned, `(batch, order (B, n)) -> (B, n)`; a simulator's clicks
            or logged feedback. Default: the relevance of the item shown there, scaled to [0, 1] by `top`.
        top: highest relevance (5 stars).
    """

    use_rank = False

    def __init__(
        self,
        features: RerankerFeatures,
        hidden: int = 64,
        beams: int = 16,
        place_values: PlaceValues | None = None,
        top: float = 5.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(features)
        self.scorer = nn.Sequential(
            nn.Linear(features.width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1)
        )
        self.item = nn.Sequential(nn.Linear(features.width, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.context = nn.LSTM(hidden, hidden // 2, batch_first=True, bidirectional=True)
        self.worth = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.beams, self.place_values, self.top = beams, place_values, top

    def worth_of(self, x: Tensor, mask: Tensor, order: Tensor) -> Tensor:
        """(B, n) what each place of the shown order is expected to earn, 0 at pads; x is (B, n, width)."""
        shown, real = _gathered(self.item(x), order), torch.gather(mask, 1, order)
        packed = nn.utils.rnn.pack_padded_sequence(shown, real.sum(dim=1).cpu(), batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.context(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.worth(torch.cat([shown, out], dim=-1))[..., 0].masked_fill(~real, 0.0)

    def list_value(self, worth: Tensor) -> Tensor:
        """(B,) value of a list from its places. Values from feedback hold the examination already; relevance gets the
        discount of NDCG."""
        if self.place_values is not None:
            return worth.sum(dim=1)
        places = torch.arange(worth.shape[1], device=worth.device)
        return (worth / torch.log2(places + 2.0)).sum(dim=1)

    def forward(self, batch: PostRankBatch) -> Tensor:
        """(B, n) minus the place in the list that the evaluator likes best, −inf at pads."""
        x = self.features(batch)
        lists = beam_lists(self.scorer(x)[..., 0], batch.item_mask, self.beams)
        places = torch.arange(x.shape[1], device=x.device).expand(len(x), 1, -1)
        lists = torch.cat([lists, places], dim=1)
        many = lists.shape[1]
        flat = lists.reshape(-1, x.shape[1])
        worth = self.worth_of(x.repeat_interleave(many, 0), batch.item_mask.repeat_interleave(many, 0), flat)
        value = self.list_value(worth).reshape(len(x), many)
        best = lists[torch.arange(len(x), device=x.device), value.argmax(dim=1)]
        return scores_of(best).masked_fill(~batch.item_mask, -torch.inf)

    def loss(self, batch: PostRankBatch) -> Tensor:
        """ListNet of the scorer + squared error of the evaluator on a random order and the scorer's own."""
        x = self.features(batch)
        scores = self.scorer(x)[..., 0].masked_fill(~batch.item_mask, -torch.inf)
        total = list_loss(scores, batch.relevance, batch.item_mask)
        noise = torch.rand_like(scores).masked_fill(~batch.item_mask, -1.0)
        for order in (noise.argsort(dim=1, descending=True), scores.detach().argsort(dim=1, descending=True)):
            worth = self.worth_of(x, batch.item_mask, order)
            if self.place_values is not None:
                earned = self.place_values(batch, order).to(worth)
            else:
                earned = torch.gather(batch.relevance, 1, order) / self.top
            known = torch.gather(batch.item_mask, 1, order) & ~torch.isnan(earned)
            gap = F.mse_loss(worth, torch.nan_to_num(earned), reduction="none")
            total = total + (gap * known).sum() / known.sum().clamp(min=1)
        return total

"""Re-ranking baselines that score every candidate in the context of its list: MLP, DLCM, PRM, SetRank.

After DLCM (Ai et al. 2018, arXiv 1804.05936), PRM (Pei et al. 2019, 1904.06813) and SetRank (Pang et al. 2020,
1912.05891), small and on the suite's features. Differences: layers and widths are ours; all are trained with the ListNet
loss on softmax(relevance), which needs no order among equals; PRM's pre-trained personal vector is whatever the user
fields hold; SetRank is the MSAB form without ordinal embeddings, hence equivariant to the incoming order.

Every model is `forward(batch) -> scores (B, n)`, −inf at pads, higher is better, and `loss(batch) -> scalar`; `batch`
is a `PostRankBatch` of tensors (`batch.map(torch.from_numpy)`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sidtune.benchmarks.rivals.rerankers.features import RerankerFeatures
from sidtune.data_builders.post_ranking.schema import PostRankBatch


def list_loss(scores: Tensor, relevance: Tensor, mask: Tensor) -> Tensor:
    """ListNet's top-one cross entropy: mean over lists of −sum softmax(relevance) log softmax(scores).

    Args:
        scores: (B, n), −inf at pads. relevance: (B, n), NaN = unknown: such candidates are left out of their list.
        mask: (B, n) bool, real candidates.

    Lists without any known relevance do not count; with none at all the loss is 0.
    """
    known = mask & ~torch.isnan(relevance)
    lowest = torch.finfo(scores.dtype).min
    target = torch.nan_to_num(relevance).masked_fill(~known, lowest).softmax(dim=-1)
    log_chance = scores.masked_fill(~known, lowest).log_softmax(dim=-1)
    each = -(target * log_chance.masked_fill(~known, 0.0)).sum(dim=-1)
    counts = known.any(dim=-1)
    return (each * counts).sum() / counts.sum().clamp(min=1)


def scores_of(order: Tensor) -> Tensor:
    """(B, n) scores that sort into `order`: minus the place that each candidate got."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return -torch.empty(order.shape, device=order.device).scatter_(1, order, places.float())


class Reranker(nn.Module):
    """Base: features, masking, loss. Subclasses give `score(x, batch) -> (B, n)` from features x (B, n, width)."""

    use_rank = True

    def __init__(self, features: RerankerFeatures) -> None:
        super().__init__()
        self.features = features

    def score(self, x: Tensor, batch: PostRankBatch) -> Tensor:
        """(B, n) raw scores; pads may hold anything."""
        raise NotImplementedError("a Reranker subclass must say how it scores")

    def forward(self, batch: PostRankBatch) -> Tensor:
        """(B, n) scores, −inf at pads."""
        return self.score(self.features(batch), batch).masked_fill(~batch.item_mask, -torch.inf)

    def loss(self, batch: PostRankBatch) -> Tensor:
        """Scalar training loss."""
        return list_loss(self.forward(batch), batch.relevance, batch.item_mask)

    @torch.no_grad()
    def rank(self, batch: PostRankBatch) -> Tensor:
        """(B, n) places of the candidates, best first, pads last; ties keep the incoming order."""
        return torch.sort(self.forward(batch), dim=1, descending=True, stable=True).indices


class ListMlp(Reranker):
    """An MLP on each candidate's features, the list's mean and the difference to it (a plain ranker with context)."""

    use_rank = False

    def __init__(self, features: RerankerFeatures, hidden: int = 64, dropout: float = 0.1) -> None:
        super().__init__(features)
        self.item = nn.Sequential(nn.Linear(features.width, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Sequential(nn.Linear(3 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def score(self, x: Tensor, batch: PostRankBatch) -> Tensor:
        """Scores of (own, mean, own − mean)."""
        own = self.item(x)
        keep = batch.item_mask[..., None].float()
        mean = ((own * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1.0))[:, None, :].expand_as(own)
        return self.head(torch.cat([own, mean, own - mean], dim=-1))[..., 0]


class Dlcm(Reranker):
    """DLCM: a GRU reads the list from its last candidate to its first; its last state judges every candidate."""

    def __init__(self, features: RerankerFeatures, hidden: int = 64, dropout: float = 0.1) -> None:
        super().__init__(features)
        self.item = nn.Sequential(nn.Linear(features.width, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.encoder = nn.GRU(hidden, hidden, batch_first=True)
        self.context = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, 1, bias=False)

    def score(self, x: Tensor, batch: PostRankBatch) -> Tensor:
        """phi(o_i, s) = V (o_i * tanh(W s + b)), o_i the GRU's output at i, s its last state."""
        backward, place = _reversed(self.item(x), batch.item_mask)
        out, _ = self.encoder(backward)
        length = batch.item_mask.sum(dim=1) - 1
        state = out[torch.arange(len(out), device=out.device), length]
        own = torch.gather(out, 1, place[..., None].expand_as(out))
        return self.head(own * torch.tanh(self.context(state))[:, None, :])[..., 0]


def _reversed(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each list back to front with pads still last, and where each candidate went (B, n)."""
    length = mask.sum(dim=1, keepdim=True)
    place = torch.arange(x.shape[1], device=x.device)[None, :]
    place = torch.where(place < length, length - 1 - place, place)
    return torch.gather(x, 1, place[..., None].expand_as(x)), place


class Prm(Reranker):
    """PRM: a transformer encoder over the list with learned embeddings of the incoming place.

    Args:
        features: the inputs. hidden: width. layers, heads: of the encoder. max_places: later places share the last one.
    """

    def __init__(
        self,
        features: RerankerFeatures,
        hidden: int = 64,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        max_places: int = 100,
    ) -> None:
        super().__init__(features)
        self.item = nn.Linear(features.width, hidden)
        self.place = nn.Embedding(max_places, hidden)
        self.encoder = _encoder(hidden, layers, heads, dropout)
        self.head = nn.Linear(hidden, 1)

    def score(self, x: Tensor, batch: PostRankBatch) -> Tensor:
        """One linear score per encoded candidate."""
        place = batch.init_rank.clamp(max=self.place.num_embeddings - 1)
        encoded = self.encoder(self.item(x) + self.place(place), src_key_padding_mask=~batch.item_mask)
        return self.head(encoded)[..., 0]


class SetRank(Reranker):
    """SetRank (MSAB): self-attention blocks without any notion of place, so permuting the list permutes the scores."""

    use_rank = False

    def __init__(
        self, features: RerankerFeatures, hidden: int = 64, layers: int = 2, heads: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__(features)
        self.item = nn.Linear(features.width, hidden)
        self.encoder = _encoder(hidden, layers, heads, dropout)
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def score(self, x: Tensor, batch: PostRankBatch) -> Tensor:
        """A row-wise head on the encoded set."""
        return self.head(self.encoder(self.item(x), src_key_padding_mask=~batch.item_mask))[..., 0]


def _encoder(hidden: int, layers: int, heads: int, dropout: float) -> nn.TransformerEncoder:
    block = nn.TransformerEncoderLayer(hidden, heads, 2 * hidden, dropout, batch_first=True)
    return nn.TransformerEncoder(block, layers, enable_nested_tensor=False)

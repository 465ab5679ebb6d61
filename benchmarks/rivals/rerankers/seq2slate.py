"""Seq2Slate (Bello et al. 2019, arXiv 1810.02019): a pointer network that builds the list.

Trained with teacher forcing on the target order (its supervised form), not with REINFORCE.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sidtune.benchmarks.rivals.rerankers.features import RerankerFeatures
from sidtune.benchmarks.rivals.rerankers.listwise import Reranker, scores_of
from sidtune.data_builders.post_ranking.schema import PostRankBatch


def _target(batch: PostRankBatch) -> Tensor:
    """(B, n) target order: falling relevance, equals in incoming order, unknown then pads last."""
    value = torch.nan_to_num(batch.relevance, nan=-1e30).masked_fill(~batch.item_mask, -torch.inf)
    return torch.sort(value, dim=1, descending=True, stable=True).indices


class Seq2Slate(Reranker):
    """A pointer network: an LSTM reads the list, another LSTM points at the next candidate until all are placed.

    Args:
        features: the inputs. hidden: width of both LSTMs.
    """

    def __init__(self, features: RerankerFeatures, hidden: int = 64, dropout: float = 0.1) -> None:
        super().__init__(features)
        self.item = nn.Sequential(nn.Linear(features.width, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.encoder = nn.LSTM(hidden, hidden, batch_first=True)
        self.decoder = nn.LSTMCell(hidden, hidden)
        self.start = nn.Parameter(torch.zeros(hidden))
        self.key, self.query = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden, bias=False)
        self.point = nn.Linear(hidden, 1, bias=False)

    def decode(self, batch: PostRankBatch, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(order (B, n), log-probabilities of every step (B, n steps, n candidates)).

        Args:
            batch: the lists.
            forced: (B, n) order to follow instead of the likeliest candidate (teacher forcing).
        """
        x = self.item(self.features(batch))
        encoded, _ = self.encoder(x)
        rows = torch.arange(len(x), device=x.device)
        last = batch.item_mask.sum(dim=1) - 1
        hidden, cell = encoded[rows, last], torch.zeros_like(encoded[:, 0])
        keys, given, step_in = self.key(encoded), batch.item_mask.clone(), self.start.expand(len(x), -1)
        order, steps = [], []
        pads = torch.arange(x.shape[1], device=x.device)[None, :]
        for step in range(x.shape[1]):  # one step per place: the network is sequential by nature
            hidden, cell = self.decoder(step_in, (hidden, cell))
            logit = self.point(torch.tanh(keys + self.query(hidden)[:, None, :]))[..., 0]
            over = ~given.any(dim=1, keepdim=True)
            logit = torch.where(over, torch.where(pads == step, 0.0, -torch.inf), logit.masked_fill(~given, -torch.inf))
            steps.append(logit.log_softmax(dim=-1))
            chosen = steps[-1].argmax(dim=-1) if forced is None else forced[:, step]
            order.append(chosen)
            given = given.scatter(1, chosen[:, None], False)
            step_in = x[rows, chosen]
        return torch.stack(order, dim=1), torch.stack(steps, dim=1)

    def forward(self, batch: PostRankBatch) -> Tensor:
        """(B, n) minus the place in the greedily decoded list, −inf at pads."""
        return scores_of(self.decode(batch)[0]).masked_fill(~batch.item_mask, -torch.inf)

    def loss(self, batch: PostRankBatch) -> Tensor:
        """Mean negative log-likelihood of the target order per placed candidate; where several candidates left are
        equally relevant, any of them will do (their probabilities add up), so ties teach no copying."""
        order = _target(batch)
        steps = self.decode(batch, order)[1]
        relevance = torch.nan_to_num(batch.relevance, nan=-1.0)
        equal = torch.gather(relevance, 1, order)[..., None] == relevance[:, None, :]
        chance = steps.masked_fill(~(equal & batch.item_mask[:, None, :]), -1e30).logsumexp(dim=-1)
        known = torch.gather(batch.item_mask & ~torch.isnan(batch.relevance), 1, order)
        return -chance.masked_fill(~known, 0.0).sum() / known.sum().clamp(min=1)

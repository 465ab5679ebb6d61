"""Dense inputs of the re-ranking baselines from a `PostRankBatch`: one vector per candidate, the same for all of them.

Own design: query, user fields, item fields, the mean of the history's item fields, score and place of the ranking stage,
side by side; missing values are zeros with a flag beside them. Numeric fields and scores are standardised with
statistics of the training requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sidtune.data_builders.post_ranking.schema import PostRankBatch, PostRankTable


class RerankerFeatures(nn.Module):
    """`PostRankBatch` of tensors → (B, n, width) float32; pads are zeros.

    Args:
        table: its fields and widths are read, and statistics from `rows`.
        rows: training rows.
        use_rank: adds the incoming place; without it the features of an item do not depend on where it stands.

    Attributes:
        width: columns made.
    """

    def __init__(self, table: PostRankTable, rows: Sequence[int] | np.ndarray, use_rank: bool = True) -> None:
        super().__init__()
        rows = np.asarray(rows)
        self.user_names = [one.name for one in table.fields_of("user")]
        self.item_names = [one.name for one in table.fields_of("item")]
        self.use_rank = use_rank
        for (side, name), (mean, spread) in table.statistics(rows).items():
            self.register_buffer(f"{side}_{name}_mean", torch.from_numpy(np.asarray(mean, np.float32)))
            self.register_buffer(f"{side}_{name}_std", torch.from_numpy(np.asarray(spread, np.float32)))
        scores = table.batch(rows).init_score
        known = scores[~np.isnan(scores)]
        self.register_buffer("score_mean", torch.tensor(float(known.mean()) if len(known) else 0.0))
        self.register_buffer("score_std", torch.tensor(max(float(known.std()), 1e-6) if len(known) else 1.0))
        user = sum(one.dim + 1 for one in table.fields_of("user"))
        item = sum(one.dim + 1 for one in table.fields_of("item"))
        self.width = table.d_q + 1 + user + 2 * item + 2 + 2 * int(use_rank)

    def forward(self, batch: PostRankBatch) -> Tensor:
        """(B, n, width); see the class."""
        count = batch.item_mask.shape[1]
        shared = [batch.query, batch.query_present[:, None].float()]
        shared += self._fields("user", self.user_names, batch.user_fields, batch.user_present)
        past = torch.cat(self._fields("item", self.item_names, batch.history_fields, batch.history_present), dim=-1)
        keep = batch.history_mask[..., None].float()
        shared.append((past * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1.0))
        parts = [torch.cat(shared, dim=-1)[:, None, :].expand(-1, count, -1)]
        parts += self._fields("item", self.item_names, batch.item_fields, batch.item_present)
        scored = ~torch.isnan(batch.init_score)
        score = (torch.nan_to_num(batch.init_score) - self.score_mean) / self.score_std
        parts += [torch.where(scored, score, torch.zeros_like(score))[..., None], scored[..., None].float()]
        if self.use_rank:
            place = batch.init_rank[..., None].float()
            parts += [1.0 / (1.0 + place), place / 10.0]
        return torch.cat(parts, dim=-1) * batch.item_mask[..., None]

    def _fields(
        self, side: str, names: Sequence[str], values: dict[str, Tensor], present: dict[str, Tensor]
    ) -> list[Tensor]:
        made = []
        for name in names:
            value, there = values[name], present[name][..., None].float()
            mean = getattr(self, f"{side}_{name}_mean", None)
            if mean is not None:
                value = (value - mean) / getattr(self, f"{side}_{name}_std") * there
            made += [value, there]
        return made

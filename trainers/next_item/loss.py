"""What a next-item network is trained on: the negative log-probability of the target's SID, and what may be added to it.

The softmax of each code runs over the codes that the trie allows after the true prefix (`softmax: trie`), so the loss of a target
is minus the logarithm of the probability that the beam search gives its SID, and all SIDs of the catalogue sum to one.
`softmax: level` runs over all codes of the level, as TIGER's (whose runs over the whole vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sidtune.core.config import check_range, check_shares, check_types
from sidtune.core.errors import ConfigError
from sidtune.decoding.trie import SidTrie
from sidtune.models.next_item.network import NextItemNetwork, NextTargets

_NEVER = float("-inf")


@dataclass
class LossConfig:
    """Terms of the loss. The first is always on, the others have weight 0 by default.

    Attributes:
        softmax: `trie` (legal codes only, default) or `level` (all codes of the level).
        label_smoothing: share of the target's probability that is spread evenly over the codes of the softmax.
        contrastive: weight of an InfoNCE term: the state before a target against the target's item vector, the other targets of
            the batch as negatives; targets that are the same item are not negatives of each other.
        temperature: of that term.
        ahead: weight of the codes of the items after the target; the network needs `ahead` heads for it.
    """

    softmax: Literal["trie", "level"] = "trie"
    label_smoothing: float = 0.0
    contrastive: float = 0.0
    temperature: float = 0.1
    ahead: float = 0.0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), "loss")
        check_shares(self, "label_smoothing")
        check_range(self, 0, "contrastive", "ahead")
        if not self.temperature > 0:
            raise ConfigError(f"loss: temperature must be above 0, got {self.temperature}; correct it.")
        if self.temperature != 0.1 and not self.contrastive:
            raise ConfigError(
                "loss: temperature is of the contrastive term, which is 0; set contrastive or leave it out."
            )


class NextItemLoss:
    """Loss of each target.

    Args:
        config: see `LossConfig`. trie: legal SIDs.
        codes: (N, depth) int64 codes of the items.
    """

    def __init__(self, config: LossConfig, trie: SidTrie, codes: Tensor) -> None:
        self.config, self.trie, self.codes = config, trie, codes
        self.nodes = torch.stack([trie.find(codes[:, :level]) for level in range(trie.depth)], dim=1)

    def to(self, device: torch.device) -> NextItemLoss:
        """Itself, with its tables on `device`."""
        self.trie, self.codes, self.nodes = self.trie.to(device), self.codes.to(device), self.nodes.to(device)
        return self

    def __call__(
        self, network: NextItemNetwork, targets: NextTargets, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Loss (P,) of each target with all terms, and (P,) its negative log-probability alone, without gradient."""
        row, place = batch["learn"].nonzero(as_tuple=True)
        items = batch["target_rows"][row, place]
        smoothed, plain = self.code_losses(targets.logits, items)
        states = targets.states.float()  # bf16 under autocast, which does not reach here
        total = smoothed
        if self.config.contrastive:
            total = total + self.config.contrastive * self.contrast(network, states, items)
        if self.config.ahead:
            total = total + self.config.ahead * self.ahead(network, states, batch, row, place)
        return total, plain.detach()

    def code_losses(self, logits: list[Tensor], items: Tensor) -> tuple[Tensor, Tensor]:
        """(P,) sums over the levels of the smoothed and of the plain negative log-probability of the items' codes."""
        smoothed = plain = torch.zeros(len(items), device=items.device)
        for level, scores in enumerate(logits):
            legal = self._legal(level, items, scores)
            log_p = scores.float().masked_fill(~legal, _NEVER).log_softmax(dim=-1)
            own = -log_p.gather(1, self.codes[items, level, None])[:, 0]
            rate = self.config.label_smoothing
            even = -(log_p.masked_fill(~legal, 0.0).sum(dim=-1) / legal.sum(dim=-1)) if rate else own
            smoothed, plain = smoothed + (1 - rate) * own + rate * even, plain + own
        return smoothed, plain

    def _legal(self, level: int, items: Tensor, scores: Tensor) -> Tensor:
        if self.config.softmax == "level":
            return torch.ones_like(scores, dtype=torch.bool)
        return self.trie.legal_mask(level, self.nodes[items, level])

    def contrast(self, network: NextItemNetwork, states: Tensor, items: Tensor) -> Tensor:
        """(P,) InfoNCE of each state against the item vectors of all targets of the batch."""
        queries = F.normalize(states.float(), dim=-1)
        keys = F.normalize(network.item_vectors(self.codes[items]).float(), dim=-1)
        scores = queries @ keys.T / self.config.temperature
        same = items[:, None] == items[None, :]
        other = ~torch.eye(len(items), dtype=torch.bool, device=items.device)
        scores = scores.masked_fill(same & other, _NEVER)
        return -scores.log_softmax(dim=-1).diagonal()

    def ahead(
        self, network: NextItemNetwork, states: Tensor, batch: dict[str, Tensor], row: Tensor, place: Tensor
    ) -> Tensor:
        """(P,) losses of the items after the target in the same sequence, over all codes of each level; 0 where there is none."""
        total, length = torch.zeros(len(row), device=states.device), batch["learn"].shape[1]
        for step in range(len(network.ahead)):
            later = place + 1 + step
            known, later = later < length, later.clamp(max=length - 1)
            known = known & (batch["segments"][row, later] == batch["segments"][row, place])
            items = batch["target_rows"][row, later].clamp(min=0)
            for level, scores in enumerate(network.ahead_logits(states, step)):
                losses = F.cross_entropy(scores.float(), self.codes[items, level], reduction="none")
                total = total + losses * known
        return total

"""Beam search and exact scores with a next-item network, over the same trie as language models.

A network needs three methods: `read` (a history, once), `continue_codes` (scores along any number of code prefixes) and
`next_logits` (scores after them); see `sidtune.models.next_item.network`. Beams of one history share what was read, and the
prefixes of all beams are scored in one pass.
Scores are log-probabilities over the legal codes only, as everywhere in sidtune. Our choice; TIGER's code searches without a
trie and throws illegal SIDs away.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.core.finite import NOT_NUMBERS
from sidtune.decoding.beam_search import _search
from sidtune.decoding.items import BeamOutput
from sidtune.decoding.trie import SidTrie

_NEVER = float("-inf")


class CodeNetwork(Protocol):
    """What the search needs of a network."""

    def read(self, **batch: Tensor) -> Any: ...

    def continue_codes(self, memory: Any, codes: Tensor) -> list[Tensor]: ...

    def next_logits(self, memory: Any, codes: Tensor) -> Tensor: ...


class _NetworkSearch:
    """A network in the place of a language model: the view that the beam search has of either."""

    def __init__(self, network: CodeNetwork, memory: Any, rows: int, trie: SidTrie) -> None:
        self.network, self.memory, self.rows, self.trie = network, memory, rows, trie
        self.device, self.steps = trie.device, self
        self._codes = torch.zeros(rows, 1, 0, dtype=torch.int64, device=trie.device)

    def children(self, nodes: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.trie.children(nodes, level)

    def logits(self, level: int) -> tuple[Tensor, None]:
        return self.network.next_logits(self.memory, self._codes).float(), None

    def advance(self, level: int, codes: Tensor, parents: Tensor) -> None:
        old = self._codes.gather(1, parents[..., None].expand(-1, -1, level))
        self._codes = torch.cat([old, codes[..., None]], dim=-1)


@torch.no_grad()
def search_network(network: CodeNetwork, batch: dict[str, Tensor], trie: SidTrie, num_beams: int) -> BeamOutput:
    """The `num_beams` most probable SIDs after each history.

    Args:
        network: in evaluation mode.
        batch: B histories on the network's device, as `NextItemNetwork` names them.
        trie: legal SIDs, on the same device.
        num_beams: K; more than the trie has leaves gives leaf -1 with score -inf at the end.

    Raises:
        ConfigError: no beams. SidtuneError: the scores are not numbers.
    """
    if num_beams < 1:
        raise ConfigError(f"num_beams must be 1 or more, got {num_beams}.")
    rows, width = len(batch["segments"]), min(num_beams, trie.num_allowed_leaves)
    leaves = torch.full((rows, num_beams), -1, dtype=torch.int64, device=trie.device)
    scores = torch.full((rows, num_beams), _NEVER, dtype=torch.float32, device=trie.device)
    if width and rows:
        found = _search(_NetworkSearch(network, network.read(**batch), rows, trie), width)
        leaves[:, :width], scores[:, :width] = found
    if bool(scores.isnan().any()):
        raise SidtuneError(NOT_NUMBERS)
    return BeamOutput(leaves, scores)


@torch.no_grad()
def score_leaves(network: CodeNetwork, batch: dict[str, Tensor], trie: SidTrie, leaves: Tensor) -> Tensor:
    """Log-probabilities (B, C) of leaves (B, C) after each history; -inf where the leaf is -1.

    Raises:
        DataError: a leaf that the trie does not have.
    """
    if leaves.numel() and int(leaves.max()) >= trie.num_leaves:
        raise DataError(f"Leaf {int(leaves.max())} was asked for, the catalogue has {trie.num_leaves} distinct SIDs.")
    codes = trie.leaf_codes(leaves).clamp(min=0)
    parts = network.continue_codes(network.read(**batch), codes[..., :-1])
    total = torch.zeros(leaves.shape, dtype=torch.float32, device=leaves.device)
    nodes = torch.zeros_like(leaves)
    for level, logits in enumerate(parts):
        legal = trie.legal_mask(level, nodes)
        scores = logits.float().masked_fill(~legal, _NEVER).log_softmax(dim=-1)
        total = total + scores.gather(-1, codes[..., level, None])[..., 0]
        nodes = trie.step(nodes, codes[..., level])
    return total.masked_fill(leaves < 0, _NEVER)


def mean_probability(scores: list[np.ndarray], weights: list[float] | None = None) -> np.ndarray:
    """Log of the mean probability of several models, elementwise: log-probabilities (B, C) each give (B, C).

    A mean of probabilities, not of logarithms: a model that finds an item impossible does not veto it.

    Args:
        scores: of each model. weights: of each model, positive; they are divided by their sum. None for equal ones.
    """
    shares = np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=np.float64)
    if not scores or len(shares) != len(scores) or not (shares > 0).all():
        raise ConfigError(
            f"An ensemble needs the scores of at least one model and a positive weight of each, got {len(scores)} models "
            f"and the weights {shares.tolist()}."
        )
    logs = np.log(shares / shares.sum())
    parts = [score.astype(np.float64) + log for score, log in zip(scores, logs, strict=True)]
    return np.logaddexp.reduce(parts, axis=0)

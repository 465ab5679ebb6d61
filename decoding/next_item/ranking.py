"""Histories to ranked items with a next-item network: batches of like length, beams, items, seen items left out.

Leaving out what a user already has is a choice, off by default: published next-item numbers are read with and without it, and it
helps every model where users hardly ever buy twice. Beams are spent on seen items all the same, so `num_beams` should
exceed the list by the length of a usual history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidtune.core.errors import DataError
from sidtune.data_builders.sequences.item_sequences import ItemSequences, SequenceExamples, padded
from sidtune.decoding.engine.model_steps import evaluating
from sidtune.decoding.items import LeafItems, rank_items
from sidtune.decoding.next_item.search import score_leaves, search_network
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

_MOST_BEAMS = 8192  # beams of all histories in one pass


@dataclass(frozen=True)
class SequenceCatalogue:
    """A catalogue's SIDs in the row order of the sequences, ready for training and search.

    Attributes:
        sids: item n is row n of the sequences. codes: (N, depth) int64.
        trie: legal SIDs. leaves: leaf → item rows.
    """

    sids: SemanticIds
    codes: np.ndarray
    trie: SidTrie
    leaves: LeafItems

    @classmethod
    def of(cls, sids: SemanticIds, sequences: ItemSequences) -> SequenceCatalogue:
        """Brings SIDs into the row order of `sequences`; items of one SID stand by their training count, then by id.

        Raises:
            DataError: an item of the sequences has no SID.
        """
        missing = [item for item in sequences.item_ids if item not in sids]
        if missing:
            raise DataError(
                f"{len(missing)} items have no SID (first: '{missing[0]}'); learn SIDs for the whole catalogue."
            )
        codes = sids.codes[sids.rows_of_ids(sequences.item_ids)]
        counts = sequences.training_counts().astype(np.float64)
        own = SemanticIds(sequences.item_ids, codes, sids.level_sizes, counts, suffix_level=sids.suffix_level)
        return cls(own, codes.astype(np.int64), SidTrie.from_semantic_ids(own), LeafItems.from_semantic_ids(own))


@dataclass(frozen=True)
class HistoryRanker:
    """Ranks the catalogue after histories.

    Attributes:
        sequences, catalogue: what the network was made for.
        num_beams: beams per history. batch_items: upper limit for histories x longest history in one pass.
        exclude_seen: leave out the items of the user's whole history.
    """

    sequences: ItemSequences
    catalogue: SequenceCatalogue
    num_beams: int = 30
    batch_items: int = 4096
    exclude_seen: bool = False

    def rank(self, network: nn.Module, examples: SequenceExamples, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(n, k) int64 item rows, best first, -1 where the beams hold fewer, and (n, k) float32 log-probabilities."""
        return self._rank(network, examples, k, (self.exclude_seen,))[self.exclude_seen]

    def rank_both(self, network: nn.Module, examples: SequenceExamples, k: int) -> dict[bool, np.ndarray]:
        """Item rows (n, k) of one search under both rules: seen items ranked (False) and left out (True)."""
        return {rule: rows for rule, (rows, _) in self._rank(network, examples, k, (False, True)).items()}

    def _rank(
        self, network: nn.Module, examples: SequenceExamples, k: int, rules: tuple[bool, ...]
    ) -> dict[bool, tuple[np.ndarray, np.ndarray]]:
        shape = (len(examples), k)
        found = {rule: (np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)) for rule in rules}
        with evaluating(network):
            for part in self._parts(examples):
                batch, trie = self._batch(network, examples, part)
                beams = search_network(network, batch, trie, self.num_beams)
                for rule, (rows, scores) in found.items():
                    seen = self.sequences.seen(examples.take(part)) if rule else None
                    rows[part], scores[part] = rank_items(beams, self.catalogue.leaves, k, exclude=seen)
        return found

    def score(self, network: nn.Module, examples: SequenceExamples, items: np.ndarray) -> np.ndarray:
        """(n, C) float32 log-probabilities of item rows (n, C) after each history; -inf where the row is -1.

        Empty places at the end of all rows of a batch cost nothing.
        """
        leaves = np.where(items >= 0, self.catalogue.leaves.leaf_of[np.maximum(items, 0)], -1)
        scores = np.full(items.shape, -np.inf, dtype=np.float32)
        with evaluating(network):
            for part in self._parts(examples):
                batch, trie = self._batch(network, examples, part)
                filled = np.flatnonzero((leaves[part] >= 0).any(axis=0))
                width = int(filled[-1]) + 1 if len(filled) else 0
                if width:
                    wanted = torch.from_numpy(leaves[part, :width]).to(trie.device)
                    scores[part, :width] = score_leaves(network, batch, trie, wanted).cpu().numpy()
        return scores

    def _parts(self, examples: SequenceExamples) -> list[np.ndarray]:
        """Places of the examples in batches of like length."""
        lengths = examples.lengths - 1
        order, parts, begin = np.argsort(-lengths, kind="stable"), [], 0
        while begin < len(order):
            longest = max(1, int(lengths[order[begin]]))
            size = max(1, min(self.batch_items // longest, _MOST_BEAMS // self.num_beams))
            parts.append(order[begin : begin + size])
            begin += size
        return parts

    def _batch(
        self, network: nn.Module, examples: SequenceExamples, part: np.ndarray
    ) -> tuple[dict[str, Tensor], SidTrie]:
        device = next(network.parameters()).device
        rows = padded(self.sequences, examples.starts[part], examples.stops[part] - 1)
        batch: dict[str, Any] = {
            "rows": rows,
            "codes": self.catalogue.codes[np.maximum(rows, 0)],
            "segments": np.where(rows >= 0, 0, -1),
            "users": examples.users[part],
        }
        return {name: torch.from_numpy(value).to(device) for name, value in batch.items()}, self.catalogue.trie.to(
            device
        )

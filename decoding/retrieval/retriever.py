"""From requests to ranked items: serializer, tokenizer, constrained beams and item expansion in one object.

`SidRetriever` is what evaluation runs and what a published repository is loaded into, so a served answer is the evaluated one.
Prompts are sorted by length and decoded in batches; the result does not depend on the batch (scores up to the rounding
of float arithmetic). Filters take part in the search, so a filtered answer is the one of a catalogue without those items.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sidtune.core.errors import DataError
from sidtune.core.ragged import pad
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.decoding.beam_search import sid_beam_search
from sidtune.decoding.filters import ItemFilter
from sidtune.decoding.items import BeamOutput, rank_items
from sidtune.decoding.retrieval.catalogue import Catalogue, Scope, Target
from sidtune.decoding.retrieval.model_folder import (
    SERIALIZER_FILE,
    TEMPLATES_FOLDER,
    ModelFolder,
    PromptSettings,
    make_serializer,
)
from sidtune.decoding.retrieval.prompter import Prompter
from sidtune.decoding.retrieval.search_request import UNLIMITED, PastTurn, SearchRequest, parse_request
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import Vocabulary

LIMITS = replace(UNLIMITED, max_query_chars=1000)  # of a request from Python

__all__ = [
    "SERIALIZER_FILE",
    "TEMPLATES_FOLDER",
    "Hit",
    "PastTurn",
    "PromptSettings",
    "SearchRequest",
    "SidRetriever",
    "catalogue_table",
    "make_serializer",
]


@dataclass(frozen=True)
class Hit:
    """One ranked item: id, title, SID text and log-probability of the SID (renormalised over what may be found)."""

    item_id: str
    title: str | None
    sid: str
    score: float


class SidRetriever:
    """Ranks the whole catalogue for requests. Not thread-safe.

    Args:
        model, tokenizer, vocabulary: an extended language model.
        sids: the catalogue's semantic IDs.
        serializer: renders requests; made for the same tokenizer.
        settings: see `PromptSettings`.
        titles: item id → title, for results that people read.
        catalogue: titles, categories and stock of `sids`; default: made from `sids` and `titles`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        vocabulary: Vocabulary,
        sids: SemanticIds,
        serializer: Serializer,
        settings: PromptSettings | None = None,
        titles: dict[str, str | None] | None = None,
        catalogue: Catalogue | None = None,
    ) -> None:
        vocabulary.check(sids=sids)
        self.model, self.tokenizer, self.vocabulary = model.eval(), tokenizer, vocabulary
        self.catalogue = Catalogue(sids, titles) if catalogue is None else catalogue
        self.prompter = Prompter(tokenizer, serializer, settings, self.catalogue)
        self.sids, self.serializer, self.settings = sids, serializer, self.prompter.settings
        self.titles = self.catalogue.titles
        self._tries: weakref.WeakKeyDictionary[SidTrie, SidTrie] = weakref.WeakKeyDictionary()
        self.trie, self.leaves = self.catalogue.whole.trie, self.catalogue.whole.leaves

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None) -> SidRetriever:
        """Loads a complete model folder: a bundle of publish (with titles and categories), or of a training step."""
        return cls.from_prompter(Prompter.of(ModelFolder.open(folder)), device)

    @classmethod
    def from_prompter(cls, prompter: Prompter, device: str | torch.device | None = None) -> SidRetriever:
        """Adds the weights to a prompter of a model folder. `device` defaults to the GPU if there is one."""
        opened, catalogue = prompter.opened, prompter.catalogue
        if opened is None:
            raise DataError(
                "The prompter was made without a model folder, so it has no weights; make it by Prompter.of."
            )
        return cls(
            opened.load_model().to(device or ("cuda" if torch.cuda.is_available() else "cpu")),
            prompter.tokenizer,
            opened.vocabulary,
            catalogue.sids,
            prompter.serializer,
            prompter.settings,
            catalogue=catalogue,
        )

    def beams(
        self,
        prompts: Sequence[Sequence[str]],
        num_beams: int,
        batch_size: int = 32,
        trie: SidTrie | None = None,
        progress: Callable[[int], Any] | None = None,
        filters: ItemFilter | None = None,
    ) -> BeamOutput:
        """Beams of every prompt (pieces), in the order given.

        Args:
            prompts: R prompts as lists of text pieces.
            num_beams: K. batch_size: prompts in one pass.
            trie: a restricted trie instead of the whole catalogue.
            progress: called with the number of prompts finished in each batch.
            filters: what each prompt may get of `trie`.

        Returns:
            leaves and scores (R, K) on the CPU; K is the number of SIDs where there are fewer.
        """
        return self.beams_of(self.prompter.encode(prompts), num_beams, batch_size, trie, progress, filters)

    def beams_of(
        self,
        ids: Sequence[Sequence[int]],
        num_beams: int,
        batch_size: int = 32,
        trie: SidTrie | None = None,
        progress: Callable[[int], Any] | None = None,
        filters: ItemFilter | None = None,
    ) -> BeamOutput:
        """`beams` of prompts that are token ids already."""
        order = np.argsort([-len(row) for row in ids], kind="stable")
        trie = self.trie if trie is None else trie
        num_beams = min(num_beams, max(1, trie.num_leaves))
        leaves = torch.full((len(ids), num_beams), -1, dtype=torch.int64)
        scores = torch.full((len(ids), num_beams), -torch.inf)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            input_ids, mask = self._pad([ids[row] for row in rows])
            out = sid_beam_search(
                self.model,
                input_ids,
                mask,
                trie=self._placed(trie),
                sid_token_ids=self.vocabulary.sid_token_ids,
                num_beams=num_beams,
                filters=None if filters is None else filters.part(rows).leaves(trie),
            )
            leaves[rows], scores[rows] = out.leaves.cpu(), out.scores.float().cpu()
            if progress is not None:
                progress(len(rows))
        return BeamOutput(leaves, scores)

    def rank(
        self, prompts: Sequence[Sequence[str]], k: int, num_beams: int | None = None, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Item rows and scores (R, k) of every prompt; -1 and -inf where the beams hold fewer items."""
        return rank_items(self.beams(prompts, num_beams or max(k, 10), **options), self.leaves, k)

    def rank_targets(
        self,
        prompts: Sequence[Sequence[str]],
        targets: Sequence[Target],
        batch_size: int = 32,
        progress: Callable[[int], Any] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Item rows and scores of every prompt (pieces), at most `targets[i].k` each, best first.

        Prompts with another beam width or another part of the catalogue are decoded apart, so that the answer of one does
        not depend on the others. Arguments as in `beams`.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for place, target in enumerate(targets):
            groups.setdefault((target.num_beams, id(target.scope)), []).append(place)
        found: list[Any] = [None] * len(prompts)
        for (num_beams, _), places in groups.items():
            scope: Scope = targets[places[0]].scope
            own = [targets[place] for place in places]
            filters = ItemFilter(scope.leaves, [one.exclude for one in own], [one.only for one in own])
            asked = [prompts[place] for place in places]
            beams = self.beams(asked, num_beams, batch_size, scope.trie, progress, filters)
            rows, scores = filters.rank(beams, min(max(one.k for one in own), len(self.sids)))
            for place, own_rows, own_scores in zip(places, rows, scores, strict=True):
                own_rows, own_scores = own_rows[: targets[place].k], own_scores[: targets[place].k]
                found[place] = own_rows[own_rows >= 0], own_scores[own_rows >= 0]
        return found

    def hits(self, rows: np.ndarray, scores: np.ndarray) -> list[Hit]:
        """Item rows and scores (n,) as what people read."""
        ids, texts = self.sids.item_ids, self.catalogue.texts
        items = [ids[row] for row in rows.tolist()]
        return [Hit(i, self.titles.get(i), texts[i], score) for i, score in zip(items, scores.tolist(), strict=True)]

    def search_batch(self, requests: Sequence[SearchRequest | dict[str, Any]], batch_size: int = 32) -> list[list[Hit]]:
        """Answers requests, each as `search` would alone.

        Raises:
            DataError: as `search` does.
        """
        asked = [one if isinstance(one, SearchRequest) else parse_request(one, LIMITS) for one in requests]
        prompts = [self.prompter.pieces(request) for request in asked]
        targets = [self.prompter.target(request) for request in asked]
        return [self.hits(*found) for found in self.rank_targets(prompts, targets, batch_size)]

    def search(self, query: str | None = None, **fields: Any) -> list[Hit]:
        """Answers one request; all texts are data and are sanitised.

        Args:
            query: what the user typed; None asks for recommendations.
            fields: the other fields of `SearchRequest`, in any form that `parse_request` takes.

        Raises:
            DataError: an unknown field, a value of a wrong type, a text that is too long, an item or a category that is not
                in the catalogue, a prompt that does not fit into the model.
        """
        return self.search_batch([{"query": query, **fields}])[0]

    def _placed(self, trie: SidTrie) -> SidTrie:
        """The trie on the model's device, copied there once and not for every batch."""
        device = next(self.model.parameters()).device
        if trie.device == device:
            return trie
        if self._tries.get(trie) is None or self._tries[trie].device != device:
            self._tries[trie] = trie.to(device)
        return self._tries[trie]

    def _pad(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        fill = self.tokenizer.pad_token_id or 0
        # Encoder-decoders read padding on the right, decoder-only models need the prompt's end at the edge.
        ids, mask = pad(rows, fill, left=not getattr(self.model.config, "is_encoder_decoder", False))
        return torch.from_numpy(ids), torch.from_numpy(mask)


def catalogue_table(items: pa.Table) -> pa.Table:
    """What a bundle carries of the catalogue."""
    return items.select(["item_id", "title", "category", "brand", "price", "clicks"])

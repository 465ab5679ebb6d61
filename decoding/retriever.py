"""From requests to ranked items: serializer, tokenizer, constrained beams and item expansion in one object.

`SidRetriever` is what evaluation runs and what a published repository is loaded into, so a served answer is the evaluated one.
Prompts are sorted by length and decoded in batches; the result does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json
from sidtune.data_builders.encoding import encode_prompts
from sidtune.data_builders.serializer import Serializer
from sidtune.decoding.beam_search import BeamOutput, sid_beam_search
from sidtune.decoding.items import LeafItems, rank_items
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.model_files import load_tokenizer
from sidtune.tokenizers.row_saving import load_model
from sidtune.tokenizers.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary import Vocabulary

SERIALIZER_FILE = "serializer.json"
TEMPLATES_FOLDER = "templates"
MAX_QUERY_CHARS = 1000


@dataclass(frozen=True)
class PromptSettings:
    """How requests become prompts; saved beside a model so that serving renders what training rendered.

    Attributes:
        max_history: most past turns in a prompt, None for all.
        max_length: most tokens of prompt and SID together, None for no limit.
        max_chars: longest text of a field, by name (see `serializer.MAX_CHARS`).
        history_context: render the context of past turns too.
    """

    max_history: int | None = 20
    max_length: int | None = 1024
    max_chars: dict[str, int | None] | None = None
    history_context: bool = True


@dataclass(frozen=True)
class PastTurn:
    """One past action of the user: the item, and what was asked when it was found."""

    item_id: str
    query: str | None = None
    context: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Hit:
    """One ranked item: id, title, SID text and log-probability of the SID (renormalised over the catalogue)."""

    item_id: str
    title: str | None
    sid: str
    score: float


class SidRetriever:
    """Ranks the whole catalogue for requests.

    Args:
        model, tokenizer, vocabulary: an extended language model.
        sids: the catalogue's semantic IDs.
        serializer: renders requests; made for the same tokenizer.
        settings: see `PromptSettings`.
        titles: item id → title, for results that people read.
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
    ) -> None:
        if tuple(vocabulary.level_sizes) != tuple(sids.level_sizes):
            raise DataError(
                f"The model was made for SIDs of sizes {tuple(vocabulary.level_sizes)}, the catalogue has "
                f"{tuple(sids.level_sizes)}; use the SIDs that the model was extended with."
            )
        self.model, self.tokenizer, self.vocabulary = model.eval(), tokenizer, vocabulary
        self.sids, self.serializer, self.settings = sids, serializer, settings or PromptSettings()
        self.titles = titles or {}
        self.trie = SidTrie.from_semantic_ids(sids)
        self.leaves = LeafItems.from_semantic_ids(sids)
        self._texts = sids.texts()

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None) -> SidRetriever:
        """Loads a folder written by the publish recipe (model, `sids/`, `serializer.json`, `templates/`, `catalogue.parquet`)."""
        folder = Path(folder)
        if not (folder / SERIALIZER_FILE).exists():
            raise DataError(
                f"{folder} holds no {SERIALIZER_FILE}, so it is no sidtune bundle; write one with recipes/publish."
            )
        vocabulary, tokenizer, model = Vocabulary.from_pretrained(folder), load_tokenizer(folder), load_model(folder)
        settings = PromptSettings(**read_json(folder / SERIALIZER_FILE))
        serializer = make_serializer(tokenizer, folder / TEMPLATES_FOLDER, settings)
        titles = {}
        if (folder / "catalogue.parquet").exists():
            table = pq.read_table(folder / "catalogue.parquet", columns=["item_id", "title"])
            titles = dict(zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        sids = SemanticIds.from_pretrained(folder / "sids")
        return cls(model.to(device), tokenizer, vocabulary, sids, serializer, settings, titles)

    def beams(
        self,
        prompts: Sequence[Sequence[str]],
        num_beams: int,
        batch_size: int = 32,
        trie: SidTrie | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> BeamOutput:
        """Beams of every prompt (pieces), in the order given.

        Args:
            prompts: R prompts as lists of text pieces.
            num_beams: K. batch_size: prompts in one pass.
            trie: a restricted trie instead of the whole catalogue.
            progress: called with the number of prompts finished in each batch.

        Returns:
            leaves and scores (R, K) on the CPU.
        """
        ids = encode_prompts(
            self.tokenizer, [list(p) for p in prompts], self.settings.max_length, reserve=self.sids.depth
        )
        order = np.argsort([-len(row) for row in ids], kind="stable")
        leaves = torch.full((len(ids), num_beams), -1, dtype=torch.int64)
        scores = torch.full((len(ids), num_beams), -torch.inf)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            input_ids, mask = self._pad([ids[row] for row in rows])
            out = sid_beam_search(
                self.model, trie or self.trie, self.vocabulary.sid_token_ids, input_ids, mask, num_beams
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

    def search(
        self,
        query: str | None = None,
        *,
        profile: Sequence[tuple[str, str]] = (),
        context: Sequence[tuple[str, str]] = (),
        history: Sequence[PastTurn] = (),
        k: int = 10,
        num_beams: int | None = None,
    ) -> list[Hit]:
        """Answers one request; all texts are data and are sanitised.

        Args:
            query: what the user typed; None asks for recommendations.
            profile, context: (name, value) pairs.
            history: past turns, oldest first.
            k: items wanted.
            num_beams: default max(k, 10).

        Raises:
            DataError: an item of the history is not in the catalogue, or a text is too long.
        """
        if query is not None and len(query) > MAX_QUERY_CHARS:
            raise DataError(
                f"The query has {len(query)} characters; at most {MAX_QUERY_CHARS} are allowed, shorten it."
            )
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}.")
        head = self.serializer.head({"profile": _pairs(profile)})
        prompt = [head, *self._past(history), self.serializer.turn(query, _pairs(context))]
        rows, scores = self.rank([prompt], k, num_beams)
        found = [(int(row), float(score)) for row, score in zip(rows[0], scores[0], strict=True) if row >= 0]
        ids = self.sids.item_ids
        return [Hit(ids[row], self.titles.get(ids[row]), self._texts[ids[row]], score) for row, score in found]

    def _past(self, history: Sequence[PastTurn]) -> list[str]:
        limit = self.settings.max_history
        pieces: list[str] = []
        for turn in history if limit is None else history[max(0, len(history) - limit) :]:
            if turn.item_id not in self._texts:
                raise DataError(f"The item '{turn.item_id}' of the history is not in the catalogue; leave it out.")
            context = _pairs(turn.context) if self.settings.history_context else []
            pieces += [self.serializer.turn(turn.query, context), self._texts[turn.item_id]]
        return pieces

    def _pad(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        pad = 0 if pad is None else pad
        # Encoder-decoders read padding on the right, decoder-only models need the prompt's end at the edge.
        left = not getattr(self.model.config, "is_encoder_decoder", False)
        ids = np.full((len(rows), length), pad, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for place, row in enumerate(rows):
            part = slice(length - len(row), length) if left else slice(0, len(row))
            ids[place, part], mask[place, part] = row, 1
        return torch.from_numpy(ids), torch.from_numpy(mask)


def _pairs(values: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"name": str(name), "value": str(value)} for name, value in values]


def make_serializer(tokenizer: Any, templates: str | Path, settings: PromptSettings) -> Serializer:
    """The serializer that `settings` describe."""
    return Serializer(
        tokenizer, templates=templates, max_chars=settings.max_chars, history_context=settings.history_context
    )


def catalogue_table(items: pa.Table) -> pa.Table:
    """What a bundle carries of the catalogue: item id, title, clicks."""
    return items.select(["item_id", "title", "clicks"])

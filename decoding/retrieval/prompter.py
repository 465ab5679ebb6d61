"""Requests → prompts and search targets: all of a retriever that needs no language model.

It loads in a moment, so a batch of requests can be checked to the last one before a large model is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from sidtune.core.errors import DataError
from sidtune.data_builders.prompts.encoding import encode_prompts, encoder_of
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.decoding.retrieval.catalogue import Catalogue, Target
from sidtune.decoding.retrieval.model_folder import ModelFolder, PromptSettings
from sidtune.decoding.retrieval.search_request import SearchRequest
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

_REMEMBERED_PIECES = 20_000


class Prompter:
    """Renders requests for one tokenizer and one catalogue. Not thread-safe.

    Args:
        tokenizer: the model's tokenizer.
        serializer: renders requests; made for the same tokenizer.
        settings: see `PromptSettings`.
        catalogue: the items.

    Attributes:
        opened: the model folder it was made of, None if of none.
    """

    opened: ModelFolder | None = None

    def __init__(
        self, tokenizer: Any, serializer: Serializer, settings: PromptSettings | None, catalogue: Catalogue
    ) -> None:
        self.tokenizer, self.serializer = tokenizer, serializer
        self.settings, self.catalogue = settings or PromptSettings(), catalogue

    @classmethod
    def of(cls, opened: ModelFolder, items: pa.Table | None = None) -> Prompter:
        """Of a model folder; titles and categories from `items`, or from the catalogue of a published bundle."""
        made = (
            Catalogue.from_bundle(opened.path, opened.sids)
            if items is None
            else Catalogue.from_table(opened.sids, items)
        )
        prompter = cls(opened.tokenizer, opened.serializer, opened.settings, made)
        prompter.opened = opened
        return prompter

    @property
    def sids(self) -> SemanticIds:
        return self.catalogue.sids

    def pieces(self, request: SearchRequest, unknown: str = "error") -> list[str]:
        """The prompt of a request, as the pieces that are tokenised one by one.

        Args:
            request: the request.
            unknown: `error`, or `ignore` to leave out past turns whose item the catalogue lacks.

        Raises:
            DataError: an item of the history is not in the catalogue.
        """
        head = self.serializer.head({"profile": _pairs(request.profile)})
        limit, turns = self.settings.max_history, self.catalogue.known_turns(request.history, unknown)
        pieces: list[str] = [head]
        for turn in turns if limit is None else turns[max(0, len(turns) - limit) :]:
            context = _pairs(turn.context) if self.settings.history_context else []
            pieces += [self.serializer.turn(turn.query, context), self.catalogue.texts[turn.item_id]]
        return [*pieces, self.serializer.turn(request.query, _pairs(request.context))]

    def encode(self, prompts: Sequence[Sequence[str]]) -> list[list[int]]:
        """Token ids of prompts. Raises DataError when one does not fit even without history."""
        encoder = encoder_of(self.tokenizer)
        if len(encoder.lengths) > _REMEMBERED_PIECES:
            # Every new piece copies the arrays of all known ones; a server that sees new queries all day must not slow down.
            encoder._forget()
        return encode_prompts(
            self.tokenizer, [list(p) for p in prompts], self.settings.max_length, reserve=self.sids.depth
        )

    def check_length(self, pieces: Sequence[str]) -> None:
        """Raises DataError when one prompt does not fit even without history."""
        try:
            self.encode([pieces])
        except DataError:
            raise DataError(
                f"The request does not fit into the {self.settings.max_length} tokens of this model even without history; "
                "shorten its query, profile or context."
            ) from None

    def target(self, request: SearchRequest, unknown: str = "error") -> Target:
        """What a request may find; see `Catalogue.target`."""
        return self.catalogue.target(request, unknown)


def _pairs(values: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values]

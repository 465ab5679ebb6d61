"""Requests → prompts and search targets: all of a retriever that needs no language model.

It loads in a moment, so a batch of requests can be checked to the last one before a large model is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json
from sidtune.data_builders.prompts.encoding import encode_prompts, encoder_of
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.decoding.retrieval.catalogue import Catalogue, Target
from sidtune.decoding.retrieval.search_request import SearchRequest
from sidtune.tokenizers.base_models.loading import load_tokenizer
from sidtune.tokenizers.sids.query_codes import QueryCoder
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

SERIALIZER_FILE = "serializer.json"
TEMPLATES_FOLDER = "templates"
_REMEMBERED_PIECES = 20_000


@dataclass(frozen=True)
class PromptSettings:
    """How requests become prompts; saved beside a model so that serving renders what training rendered.

    Attributes:
        max_history: most past turns in a prompt, None for all.
        max_length: most tokens of prompt and SID together, None for no limit.
        max_chars: longest text of a field, by name (see `serializer.MAX_CHARS`).
        history_context: render the context of past turns too.
        query_sids: show the SID of a query behind its text; its coder lies beside the model.
    """

    max_history: int | None = 20
    max_length: int | None = 1024
    max_chars: dict[str, int | None] | None = None
    history_context: bool = True
    query_sids: bool = False


class Prompter:
    """Renders requests for one tokenizer and one catalogue. Not thread-safe.

    Args:
        tokenizer: the model's tokenizer.
        serializer: renders requests; made for the same tokenizer.
        settings: see `PromptSettings`.
        catalogue: the items.
    """

    def __init__(
        self, tokenizer: Any, serializer: Serializer, settings: PromptSettings | None, catalogue: Catalogue
    ) -> None:
        self.tokenizer, self.serializer = tokenizer, serializer
        self.settings, self.catalogue = settings or PromptSettings(), catalogue

    @classmethod
    def from_bundle(cls, folder: str | Path) -> Prompter:
        """Of a folder written by the publish recipe. Raises DataError when it is none."""
        folder = Path(folder)
        if not (folder / SERIALIZER_FILE).exists():
            raise DataError(
                f"{folder} holds no {SERIALIZER_FILE}, so it is no sidtune bundle; write one with `sidtune publish`."
            )
        tokenizer = load_tokenizer(folder)
        settings = PromptSettings(**read_json(folder / SERIALIZER_FILE))
        serializer = make_serializer(tokenizer, folder / TEMPLATES_FOLDER, settings, folder)
        catalogue = Catalogue.from_bundle(folder, SemanticIds.from_pretrained(folder / "sids"))
        return cls(tokenizer, serializer, settings, catalogue)

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
            ConfigError: k or num_beams below 1.
        """
        if request.k < 1 or request.beams < 1:
            raise ConfigError(f"k and num_beams must be at least 1, got {request.k} and {request.beams}.")
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
    return [{"name": str(name), "value": str(value)} for name, value in values]


def make_serializer(
    tokenizer: Any, templates: str | Path, settings: PromptSettings, coder_folder: str | Path | None = None
) -> Serializer:
    """The serializer that `settings` describe.

    Args:
        tokenizer, templates: see `Serializer`.
        settings: how prompts look.
        coder_folder: with `settings.query_sids`, where `QueryCoder.from_pretrained` finds the coder of queries.
    """
    if settings.query_sids and coder_folder is None:
        raise ConfigError("query_sids is true, but no folder of a query coder is known; give that of learn_sids.")
    return Serializer(
        tokenizer,
        templates=templates,
        max_chars=settings.max_chars,
        history_context=settings.history_context,
        query_sids=QueryCoder.from_pretrained(coder_folder) if settings.query_sids else None,
    )

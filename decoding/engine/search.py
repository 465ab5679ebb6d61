"""What every constrained search shares: checked inputs, chunks of prompts, legal children, and the way into `generate`.

A search (beams, samples) is a loop over the levels of the trie: legal children of the nodes it stands on, logits of the
level's codes, a choice, one more token per beam. `Search` owns all of that but the choice. `GenerateCall` is the other
side: the same function is called by a person with tensors, or by `model.generate(custom_generate=...)` with tensors and
everything that `generate` prepared, most of which a search neither needs nor obeys. Our choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateBeamEncoderDecoderOutput

from sidtune.core.config import MANY
from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.decoding.engine.model_steps import ModelSteps, evaluating
from sidtune.decoding.engine.sharing import layout_for
from sidtune.decoding.filters import RequestFilter
from sidtune.decoding.trie import SidTrie

_PLAIN_NAMES = ("attention_mask",)


def check_limits(count_name: str, count: int, max_rows: int | None, memory_budget: int | None) -> None:
    """Raises ConfigError unless all are at least 1 (None: no limit), and the count one that memory holds."""
    if count > MANY:
        raise ConfigError(f"{count_name} must be at most {MANY:,}, got {count:,}; lower it.")
    for name, value in ((count_name, count), ("max_rows", max_rows), ("memory_budget", memory_budget)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}; raise it.")


@dataclass(frozen=True)
class GenerateCall:
    """How a search was called.

    Attributes:
        input_ids: (B, T) prompts, or the decoder's start tokens (B, 1) when `generate` ran the encoder.
        mask: (B, T) or None. encoded: (B, T, D) the encoder's states, when `generate` ran the encoder.
        config: the generation config, None for a plain call.
    """

    input_ids: Tensor
    mask: Tensor | None = None
    encoded: Tensor | None = None
    config: Any = None

    @classmethod
    def of(cls, arguments: dict[str, Any], input_ids: Tensor, mask: Tensor | None, function: str) -> GenerateCall:
        """Reads the arguments that are not the search's own.

        Raises:
            ConfigError: an unknown argument in a plain call, or two masks.
        """
        config = arguments.get("generation_config")
        if config is None:
            for name in arguments:
                if name not in _PLAIN_NAMES:
                    known = (
                        *_PLAIN_NAMES,
                        "trie",
                        "sid_token_ids",
                        "max_rows",
                        "memory_budget",
                        "filters",
                        "num_beams",
                    )
                    raise ConfigError(f"{function} knows no argument '{name}'; {nearest(name, known)}")
            if mask is not None and arguments.get("attention_mask") is not None:
                raise ConfigError("`mask` and `attention_mask` mean the same; pass one of them.")
            return cls(input_ids, arguments.get("attention_mask") if mask is None else mask)
        # A generation config with beams or several samples makes `generate` repeat its inputs; one row each is enough.
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        encoded = arguments.get("encoder_outputs")
        states = None if encoded is None else encoded[0][::copies]
        mask = arguments.get("attention_mask")
        return cls(input_ids[::copies], None if mask is None else mask[::copies], states, config)

    @property
    def by_generate(self) -> bool:
        return self.config is not None

    def answer(self, leaves: Tensor, scores: Tensor, search: Search, count: int | None) -> Any:
        """What `generate` returns for (B, K) leaves and scores: see `sid_beam_search`."""
        leaves, scores = leaves[:, :count], scores[:, :count]
        codes = search.trie.leaf_codes(leaves)
        pad = self.config.pad_token_id
        tokens = torch.full_like(codes, 0 if pad is None else int(pad))
        for level, ids in enumerate(search.level_tokens):
            tokens[..., level] = ids[codes[..., level].clamp(min=0)].where(leaves >= 0, tokens[..., level])
        start = self.input_ids.to(tokens.device)[:, None, :].expand(-1, leaves.shape[1], -1)
        sequences = torch.cat([start, tokens], dim=-1).flatten(0, 1)
        if not self.config.return_dict_in_generate:
            return sequences
        kind = GenerateBeamEncoderDecoderOutput if search.steps.encoder_decoder else GenerateBeamDecoderOnlyOutput
        return kind(sequences=sequences, sequences_scores=scores.flatten())


class Search:
    """One search over B prompts; make it with `prepare`.

    Attributes:
        trie: on the model's device. level_tokens: per level, (k_level,) int64 token ids.
        steps: the model. device: of the model. prompts: B. rows: prompts of the chunk at hand.
    """

    trie: SidTrie
    level_tokens: list[Tensor]
    steps: ModelSteps
    device: torch.device
    prompts: int
    rows: int

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        call: GenerateCall,
        trie: SidTrie,
        sid_token_ids: np.ndarray | Tensor | None,
        filters: RequestFilter | None,
        whole_vocabulary: bool = False,
    ) -> Search:
        """Checks everything before the model runs. Raises ConfigError and DataError."""
        self = cls()
        if not isinstance(trie, SidTrie):
            raise ConfigError(f"`trie` must be a SidTrie, got {type(trie).__name__}; make one with SidTrie.from_codes.")
        self.device = model.device if hasattr(model, "device") else next(model.parameters()).device
        self.trie = trie.to(self.device)
        self.level_tokens = self.trie.level_tokens(sid_token_ids, _vocabulary_size(model))
        self.steps = ModelSteps(model, self.level_tokens, whole_vocabulary)
        self._encoded = None if call.encoded is None else call.encoded.to(self.device)
        ids = call.input_ids.to(self.device) if self._encoded is None else None
        mask = call.mask
        if mask is None:
            like = call.input_ids if self._encoded is None else self._encoded[..., 0]
            mask = torch.ones(like.shape, dtype=torch.int64)
        mask = mask.to(device=self.device, dtype=torch.int64)
        if ids is not None:
            check_prompts(model, ids, mask, trie.depth, self.steps.encoder_decoder)
            if self.steps.encoder_decoder:
                ids, mask = _pad_right(ids, mask)
        self._ids, self._mask, self.prompts = ids, mask, len(mask)
        if filters is not None and (len(filters) != self.prompts or filters.trie.num_nodes != trie.num_nodes):
            raise DataError(
                f"The filters are for {len(filters)} requests and a trie of {filters.trie.num_nodes} nodes, but there "
                f"are {self.prompts} prompts and {trie.num_nodes} nodes; make one entry per prompt for this trie."
            )
        self._filters = None if filters is None else filters.to(self.device)
        return self

    def chunks(self, max_rows: int | None, width: int, memory_budget: int | None = None) -> Iterator[slice]:
        """Slices of the prompts that keep to both limits at `width` beams each; each chunk's prompts have been read."""
        size = self.prompts if max_rows is None else max(1, max_rows // max(1, width))
        if memory_budget is not None:
            size = max(1, min(size, memory_budget // self.bytes_per_prompt(width)))
        longest = int(self._mask.sum(dim=1).max()) + self.trie.depth
        with evaluating(self.steps.model):
            self.steps.use(layout_for(self.steps, longest))
            for first in range(0, self.prompts, size):
                part = slice(first, min(first + size, self.prompts))
                self.rows = part.stop - part.start
                self._filter = None if self._filters is None else self._filters.part(part)
                mask = self._mask[part]
                used = mask.any(dim=0).nonzero().flatten()
                columns = slice(int(used[0]), int(used[-1]) + 1)
                encoded = None if self._encoded is None else self._encoded[part][:, columns]
                ids = None if self._ids is None else self._ids[part][:, columns]
                self.steps.read_prompt(ids, mask[:, columns], encoded)
                yield part

    def bytes_per_prompt(self, width: int) -> int:
        """Estimate of what a prompt with `width` beams needs: keys and values, one layer's activations, candidates."""
        config = self.steps.config
        config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        hidden, layers = config.hidden_size, config.num_hidden_layers
        heads = config.num_attention_heads
        kept = (getattr(config, "num_key_value_heads", None) or heads) * (
            getattr(config, "head_dim", None) or hidden // heads
        )
        fed, size = width * self.trie.depth, self.steps.model.dtype.itemsize
        columns = self._mask.shape[1]
        cache = 2 * layers * kept * size * (columns + fed)
        inner = getattr(config, "intermediate_size", None) or getattr(config, "d_ff", None) or 4 * hidden
        layer = size * max(columns, width) * (6 * hidden + 2 * inner)
        return cache + layer + 48 * width * max(self.trie.max_children)

    def children(self, nodes: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """`SidTrie.children` of (B, W) nodes under the filters of the chunk."""
        codes, children, legal = self.trie.children(nodes, level)
        if self._filter is not None:
            legal = legal & self._filter.allows(children)
        return codes, children, legal

    def advance(self, level: int, codes: Tensor, parents: Tensor) -> None:
        """Feeds the tokens of the (B, W) codes chosen at `level`."""
        self.steps.advance(self.level_tokens[level][codes], parents)


def _pad_right(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves padding behind the prompt: encoders with learned positions (BART) count columns, padding included."""
    order = mask.argsort(dim=1, descending=True, stable=True)
    return input_ids.gather(1, order), mask.gather(1, order)


def check_prompts(model: Any, input_ids: Tensor, mask: Tensor, more: int, encoder_decoder: bool = False) -> None:
    """Raises DataError unless these are padded prompts of the model that leave room for `more` tokens."""
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point() or mask.shape != input_ids.shape:
        raise DataError(
            f"Prompts must be a non-empty integer array (B, T) with a mask of the same shape, got "
            f"{tuple(input_ids.shape)} and {tuple(mask.shape)}; tokenise them with padding=True."
        )
    if not bool(((mask == 0) | (mask == 1)).all() and mask.any(dim=1).all()):
        raise DataError("The attention mask must be 0 or 1 and 1 somewhere in every prompt; give every prompt a token.")
    if not encoder_decoder and not bool((mask.diff(dim=1) >= 0).all()):
        raise DataError("A decoder-only model needs prompts padded on the left; set tokenizer.padding_side = 'left'.")
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise DataError(
            f"The prompts hold token ids from {low} to {high} but the model has a vocabulary of {vocabulary}; "
            "use the tokenizer of this model."
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = int(mask.sum(dim=1).max()) + (0 if encoder_decoder else more - 1)
    if limit is not None and longest > limit:
        raise DataError(
            f"The longest prompt with what follows needs {longest} positions but the model has {limit}; shorten it."
        )


def _vocabulary_size(model: nn.Module) -> int | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(head, "out_features", None)

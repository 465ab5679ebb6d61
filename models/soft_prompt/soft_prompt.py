"""Soft prompts: vectors at placeholder positions of a causal or an encoder-decoder model of transformers.

A placeholder is a token id behind the end of the vocabulary. Its embedding is never looked up: the vectors of an adapter, a
Q-Former or an image encoder stand in its place. So the vocabulary is not resized, and no text can produce a placeholder. Gradients
reach the vectors; an encoder-decoder reads them in its encoder. Our own plumbing, after LLM4PR (arXiv 2411.01178, section 3.2).

    prompt = SoftPrompt(model, ["user", "item"])
    ids = [*text_ids, prompt.ids["user"], *more_ids]                   # one row of (B, T) input ids
    logits = prompt(input_ids, attention_mask, {"user": (B, d) vectors}).logits
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sidtune.core.errors import DataError, nearest


class SoftPrompt:
    """A model of transformers that reads vectors between its tokens. Holds no weights.

    Args:
        model: a causal or encoder-decoder language model, PEFT's wrapper included; used as it is.
        names: kinds of placeholders. `ids` maps each to its token id, rising from the rows of the embedding on.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        self.model = model
        first = model.get_input_embeddings().num_embeddings
        self.ids: dict[str, int] = {name: first + n for n, name in enumerate(names)}

    def embed(self, input_ids: Tensor, vectors: Mapping[str, Tensor]) -> Tensor:
        """(B, T, d) input embeddings.

        Args:
            input_ids: (B, T) with placeholder ids.
            vectors: kind → (n, d) in the order of its placeholders, row by row.

        Raises:
            DataError: an unknown kind, or not one vector of the model's width for each placeholder.
        """
        unknown = [name for name in vectors if name not in self.ids]
        if unknown:
            raise DataError(f"There is no placeholder '{unknown[0]}': {nearest(unknown[0], self.ids)}")
        slots = {name: input_ids == number for name, number in self.ids.items()}
        embedded = look_up(self.model, input_ids, torch.stack([*slots.values()]).any(dim=0))
        for name, places in slots.items():
            given = vectors.get(name, embedded.new_zeros((0, embedded.shape[-1])))
            if given.shape != (count := int(places.sum()), embedded.shape[-1]):
                raise DataError(
                    f"The prompts have {count} placeholders '{name}', so {(count, embedded.shape[-1])} vectors are needed, got "
                    f"{tuple(given.shape)}; give one vector per placeholder, row by row."
                )
            embedded = put(embedded, places, given)
        return embedded

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None, vectors: Mapping[str, Tensor], **options: Any
    ) -> Any:
        """The model's output; `options` (`labels`, `decoder_input_ids`, ...) go to its forward. Errors as of `embed`."""
        return run(self.model, self.embed(input_ids, vectors), attention_mask, **options)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None, vectors: Mapping[str, Tensor], **options: Any
    ) -> Any:
        """What the model's `generate` gives with `options`; errors as of `embed` and `generate`."""
        return generate(self.model, self.embed(input_ids, vectors), attention_mask, **options)


def look_up(model: Any, input_ids: Tensor, slots: Tensor) -> Tensor:
    """(B, T, d) embeddings of `input_ids` (B, T); whatever row 0 holds where `slots` (B, T) is true."""
    return model.get_input_embeddings()(input_ids.masked_fill(slots, 0))


def put(embedded: Tensor, slots: Tensor, vectors: Tensor) -> Tensor:
    """`embedded` (B, T, d) with `vectors` (n, d), cast to its dtype, in its n `slots` (B, T), row by row."""
    return embedded.masked_scatter(slots[..., None], vectors.to(embedded.dtype))


def run(model: Any, embedded: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
    """Forward pass on embeddings (B, T, d), padded on either side; `attention_mask` (B, T) is all ones by default."""
    if attention_mask is None:
        attention_mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device)
    if takes(model, "position_ids"):
        # Learned positions (GPT-2) would otherwise count left pads.
        options.setdefault("position_ids", (attention_mask.long().cumsum(-1) - 1).clamp(min=0))
    options.setdefault("use_cache", False)
    return model(inputs_embeds=embedded, attention_mask=attention_mask, **options)


def generate(model: Any, embedded: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
    """`generate` of the model behind embedded prompts: generated tokens only, (B, new).

    Raises:
        DataError: the prompts of a causal model are not padded on the left.
    """
    if attention_mask is None:
        attention_mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device)
    if not model.config.is_encoder_decoder:
        check_left_padded(attention_mask)
    return model.generate(inputs_embeds=embedded, attention_mask=attention_mask, **options)


def check_left_padded(mask: Tensor) -> None:
    """Raises DataError where a prompt does not end in the last column of its mask (B, T)."""
    if not bool(mask[:, -1].all()):
        raise DataError("Prompts must be padded on the left to be answered; make them with padding_side 'left'.")


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward, below a PEFT wrapper too, has an argument of that name."""
    return name in _parameters(type(model.get_base_model() if hasattr(model, "get_base_model") else model))


@functools.lru_cache(maxsize=64)
def _parameters(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)

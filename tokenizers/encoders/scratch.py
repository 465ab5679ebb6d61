"""A small text encoder made from scratch: byte-level BPE of the shop's own texts, and a seeded random BERT.

What makes the aligned encoder run offline; it knows nothing before it is trained. Our choice; OneSearch starts from a distilled
BGE, and so should anyone who can: name it as `backbone`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from sidtune.tokenizers.base_models.from_scratch import (
    check_fields,
    check_vocab_size,
    check_weights,
    checked_kind,
    told,
    train_lm_tokenizer,
)

FIRST = "<|cls|>"
_SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
}


def scratch_encoder(
    texts: Sequence[str], config: dict[str, Any] | None = None, vocab_size: int = 4096, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random text model and its tokenizer. The same arguments give the same weights; the caller's random state is left alone.

    Args:
        texts: what the BPE is trained on: item texts and queries.
        config: `model_type` (default `bert`) and fields of its transformers config; for BERT those left out are small.
        vocab_size: of the BPE, see `train_lm_tokenizer`. Every text begins with the token `<|cls|>`, also an empty one.
        seed: of the weights.

    Raises:
        ConfigError: unknown model type, or fields that make no text model. DataError: no text.
    """
    tokenizer = train_lm_tokenizer(texts, vocab_size=vocab_size, chat_tokens=False)
    tokenizer.add_special_tokens({"cls_token": FIRST})
    first = processors.TemplateProcessing(
        single=f"{FIRST} $A", special_tokens=[(FIRST, tokenizer.convert_tokens_to_ids(FIRST))]
    )
    tokenizer.backend_tokenizer.post_processor = first
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _made(config, len(tokenizer), tokenizer.pad_token_id), tokenizer


def check_text_model(config: dict[str, Any] | None, vocab_size: int) -> None:
    """Refuses a config or a vocabulary that `scratch_encoder` would refuse, without the memory. Raises ConfigError."""
    check_vocab_size(vocab_size)
    check_fields(config, "The config of the encoder")
    with torch.device("meta"):
        model = _made(config, vocab_size, 0)
    check_weights(model, "The config of the encoder")


def _made(config: dict[str, Any] | None, vocab_size: int, pad: int | None) -> PreTrainedModel:
    fields = dict(config or {})
    kind = checked_kind(fields.pop("model_type", "bert"))
    tokens = {"vocab_size": vocab_size, "pad_token_id": pad}
    with told(kind):
        made = AutoConfig.for_model(kind, **{**(_SMALL if kind == "bert" else {}), **fields, **tokens})
        return AutoModel.from_config(made)

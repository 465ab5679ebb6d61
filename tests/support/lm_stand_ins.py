"""Tiny language models of every family, a trained tokenizer and semantic IDs, for the tests of vocabulary and rows."""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch
from torch import nn

from sidtune.tokenizers.base_models.from_scratch import build_model, train_lm_tokenizer
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import Vocabulary, extend_vocabulary

LEVEL_SIZES = (4, 3, 5)
TITLES = [
    "blue gel pen with soft grip",
    "red paper A4 500 sheets",
    "heavy duty stapler, black",
    "Füllfederhalter für Linkshänder",
    "office chair with mesh back",
    "desk lamp, warm white LED",
    "sticky notes 76x76 mm yellow",
    "whiteboard marker set of 8",
]
TINY = {
    "qwen3": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "head_dim": 8},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "dropout_rate": 0.0},
    "mt5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "dropout_rate": 0.0},
    "bart": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "dropout": 0.0,
        "max_position_embeddings": 64,
    },
}
CASES = [(kind, tied) for kind in TINY for tied in (True, False)]


@functools.cache
def _trained():
    return train_lm_tokenizer(TITLES * 3, 300)


def tiny_tokenizer():
    return copy.deepcopy(_trained())


def tiny_model(kind: str = "qwen3", tied: bool = True, seed: int = 0):
    """Random model; larger weights than the default, so that wrong rows show in the logits."""
    fields = dict(TINY[kind])
    if kind not in ("t5", "mt5"):
        fields["tie_word_embeddings"] = tied
    model = build_model({"model_type": kind, **fields}, tiny_tokenizer(), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    if kind in ("t5", "mt5") and not tied:  # as transformers leaves a T5 v1.1: untied weights, a config that says tied
        weight = model.lm_head.weight
        model.lm_head.weight = nn.Parameter(torch.randn(weight.shape, generator=generator))
        model.all_tied_weights_keys.pop("lm_head.weight", None)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding) and "Position" not in type(module).__name__:
                module.weight += 0.3 * torch.randn(module.weight.shape, generator=generator) + 0.1
    return model


def tiny_sids(items: int = len(TITLES)) -> SemanticIds:
    random = np.random.default_rng(5)
    codes = np.stack([random.integers(0, size, items) for size in LEVEL_SIZES], axis=1)
    return SemanticIds([f"item{n}" for n in range(items)], codes, LEVEL_SIZES)


def codebooks(width: int = 6) -> list[np.ndarray]:
    random = np.random.default_rng(6)
    return [random.standard_normal((size, width)) * (n + 1) + 2 for n, size in enumerate(LEVEL_SIZES)]


def extended(kind: str = "qwen3", tied: bool = True, **options) -> tuple:
    """`(model, tokenizer, vocabulary)` after extension by the codebook."""
    model, tokenizer = tiny_model(kind, tied), tiny_tokenizer()
    vocabulary = extend_vocabulary(model, tokenizer, tiny_sids(), codebooks=codebooks(), **options)
    return model, tokenizer, vocabulary


def inputs(model, vocabulary: Vocabulary, rows: int = 2, length: int = 7, labels: bool = False) -> dict:
    """A batch of old and new tokens."""
    generator = torch.Generator().manual_seed(3)
    base = vocabulary.base_vocab_size
    ids = torch.randint(5, base, (rows, length), generator=generator)
    sid = torch.randint(vocabulary.start, vocabulary.stop, (rows, length), generator=generator)
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, sid, ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids.flip(0)[:, :4].contiguous()
    if labels:
        batch["labels"] = batch.get("decoder_input_ids", ids).clone()
    return batch


@torch.no_grad()
def logits(model, vocabulary: Vocabulary) -> torch.Tensor:
    model.eval()
    return model(**inputs(model, vocabulary)).logits

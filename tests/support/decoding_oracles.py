"""Slow, independent truths for decoding tests: prefix dictionaries, teacher forcing without a cache, plain loops."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY, LEVEL_SIZES = 90, (4, 5, 6)
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    **_TOKENS,
}


def _qwen3(**more):
    return Qwen3ForCausalLM(Qwen3Config(**{**_DECODER, **more}))


def _gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.5, **_TOKENS))


def _bart():
    return BartForConditionalGeneration(
        BartConfig(
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            init_std=0.5,
            **_TOKENS,
        )
    )


def _bart_biased():
    model = _bart()
    model.final_logits_bias.normal_()
    return model


def _bloom():
    """ALiBi reads positions off the mask's columns, so its beams cannot share a row."""
    return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.5, **_TOKENS))


def _t5(model_class=T5ForConditionalGeneration, config_class=T5Config, **more):
    config = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        **more,
    }
    return model_class(config_class(**config, **_TOKENS))


def _lora(model, targets, task):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type=task))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return wrapped


MODELS = {
    "qwen3": _qwen3,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)),
    "gpt2": _gpt2,
    "bart": _bart,
    "t5": _t5,
    "t5-v1.1": lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart-logits-bias": _bart_biased,
    "mt5": lambda: _t5(MT5ForConditionalGeneration, MT5Config),
    "bloom-alibi": _bloom,
    "qwen3-some-sliding": lambda: _qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "mistral-all-sliding": lambda: MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=4)),
    "gemma2-softcap-sliding": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_DECODER, final_logit_softcapping=2.0, sliding_window=4)
    ),
    "qwen3-lora": lambda: _lora(_qwen3(), ["q_proj", "v_proj"], "CAUSAL_LM"),
    "qwen3-lora-head": lambda: _lora(_qwen3(tie_word_embeddings=False), ["q_proj", "lm_head"], "CAUSAL_LM"),
    "bart-lora": lambda: _lora(_bart(), ["q_proj", "v_proj"], "SEQ_2_SEQ_LM"),
}


def make_model(name: str) -> nn.Module:
    torch.manual_seed(7)
    return MODELS[name]().eval()


def random_codes(seed: int, items: int = 30, sizes: tuple[int, ...] = LEVEL_SIZES) -> np.ndarray:
    """Codes of some items, some of them shared, not sorted."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.integers(0, size, items) for size in sizes], axis=1)


def random_token_ids(seed: int, sizes: tuple[int, ...] = LEVEL_SIZES, low: int = 10) -> np.ndarray:
    """Token ids of the codes in no order, so that nothing may rely on levels being contiguous in the vocabulary."""
    return np.random.default_rng(seed).permutation(np.arange(low, VOCABULARY))[: sum(sizes)]


def random_prompts(seed: int, lengths: tuple[int, ...] = (6, 1, 9, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of different lengths and their mask. Padding holds ids that also occur as tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 10, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return ids, mask


def prefix_dictionary(codes: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    """Prefix -> sorted legal next codes."""
    legal: dict[tuple[int, ...], set[int]] = {}
    for row in codes.tolist():
        for length in range(len(row)):
            legal.setdefault(tuple(row[:length]), set()).add(row[length])
    return {prefix: sorted(codes) for prefix, codes in legal.items()}


def sorted_leaves(codes: np.ndarray) -> list[tuple[int, ...]]:
    return sorted({tuple(row) for row in codes.tolist()})


class Oracle:
    """Log-probability of any prefix given one prompt, by teacher forcing on unpadded rows without a cache."""

    def __init__(
        self, model: nn.Module, codes: np.ndarray, token_ids: np.ndarray, renormalize: bool, temperature: float = 1.0
    ) -> None:
        self.model, self.token_ids, self.renormalize, self.temperature = model, token_ids, renormalize, temperature
        self.legal, self.leaves = prefix_dictionary(codes), sorted_leaves(codes)
        self.offsets = np.cumsum([0, *LEVEL_SIZES])

    def token(self, level: int, code: int) -> int:
        return int(self.token_ids[self.offsets[level] + code])

    @torch.no_grad()
    def children(self, prompt: list[int], prefix: tuple[int, ...]) -> dict[int, float]:
        """Log-probability of each legal next code after one prefix."""
        read = [self.token(level, code) for level, code in enumerate(prefix)]
        if self.model.config.is_encoder_decoder:
            start = self.model.config.decoder_start_token_id
            run = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[start, *read]])}
        else:
            run = {"input_ids": torch.tensor([prompt + read])}
        logits = self.model(**run, use_cache=False).logits[0, -1].double() / self.temperature
        legal = self.legal[prefix]
        tokens = [self.token(len(prefix), code) for code in legal]
        chosen = logits[tokens]
        values = chosen - (chosen if self.renormalize else logits).logsumexp(0)
        return dict(zip(legal, values.tolist(), strict=True))

    def exhaustive(self, prompt: list[int]) -> list[tuple[float, int]]:
        """(score, leaf) of every leaf, best first."""
        totals = {(): 0.0}
        for _ in LEVEL_SIZES:
            totals = {
                (*prefix, code): total + value
                for prefix, total in totals.items()
                for code, value in self.children(prompt, prefix).items()
            }
        return sorted(((total, self.leaves.index(path)) for path, total in totals.items()), key=lambda p: (-p[0], p[1]))

    def beam(self, prompt: list[int], beams: int) -> list[tuple[float, int]]:
        """A plain beam search: keep the best `beams` prefixes of each length."""
        alive = [(0.0, ())]
        for _ in LEVEL_SIZES:
            grown = [
                (total + value, (*prefix, code))
                for total, prefix in alive
                for code, value in self.children(prompt, prefix).items()
            ]
            alive = sorted(grown, key=lambda pair: (-pair[0], pair[1]))[:beams]
        return [(total, self.leaves.index(path)) for total, path in alive]


def right_padded(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same prompts with the padding behind them."""
    out = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, prompt in enumerate(prompts_of(ids, mask)):
        out[0][row, : len(prompt)], out[1][row, : len(prompt)] = torch.tensor(prompt), 1
    return out


def prompts_of(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]

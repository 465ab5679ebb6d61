"""A small LLM made from scratch: byte-level BPE trained on the shop's own texts, and a seeded random model.

This is what makes every recipe run offline: no download, the same result on every machine. The tokenizer has the shape
of Qwen's and GPT-2's (byte-level BPE, no prefix space, no unknown token), so nothing downstream treats it specially.
Our choice; no paper is involved. For real use replace both by a pretrained model.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sidtune.core.config import check_keys
from sidtune.core.errors import ConfigError, DataError, nearest

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BYTES = 256
# Fields of transformers' configs by what their names say: sizes and numbers of layers, shares, and spreads.
_SIZE = re.compile(
    r"^(?!.*nextn).*(size|dim|layers?|heads?|positions|position_embeddings|n_embd|n_inner|d_model|d_ff|d_kv)$"
)
_LAYERS, _MOST_LAYERS = re.compile(r"layers?$"), 1000
_SHARE, _SPREAD = re.compile(r"drop"), re.compile(r"(eps|epsilon|initializer_range|initializer_factor)$")

# A tiny model of each family: about a million parameters, trains on a laptop.
_SMALL: dict[str, dict[str, Any]] = {
    "qwen3": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 1024},
    "t5": {"d_model": 128, "d_kv": 32, "d_ff": 384, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    "bart": {
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 384,
        "decoder_ffn_dim": 384,
    },
}
_SMALL["llama"] = {key: value for key, value in _SMALL["qwen3"].items() if key != "head_dim"}
_SMALL["mt5"] = _SMALL["t5"]


def train_lm_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, chat_tokens: bool = True, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer. The same texts give the same tokenizer.

    Args:
        texts: the texts; read once, empty ones are skipped.
        vocab_size: largest number of tokens, special ones included. Fewer come out when the texts hold fewer pairs.
        chat_tokens: adds `<|im_start|>`, `<|im_end|>` and a ChatML template; `<|im_end|>` is then the end token, as in
            Qwen's chat models. Without them `<|endoftext|>` is. There is no begin token.
        min_frequency: pairs seen less often are not merged.

    Raises:
        ConfigError: `vocab_size` has no room for the 256 bytes and the special tokens.
        DataError: no text at all, or one that is not a string.
    """
    special = [PAD, END_OF_TEXT, *((TURN_START, TURN_END) if chat_tokens else ())]
    check_vocab_size(vocab_size, len(special))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_checked_texts(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=TURN_END if chat_tokens else END_OF_TEXT,
        extra_special_tokens=[TURN_START, END_OF_TEXT] if chat_tokens else [],
        chat_template=CHAT_TEMPLATE if chat_tokens else None,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _checked_texts(texts: Iterable[str]) -> list[str]:
    kept = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"Text number {number} for the tokenizer is {type(text).__name__}; texts must be strings.")
        if text:
            kept.append(text)
    if not kept:
        raise DataError("The tokenizer has no text to learn from; give it the catalogue's titles and queries.")
    try:
        "".join(kept).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("A text for the tokenizer holds a lone surrogate, which is no valid text; repair it.") from None
    return kept


def build_model(
    config: dict[str, Any] | None, tokenizer: PreTrainedTokenizerBase, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A randomly initialised language model that fits `tokenizer`.

    Args:
        config: `model_type` (default `qwen3`; any causal or seq2seq type transformers knows) and fields of its
            transformers config, for example `{"model_type": "gpt2", "n_layer": 6, "tie_word_embeddings": False}`.
            Fields left out take small values for qwen3, llama, gpt2, t5, mt5 and bart, the family's defaults otherwise.
            T5 and mT5 ignore `tie_word_embeddings`, as transformers does.
        tokenizer: gives vocabulary size and the ids of pad, begin and end.
        seed: seed of the weights; the caller's random state is left alone.
        dtype: dtype of the weights.

    Raises:
        ConfigError: unknown `model_type` or field, values that do not go together.
    """
    pad, first, last = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    kind, made = _config(config, len(tokenizer), pad, first, last)
    with told(kind), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _family(made).from_config(made, dtype=dtype)


def check_model(config: dict[str, Any] | None, vocab_size: int) -> None:
    """Refuses a config that makes no model, or one that this machine cannot hold; needs no memory for it.

    Args:
        config: see `build_model`. vocab_size: about the size of the tokenizer.

    Raises:
        ConfigError: as `build_model`, or the wrong size.
    """
    check_vocab_size(vocab_size)
    kind, made = _config(config, vocab_size, 0, None, 1)
    where = f"The config of the {kind} model"
    with told(kind), torch.device("meta"):
        model = _family(made).from_config(made)
    check_weights(model, where)


def check_fields(config: dict[str, Any] | None, where: str) -> None:
    """Refuses what transformers takes and no model can use: sizes below 1, shares outside [0, 1), negative spreads. ConfigError."""
    for name, value in (config or {}).items():
        if value is None or isinstance(value, (list, dict)):
            continue
        wanted, number = None, isinstance(value, (int, float)) and not isinstance(value, bool)
        if _SIZE.search(name) and not (number and isinstance(value, int) and value >= 1):
            wanted = "a whole number of at least 1"
        elif (
            _LAYERS.search(name) and number and value > _MOST_LAYERS
        ):  # every one is made before the weights are counted
            wanted = f"at most {_MOST_LAYERS:,}"
        elif _SHARE.search(name) and not (number and 0 <= value < 1):
            wanted = "a share in [0, 1)"
        elif _SPREAD.search(name) and not (number and value >= 0):
            wanted = "a number of at least 0"
        if wanted:
            raise ConfigError(f"{where}: {name} must be {wanted}, got {value!r}; correct it.")


def check_vocab_size(size: int, special: int = 4) -> None:
    """Raises ConfigError for a vocabulary without room for the bytes and the special tokens."""
    if size < _BYTES + special:
        raise ConfigError(
            f"vocab_size must be at least {_BYTES + special} ({_BYTES} bytes and {special} special tokens), got {size}."
        )


def check_weights(model: torch.nn.Module, where: str) -> None:
    """Raises ConfigError for a model, made on the meta device, with weights of size 0 or more than this machine can hold."""
    sizes = [weight.numel() for weight in model.parameters()]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not all(sizes) or 4 * sum(sizes) > memory:
        wrong = (
            f"weights of {4 * sum(sizes) / 1e9:,.0f} GB, more than this machine has"
            if all(sizes)
            else "weights of size 0"
        )
        raise ConfigError(f"{where} gives {wrong}; correct its sizes.")


def checked_kind(kind: Any) -> str:
    """The model type; raises ConfigError where transformers knows none of that name."""
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"There is no model_type '{kind}' in transformers: {nearest(str(kind), CONFIG_MAPPING.keys())}"
        )
    return kind


def _config(
    config: dict[str, Any] | None, vocab_size: int, pad: int | None, first: int | None, last: int | None
) -> tuple[str, PreTrainedConfig]:
    """Model type and filled config."""
    fields = dict(config or {})
    kind = checked_kind(fields.pop("model_type", "qwen3"))
    known = _config_fields(kind)
    where = f"The config of the {kind} model"
    check_keys(fields, known, where)
    check_fields(fields, where)
    tokens = {
        "vocab_size": vocab_size,
        "pad_token_id": pad,
        "bos_token_id": first,
        "eos_token_id": last,
        "decoder_start_token_id": pad,
        "forced_eos_token_id": last,
    }
    clash = sorted(set(tokens) & set(fields))
    if clash:
        raise ConfigError(f"The config of the {kind} model: '{clash[0]}' comes from the tokenizer; remove it.")
    always = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
    tokens = {key: value for key, value in tokens.items() if key in known or key in always}
    with told(kind):
        made = AutoConfig.for_model(kind, **{**_SMALL.get(kind, {}), **fields, **tokens})
    heads, shared = (getattr(made, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ConfigError(
            f"{where}: {heads} num_attention_heads cannot share {shared} num_key_value_heads; make it a divisor."
        )
    if made.is_encoder_decoder and getattr(made, "decoder_start_token_id", None) is None:
        made.decoder_start_token_id = pad
    return kind, made


def _family(made: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM


@contextlib.contextmanager
def told(kind: str) -> Iterator[None]:
    """Another library's errors about a config as one sentence."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError, AssertionError, KeyError) as error:
        raise ConfigError(f"The config of the {kind} model makes no model ({_sentence(error)}); correct it.") from None
    except Exception as error:  # the strict config classes of the hub client have their own error base
        if "validation" not in type(error).__name__.lower():
            raise
        raise ConfigError(f"The config of the {kind} model is wrong ({_sentence(error)}); correct it.") from None


def _config_fields(kind: str) -> list[str]:
    cls = CONFIG_MAPPING[kind]
    own = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs", "args")]
    return sorted({*own, *getattr(cls, "attribute_map", {}), "tie_word_embeddings"})


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__

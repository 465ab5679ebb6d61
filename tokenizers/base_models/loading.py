"""Loads plain language models and tokenizers, from a folder or the hub, and says in one sentence why it cannot.

Weights are float32 unless asked otherwise: new rows train on small updates that bfloat16 weights would lose. Never runs
code from a repository. Our choice; no paper is involved.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.finite import check_weights
from sidtune.tokenizers.base_models.settings import clean_settings, settings_of

_TOKENIZER_FILES = ("tokenizer*.json", "*.model", "vocab*")
_FEWEST_TOKENS = 64
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


def check_place(folder_or_id: str | Path) -> str:
    """The folder or hub id as text. Raises DataError when it is neither an existing folder nor possibly a hub id."""
    text = os.fspath(folder_or_id)
    if Path(text).is_dir():
        return text
    if Path(text).exists():
        raise DataError(f"The model {text} is a file; name the folder it stands in.")
    if isinstance(folder_or_id, Path) or not _HUB_ID.fullmatch(text):
        raise DataError(f"The model folder {text} does not exist; check the path or run the step that writes it.")
    return text


def hub_id(base: str | None) -> str | None:
    """`base` where it can be published as the name of a model on the hub; None for a folder of this machine."""
    return base if base and _HUB_ID.fullmatch(base) and not Path(base).exists() else None


def check_dtype(dtype: Any) -> torch.dtype | str:
    """A torch dtype from itself or its name. Raises ConfigError for anything that is no floating dtype."""
    value = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if dtype != "auto" and not (isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize > 1):
        raise ConfigError(f"dtype must be 'float32', 'bfloat16', 'float16' or 'auto', got {dtype!r}.")
    return value


def load_plain(
    folder_or_id: str | Path, revision: str | None = None, dtype: Any = "float32", **options: Any
) -> PreTrainedModel:
    """A causal or encoder-decoder language model, by its config.

    Args:
        folder_or_id, revision: model folder or hub id, and revision on the hub.
        dtype: `float32` (default), `bfloat16`, `float16`, `auto`, or a torch dtype.
        options: further options of transformers' `from_pretrained`.

    Raises:
        DataError: no such folder or hub model, unreadable files, or weights that are not those of the config or not
            finite.
        ConfigError: bad dtype.
    """
    place, kind = check_place(folder_or_id), check_dtype(dtype)
    hub = {"revision": revision} if revision is not None else {}
    try:
        config = AutoConfig.from_pretrained(place, **hub)
        family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        given = settings_of(place, **hub)
        tokens = GenerationConfig() if given is not None else GenerationConfig.from_model_config(config)
        options = {"dtype": kind, "generation_config": tokens, "output_loading_info": True, **hub, **options}
        model, report = family.from_pretrained(place, **options)
    except Exception as error:  # transformers, safetensors and the hub client each raise their own kinds here
        raise _unreadable("model", place, error) from None
    missing, stray = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    rows = [key for key in stray if "sid_rows" in key]
    if rows:
        raise DataError(
            f"The weights in {place} hold unmerged SID rows ({rows[0]}), saved from a sharded model; save it with "
            "save_trained instead."
        )
    if missing:
        raise DataError(
            f"The weights in {place} lack {len(missing)} tensors of the model (first: '{missing[0]}'); copy or train "
            "the model again."
        )
    check_weights(model, place)
    clean_settings(model, given=given)
    return model


def load_tokenizer(folder_or_id: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id. Raises DataError when there is none."""
    place = check_place(folder_or_id)
    hub = {"revision": revision} if revision is not None else {}
    local = Path(place).is_dir()
    # transformers 5 makes an empty tokenizer of the model's family where a folder holds only a model.
    if local and not any(next(Path(place).glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise DataError(f"The folder {place} holds no tokenizer; save one there with tokenizer.save_pretrained.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **hub)
    except Exception as error:
        raise _unreadable("tokenizer", place, error) from None
    if not local and len(tokenizer) < _FEWEST_TOKENS:
        raise DataError(f"The hub model {place} has a tokenizer of {len(tokenizer)} tokens, so its files are missing.")
    return tokenizer


def load_text_model(
    folder_or_id: str | Path, revision: str | None = None, dtype: Any = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A text model without a head, and its tokenizer, which pads on the right; arguments and errors as in `load_plain`."""
    tokenizer, place, kind = load_tokenizer(folder_or_id, revision), check_place(folder_or_id), check_dtype(dtype)
    try:
        model = AutoModel.from_pretrained(place, dtype=kind, **({} if revision is None else {"revision": revision}))
    except Exception as error:
        raise _unreadable("text model", place, error) from None
    check_weights(model, place)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise DataError(f"The tokenizer of {place} has no padding, end or unknown token; give it one.")
    tokenizer.padding_side = "right"
    return model, tokenizer


def _unreadable(what: str, place: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    where = "the folder" if Path(place).is_dir() else "the hub model"
    return DataError(
        f"No {what} can be read from {where} {place} ({type(error).__name__}: {reason}); check the name, or "
        "write it again."
    )

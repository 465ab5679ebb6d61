"""From the states of a text's tokens to one vector, and where a model folder says how it is done.

A pretrained embedding model is trained with one pooling and is worthless with another. Folders in the layout of
sentence-transformers say which in `1_Pooling/config.json`; it is read here for the `transformers` encoder and written here
by the aligned encoder, so that both libraries use what was trained. Our choice; no paper is involved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json, write_json

POOLINGS = ("mean", "cls", "last")
POOLING_FILE = "1_Pooling/config.json"
_FLAGS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
_OTHER_FLAGS = (
    "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
)


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(B, d) one vector per text, of the dtype of the last hidden states (B, T, d).

    Args:
        mask: (B, T), 1 for real tokens, which stand on the left; every text has one.
        pooling: `mean` of the real tokens, `cls` (the first token) or `last` (the last real token).
    """
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(dim=1) / weight.sum(dim=1)


def saved_pooling(model: str, revision: str | None = None) -> str | None:
    """The pooling a model folder or hub repository names, or None where it names none.

    Raises:
        ConfigError: it names one that is not among `POOLINGS`.
        DataError: the file is damaged.
    """
    from transformers.utils import cached_file

    try:
        found = cached_file(
            model,
            POOLING_FILE,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # a name that is neither a folder nor a repository fails where the model is loaded
        return None
    if found is None:
        return None
    record = read_json(found)
    if not isinstance(record, dict):
        raise DataError(f"{POOLING_FILE} of {model} holds no JSON object; write the folder again.")
    named = record.get("pooling_mode")
    chosen = [name for name, flag in _FLAGS.items() if record.get(flag) is True or named == _short(name)]
    other = [flag for flag in _OTHER_FLAGS if record.get(flag) is True]
    if len(chosen) != 1 or other:
        raise ConfigError(
            f"{POOLING_FILE} of {model} names {' and '.join([*chosen, *other]) or 'no pooling'}; set 'pooling' to one of "
            f"{', '.join(POOLINGS)} yourself."
        )
    return chosen[0]


def _short(name: str) -> str:
    return "lasttoken" if name == "last" else name


def write_pooling(folder: str | Path, pooling: str, dims: int, max_length: int) -> None:
    """Adds the files that make a transformers folder one of sentence-transformers too, with vectors of length 1, `dims` wide."""
    folder = Path(folder)
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules: list[dict[str, Any]] = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(parts)
    ]
    for path, _ in parts[1:]:
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    flags = {flag: name == pooling for name, flag in _FLAGS.items()} | dict.fromkeys(_OTHER_FLAGS, False)
    write_json(folder / POOLING_FILE, {"word_embedding_dimension": dims, **flags, "include_prompt": True})

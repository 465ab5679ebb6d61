"""What a model's configs must not carry: settings that cut or re-weigh legal SIDs, that cannot be saved, or that a trainer left.

A base brings its chat habits in `generation_config.json` (temperature, top-k, penalties, forced tokens), and servers obey
them; a trainer leaves the cache off and router outputs on. `clean_settings` runs where a model is loaded and where it is
saved. The tables say what does nothing for each name; the first value is set. No paper is involved; MiniOneRec's pull
request 57 mended the same defect in one place.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Container
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

logger = logging.getLogger(__name__)

WARPERS: dict[str, tuple] = {
    "top_k": (0,),
    "top_p": (1.0,),
    "min_p": (None, 0.0),
    "top_h": (None,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
}
_SCORES: dict[str, tuple] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "remove_invalid_values": (False,),  # it would turn NaN, which must be seen, into a number
    "diversity_penalty": (0.0,),
}
_LENGTHS: dict[str, tuple] = {
    "max_length": (None, 20),
    "min_length": (0,),
    "min_new_tokens": (None, 0),
    "max_time": (None,),
    "stop_strings": (None, []),
    "token_healing": (None, False),
}
# These choose another decoding method than greedy search, sampling or beam search.
_METHODS: dict[str, tuple] = {
    "num_beam_groups": (1,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "constraints": (None, []),
    "force_words_ids": (None, []),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
}
RESET = {**WARPERS, **_SCORES, **_LENGTHS, **_METHODS}
# Of `config.json`, beside what of RESET stands there: name -> what it must be, and why.
_CONFIG: dict[str, tuple[Any, str]] = {
    "output_router_logits": (False, "decoding with a cache cannot balance the load of experts"),
    "use_cache": (True, "a trainer switches it off, and `generate` would read the prompt again for every token"),
    "output_hidden_states": (False, "memory"),
    "output_attentions": (False, "memory, and only the slowest attention can"),
    "return_dict": (True, "outputs are read by name"),
}
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")


def settings_of(place: str, **hub: Any) -> dict[str, Any] | None:
    """What stands in the `generation_config.json` of a folder or hub id, None without one. Not checked: transformers refuses
    to read some settings that are reset anyway."""
    file = cached_file(place, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    return None if file is None else json.loads(Path(file).read_text("utf-8"))


def clean_settings(
    model: Any, tokenizer: Any = None, sid_tokens: Container[int] = (), given: dict[str, Any] | None = None
) -> list[str]:
    """Resets, in place, what a model's configs must not carry; says it in one notice of the log.

    Afterwards `generation_config` holds special tokens only. A special token outside the embedding, or one that is a SID
    token, is left out; with a tokenizer, what is missing is taken from it.

    Args:
        model: plain model of transformers. tokenizer: its own, when it is saved. sid_tokens: ids of its SIDs.
        given: its generation settings, default those in `generation_config`.

    Returns:
        `name=value` of each setting that was reset.
    """
    config, old = model.config, getattr(model, "generation_config", None)
    rows = model.get_input_embeddings().num_embeddings
    found = []
    for one in (config, *([] if config.get_text_config() is config else [config.get_text_config()])):
        found += _clean_config(one)
        for name in _TOKENS:
            if hasattr(one, name):
                setattr(one, name, _legal(name, getattr(one, name), rows, sid_tokens, found))
    if old is not None:
        given = old.to_dict() if given is None else given
        found += [f"{name}={value!r:.60}" for name, value in given.items() if _tells(name, value)]
        tokens = {name: _legal(name, given.get(name), rows, sid_tokens, found) for name in _TOKENS}
        own = {name: getattr(tokenizer, name, None) for name in _TOKENS}
        model.generation_config = GenerationConfig(**{n: own[n] if v is None else v for n, v in tokens.items()})
    found = list(dict.fromkeys(found))
    if found:
        logger.info(
            "%s had settings that a SID model must not carry; reset: %s.", type(model).__name__, ", ".join(found)
        )
    return found


def _clean_config(config: Any) -> list[str]:
    wanted = {name: value for name, (value, _) in _CONFIG.items() if hasattr(config, name)}
    own = {name: values for name, values in RESET.items() if name in vars(config)}
    wanted |= {name: values[0] for name, values in own.items() if getattr(config, name) not in (None, *values)}
    found = [
        f"{name}={getattr(config, name)!r:.60}" for name, value in wanted.items() if getattr(config, name) != value
    ]
    for name, value in wanted.items():
        setattr(config, name, value)
    return found


def _tells(name: str, value: Any) -> bool:
    """Whether a generation setting does something, so that its reset is worth a word."""
    if name.startswith("_") or name == "transformers_version" or name in _TOKENS:
        return False
    if value is False:
        return name == "use_cache"
    default = GenerationConfig._get_default_generation_params().get(name)
    return value not in (None, {}, [], default, *RESET.get(name, ()))


def _legal(name: str, value: Any, rows: int, sid_tokens: Container[int], found: list[str]) -> Any:
    """A token id, or a list of them, without what no embedding row has or what is a SID; None where nothing is left."""
    given = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    kept = [token for token in given if isinstance(token, int) and 0 <= token < rows and token not in sid_tokens]
    if kept == list(given):
        return value
    found.append(f"{name}={value}")
    return (kept if isinstance(value, (list, tuple)) else kept[0]) if kept else None

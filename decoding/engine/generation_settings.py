"""Generation settings that leave a SID constraint alone: a copy of a model's own, without what would work against it.

`generate` runs a custom processor after its own processors but *before* its warpers, so an instruct model's `top_k=20`
cuts the legal tokens once more and other settings change their scores. Passing a clean `GenerationConfig` is not enough
either: every value of it that is None is filled from the model's `generation_config`, and then from global defaults
(`top_k=50`). `SidGenerationConfig` keeps the names of `RESET` as they were set. No paper is involved.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import nn
from transformers import GenerationConfig

from sidtune.core.errors import ConfigError, nearest
from sidtune.tokenizers.base_models.settings import RESET, WARPERS

logger = logging.getLogger(__name__)

_OWNED = ("temperature", "length_penalty", "renormalize_logits", "max_new_tokens", "eos_token_id")


class SidGenerationConfig(GenerationConfig):
    """A `GenerationConfig` whose reset settings are not filled again from the model or from global defaults."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """As in transformers; with `defaults_only` the reset settings stay as they are."""
        if defaults_only:
            kwargs = {name: value for name, value in kwargs.items() if name not in RESET and name not in _OWNED}
        return super().update(defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **kwargs)


def constrained_config(
    model: nn.Module,
    settings: dict[str, Any],
    *,
    max_new_tokens: int,
    eos_token_id: int | None,
    renormalize: bool = True,
) -> SidGenerationConfig:
    """A copy of the model's generation settings with which nothing cuts legal tokens or changes their scores.

    Everything in `RESET` gets the value that does nothing, `temperature` is 1 unless `settings` give it,
    `length_penalty` is 0, so that a beam's score is its log-probability. What was dropped is logged in one warning.

    Args:
        model: model of transformers, possibly wrapped by PEFT; its own settings stay as they are.
        settings: options the caller wants to generate with, for example `num_beams`, `do_sample`, `temperature`.
        max_new_tokens: number of tokens the constraint asks for; a smaller wish is dropped.
        eos_token_id: the token that ends a row, or None for rows of a fixed length.
        renormalize: beam scores over the tokens that are left after the constraint.

    Raises:
        ConfigError: a setting that `GenerationConfig` does not have.
    """
    own = _own_settings(model)
    config = _merged(own, settings)
    dropped = _dropped(own, settings, max_new_tokens)
    _set(config, {name: harmless[0] for name, harmless in RESET.items()})
    temperature = settings.get("temperature")
    config.temperature = 1.0 if temperature is None else temperature
    config.length_penalty, config.renormalize_logits = 0.0, renormalize
    config.max_new_tokens, config.eos_token_id = max_new_tokens, eos_token_id
    if dropped:
        logger.warning(
            "These generation settings would cut legal tokens or change the scores of SIDs and were dropped: %s.",
            ", ".join(dropped),
        )
    return config


def explicit_config(model: nn.Module, **settings: Any) -> SidGenerationConfig:
    """Settings for free text: those given and, of the model's own, only what says nothing about the choice of tokens.

    The model's sampling settings and penalties are not used, so that the same call means the same for every model.
    Raises ConfigError for a setting that `GenerationConfig` does not have.
    """
    own = _own_settings(model)
    config = _merged(own, settings)
    neutral = {name: harmless[0] for name, harmless in RESET.items()}
    neutral |= {"temperature": 1.0, "length_penalty": 0.0, "renormalize_logits": False}
    neutral |= {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    _set(config, {name: value for name, value in neutral.items() if name not in settings})
    return config


def _set(config: GenerationConfig, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _merged(own: dict[str, Any], settings: dict[str, Any]) -> SidGenerationConfig:
    config = SidGenerationConfig()
    unknown = [name for name in settings if not hasattr(config, name) and name not in own]
    if unknown:
        near = nearest(unknown[0], [name for name in vars(config) if not name.startswith("_")])
        raise ConfigError(f"generate() has no setting '{unknown[0]}': {near}")
    # Set one by one, because the constructor warns about combinations that are reset in a moment.
    _set(config, {**own, **settings})
    return config


def _dropped(own: dict[str, Any], settings: dict[str, Any], max_new_tokens: int) -> list[str]:
    """What has an effect in this mode of generation and will be reset, with its value and whose it was."""
    both = {**own, **{name: value for name, value in settings.items() if value is not None}}
    sampling, beams = bool(both.get("do_sample")), (both.get("num_beams") or 1) > 1
    dropped = []
    for name, harmless in RESET.items():
        value, origin = _in_effect(name, own, settings, sampling)
        if value is not None and value not in harmless and (sampling or name not in WARPERS):
            dropped.append(f"{name}={_shown(value)} ({origin})")
    if sampling and settings.get("temperature") is None and own.get("temperature") not in (None, 1.0):
        dropped.append(f"temperature={own['temperature']} (of the model)")
    if beams and both.get("length_penalty") not in (None, 0.0):
        dropped.append(f"length_penalty={both['length_penalty']}")
    wished = settings.get("max_new_tokens")
    if wished is not None and wished < max_new_tokens:
        dropped.append(f"max_new_tokens={wished} (of the call)")
    return dropped


def _own_settings(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "generation_config", None)
    if not isinstance(config, GenerationConfig):
        raise ConfigError(
            f"{type(model).__name__} has no generation_config, so it cannot generate; pass a language model of "
            "transformers, unwrapped."
        )
    return {name: copy.deepcopy(value) for name, value in vars(config).items() if not name.startswith("_")}


def _in_effect(name: str, own: dict[str, Any], settings: dict[str, Any], sampling: bool) -> tuple[Any, str]:
    """The value `generate` would have used, and whose it is."""
    if settings.get(name) is not None:
        return settings[name], "of the call"
    if own.get(name) is not None:
        return own[name], "of the model"
    if name == "top_k" and sampling and name not in settings:
        return GenerationConfig._get_default_generation_params()["top_k"], "the default of transformers"
    return None, ""


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."

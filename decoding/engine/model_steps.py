"""Runs a language model over prompts once and then one code per beam and step, and scores one level's codes at a time.

`ModelSteps` is what a search sees of a model: `read_prompt`, `advance`, `logits`. It hides decoder-only against
encoder-decoder, positions under left padding, the key/value cache (`sidtune.decoding.engine.prompt_cache`: the prompt's part is
shared by all beams where the model can do it, which `sidtune.decoding.engine.sharing` measures), and the output head
(`sidtune.decoding.engine.head`: only the level's rows are multiplied). All of this is our choice; the specs use `generate`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sidtune.core.errors import ConfigError
from sidtune.decoding.engine.head import LevelHead
from sidtune.decoding.engine.prompt_cache import CopiedBeams, Layout


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own previous mode afterwards, also after an error."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class ModelSteps:
    """One model in use by one search.

    Args:
        model: causal or encoder-decoder language model of transformers, or such a model wrapped by PEFT.
        level_tokens: per SID level, (k_level,) int64 token ids of its codes.
        whole_vocabulary: also return the log-sum-exp over the whole vocabulary, for scores that are not renormalised.

    Raises:
        ConfigError: no such model, prompt-learning PEFT, or no start token for the decoder.
    """

    def __init__(self, model: nn.Module, level_tokens: list[Tensor], whole_vocabulary: bool = False) -> None:
        self.model = model
        self.level_tokens = level_tokens
        self.whole_vocabulary = whole_vocabulary
        self.config = _config_of(model)
        self.encoder_decoder = bool(getattr(self.config, "is_encoder_decoder", False))
        self.start_token = _start_token(model, self.config) if self.encoder_decoder else None
        self._accepts = _forward_arguments(model)
        self._head = LevelHead(model, level_tokens)
        self._width = 1
        self.use(CopiedBeams)

    def use(self, layout: type[Layout]) -> None:
        """Fixes the layout of the cache for the prompts read from now on; the default copies it for every beam.

        `layout_for` says which one the model can do.
        """
        self._layout = layout(self.model, self._forward, self.start_token)

    def read_prompt(self, input_ids: Tensor, attention_mask: Tensor, encoded: Tensor | None = None) -> None:
        """Runs B prompts, (B, T) each; afterwards `logits(0)` scores the first code, with one beam per prompt.

        `encoded` (B, T, D): the encoder's states, where they are there already.
        """
        self._width = 1
        self._layout.read(input_ids, attention_mask, encoded)

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        """Feeds one token per beam: (B, W) token ids, and (B, W) the beam of the previous step each one continues."""
        self._layout.advance(tokens, parents)
        self._width = tokens.shape[1]

    def logits(self, level: int) -> tuple[Tensor, Tensor | None]:
        """Scores of the next code for every beam.

        Returns:
            (B, W, k_level) float32 logits of the level's codes, and (B, W) float32 log-sum-exp over the whole
            vocabulary, or None unless `whole_vocabulary`.
        """
        columns, total = self._head.read(level, self.whole_vocabulary)
        columns = columns.reshape(-1, self._width, columns.shape[-1])
        return columns, None if total is None else total.reshape(-1, self._width)

    def _forward(self, run: dict[str, Any], positions: int, first: bool) -> dict[str, Any]:
        run = {
            **run,
            "use_cache": True,
            "return_dict": True,
            "logits_to_keep": positions,
            "output_router_logits": False,
        }
        run = {name: value for name, value in run.items() if name in self._accepts}
        if first and self._head.tap:
            return self._first_pass(run, positions)
        with self._head.tapped(first, positions):
            output = self.model(**run)
        self._head.keep(output, first)
        return output

    def _first_pass(self, run: dict[str, Any], positions: int) -> dict[str, Any]:
        with self._head.tapped(True, positions):
            output = self.model(**run)
        if not self._head.keep(output, True):
            if run.get("past_key_values") is not None:
                run["past_key_values"] = type(run["past_key_values"])()
            with self._head.tapped(True, positions):
                output = self.model(**run)
            self._head.keep(output, True)
        return output


def _config_of(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ConfigError(
            f"Decoding needs a language model of transformers, possibly wrapped by PEFT, got {type(model).__name__}; "
            "unwrap a distributed model with accelerator.unwrap_model(model) first."
        )
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and getattr(adapter, "is_prompt_learning", False):
        raise ConfigError(
            f"A {adapter.peft_type} adapter puts virtual tokens before the prompt, which the search does not handle; "
            "use LoRA or another adapter that changes weights."
        )
    return config


def _start_token(model: nn.Module, config: Any) -> int:
    for source in (getattr(model, "generation_config", None), config):
        token = getattr(source, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise ConfigError(
        f"The config of {type(model).__name__} has no decoder_start_token_id, so the decoder cannot start; set it."
    )


def _forward_arguments(model: nn.Module) -> set[str]:
    """Names the model's forward understands; looked up below wrappers (PEFT, compile), which pass everything on."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = getattr(base, "_orig_mod", base)
    names = set(inspect.signature(type(base).forward).parameters)
    if "input_ids" not in names:
        raise ConfigError(
            f"The forward of {type(base).__name__} does not name its inputs, so it looks like a wrapper; "
            "pass the language model inside it."
        )
    return names | {"return_dict"}

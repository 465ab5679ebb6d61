"""Runs a language model over prompts once and then one code per beam and step, and scores one level's codes at a time.

`ModelSteps` is what a search sees of a model: `read_prompt`, `advance`, `logits`. It hides decoder-only against
encoder-decoder, positions under left padding, the key/value cache, and the output head.

The head: a vocabulary has 10^5 rows and a level has a few hundred, so during the model's own pass the head is fed no
position at all, its input is kept, and only the level's rows are multiplied. That is right only if the model does
nothing to the logits after its head (soft-capping, scaling, a bias). Models do, so it is measured, not assumed: in the
first pass the head's output is replaced by a known ramp, and unless the model returns that ramp unchanged, the pass is
repeated and the model's own logits are used. A head that is no plain linear layer (LoRA on it, trained token rows,
quantised, sharded) is called as it is, on the last position.

Prompts are read once; the cache is then laid out per beam. Sharing the prompt's part between beams (one packed query
row per prompt) fits behind the same three methods. All of this is our choice; the specs use `generate`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from sidtune.core.errors import ConfigError

_RAMP = 50.0


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
        self._head = _Head(model, level_tokens)
        self._width = 1

    def read_prompt(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Runs B prompts, (B, T) each; afterwards `logits(0)` scores the first code, with one beam per prompt."""
        self._prompt_mask, self._width, self._read = attention_mask, 1, 0
        if self.encoder_decoder:
            states = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
            self._encoded = self._beam_encoded = states.last_hidden_state
            self._beam_mask = attention_mask
            self._lengths = None
            start = input_ids.new_full((len(input_ids), 1), self.start_token)
            run = {"decoder_input_ids": start, **self._encoder_arguments()}
        else:
            self._lengths = attention_mask.sum(dim=1)
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            run = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        self._cache = self._forward(run, first=True).get("past_key_values")
        if not hasattr(self._cache, "reorder_cache"):
            raise ConfigError(
                f"{type(self.model).__name__} returned no key/value cache to search with; "
                "use a decoder-only or encoder-decoder model whose `use_cache=True` works."
            )

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        """Feeds one token per beam: (B, W) token ids, and (B, W) the beam of the previous step each one continues."""
        prompts, width = tokens.shape
        offsets = torch.arange(prompts, device=tokens.device)[:, None] * self._width
        self._lay_out_cache((offsets + parents).flatten(), width)
        if width != self._width:
            self._width = width
            self._beam_mask = self._prompt_mask.repeat_interleave(width, dim=0)
            if self.encoder_decoder:
                self._beam_encoded = self._encoded.repeat_interleave(width, dim=0)
        self._read += 1
        column = tokens.reshape(-1, 1)
        if self.encoder_decoder:
            run = {"decoder_input_ids": column, **self._encoder_arguments()}
        else:
            mask = self._prompt_mask.repeat_interleave(width, dim=0)
            mask = torch.cat([mask, mask.new_ones(len(mask), self._read)], dim=1)
            positions = self._lengths.repeat_interleave(width)[:, None] + (self._read - 1)
            run = {"input_ids": column, "attention_mask": mask, "position_ids": positions}
        self._forward({**run, "past_key_values": self._cache}, first=False)

    def logits(self, level: int) -> tuple[Tensor, Tensor | None]:
        """Scores of the next code for every beam.

        Returns:
            (B, W, k_level) float32 logits of the level's codes, and (B, W) float32 log-sum-exp over the whole
            vocabulary, or None unless `whole_vocabulary`.
        """
        columns, total = self._head.read(level, self.whole_vocabulary)
        shape = (-1, self._width)
        return columns.unflatten(0, shape), None if total is None else total.unflatten(0, shape)

    def _encoder_arguments(self) -> dict[str, Any]:
        return {
            "encoder_outputs": BaseModelOutput(last_hidden_state=self._beam_encoded),
            "attention_mask": self._beam_mask,
        }

    def _lay_out_cache(self, rows: Tensor, width: int) -> None:
        cache = self._cache
        if isinstance(cache, EncoderDecoderCache) and width == self._width:
            # Beams of a prompt see the same encoder states, so trading places among them changes nothing there.
            cache = cache.self_attention_cache
        cache.reorder_cache(rows)

    def _forward(self, run: dict[str, Any], first: bool) -> dict[str, Any]:
        run = {**run, "use_cache": True, "return_dict": True, "logits_to_keep": 1}
        run = {name: value for name, value in run.items() if name in self._accepts}
        with self._head.tapped(first):
            output = self.model(**run)
        if not self._head.keep(output, first):
            with self._head.tapped(first):
                output = self.model(**run)
            self._head.keep(output, first)
        return output


class _Head:
    """The output head of a model, read at the last position only. See the module's docstring for the two ways."""

    def __init__(self, model: nn.Module, level_tokens: list[Tensor]) -> None:
        self.module = model.get_output_embeddings()
        self.level_tokens = level_tokens
        self.tap = isinstance(self.module, nn.Module)
        self.rows = self._level_rows()
        self._ramp: Tensor | None = None

    def _level_rows(self) -> list[tuple[Tensor, Tensor | None]] | None:
        """Weight and bias rows per level, or None where the head is anything but a plain, whole linear layer."""
        head = self.module
        # Hooks and a replaced `forward` (sharding, offloading) mean that the weight alone does not tell what it does.
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
            return None
        weight, bias = head.weight, head.bias
        if type(weight) not in (Tensor, nn.Parameter) or tuple(weight.shape) != (head.out_features, head.in_features):
            return None
        where = [tokens.to(weight.device) for tokens in self.level_tokens]
        return [(weight[rows], None if bias is None else bias[rows]) for rows in where]

    @contextlib.contextmanager
    def tapped(self, first: bool) -> Iterator[None]:
        """Watches one forward pass of the model."""
        self.hidden = self.values = self._ramp = None
        if not isinstance(self.module, nn.Module):
            yield
            return
        hooks = [self.module.register_forward_pre_hook(self._cut)]
        if first and self.tap:
            hooks.append(self.module.register_forward_hook(self._replace))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _cut(self, module: nn.Module, arguments: tuple) -> tuple | None:
        if not arguments:
            return None
        hidden = arguments[0]
        last = hidden[..., -1:, :]
        if not self.tap:
            return (last, *arguments[1:])
        self.hidden = last[..., 0, :]
        return (hidden[..., :0, :], *arguments[1:])

    def _replace(self, module: nn.Module, arguments: tuple, output: Tensor) -> Tensor | None:
        if self.hidden is None:
            return None
        self._ramp = torch.linspace(-_RAMP, _RAMP, output.shape[-1], device=output.device).to(output.dtype)
        return self._ramp.expand(1, 1, -1)

    def keep(self, output: dict[str, Any], first: bool) -> bool:
        """Keeps what the pass gave for `read`. False: the model works on its logits, so the pass must be run again."""
        logits = output["logits"]
        if self.hidden is None:
            self.values = logits[:, -1]
            return True
        if first and not (logits.numel() == len(self._ramp) and torch.equal(logits.flatten(), self._ramp.to(logits))):
            self.tap = False
            return False
        return True

    def _as_head_takes_it(self, hidden: Tensor) -> Tensor:
        """Mixed precision may run the model's pass, and thus `hidden`, in another type than this call has."""
        weight = getattr(self.module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return hidden.to(weight.dtype)
        return hidden

    def read(self, level: int, whole_vocabulary: bool) -> tuple[Tensor, Tensor | None]:
        """(R, k_level) float32 logits for the R rows of the last pass, and (R,) log-sum-exp or None."""
        tokens = self.level_tokens[level]
        if self.values is None and self.rows is not None and not whole_vocabulary:
            weight, bias = self.rows[level]
            columns = nn.functional.linear(self.hidden.to(weight), weight, bias)
            return columns.float().to(tokens.device), None
        if self.values is None:
            self.values = self.module(self._as_head_takes_it(self.hidden))
        values = self.values.float()
        columns = values.index_select(-1, tokens.to(values.device)).to(tokens.device)
        return columns, values.logsumexp(dim=-1).to(tokens.device) if whole_vocabulary else None


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

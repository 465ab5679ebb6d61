"""How the beams of a prompt use the key/value cache of that prompt: three layouts behind two methods.

`PackedBeams` (decoder-only): the prompt's keys and values stay as they were read, one copy per prompt whatever the beam.
Each step feeds the W beams of a prompt as one row of W tokens; a 4-D mask lets every token see the prompt and its own
ancestors only, and all of a step's tokens stand at the same position. Nothing is reordered: a beam that is dropped is
never looked at again. (Tree attention; Miao et al., SpecInfer, 2024, use it to verify drafts. Its use here is our choice.)

`SharedEncoder` (encoder-decoder): the large part is the cross-attention cache over the encoded prompt. Cross-attention
knows no positions, so during a step its W rows per prompt are folded into one row of W queries over the one cache. The
decoder's own cache holds a few codes per beam and is reordered.

`CopiedBeams`: the cache laid out per beam, as `generate` does. The fall-back for models that cannot do the others, and
what `sidtune.decoding.engine.sharing` measures them against.

Each layout talks to the model through `run(arguments, positions, first)`, which `ModelSteps` provides.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from sidtune.core.errors import ConfigError

Run = Callable[..., dict[str, Any]]


class Layout:
    """Base of the three layouts; see the module's docstring.

    Args:
        model: the language model.
        run: runs one forward pass and keeps its head's input.
        start_token: the decoder's first token, None for decoder-only models.
    """

    def __init__(self, model: nn.Module, run: Run, start_token: int | None) -> None:
        self.model, self.run, self.start_token = model, run, start_token

    def read(self, ids: Tensor, mask: Tensor, encoded: Tensor | None = None) -> None:
        """Reads B prompts (B, T); afterwards there is one beam per prompt."""
        raise NotImplementedError("a Layout subclass must say how prompts are read")

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        """Feeds (B, W) tokens; `parents (B, W)` is the beam of the previous step that each one continues."""
        raise NotImplementedError("a Layout subclass must say how beams advance")

    def _read_decoder(self, ids: Tensor, mask: Tensor, cache: Any = None) -> Any:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        run = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return self._checked(self.run({**run, "past_key_values": cache} if cache is not None else run, 1, first=True))

    def _read_encoder(self, ids: Tensor, mask: Tensor, encoded: Tensor | None) -> tuple[Tensor, Any]:
        if encoded is None:
            states = self.model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
            encoded = states.last_hidden_state
        start = torch.full((len(mask), 1), self.start_token, dtype=torch.int64, device=mask.device)
        run = {"decoder_input_ids": start, "encoder_outputs": BaseModelOutput(encoded), "attention_mask": mask}
        return encoded, self._checked(self.run(run, 1, first=True))

    def _checked(self, output: dict[str, Any]) -> Any:
        cache = output.get("past_key_values")
        if not hasattr(cache, "reorder_cache"):
            raise ConfigError(
                f"{type(self.model).__name__} returned no key/value cache to search with; "
                "use a decoder-only or encoder-decoder model whose `use_cache=True` works."
            )
        return cache


class CopiedBeams(Layout):
    """Every beam has its own copy of the prompt's cache, and of the encoder's states."""

    def read(self, ids: Tensor, mask: Tensor, encoded: Tensor | None = None) -> None:
        self._mask, self._width, self._read = mask, 1, 0
        if self.start_token is None:
            self._cache = self._read_decoder(ids, mask)
        else:
            self._encoded, self._cache = self._read_encoder(ids, mask, encoded)

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        prompts, width = tokens.shape
        offsets = torch.arange(prompts, device=tokens.device)[:, None] * self._width
        cache = self._cache
        if isinstance(cache, EncoderDecoderCache) and width == self._width:
            # Beams of a prompt see the same encoder states, so trading places among them changes nothing there.
            cache = cache.self_attention_cache
        cache.reorder_cache((offsets + parents).flatten())
        self._width, self._read = width, self._read + 1
        mask, column = self._mask.repeat_interleave(width, dim=0), tokens.reshape(-1, 1)
        if self.start_token is not None:
            encoded = BaseModelOutput(self._encoded.repeat_interleave(width, dim=0))
            run = {"decoder_input_ids": column, "encoder_outputs": encoded, "attention_mask": mask}
        else:
            positions = mask.sum(dim=1, keepdim=True) + (self._read - 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), self._read)], dim=1)
            run = {"input_ids": column, "attention_mask": mask, "position_ids": positions}
        self.run({**run, "past_key_values": self._cache}, 1, first=False)


class PackedBeams(Layout):
    """The W beams of a prompt are one row of W tokens over the prompt's one cache."""

    def read(self, ids: Tensor, mask: Tensor, encoded: Tensor | None = None) -> None:
        # A plain cache: one that forgets what left a sliding window would forget by columns, not by positions.
        self._cache = self._read_decoder(ids, mask, DynamicCache())
        self._mask, self._positions = mask.bool(), (mask.cumsum(dim=1) - 1).clamp(min=0)
        self._lengths = mask.sum(dim=1)
        self._read = 0
        self._ancestors = self._mask.new_zeros(len(mask), 1, 0)
        self._depths = self._lengths.new_zeros(0)

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        prompts, width = tokens.shape
        inherited = self._ancestors.gather(1, parents[..., None].expand(-1, -1, self._ancestors.shape[-1]))
        itself = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(prompts, -1, -1)
        self._ancestors = torch.cat([inherited, itself], dim=2)
        self._depths = torch.cat([self._depths, self._depths.new_full((width,), self._read)])
        positions = (self._lengths + self._read)[:, None].expand(-1, width)
        run = {
            "input_ids": tokens,
            "attention_mask": self._masks(width),
            "position_ids": positions,
            "past_key_values": self._cache,
        }
        self._read += 1
        self.run(run, width, first=False)

    def _masks(self, width: int) -> Any:
        prompt = self._mask[:, None, :].expand(-1, width, -1)
        full = torch.cat([prompt, self._ancestors], dim=2)[:, None]
        windows = windows_of(self.model.config)
        if not windows:
            return self._as_attention_takes_it(full)
        masks = {kind: self._as_attention_takes_it(full & self._near(window)) for kind, window in windows.items()}
        return masks if getattr(_text_config(self.model.config), "layer_types", None) else next(iter(masks.values()))

    def _near(self, window: int | None) -> Tensor:
        """(B, 1, 1, columns): columns within the window, counted in positions, of the tokens fed now."""
        if window is None:
            return torch.ones((), dtype=torch.bool, device=self._mask.device)
        packed = self._lengths[:, None] + self._depths
        columns = torch.cat([self._positions, packed], dim=1)
        return ((self._lengths + self._read)[:, None] - columns < window)[:, None, None, :]

    def _as_attention_takes_it(self, mask: Tensor) -> Tensor:
        if getattr(self.model.config, "_attn_implementation", None) == "sdpa":
            return mask
        values = torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device)
        return values.masked_fill_(~mask, torch.finfo(values.dtype).min)


class SharedEncoder(Layout):
    """One row per beam in the decoder, one cross-attention cache per prompt."""

    def read(self, ids: Tensor, mask: Tensor, encoded: Tensor | None = None) -> None:
        self._mask, self._width = mask, 1
        self._layers = cross_attentions(self.model)
        self._encoded, self._cache = self._read_encoder(ids, mask, encoded)

    def advance(self, tokens: Tensor, parents: Tensor) -> None:
        prompts, width = tokens.shape
        offsets = torch.arange(prompts, device=tokens.device)[:, None] * self._width
        self._cache.self_attention_cache.reorder_cache((offsets + parents).flatten())
        self._width = width
        rows = prompts * width
        # Only its shape is read: the cross-attention cache is filled.
        shape = (rows, *self._encoded.shape[1:])
        run = {
            "decoder_input_ids": tokens.reshape(-1, 1),
            "encoder_outputs": BaseModelOutput(self._encoded.new_zeros(1, 1, 1).expand(shape)),
            "attention_mask": self._mask.repeat_interleave(width, dim=0),
            "past_key_values": self._cache,
        }
        with folded_cross_attention(self._layers, width):
            self.run(run, 1, first=False)


@contextlib.contextmanager
def folded_cross_attention(modules: list[nn.Module], width: int) -> Iterator[None]:
    """Inside, cross-attention layers get (B * W, 1, D) hidden states as (B, W, D), and give them back unfolded."""
    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(_fold(width), with_kwargs=True))
        hooks.append(module.register_forward_hook(_unfold(width), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cross_attentions(model: nn.Module) -> list[nn.Module]:
    """Innermost modules that may be called with `key_value_states` (T5's serve self-attention too, without them)."""
    found = [m for m in model.modules() if "key_value_states" in inspect.signature(type(m).forward).parameters]
    ids = {id(module) for module in found}
    return [module for module in found if not ids & {id(part) for part in module.modules() if part is not module}]


def _fold(width: int) -> Callable:
    def before(module: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple | None:
        if named.get("key_value_states") is None:
            return None
        named = dict(named)
        if arguments:
            arguments = (arguments[0].reshape(-1, width, arguments[0].shape[-1]), *arguments[1:])
        else:
            hidden = named["hidden_states"]
            named["hidden_states"] = hidden.reshape(-1, width, hidden.shape[-1])
        for name in ("mask", "attention_mask"):
            if named.get(name) is not None:
                named[name] = named[name][::width]
        return arguments, named

    return before


def _unfold(width: int) -> Callable:
    def after(module: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> Any:
        if named.get("key_value_states") is None:
            return None
        return (output[0].reshape(-1, 1, output[0].shape[-1]), *output[1:])

    return after


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def windows_of(config: Any) -> dict[str, int | None]:
    """Attention window in positions by layer type; None sees all; empty when every layer sees all.

    Raises:
        ConfigError: a kind of layer whose mask is not known here (chunked, linear attention, ...).
    """
    config = _text_config(config)
    window = getattr(config, "sliding_window", None)
    kinds = set(
        getattr(config, "layer_types", None) or (["full_attention"] if window is None else ["sliding_attention"])
    )
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"Layers of the kind {sorted(unknown)} have no shared prompt cache here.")
    if kinds == {"full_attention"}:
        return {}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}

"""Reason first, then search: free text until an end token, then a beam search over the trie behind it.

Inference and R-GRPO rollouts of CRS (`specs/crs_debiased_grpo.md` 2.7, 2.8 and 5.7; what the paper leaves open is our
choice): every prompt gets G reasonings, a reasoning that the model did not close is closed by force, and each one is
followed by the K best SIDs under it. The search is `sid_beam_search`, so scores mean what they mean everywhere else.

ZeRO-3 and FSDP: each call makes exactly one `generate` call and one search of `depth` steps on every process, whatever
the texts say (nothing is skipped when no text was closed). Inside `generate`, transformers keeps the processes in step
itself when parameters are sharded; `synced_gpus` passes on a decision of your own. `SidLogitsProcessor(start_after=...)`
does both parts in one `generate` call, also for encoder-decoders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidtune.core.errors import ConfigError
from sidtune.decoding.beam_search import sid_beam_search
from sidtune.decoding.engine.generation_settings import SidGenerationConfig, explicit_config
from sidtune.decoding.engine.model_steps import evaluating
from sidtune.decoding.engine.search import check_prompts
from sidtune.decoding.items import BeamOutput
from sidtune.decoding.trie import SidTrie


@dataclass(frozen=True)
class ReasonedBeams:
    """G reasonings of each of B prompts and the K best SIDs behind each of them.

    Attributes:
        reasoning_ids: (B, G, R) int64, the reasoning with its end token, padded on the right.
        lengths: (B, G) int64, tokens of each reasoning, the end token included.
        closed: (B, G) bool, the model wrote the end token itself.
        stopped: (B, G) bool, the model wrote EOS instead of the end token; the EOS is not part of the reasoning.
        beams: `BeamOutput` with (B * G, K) leaves and scores; row b * G + g belongs to reasoning g of prompt b.
        input_ids: (B * G, T + R) what was searched behind: prompt and reasoning, padded on the left.
        attention_mask: (B * G, T + R) int64, 1 on their tokens.
    """

    reasoning_ids: Tensor
    lengths: Tensor
    closed: Tensor
    stopped: Tensor
    beams: BeamOutput
    input_ids: Tensor
    attention_mask: Tensor

    @property
    def forced(self) -> Tensor:
        """(B, G) bool: the end token was put there, because the text was too long or ended without it."""
        return ~self.closed

    @property
    def mask(self) -> Tensor:
        """(B, G, R) bool: tokens of the reasoning, a forced end token included."""
        places = torch.arange(self.reasoning_ids.shape[2], device=self.lengths.device)
        return places < self.lengths[..., None]

    def texts(self) -> list[list[list[int]]]:
        """The reasonings as lists of token ids, per prompt and reasoning, end token included."""
        rows, lengths = self.reasoning_ids.tolist(), self.lengths.tolist()
        return [[ids[:size] for ids, size in zip(*pair, strict=True)] for pair in zip(rows, lengths, strict=True)]


@torch.no_grad()
def reason_then_search(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    trie: SidTrie,
    sid_token_ids: np.ndarray | Tensor | None = None,
    end_token_id: int,
    eos_token_id: int,
    pad_token_id: int,
    max_reasoning_tokens: int,
    num_beams: int = 10,
    num_reasonings: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float | None = None,
    forbid_sids: bool = True,
    forbid_eos: bool = False,
    generator: torch.Generator | None = None,
    synced_gpus: bool | None = None,
    logits_processor: Any = None,
    **search: Any,
) -> ReasonedBeams:
    """Writes a reasoning behind every prompt, closes it, and searches the best SIDs behind it.

    The model's own generation settings (sampling, penalties, lengths) are neither used nor changed. Evaluation mode is
    on meanwhile and restored afterwards.

    Args:
        model: decoder-only language model of transformers, or one wrapped by PEFT.
        input_ids: (B, T) prompts that end where the reasoning begins, padded on the left.
        attention_mask: (B, T); default all 1.
        trie, sid_token_ids: as for `sid_beam_search`.
        end_token_id: ends a reasoning, for example the token of `</think>`; no SID token.
        eos_token_id: also stops a reasoning; the end token then takes its place.
        pad_token_id: padding behind shorter texts and before shorter prompts; may equal `eos_token_id`.
        max_reasoning_tokens: tokens of a reasoning before a forced end token, at least 1; a text that has not ended by
            then is closed by force.
        num_beams: K.
        num_reasonings: G; more than one needs `do_sample`.
        do_sample: sample the text instead of greedy choice; temperature, top_k (0: off), top_p, min_p shape that.
        forbid_sids: no SID tokens in the reasoning.
        forbid_eos: no EOS in the reasoning, as in `SidLogitsProcessor`; every text then ends by end token or length.
        generator: source of the randomness; default the global one. The same generator state gives the same texts.
        synced_gpus: passed to `generate`; default: transformers decides.
        logits_processor: processors of your own for the text.
        search: options of `sid_beam_search`, such as `max_rows`, `renormalize`, or `filters` (one entry per prompt and
            reasoning, B * G).

    Raises:
        ConfigError: options or model that do not fit. DataError: prompts that do not fit. Before the model runs.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    tokens = torch.cat(trie.level_tokens(sid_token_ids)).tolist()
    _check_options(end_token_id, eos_token_id, tokens, max_reasoning_tokens, num_reasonings, do_sample)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(
            "Reasoning and search in two calls needs a decoder-only model; give generate() a SidLogitsProcessor with "
            "start_after for an encoder-decoder."
        )
    check_prompts(model, input_ids, mask, max_reasoning_tokens + 1 + trie.depth)
    device = model.device if hasattr(model, "device") else next(model.parameters()).device
    input_ids, mask = input_ids.to(device), mask.to(device=device, dtype=torch.int64)
    config = explicit_config(
        model,
        max_new_tokens=max_reasoning_tokens,
        eos_token_id=[end_token_id, *([] if forbid_eos else [eos_token_id])],
        pad_token_id=pad_token_id,
        suppress_tokens=[*(tokens if forbid_sids else []), *([eos_token_id] if forbid_eos else [])] or None,
        num_return_sequences=num_reasonings,
        do_sample=do_sample,
        **({"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p} if do_sample else {}),
    )
    written = _write(model, input_ids, mask, config, generator, synced_gpus, logits_processor)
    text, lengths, closed, stopped = _close(written, end_token_id, eos_token_id, pad_token_id)
    prompts, masks = (part.repeat_interleave(num_reasonings, dim=0) for part in (input_ids, mask))
    kept = torch.arange(text.shape[1], device=device) < lengths[:, None]
    joined = _pad_left(torch.cat([prompts, text], dim=1), torch.cat([masks, kept.long()], dim=1), pad_token_id)
    beams = sid_beam_search(
        model,
        input_ids=joined[0],
        attention_mask=joined[1],
        trie=trie,
        sid_token_ids=sid_token_ids,
        num_beams=num_beams,
        **search,
    )
    shape = (len(input_ids), num_reasonings)
    parts = (part.unflatten(0, shape) for part in (text, lengths, closed, stopped))
    return ReasonedBeams(*parts, beams, *joined)


def _write(
    model: nn.Module,
    input_ids: Tensor,
    mask: Tensor,
    config: SidGenerationConfig,
    generator: torch.Generator | None,
    synced_gpus: bool | None,
    logits_processor: Any,
) -> Tensor:
    """(B * G, N) new tokens of one `generate` call, N at most `max_new_tokens`."""
    own = {} if logits_processor is None else {"logits_processor": logits_processor}
    with evaluating(model), _seeded(generator, input_ids.device):
        out = model.generate(  # type: ignore[operator]
            input_ids=input_ids, attention_mask=mask, generation_config=config, synced_gpus=synced_gpus, **own
        )
    return out[:, input_ids.shape[1] :]


@contextlib.contextmanager
def _seeded(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """`generate` draws from the global source only; inside it is seeded from `generator`, afterwards as before."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        yield


def _close(written: Tensor, end: int, eos: int, pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ends every row of new tokens with exactly one end token.

    Returns:
        (R, W) texts with end token, padded on the right; (R,) lengths with end token; (R,) closed by the model;
        (R,) stopped by EOS.
    """
    ends = (written == end) | (written == eos)
    first = (ends.cumsum(dim=1) == 0).sum(dim=1)
    last = written.gather(1, first.clamp(max=written.shape[1] - 1)[:, None])[:, 0]
    found = first < written.shape[1]
    closed, stopped = found & (last == end), found & (last == eos)
    text = torch.nn.functional.pad(written, (0, 1), value=pad).scatter(1, first[:, None], end)
    places = torch.arange(text.shape[1], device=text.device)
    text = text.masked_fill(places > first[:, None], pad)
    return text[:, : int(first.max()) + 1], first + 1, closed, stopped


def _pad_left(ids: Tensor, mask: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Moves all padding to the left, keeping the order of the tokens. Only columns that are padding everywhere go."""
    order = mask.argsort(dim=1, stable=True)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    width = int(mask.sum(dim=1).max())
    return ids.masked_fill(mask == 0, pad)[:, -width:], mask[:, -width:]


def _check_options(end: int, eos: int, sids: list[int], longest: int, reasonings: int, do_sample: bool) -> None:
    if end == eos or {end, eos} & set(sids):
        raise ConfigError(
            f"end_token_id and eos_token_id must be two tokens that are no SID tokens, got {end} and {eos}; check the "
            "tokenizer."
        )
    if longest < 1 or reasonings < 1:
        raise ConfigError(
            f"max_reasoning_tokens and num_reasonings must be at least 1, got {longest} and {reasonings}; raise them."
        )
    if reasonings > 1 and not do_sample:
        raise ConfigError(f"{reasonings} greedy reasonings would all be the same; set do_sample=True.")

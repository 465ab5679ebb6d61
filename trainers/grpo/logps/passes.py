"""One forward pass for `group_logps`, and what a model can do of it: found out once per model on a few random tokens.

See `group_logps.py` for the why. Three ways to get scores out of a pass, from the cheapest: inside the head (`HEAD`), from
the model's logits of the scored positions only (`LOGITS`), from all its logits (`ALL_LOGITS`). Two ways to lay rows out:
packed with a tree mask, or plain. What is compared is log-probabilities against the model untouched on ordinary rows.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.engine.model_steps import evaluating
from sidtune.trainers.grpo.logps.packing import Batch, PackedRows, pack, plain_rows, read_batch
from sidtune.trainers.grpo.logps.scores import Scorer, TokenTargets

HEAD, LOGITS, ALL_LOGITS = "head", "logits", "all logits"
_MASKED = ("sdpa", "eager")
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention_window_size")


@dataclass
class Ability:
    """What a model can do.

    Attributes:
        packed: rows may share their prompt.
        way: how scores are read: HEAD, LOGITS or ALL_LOGITS.
        reason: why not packed, a clause; empty when packed.
        hidden_size: width of the model, for the cost of a row.
        row_limit: longest packed row, or None.
        mentioned: what the user has been told about this model.
    """

    packed: bool
    way: str
    reason: str = ""
    hidden_size: int = 1
    row_limit: int | None = None
    mentioned: set[str] = field(default_factory=set)


_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, Ability]] = weakref.WeakKeyDictionary()


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, DeepSpeed, compile and PEFT.

    Raises:
        ConfigError: it is none, or an encoder-decoder.
    """
    base = model
    while True:
        inner = getattr(base, "_orig_mod", None) or getattr(base, "module", None)
        if inner is None and hasattr(base, "get_base_model"):
            inner = base.get_base_model()
        if not isinstance(inner, nn.Module) or inner is base:
            break
        base = inner
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "get_output_embeddings"):
        raise ConfigError(f"group_logps needs a language model of transformers, got {type(base).__name__}.")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{type(base).__name__} is an encoder-decoder model; shared prompts need a causal LM such as Qwen3."
        )
    return base


def ability_of(model: nn.Module, base: nn.Module, longest: int) -> Ability:
    """What `model` can do for rows of `longest` tokens. The first call runs a few tokens through it, on every process.

    Raises:
        DataError: the model has fewer positions.
    """
    config = base.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise DataError(f"The longest row needs {longest} positions but the model has {positions}; shorten the rows.")
    device = base.get_input_embeddings().weight.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    attention = getattr(config, "_attn_implementation", None)
    cache = _known.setdefault(base, {})
    if (attention, autocast) not in cache:
        cache[attention, autocast] = found = _find_out(model, base, attention)
        found.hidden_size = getattr(config, "hidden_size", None) or 1
        found.row_limit = min((w for w in (positions, _window(config)) if w is not None), default=None)
        if found.reason:
            _say(base, found.reason)
    found, window = cache[attention, autocast], _window(config)
    if found.packed and window is not None and longest > window:
        reason = f"its attention window of {window} tokens is shorter than the longest row, {longest}"
        if "window" not in found.mentioned:
            found.mentioned.add("window")
            _say(base, reason)
        return Ability(False, found.way, reason)
    return found


def _say(base: nn.Module, reason: str) -> None:
    warnings.warn(
        f"Prompts are not shared for {type(base).__name__}, because {reason}; every completion is read with its own "
        "copy of the prompt, which is slower and gives the same numbers.",
        stacklevel=4,
    )


def _window(config: Any) -> int | None:
    given = [getattr(config, name, None) for name in _WINDOWS]
    return min((int(w) for w in given if isinstance(w, int) and w > 0), default=None)


def run_pass(
    model: nn.Module,
    base: nn.Module,
    rows: PackedRows,
    tokens: Tensor,
    targets: TokenTargets,
    scorer: Scorer,
    ability: Ability,
    packed: bool,
) -> Tensor:
    """(N, columns) float32 scores of the N targets of one pass.

    Args:
        rows: on the device of the model.
        tokens: (B * (P + C),) flattened prompts and completions, which `rows.source` points into.
        targets: the targets of `rows`, in their order.
    """
    inputs = _inputs(base, rows, tokens, packed)
    head, width = base.get_output_embeddings(), rows.source.shape[1]
    if ability.way == ALL_LOGITS:
        logits = model(**inputs).logits[:, -width:]
        return scorer.from_logits(logits.flatten(0, 1)[rows.predicts_at], targets)
    if ability.way == LOGITS:
        places, which = rows.predicts_at.unique(return_inverse=True)

        def pick(states: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
            return call(_flat(states, width)[places][None])

        with _replaced(head, pick):
            logits = model(**inputs).logits[0]
        return scorer.from_logits(logits[which], targets)

    def score(states: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        return scorer.from_states(_flat(states, width)[rows.predicts_at], targets, head, call)[None]

    with _replaced(head, score):
        return model(**inputs).logits[0].float()


def _flat(states: Tensor, width: int) -> Tensor:
    """(R * width, d): of the last `width` positions, since some adapters put virtual tokens in front."""
    return states[:, -width:].flatten(0, 1)


@contextlib.contextmanager
def _replaced(head: nn.Module, forward: Callable[[Tensor, Callable], Tensor]) -> Iterator[None]:
    """Replaces the forward of a module: `forward(states, its own forward)`; its hooks stay in place."""
    own, instance = head.forward, vars(head).get("forward")
    head.forward = lambda states, *rest, **more: forward(states, lambda x: own(x, *rest, **more))
    try:
        yield
    finally:
        if instance is None:
            del head.forward
        else:
            head.forward = instance


def _inputs(base: nn.Module, rows: PackedRows, tokens: Tensor, packed: bool) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": tokens[rows.source], "use_cache": False}
    if packed:
        inputs["attention_mask"] = _mask_for(base, rows.attention_mask())
        inputs["position_ids"] = rows.positions
    else:
        inputs["attention_mask"] = (rows.unit > 0).long()
    known = inspect.signature(type(base).forward).parameters
    return {**{name: value for name, value in inputs.items() if name in known}, "return_dict": True}


def _mask_for(base: nn.Module, sees: Tensor) -> Tensor:
    """The mask as the attention wants it: scaled-dot-product attention takes booleans, the eager one adds numbers."""
    if base.config.get_text_config()._attn_implementation != "eager":
        return sees
    dtype = base.dtype if base.dtype.is_floating_point else torch.float32
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


def _find_out(model: nn.Module, base: nn.Module, attention: str | None) -> Ability:
    head = base.get_output_embeddings()
    batch, ids = _probe_rows(base)
    plain, tree = plain_rows(batch)[0].to(ids.device), pack(batch, 64)[0].to(ids.device)
    with torch.no_grad(), evaluating(model):
        truth = _truth(model, base, plain, ids)
        way = _way(model, base, head, plain, ids, truth)
        if attention not in _MASKED:
            return Ability(False, way, f"its attention '{attention}' takes no mask of its own")
        if "position_ids" not in inspect.signature(type(base).forward).parameters:
            return Ability(False, way, "it takes no position_ids")
        try:
            error = _difference(model, base, tree, ids, way, truth)
        except Exception as failure:  # a model may refuse a mask in any way it likes
            reason = " ".join(str(failure).split())[:200] or type(failure).__name__
            return Ability(False, way, f"it does not take a mask per pair of tokens ({reason})")
        if not error <= _tolerance(base):
            return Ability(False, way, f"packed rows give other log-probabilities (by {error:.1e} of their range)")
        return Ability(True, way)


def _probe_rows(base: nn.Module) -> tuple[Batch, Tensor]:
    """Three prompts with 3, 1 and 1 completions; the two short ones share a packed row."""
    config = base.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    lengths, answers = torch.tensor([6, 6, 6, 4, 2]), torch.tensor([3, 2, 4, 3, 2])
    draw = torch.randint(3, config.vocab_size, (5, 10), generator=generator)
    prompts, completions = draw[:, :6].clone(), draw[:, 6:]
    prompts[1:3] = prompts[0]
    seen = torch.arange(6) >= 6 - lengths[:, None]
    answered = torch.arange(4) < answers[:, None]
    batch = read_batch(prompts, seen, completions, answered)
    return batch, torch.cat([prompts, completions], dim=1).reshape(-1).to(base.get_input_embeddings().weight.device)


def _targets(rows: PackedRows, ids: Tensor) -> TokenTargets:
    place = rows.target // 4 * 10 + 6 + rows.target % 4
    none, no = torch.full_like(place, -1), torch.zeros_like(place)
    return TokenTargets(ids[place], none, no, no, no.bool())


def _truth(model: nn.Module, base: nn.Module, rows: PackedRows, ids: Tensor) -> Tensor:
    """(B * C,) log-probabilities by the untouched model."""
    logits = model(**_inputs(base, rows, ids, packed=False)).logits[:, -rows.source.shape[1] :]
    scores = logits.float().log_softmax(dim=-1).flatten(0, 1)[rows.predicts_at]
    targets = _targets(rows, ids)
    return scores.new_zeros(20).index_put((rows.target,), scores.gather(1, targets.tokens[:, None])[:, 0])


def _difference(
    model: nn.Module, base: nn.Module, rows: PackedRows, ids: Tensor, way: str, truth: Tensor, packed: bool = True
) -> float:
    """Largest error of the log-probabilities, relative to their range."""
    scores = run_pass(model, base, rows, ids, _targets(rows, ids), Scorer(None), Ability(packed, way), packed)[:, 0]
    true = truth[rows.target]
    return float((scores - true).abs().max() / (true.max() - true.min()).clamp(min=1e-12))


def _way(model: nn.Module, base: nn.Module, head: Any, rows: PackedRows, ids: Tensor, truth: Tensor) -> str:
    if not isinstance(head, nn.Module):
        return ALL_LOGITS
    for way in (HEAD, LOGITS) if _returned_unchanged(model, base, head, rows, ids) else (LOGITS,):
        try:
            if _difference(model, base, rows, ids, way, truth, packed=False) <= _tolerance(base):
                return way
        except (RuntimeError, ValueError, IndexError, TypeError):  # a model that insists on the shape of its logits
            continue
    return ALL_LOGITS


def _returned_unchanged(model: nn.Module, base: nn.Module, head: nn.Module, rows: PackedRows, ids: Tensor) -> bool:
    """Whether what the head returns is what the model returns, told from a known ramp in its place."""
    sent = []

    def ramp(states: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        sent.append(torch.linspace(-50.0, 50.0, 64, device=states.device).view(1, -1, 2))
        return sent[-1]

    try:
        with _replaced(head, ramp):
            logits = model(**_inputs(base, rows, ids, packed=False)).logits
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return len(sent) == 1 and logits.shape == sent[0].shape and bool(torch.equal(logits.float(), sent[0]))


def _tolerance(base: nn.Module) -> float:
    """Rounding differs between shapes: by little in float32, by much in half precision and in TF32."""
    weight = base.get_input_embeddings().weight
    half = weight.dtype != torch.float32 or torch.is_autocast_enabled(weight.device.type)
    coarse = weight.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return 5e-2 if half else 5e-3 if coarse else 1e-4

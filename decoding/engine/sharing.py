"""Which layout of the prompt's cache a model can be searched with: measured once per model, not assumed.

Whether a model honours a 4-D mask and given positions depends on its code and on its attention implementation (flash
attention and ALiBi models do not). So before the first search a model runs three steps over two short random prompts in
the shared layout and in the copied one. Where the logits agree the shared layout is used; where they do not, or where the
shared one fails, the copied one is, and a warning says so once: results are the same, only slower and larger.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from sidtune.core.errors import ConfigError
from sidtune.decoding.engine.model_steps import ModelSteps
from sidtune.decoding.engine.prompt_cache import CopiedBeams, Layout, PackedBeams, SharedEncoder, windows_of

logger = logging.getLogger(__name__)

_PROBE_TOKENS, _LONGEST_PROBED_WINDOW = 6, 64
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError, ConfigError)
_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()


def layout_for(steps: ModelSteps, longest: int) -> type[Layout]:
    """The layout for a search whose longest prompt and SID have `longest` positions."""
    shared = SharedEncoder if steps.encoder_decoder else PackedBeams
    verdicts = _known.setdefault(steps.model, {})
    key = (getattr(steps.config, "_attn_implementation", None), steps.model.dtype)
    if key not in verdicts:
        verdicts[key] = _agrees(steps, shared)
        if not verdicts[key]:
            logger.warning(
                "%s cannot share a prompt's cache between beams (attention implementation: %s), so the cache is copied "
                "for every beam: the results are the same, but slower and with more memory.",
                type(steps.model).__name__,
                key[0],
            )
    return shared if verdicts[key] and _window_was_probed(steps, longest) else CopiedBeams


def _window_was_probed(steps: ModelSteps, longest: int) -> bool:
    if steps.encoder_decoder:
        return True
    windows = [window for window in windows_of(steps.config).values() if window is not None]
    return all(longest <= window or window <= _LONGEST_PROBED_WINDOW for window in windows)


def _agrees(steps: ModelSteps, shared: type[Layout]) -> bool:
    try:
        expected, got = _three_steps(steps, CopiedBeams), _three_steps(steps, shared)
    except _FAILURES as error:
        logger.debug("the shared layout failed: %s", error)
        return False
    finally:
        steps.use(CopiedBeams)
    allowed = 1e-3 if got.dtype == torch.float32 and steps.model.dtype == torch.float32 else 3e-2
    spread = (expected - expected.mean()).abs().max()
    return bool(torch.isfinite(got).all() and (got - expected).abs().max() <= allowed * spread)


def _three_steps(steps: ModelSteps, layout: type[Layout]) -> Tensor:
    """Logits after three steps of three beams that trade places; one prompt is padded."""
    windows = [] if steps.encoder_decoder else [w for w in windows_of(steps.config).values() if w is not None]
    length = _PROBE_TOKENS + max([w for w in windows if w <= _LONGEST_PROBED_WINDOW], default=0)
    tokens = torch.cat(steps.level_tokens)
    pick = torch.arange(2 * length, device=tokens.device).mul(7).remainder(len(tokens))
    ids = tokens[pick].view(2, length)
    mask = torch.ones_like(ids)
    if steps.encoder_decoder:
        mask[1, -2:] = 0
    else:
        mask[1, :2] = 0
    steps.use(layout)
    steps.read_prompt(ids, mask)
    seen = []
    for step, parents in enumerate(([0, 0, 0], [2, 0, 1], [1, 1, 2])):
        fed = tokens[(torch.arange(6, device=tokens.device) * 5 + step).remainder(len(tokens))].view(2, 3)
        steps.advance(fed, torch.tensor([parents, parents[::-1]], device=tokens.device))
        seen.append(steps.logits(0)[0])
    return torch.stack(seen)

"""Constrained sampling of SIDs from a model: groups of leaves with their exact log-probabilities, for GRPO rollouts.

The distribution is the trie-renormalised one that `sid_beam_search` scores: at every node a softmax over the legal codes,
at a temperature. All G samples of a prompt share its key/value cache, as beams do.

*With replacement*: ancestral sampling by the inverse distribution function, one uniform number per sample and level, so a
sample depends only on its own numbers: chunks and neighbours change nothing.

*Without replacement*: stochastic beam search (Kool, van Hoof, Welling, "Stochastic beams and where to find them", ICML
2019). Every leaf y has log-probability phi_y and key phi_y + Gumbel; the G largest keys are a sample without replacement.
Keys are drawn top-down: the children of a node get Gumbel keys conditioned on their maximum being the node's key, so only
G + 1 nodes per level are looked at and the result is exactly that of perturbing all leaves. The (G+1)-th key is the
threshold kappa; given it, leaf y is in the sample with probability 1 - exp(-exp(phi_y - kappa)), which makes
sum_y f(y) p(y) / q(y) an unbiased estimate of E[f] (their equation 10). We keep G + 1 nodes; the paper keeps G and leaves
kappa to the reader. Keys and log-probabilities are computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidtune.core.errors import ConfigError, SidtuneError
from sidtune.core.finite import NOT_NUMBERS
from sidtune.decoding.engine.search import GenerateCall, Search, check_limits
from sidtune.decoding.filters import RequestFilter
from sidtune.decoding.trie import SidTrie

_NEVER = float("-inf")


@dataclass(frozen=True)
class SampleOutput:
    """G sampled leaves of each prompt.

    Attributes:
        leaves: (B, G) int64 leaf numbers of the trie; -1 where a prompt has no allowed leaf (left).
        log_probs: (B, G) float32 log-probability of each leaf, renormalised over the trie at the temperature of the
            call; -inf where the leaf is -1.
        code_log_probs: (B, G, depth) float32, the part of each code; they sum to `log_probs`.
        keys: None, or without replacement (B, G) float64 perturbed log-probabilities, falling; -inf where the leaf is -1.
        threshold: None, or without replacement (B,) float64 kappa, the key that came next; -inf when none was left.
    """

    leaves: Tensor
    log_probs: Tensor
    code_log_probs: Tensor
    keys: Tensor | None = None
    threshold: Tensor | None = None

    def inclusion_log_probs(self) -> Tensor:
        """(B, G) float64 log-probability that each leaf is in the sample, given the threshold; 0 when nothing was left.

        Raises:
            ConfigError: the sample was drawn with replacement.
        """
        if self.threshold is None:
            raise ConfigError("Inclusion probabilities belong to sampling without replacement; pass replacement=False.")
        rate = self.log_probs.double() - self.threshold[:, None]
        inclusion = _log1mexp(rate.exp())
        return inclusion.where(torch.isfinite(self.threshold)[:, None], torch.zeros_like(inclusion)).where(
            self.leaves >= 0, _NEVER
        )


@torch.no_grad()
def sid_sample(
    model: nn.Module,
    input_ids: Tensor,
    mask: Tensor | None = None,
    *,
    trie: SidTrie,
    sid_token_ids: np.ndarray | Tensor | None = None,
    num_samples: int = 16,
    replacement: bool = True,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    max_rows: int | None = None,
    memory_budget: int | None = None,
    filters: RequestFilter | None = None,
    **generate_arguments: Any,
) -> Any:
    """Draws `num_samples` SIDs for every prompt; every one is a catalogue item's.

    Also for `model.generate(**batch, custom_generate=sid_sample, trie=trie, num_samples=16)`; then it returns what
    `generate` does, as described at `sid_beam_search`, with the samples in the order drawn.

    Args:
        model, input_ids, mask, trie, sid_token_ids, filters: as for `sid_beam_search`.
        num_samples: G, at least 1. Without replacement it may exceed the number of leaves; the rest is -1.
        replacement: True, independent samples; False, distinct ones (see the module's docstring).
        temperature: divides the logits before the softmax over the legal codes; positive.
        generator: source of randomness on any device; default torch's own. Its state and the shape of the call fix the
            result; with replacement the result does not depend on `max_rows` either.
        max_rows, memory_budget: limits for one pass, as for `sid_beam_search`, in rows (prompts x samples) and in bytes.

    Raises:
        ConfigError: the model or an option does not fit. DataError: prompts or token ids do not fit.
        SidtuneError: the model's scores are not numbers.
    """
    call = GenerateCall.of(generate_arguments, input_ids, mask, "sid_sample")
    check_limits("num_samples", num_samples, max_rows, memory_budget)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature must be a positive number, got {temperature}; for the best SIDs use beams.")
    search = Search.prepare(model, call, trie, sid_token_ids, filters)
    draw = _WithReplacement if replacement else _WithoutReplacement
    drawn = draw(search, num_samples, temperature, generator)
    if search.trie.num_allowed_leaves:
        for rows in search.chunks(max_rows, num_samples, memory_budget):
            drawn.chunk(rows)
    found = drawn.output()
    if bool(drawn.parts.isnan().any()):
        raise SidtuneError(NOT_NUMBERS)
    return call.answer(found.leaves, found.log_probs, search, None) if call.by_generate else found


class _WithReplacement:
    def __init__(self, search: Search, samples: int, temperature: float, generator: torch.Generator | None) -> None:
        self.search, self.temperature = search, temperature
        shape = (search.prompts, samples, search.trie.depth)
        source = "cpu" if generator is None else generator.device
        uniform = torch.rand(shape, dtype=torch.float64, generator=generator, device=source)
        self.uniform = uniform.to(search.device)
        self.nodes = torch.full(shape[:2], -1, dtype=torch.int64, device=search.device)
        self.parts = torch.zeros(shape, dtype=torch.float64, device=search.device)

    def chunk(self, rows: slice) -> None:
        search, samples = self.search, self.uniform.shape[1]
        nodes = torch.zeros(search.rows, 1, dtype=torch.int64, device=search.device)
        parents = torch.zeros(search.rows, samples, dtype=torch.int64, device=search.device)
        for level in range(search.trie.depth):
            codes, children, log_probs = _level(search, nodes, level, self.temperature)
            cumulated = log_probs.exp().cumsum(dim=-1).gather(1, _wide(parents, codes.shape[-1]))
            below = self.uniform[rows, :, level, None] * cumulated[..., -1:]
            # The first code whose cumulated probability exceeds the number; codes of probability 0 never do.
            place = torch.searchsorted(cumulated, below, right=True).clamp(max=codes.shape[-1] - 1)
            self.parts[rows, :, level] = _pick(log_probs, parents, place)
            # Nothing is legal where the probabilities sum to 0; a NaN is no 0 and stays visible.
            nodes = _pick(children, parents, place).where(cumulated[..., -1] != 0, -1)
            chosen = _pick(codes, parents, place)
            if level + 1 < search.trie.depth:
                search.advance(level, chosen, parents)
            parents = torch.arange(samples, device=search.device).expand(search.rows, -1)
        self.nodes[rows] = nodes

    def output(self) -> SampleOutput:
        alive = self.nodes >= 0
        parts = self.parts.where(alive[..., None], 0.0)
        total = parts.sum(dim=-1).where(alive, _NEVER)
        leaves = (self.nodes - self.search.trie.level_starts[-2]).where(alive, -1)
        return SampleOutput(leaves, total.float(), parts.float())


class _WithoutReplacement:
    def __init__(self, search: Search, samples: int, temperature: float, generator: torch.Generator | None) -> None:
        self.search, self.temperature, self.generator = search, temperature, generator
        self.samples, self.kept = samples, samples + 1
        shape = (search.prompts, self.kept)
        self.nodes = torch.full(shape, -1, dtype=torch.int64, device=search.device)
        self.keys = torch.full(shape, _NEVER, dtype=torch.float64, device=search.device)
        self.parts = torch.zeros(*shape, search.trie.depth, dtype=torch.float64, device=search.device)

    def _gumbel(self, shape: torch.Size) -> Tensor:
        source = "cpu" if self.generator is None else self.generator.device
        uniform = torch.rand(shape, dtype=torch.float64, generator=self.generator, device=source)
        # rand may return 0, whose Gumbel number is -inf and would look like an illegal code.
        return -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log().to(self.search.device)

    def chunk(self, rows: slice) -> None:
        search, count = self.search, self.search.rows
        nodes = torch.zeros(count, 1, dtype=torch.int64, device=search.device)
        keys = self._gumbel(torch.Size((count, 1)))
        parts = torch.zeros(count, 1, 0, dtype=torch.float64, device=search.device)
        for level in range(search.trie.depth):
            codes, children, log_probs = _level(search, nodes, level, self.temperature)
            total = parts.sum(dim=-1)[..., None] + log_probs
            child_keys = _conditioned(total, self._gumbel(total.shape), keys)
            width = min(self.kept, child_keys[0].numel())
            keys, chosen = child_keys.flatten(1).topk(width, dim=1)
            parents = chosen // codes.shape[-1]
            part = log_probs.flatten(1).gather(1, chosen).where(keys != _NEVER, 0.0)
            parts = torch.cat([parts.gather(1, _wide(parents, level)), part[..., None]], dim=-1)
            nodes = children.flatten(1).gather(1, chosen).where(keys != _NEVER, -1)
            if level + 1 < search.trie.depth:
                search.advance(level, codes.flatten(1).gather(1, chosen), parents)
        width = nodes.shape[1]
        self.nodes[rows, :width], self.keys[rows, :width], self.parts[rows, :width] = nodes, keys, parts

    def output(self) -> SampleOutput:
        nodes, keys, parts = (values[:, : self.samples] for values in (self.nodes, self.keys, self.parts))
        alive = nodes >= 0
        total = parts.sum(dim=-1).where(alive, _NEVER)
        leaves = (nodes - self.search.trie.level_starts[-2]).where(alive, -1)
        return SampleOutput(leaves, total.float(), parts.float(), keys, self.keys[:, -1])


def _level(search: Search, nodes: Tensor, level: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Legal children of (B, W) nodes: codes, nodes and float64 log-probabilities (B, W, C), -inf where not legal."""
    codes, children, legal = search.children(nodes, level)
    columns, _ = search.steps.logits(level)
    logits = (columns.gather(-1, codes).double() / temperature).masked_fill(~legal, _NEVER)
    return codes, children, (logits - logits.logsumexp(dim=-1, keepdim=True)).masked_fill(~legal, _NEVER)


def _conditioned(log_probs: Tensor, gumbel: Tensor, maximum: Tensor) -> Tensor:
    """Gumbel keys of (B, W, C) children given that their maximum is the node's key (B, W); -inf where not legal.

    Kool et al. 2019, appendix B.3, in its numerically stable form.
    """
    keys = log_probs + gumbel
    largest = keys.amax(dim=-1, keepdim=True)
    bound = maximum[..., None]
    v = bound - keys + _log1mexp(largest - keys)
    out = bound - v.clamp_min(0) - torch.log1p((-v.abs()).exp())
    # A node that stands first gets its parent's key exactly; the formula is log(0) there.
    return out.where(keys != largest, bound.expand_as(keys)).masked_fill(log_probs == _NEVER, _NEVER)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x >= 0, without loss of precision (Maechler, 2012)."""
    small = torch.log(-torch.expm1(-x))
    return torch.where(x < math.log(2), small, torch.log1p(-torch.exp(-x)))


def _pick(values: Tensor, parents: Tensor, place: Tensor) -> Tensor:
    """(B, W, C) values of the node that each of G samples stands on, at its place (B, G, 1) among the children."""
    return values.gather(1, _wide(parents, values.shape[-1])).gather(2, place)[..., 0]


def _wide(parents: Tensor, width: int) -> Tensor:
    return parents[..., None].expand(-1, -1, width)

"""Beam search over a catalogue's SID trie: every result is an item's SID, after exactly `depth` steps.

Scores are log-probabilities of a SID given its prompt. By default each step's softmax runs over the legal codes only,
so the scores of all leaves of a trie sum to one: the function that training, evaluation and serving share
(`specs/crs_debiased_grpo.md` 4.10 and 5.3; the paper does not say which it used). `renormalize=False` gives the
log-probability under the whole vocabulary instead. The legal set is exact per prefix, and nothing runs after it.

Differences from `generate`: no generation settings (temperature, top-p, length penalty, forced tokens, EOS) apply; the
prompt is read once and its key/value cache is shared by all its beams (see `sidtune.decoding.engine.prompt_cache`); a beam that
cannot go on is -inf, never an illegal item or a duplicate; equal scores are ordered by the lexicographic rank of the SID's
codes, within the beam at every level and in the result, so runs agree. Items that share a SID share its score; their order
is the matter of `sidtune.decoding.items`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidtune.core.errors import ConfigError, SidtuneError
from sidtune.core.finite import NOT_NUMBERS
from sidtune.decoding.engine.search import GenerateCall, Search, check_limits
from sidtune.decoding.filters import RequestFilter
from sidtune.decoding.items import BeamOutput
from sidtune.decoding.trie import SidTrie

_NEVER = float("-inf")


@torch.no_grad()
def sid_beam_search(
    model: nn.Module,
    input_ids: Tensor,
    mask: Tensor | None = None,
    *,
    trie: SidTrie,
    sid_token_ids: np.ndarray | Tensor | None = None,
    num_beams: int = 10,
    renormalize: bool = True,
    max_rows: int | None = None,
    memory_budget: int | None = None,
    filters: RequestFilter | None = None,
    num_return_sequences: int | None = None,
    **generate_arguments: Any,
) -> Any:
    """Finds the `num_beams` most probable SIDs of every prompt.

    Called as a function it returns a `BeamOutput`. Called by transformers,
    `model.generate(**batch, custom_generate=sid_beam_search, trie=trie, num_beams=10)`, it returns what `generate` does:
    (B * R, T + depth) token ids, each prompt's SIDs best first, or with `return_dict_in_generate=True` an output with
    `sequences` and `sequences_scores`; a SID that does not exist (fewer than R leaves) is padding with score -inf.

    With `num_beams >= trie.num_leaves` the result is exhaustive; with fewer it is a beam search, which may miss a SID
    whose prefix is improbable. No gradient is taken and every module keeps its train or evaluation mode.

    Args:
        model: decoder-only or encoder-decoder language model of transformers, or one wrapped by PEFT.
        input_ids: (B, T) prompts that end where the SID begins, padded on the left for decoder-only models; for an
            encoder any padding will do.
        mask: (B, T), 1 on tokens, 0 on padding; default all 1. The keyword `attention_mask` means the same.
        trie: legal SIDs, possibly filtered by `restrict`; copied to the model's device unless it is there.
        sid_token_ids: (sum of level sizes,) token id of every code, level by level, as `Vocabulary.sid_token_ids`.
            Default: the ones the trie was bound to (`SidTrie.bind`).
        num_beams: K, at least 1; may exceed the number of leaves.
        renormalize: scores over the legal codes (default), or over the whole vocabulary.
        max_rows: upper limit for prompts x beams in one pass, to bound memory. Prompts are split into chunks of at
            least one; the beam is never cut. Default: all at once.
        memory_budget: upper limit in bytes for the same purpose, by an estimate of cache, activations and candidates.
        filters: what each prompt may get, on top of the trie; see `sidtune.decoding.filters`.
        num_return_sequences: R, for `generate` only: how many of the K SIDs come back; default all.

    Raises:
        ConfigError: the model or an option does not fit. DataError: prompts or token ids do not fit.
        SidtuneError: the model's scores are not numbers.
    """
    call = GenerateCall.of(generate_arguments, input_ids, mask, "sid_beam_search")
    check_limits("num_beams", num_beams, max_rows, memory_budget)
    if num_return_sequences is not None and not 1 <= num_return_sequences <= num_beams:
        raise ConfigError(f"num_return_sequences must be 1 to num_beams = {num_beams}, got {num_return_sequences}.")
    search = Search.prepare(model, call, trie, sid_token_ids, filters, whole_vocabulary=not renormalize)
    width = min(num_beams, search.trie.num_allowed_leaves)
    leaves = torch.full((search.prompts, num_beams), -1, dtype=torch.int64, device=search.device)
    scores = torch.full((search.prompts, num_beams), _NEVER, dtype=torch.float32, device=search.device)
    if width:
        for rows in search.chunks(max_rows, width, memory_budget):
            leaves[rows, :width], scores[rows, :width] = _search(search, width)
    if bool(scores.isnan().any()):
        raise SidtuneError(NOT_NUMBERS)
    found = BeamOutput(leaves, scores)
    return call.answer(found.leaves, found.scores, search, num_return_sequences) if call.by_generate else found


def _search(search: Search, num_beams: int) -> tuple[Tensor, Tensor]:
    """(B, num_beams) leaves and scores, best first. `num_beams` is at most the number of allowed leaves."""
    trie, prompts = search.trie, search.rows
    nodes = torch.zeros(prompts, 1, dtype=torch.int64, device=search.device)
    scores = torch.zeros(prompts, 1, dtype=torch.float32, device=search.device)
    for level in range(trie.depth):
        width = min(num_beams, trie.allowed_counts[level + 1])
        codes, children, legal = search.children(nodes, level)
        columns, total = search.steps.logits(level)
        candidates = _extend(scores, columns.gather(-1, codes), total, legal)
        chosen = _top_in_order(candidates.flatten(1), width)
        scores = candidates.flatten(1).gather(1, chosen)
        # A NaN stays visible to the caller; it must not look like a dead beam.
        nodes = children.flatten(1).gather(1, chosen).where(scores != _NEVER, -1)
        if level + 1 < trie.depth:
            search.advance(level, codes.flatten(1).gather(1, chosen), chosen // codes.shape[-1])
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    nodes = nodes.gather(1, order)
    return (nodes - trie.level_starts[trie.depth]).where(nodes >= 0, -1), scores


def _extend(scores: Tensor, logits: Tensor, total: Tensor | None, legal: Tensor) -> Tensor:
    """Scores of all continuations: (B, W) and (B, W, C) give (B, W, C), -inf where not legal.

    The softmax runs over the legal codes when `total` is None, else `total (B, W)` is its logarithm of the normaliser.
    """
    logits = logits.masked_fill(~legal, _NEVER)
    if total is None:
        total = logits.logsumexp(dim=-1)
    return (scores[..., None] + (logits - total[..., None])).masked_fill(~legal, _NEVER)


def _top_in_order(values: Tensor, k: int) -> Tensor:
    """Positions (B, k) of the k largest of (B, F), ascending; of equal values the first ones are taken.

    `topk` leaves the choice among equal values to the device, so only its k-th value is used. Candidates stand in
    ascending node order, and so do the positions returned, which keeps that order for the next level.
    """
    values = values.nan_to_num(nan=float("inf"), neginf=_NEVER)
    smallest = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > smallest, values == smallest
    wanted = k - above.sum(dim=1, keepdim=True)
    taken = above | (equal & (equal.cumsum(dim=1) <= wanted))
    place = (taken.cumsum(dim=1) - 1).where(taken, k)
    positions = torch.arange(values.shape[1], device=values.device).expand_as(values)
    return place.new_empty(len(values), k + 1).scatter_(1, place, positions)[:, :k]

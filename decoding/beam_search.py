"""Beam search over a catalogue's SID trie: every result is an item's SID, after exactly `depth` steps.

Scores are log-probabilities of a SID given its prompt. By default each step's softmax runs over the legal codes only,
so the scores of all leaves of a trie sum to one: the function that training, evaluation and serving share
(`specs/crs_debiased_grpo.md` 4.10 and 5.3; the paper does not say which it used). `renormalize=False` gives the
log-probability under the whole vocabulary instead. The legal set is exact per prefix, and nothing runs after it.

Differences from `generate`: no generation settings (temperature, top-p, length penalty, forced tokens, EOS) apply; the
prompt is read once, before there are beams; a beam that cannot go on is -inf, never an illegal item or a duplicate;
equal scores are ordered by the lexicographic rank of the SID's codes, within the beam at every level and in the result,
so runs agree. Items that share a SID share its score; their order is the matter of `sidtune.decoding.items`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.decoding.model_steps import ModelSteps, evaluating
from sidtune.decoding.trie import SidTrie

_NEVER = float("-inf")


@dataclass(frozen=True)
class BeamOutput:
    """The best leaves of each prompt.

    Attributes:
        leaves: (B, K) int64, leaf numbers of the trie, best first, distinct; -1 where there are fewer than K leaves.
        scores: (B, K) float32 log-probabilities (natural logarithm), falling; -inf where the leaf is -1.
    """

    leaves: Tensor
    scores: Tensor


@torch.no_grad()
def sid_beam_search(
    model: nn.Module,
    trie: SidTrie,
    sid_token_ids: np.ndarray | Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    num_beams: int = 10,
    *,
    renormalize: bool = True,
    max_rows: int | None = None,
) -> BeamOutput:
    """Finds the `num_beams` most probable SIDs of every prompt.

    With `num_beams >= trie.num_leaves` the result is exhaustive; with fewer it is a beam search, which may miss a SID
    whose prefix is improbable. No gradient is taken and every module keeps its train or evaluation mode.

    Args:
        model: decoder-only or encoder-decoder language model of transformers, or one wrapped by PEFT.
        trie: legal SIDs, possibly filtered by `restrict`; copied to the model's device unless it is there.
        sid_token_ids: (sum of level sizes,) token id of every code, level by level, as `Vocabulary.sid_token_ids`.
        input_ids: (B, T) prompts that end where the SID begins, padded on the left for decoder-only models; for an
            encoder any padding will do.
        attention_mask: (B, T), 1 on tokens, 0 on padding; default all 1.
        num_beams: K, at least 1; may exceed the number of leaves.
        renormalize: scores over the legal codes (default), or over the whole vocabulary.
        max_rows: upper limit for prompts x beams in one pass, to bound memory. Prompts are split into chunks of at
            least one; the beam is never cut. Default: all at once.

    Raises:
        ConfigError: the model or an option does not fit. DataError: prompts or token ids do not fit.
        SidtuneError: the model's scores are not numbers.
    """
    if num_beams < 1 or (max_rows is not None and max_rows < 1):
        raise ConfigError(f"num_beams and max_rows must be at least 1, got {num_beams} and {max_rows}; raise them.")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    device = _device_of(model)
    input_ids, mask = input_ids.to(device), mask.to(device=device, dtype=torch.int64)
    trie = trie.to(device)
    level_tokens = split_levels(trie, sid_token_ids, _vocabulary_size(model), device)
    steps = ModelSteps(model, level_tokens, whole_vocabulary=not renormalize)
    _check_prompts(model, steps, input_ids, mask, trie.depth)
    if steps.encoder_decoder:
        input_ids, mask = _pad_right(input_ids, mask)
    width = min(num_beams, trie.num_allowed_leaves)
    chunk = len(input_ids) if max_rows is None else max(1, max_rows // max(1, width))
    leaves = torch.full((len(input_ids), num_beams), -1, dtype=torch.int64, device=device)
    scores = torch.full((len(input_ids), num_beams), _NEVER, dtype=torch.float32, device=device)
    if width == 0:
        return BeamOutput(leaves, scores)
    with evaluating(model):
        for first in range(0, len(input_ids), chunk):
            part = slice(first, first + chunk)
            leaves[part, :width], scores[part, :width] = _search(
                steps, trie, *_trim(input_ids[part], mask[part]), width
            )
    if bool(scores.isnan().any()):
        raise SidtuneError(
            "The model's scores are not numbers (NaN), so no ranking exists; check the checkpoint for NaN weights, or "
            "use bfloat16 or float32 instead of float16."
        )
    return BeamOutput(leaves, scores)


def split_levels(trie: SidTrie, sid_token_ids: np.ndarray | Tensor, vocabulary: int | None, device) -> list[Tensor]:
    """The token ids of each level's codes as tensors on `device`.

    Raises:
        DataError: not one distinct id per code of all levels, or an id outside the vocabulary (None: size unknown).
    """
    ids = sid_token_ids if isinstance(sid_token_ids, Tensor) else torch.tensor(sid_token_ids)
    expected = sum(trie.level_sizes)
    if ids.shape != (expected,) or ids.is_floating_point():
        raise DataError(
            f"sid_token_ids must hold one integer per code of all {trie.depth} levels, shape ({expected},), got "
            f"{tuple(ids.shape)}; pass the `sid_token_ids` of the vocabulary made for these SIDs."
        )
    ids = ids.to(device=device, dtype=torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary) or len(ids.unique()) != expected:
        raise DataError(
            f"sid_token_ids must be distinct ids of the model's vocabulary (size {vocabulary}), got ids from {low} to "
            f"{high}; use the model, tokenizer and vocabulary of one folder."
        )
    return list(ids.split(list(trie.level_sizes)))


def _search(steps: ModelSteps, trie: SidTrie, ids: Tensor, mask: Tensor, num_beams: int) -> tuple[Tensor, Tensor]:
    """(B, num_beams) leaves and scores, best first. `num_beams` is at most the number of allowed leaves."""
    nodes = torch.zeros(len(ids), 1, dtype=torch.int64, device=ids.device)
    scores = torch.zeros(len(ids), 1, dtype=torch.float32, device=ids.device)
    steps.read_prompt(ids, mask)
    for level in range(trie.depth):
        width = min(num_beams, trie.allowed_counts[level + 1])
        columns, total = steps.logits(level)
        codes, children, legal = trie.children(nodes, level)
        candidates = _extend(scores, columns.gather(-1, codes), total, legal)
        chosen = _top_in_order(candidates.flatten(1), width)
        parents = chosen // codes.shape[-1]
        scores = candidates.flatten(1).gather(1, chosen)
        # A NaN stays visible to the caller; it must not look like a dead beam.
        nodes = children.flatten(1).gather(1, chosen).where(scores != _NEVER, -1)
        if level + 1 < trie.depth:
            steps.advance(steps.level_tokens[level][codes.flatten(1).gather(1, chosen)], parents)
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


def _pad_right(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves padding behind the prompt: encoders with learned positions (BART) count columns, padding included."""
    order = mask.argsort(dim=1, descending=True, stable=True)
    return input_ids.gather(1, order), mask.gather(1, order)


def _trim(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Drops the outer columns that are padding in every prompt of the chunk."""
    used = mask.any(dim=0).nonzero().flatten()
    part = slice(int(used[0]), int(used[-1]) + 1)
    return input_ids[:, part], mask[:, part]


def _check_prompts(model: nn.Module, steps: ModelSteps, input_ids: Tensor, mask: Tensor, depth: int) -> None:
    if input_ids.ndim != 2 or input_ids.numel() == 0 or input_ids.is_floating_point() or mask.shape != input_ids.shape:
        raise DataError(
            f"Prompts must be a non-empty integer array (B, T) with a mask of the same shape, got "
            f"{tuple(input_ids.shape)} and {tuple(mask.shape)}; tokenise them with padding=True."
        )
    if not bool(((mask == 0) | (mask == 1)).all() and mask.any(dim=1).all()):
        raise DataError("The attention mask must be 0 or 1 and 1 somewhere in every prompt; give every prompt a token.")
    if not steps.encoder_decoder and not bool((mask.diff(dim=1) >= 0).all()):
        raise DataError("A decoder-only model needs prompts padded on the left; set tokenizer.padding_side = 'left'.")
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise DataError(
            f"The prompts hold token ids from {low} to {high} but the model has a vocabulary of {vocabulary}; "
            "use the tokenizer of this model."
        )
    limit = getattr(steps.config, "max_position_embeddings", None)
    longest = int(mask.sum(dim=1).max()) + (0 if steps.encoder_decoder else depth - 1)
    if limit is not None and longest > limit:
        raise DataError(f"The longest prompt needs {longest} positions but the model has {limit}; shorten the prompts.")


def _vocabulary_size(model: nn.Module) -> int | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(head, "out_features", None)


def _device_of(model: nn.Module) -> torch.device:
    return model.device if hasattr(model, "device") else next(model.parameters()).device

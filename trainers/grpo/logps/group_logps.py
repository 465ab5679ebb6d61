"""Per-token log-probabilities, with gradients, of completions in groups that share a prompt; the prompt is read once.

`group_logps` gives what TRL's `GRPOTrainer._get_per_token_logps_and_entropies` gives for the same rows, from fewer tokens:
G completions of c tokens behind a prompt of p cost p + G (c - 1) tokens instead of G (p + c) (`packing.py`), and at
SID positions the softmax runs over the legal codes of the trie, of which only the rows are multiplied (`scores.py`).

How it enters the model. The forward goes through `model` as it is given (DDP, DeepSpeed, PEFT, compiled, mixed precision),
with a tree attention mask and explicit positions. For that call the *head module's* forward is replaced: it receives the
states of all positions, scores the wanted ones and returns the few numbers as if they were logits. So every hook of a
wrapper fires where it should: ZeRO-3 gathers the head for it, DDP finds the results in the model's output.

Nothing of that is taken for granted. The first call on a model runs a few random tokens three ways (the model untouched
on ordinary rows, scored in the head, packed) and picks what gives the same numbers. A model that changes its logits
behind the head (soft-capping, scaling) is asked for the logits of the scored positions instead; a model that cannot take
the mask (flash attention, ALiBi, state-space layers) gets ordinary rows, one per completion, and says so once. A sliding
window is honoured by falling back for rows longer than it.

Dropout: a prompt read once has one dropout mask for its whole group, not one per completion. That is another draw of the
same noise, not another objective; it is said once. Mixture-of-experts balancing losses are not computed here.

The sharing is our choice (the specs call for it in no paper); renormalising over the trie is `crs_debiased_grpo.md` 5.3.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sidtune.core.errors import ConfigError
from sidtune.decoding.trie import SidTrie
from sidtune.trainers.grpo.logps.packing import PackedRows, pack, plain_rows, read_batch
from sidtune.trainers.grpo.logps.passes import Ability, ability_of, base_model, run_pass
from sidtune.trainers.grpo.logps.scores import Levels, Scorer, TokenTargets, check_temperature, find_targets


@dataclass(frozen=True)
class LogpsOutput:
    """Scores of the completion tokens; 0 where the completion mask is 0 or a token is not scored.

    Attributes:
        log_probs: (B, C) float32, natural logarithm, with gradient.
        entropies: (B, C) float32, of the same distribution as each log-probability, or None.
        log_z: (B, C) float32 without gradient: log of the whole vocabulary's mass that lies on the legal codes; 0 at
            free-text positions, NaN at SID positions that were not measured. Or None.
        packed: True when prompts were shared, False after a fallback.
        tokens: tokens the model read on this process, padding included.
    """

    log_probs: Tensor
    entropies: Tensor | None
    log_z: Tensor | None
    packed: bool
    tokens: int


def group_logps(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    target_ids: Tensor | None = None,
    groups: Tensor | None = None,
    scored: Tensor | None = None,
    temperature: float = 1.0,
    trie: SidTrie | None = None,
    sid_token_ids: np.ndarray | Tensor | None = None,
    sid_start: Tensor | None = None,
    compute_entropy: bool = False,
    compute_log_z: bool = False,
    log_z_rows: int | None = None,
    max_tokens: int | None = None,
    float32_head: bool = False,
    share_prompts: bool = True,
) -> LogpsOutput:
    """Log-probabilities of completion tokens, of which rows of a group share their prompt.

    Args:
        model: decoder-only language model of transformers, also inside PEFT, DDP or DeepSpeed. Call it inside the
            autocast of the training step if there is one.
        prompt_ids, prompt_mask: (B, P) integers and 1 on tokens; padding at either end.
        completion_ids, completion_mask: (B, C), ones and then zeros. A row of zeros is not read.
        target_ids: (B, C) tokens to score where they differ from those that are read. Default: `completion_ids`.
        groups: (B,) integers, equal for rows with the same prompt; rows may come in any order. Default: found by
            comparing the prompts.
        scored: (B, C), tokens whose log-probability is wanted; the rest is 0 and costs nothing. Default: all. An EOS
            behind a SID that no loss looks at would cost the whole head, so leave it out.
        temperature: divides the logits, above 0.
        trie, sid_token_ids, sid_start: legal SIDs, (sum of level sizes,) token ids of their codes level by level, and
            per row the column of the completion where its SID begins, -1 for none; all three or none. Without them every
            token is scored over the whole vocabulary. A SID cut off by the mask counts as far as it goes.
        compute_entropy: also the entropy at every position.
        compute_log_z: also log Z at SID positions; costs the whole head there, without gradient.
        log_z_rows: measure log Z in about this many rows only, evenly chosen. Default: all.
        max_tokens: split into passes of at most this many tokens, padding included. Default: one pass. Several processes
            agree on the number of passes.
        float32_head: multiply the head in float32 under mixed precision.
        share_prompts: False reads every row on its own.

    Raises:
        ConfigError: an encoder-decoder model, or options that do not fit together.
        DataError: rows, groups or SIDs that do not fit; see `read_batch` and `find_targets`.
    """
    check_temperature(temperature)
    base = base_model(model)
    levels = _levels(trie, sid_token_ids, sid_start, completion_ids.device)
    batch = read_batch(prompt_ids, prompt_mask, completion_ids, completion_mask, groups, scored)
    longest = int((batch.prompt_length + batch.completion_length).max())
    ability = ability_of(model, base, longest)
    packed = share_prompts and ability.packed
    if packed:
        _mention_dropout(model, ability)
        passes = pack(batch, ability.hidden_size, ability.row_limit, max_tokens)
    else:
        passes = plain_rows(batch, max_tokens)
    measured = _measured_rows(len(completion_ids), log_z_rows, completion_ids.device)
    targets = find_targets(
        completion_ids if target_ids is None else target_ids, completion_mask, levels, sid_start, measured
    )
    scorer = Scorer(levels, temperature, compute_entropy, compute_log_z, float32_head)
    tokens = torch.cat([prompt_ids, completion_ids], dim=1).reshape(-1)
    scores = _run(model, base, passes, tokens, targets, scorer, ability, packed, max_tokens is not None)
    columns = list(scores.view(*completion_ids.shape, -1).unbind(-1))
    return LogpsOutput(
        log_probs=columns.pop(0),
        entropies=columns.pop(0) if compute_entropy else None,
        log_z=columns.pop(0).detach() if compute_log_z else None,
        packed=packed,
        tokens=sum(rows.source.numel() for rows in passes),
    )


def _run(
    model: nn.Module,
    base: nn.Module,
    passes: list[PackedRows],
    tokens: Tensor,
    targets: TokenTargets,
    scorer: Scorer,
    ability: Ability,
    packed: bool,
    split: bool,
) -> Tensor:
    """(B * C, columns) float32 scores; every process runs as many passes as the one with the most."""
    found, where = [], []
    extra = _most(len(passes), tokens.device) - len(passes) if split else 0
    for rows in passes:
        rows = rows.to(tokens.device)
        found.append(run_pass(model, base, rows, tokens, targets[rows.target], scorer, ability, packed))
        where.append(rows.target)
    values, index = torch.cat(found), torch.cat(where)
    for _ in range(extra):  # keeps the collectives of the processes in step; adds nothing
        rows = passes[-1].to(tokens.device)
        idle = run_pass(model, base, rows, tokens, targets[rows.target], scorer, ability, packed)
        values = values + 0.0 * idle[:, 0].sum()
    empty = values.new_zeros(len(targets.tokens), values.shape[1])
    return empty.index_put((index,), values)


def _most(count: int, device: torch.device) -> int:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _levels(trie: SidTrie | None, sid_token_ids: Any, sid_start: Tensor | None, device: torch.device) -> Levels | None:
    given = [value is not None for value in (trie, sid_token_ids, sid_start)]
    if not any(given):
        return None
    if not all(given):
        raise ConfigError("trie, sid_token_ids and sid_start belong together; pass all three or none.")
    return Levels(trie, sid_token_ids, device)


def _measured_rows(rows: int, wanted: int | None, device: torch.device) -> Tensor:
    if wanted is not None and wanted < 1:
        raise ConfigError(f"log_z_rows must be at least 1, got {wanted}; leave it out to measure every row.")
    step = 1 if wanted is None else max(1, rows // wanted)
    return torch.arange(rows, device=device) % step == 0


def _mention_dropout(model: nn.Module, ability: Ability) -> None:
    if "dropout" in ability.mentioned or not model.training or not torch.is_grad_enabled():
        return
    if any(isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in model.modules()):
        ability.mentioned.add("dropout")
        warnings.warn(
            "Dropout is on: a prompt shared by a group is read once and so has one dropout mask for all its "
            "completions; set disable_dropout=True for log-probabilities without noise.",
            stacklevel=3,
        )

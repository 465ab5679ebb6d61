"""From the rewards of all processes to the advantages of this one: which estimator goes with which rollout.

The estimators are in `advantages.py`; this is the choice between them, and what is logged about a generation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sidtune.core.errors import DataError
from sidtune.decoding.trie import SidTrie
from sidtune.trainers.grpo import advantages as estimators
from sidtune.trainers.grpo.config import DebiasedGRPOConfig, position_weights
from sidtune.trainers.grpo.diagnostics import group_metrics
from sidtune.trainers.grpo.rollouts import Rollout, Rows


@dataclass(frozen=True)
class Credited:
    """What a generation earned, for the n rows of this process.

    Attributes:
        advantages: (n,), or (n, C) with position-level credit; float64.
        scale: (n,) what the rewards' standard deviation divided the advantages by; 1 without.
        metrics: see `diagnostics.group_metrics`; the same on every process.
    """

    advantages: Tensor
    scale: Tensor
    metrics: dict[str, float]


class Credit:
    """Turns rewards into advantages as the config says.

    Args:
        config: the config. trie: the catalogue.
    """

    def __init__(self, config: DebiasedGRPOConfig, trie: SidTrie) -> None:
        self.config = config
        self._weights = torch.tensor(position_weights(config.position_weights, trie.depth), dtype=torch.float64)

    def __call__(
        self,
        rollout: Rollout,
        rewards: Tensor,
        weights: Tensor,
        matches: Tensor,
        rows: Rows,
        width: int,
        gather: Callable[[Tensor], Tensor],
    ) -> Credited:
        """Advantages of this process.

        Args:
            rollout: its rows. rewards: (N, n) of all processes, NaN where one does not apply. weights: (n,).
            matches: (n, L) codes that agree with the target, -1 without a target. rows: where its rows stand.
            width: columns of the completions. gather: rows of all processes, in order; collective.
        """
        config, size = self.config, rows.group_size
        components, weights = rewards.double().cpu(), weights.double().cpu()
        total = (components * weights).nansum(1).masked_fill(components.isnan().all(1), torch.nan)
        closed = None if rollout.closed is None else gather(rollout.closed.long()).bool()
        if closed is not None and config.mask_truncated_completions:
            cut = gather(rollout.cut.long()).bool()
            components = components.masked_fill(cut[:, None], torch.nan)
            total = total.masked_fill(cut, torch.nan)
        leaves, matches = gather(rollout.leaves[:, 0]), gather(matches)
        log_probs = gather(rollout.scores[:, 0])
        complete = None if rollout.complete is None else gather(rollout.complete.long()).bool()
        metrics = group_metrics(total, leaves, matches, closed, size)
        every, scale = self._advantages(total, components, weights, log_probs, complete, size)
        metrics["advantage/abs_mean"] = every.abs().mean().item()
        here = slice(rows.first, rows.first + rows.count)
        if config.position_credit != "none":
            columns = self._by_position(every, matches, size)[here]
            every = torch.nn.functional.pad(columns, (0, width - columns.shape[1]))
            return Credited(every, scale[here], metrics)
        return Credited(every[here], scale[here], metrics)

    def _advantages(
        self,
        total: Tensor,
        components: Tensor,
        weights: Tensor,
        log_probs: Tensor,
        complete: Tensor | None,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        config, one = self.config, torch.ones_like(total)
        baseline = config.baseline != "none"
        # Equal rewards leave rounding errors: no group of them may look as if it had something to teach.
        equal = baseline & (estimators.spread(total, size).repeat_interleave(size) < config.snap)
        if config.rollout == "beam":
            values = estimators.beam_advantages(total, log_probs, size, baseline=baseline)
            return values.masked_fill(equal, 0.0), one
        if config.rollout == "without_replacement":
            whole = complete.view(-1, size)[:, 0]
            values = estimators.set_advantages(total, log_probs, size, complete=whole, baseline=baseline)
            return values.masked_fill(equal, 0.0), one
        if config.multi_objective_aggregation == "normalize_then_sum":
            flat = estimators.spread(total, size).repeat_interleave(size) < config.snap
            decoupled = estimators.decoupled_rewards(components, weights, size)
            values = estimators.group_advantages(
                decoupled, len(decoupled), baseline="group_mean", scale="group", snap=0.0
            )
            return values.masked_fill(flat, 0.0), one
        scale = estimators.scale_of(total, size, config.scale_rewards)
        options = {"baseline": config.baseline, "scale": config.scale_rewards, "snap": config.snap}
        return estimators.group_advantages(total, size, **options), scale

    def _by_position(self, item: Tensor, matches: Tensor, size: int) -> Tensor:
        """(N, L) advantages."""
        config = self.config
        if bool((matches < 0).any()):
            raise DataError(
                "TPMA compares codes with those of a target, but a prompt has none; leave it out of the data."
            )
        return estimators.tpma_advantages(
            *(matches.bool(), item, size, self._weights),
            item_weight=config.item_weight,
            baseline=config.baseline,
            scale=config.scale_rewards,
            snap=config.snap,
        )

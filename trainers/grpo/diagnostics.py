"""Diagnostics of GRPO from the first step, and a stop with an explanation when a run can no longer learn.

A run whose groups all have equal rewards or whose rollouts hold no catalogue item would go on
for days with a smooth curve. Every number here is summed over processes, so all of them see the same and stop together.
Our own; the sheet asks for the log Z monitor (`specs/crs_debiased_grpo.md` 4, row 10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sidtune.core.errors import SidtuneError
from sidtune.trainers.grpo.advantages import spread

DEGENERATE = 1e-6


@dataclass
class Health:
    """What the last generations looked like; the same on every process.

    Attributes:
        flat: generations in a row in which no group had differing rewards.
        valid: share of rows with a catalogue item in the last generation.
        scored: share of rows that a reward could score in the last generation.
        closed: share of reasonings that ended by their own mark; 1 without reasoning.
    """

    flat: int = 0
    valid: float = 1.0
    scored: float = 1.0
    closed: float = 1.0

    def saw_generation(self, metrics: dict[str, float]) -> None:
        self.flat = self.flat + 1 if metrics["group/zero_variance"] >= 1.0 else 0
        self.valid, self.scored = metrics["rollout/valid"], metrics["rollout/scored"]
        self.closed = metrics.get("rollout/closed", 1.0)


def group_metrics(
    rewards: Tensor, leaves: Tensor, matches: Tensor, closed: Tensor | None, group_size: int
) -> dict[str, float]:
    """Metrics of one generation.

    Args:
        rewards: (N,) total reward of all rows of all processes, NaN = cannot be scored. leaves: (N,) first leaf, -1 =
            none.
        matches: (N, L) codes that agree with the row's best target; -1 in rows without targets.
        closed: (N,) bool, or None without reasoning.

    Returns:
        `group/zero_variance`, `group/distinct_items` (mean number of different first items), `rollout/valid`,
        `rollout/scored`, `hit/level_1` ... `hit/level_L` (share of rows whose first l codes are a target's), and
        `rollout/closed` with reasoning.
    """
    flat = (spread(rewards, group_size) < DEGENERATE).double().mean()
    ordered = leaves.view(-1, group_size).sort(dim=1).values
    distinct = ((ordered.diff(dim=1) != 0) & (ordered[:, 1:] >= 0)).sum(1) + (ordered[:, 0] >= 0)
    known = matches[:, 0] >= 0
    prefix = (matches == 1).cumprod(1)[known].double()
    found = {
        "group/zero_variance": flat.item(),
        "group/distinct_items": distinct.double().mean().item(),
        "rollout/valid": (leaves >= 0).double().mean().item(),
        "rollout/scored": (~rewards.isnan()).double().mean().item(),
    }
    if len(prefix):
        found |= {f"hit/level_{n}": value for n, value in enumerate(prefix.mean(0).tolist(), 1)}
    return found | ({} if closed is None else {"rollout/closed": closed.double().mean().item()})


def ended_metrics(cut: Tensor, lengths: Tensor) -> dict[str, float]:
    """TRL's metrics of completions that ended, from (N,) whether a reasoning was cut and its sampled tokens."""
    ended = lengths[~cut].float() if not bool(cut.all()) else torch.zeros(1)
    found = {f"completions/{kind}_terminated_length": getattr(ended, kind)().item() for kind in ("mean", "min", "max")}
    return found | {"completions/clipped_ratio": cut.float().mean().item()}


class LegalMass:
    """Running mean of log Z, the logarithm of the probability of the legal tokens, at each SID level."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._sums: Tensor | None = None

    def add(self, log_z: Tensor, start: Tensor) -> None:
        """log_z: (B, C), NaN where it was not measured; start: (B,) column of the SID, -1 = none."""
        columns = start.clamp(min=0)[:, None] + torch.arange(self.depth, device=start.device)
        values = log_z.detach().gather(1, columns).double()
        rows = (start >= 0) & ~values.isnan().any(1)
        values = values.where(rows[:, None], 0.0)
        sums = torch.cat([values.sum(0), rows.sum().double()[None]])
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, accelerator: Any, device: torch.device) -> dict[str, float]:
        """Means over all processes since the last call; collective. Empty when nothing was seen."""
        sums = self._sums if self._sums is not None else torch.zeros(self.depth + 1, dtype=torch.float64, device=device)
        self._sums = None
        *levels, count = accelerator.reduce(sums.float() if device.type == "mps" else sums, "sum").tolist()
        if not count:
            return {}
        means = [value / count for value in levels]
        return {f"log_z/level_{n}": value for n, value in enumerate(means, 1)} | {"log_z/sid": sum(means)}


class StopDegenerate(TrainerCallback):
    """Ends a run that cannot learn, with one sentence on why.

    Args:
        health: what the trainer fills. patience: generations without a differing reward that are borne; 0 = any number.
    """

    def __init__(self, health: Health, patience: int) -> None:
        self.health, self.patience = health, patience

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        health, step = self.health, state.global_step
        if health.valid <= 0:
            raise SidtuneError(
                f"No rollout of step {step} holds a catalogue item, so nothing can be rewarded; check that the model, the SIDs "
                "and the trie belong together."
            )
        if not self.patience or health.flat < self.patience:
            return
        if health.closed <= 0:
            raise SidtuneError(
                f"In the last of {health.flat} generations without differing rewards (up to step {step}) no reasoning ended by "
                f"itself{', so all were left out' if health.scored <= 0 else ''}; raise "
                "max_completion_length, or teach the format by supervised fine-tuning first."
            )
        if health.scored <= 0:
            raise SidtuneError(
                f"In the last of {health.flat} generations (up to step {step}) no rollout could be scored; check that the prompts "
                "have targets and that the rewards apply."
            )
        raise SidtuneError(
            f"In the last {health.flat} generations (up to step {step}) all rewards of each group were equal, so there was no "
            "gradient. Choose prompts that the model sometimes gets right, raise num_generations or temperature, or reward "
            "the whole list or the prefix (list_ndcg with gammas, prefix_match)."
        )

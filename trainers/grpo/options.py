"""What a GRPO run can be told, beside its folders."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

from sidtune.core.config import SEEDS, build, check_range
from sidtune.core.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class GRPOOptions:
    """Options of a run; checked when they are made.

    Attributes:
        rewards: name → weight or options, see `trainers.rewards`.
        args: fields of `trainers.grpo.config.DebiasedGRPOConfig`: preset, rollout, batch sizes, learning rate, ...
        train: what trains: "rows", "lora" (LoRA factors and SID rows) or "all".
        lora: options of LoRA for train="lora" (fields of `peft.LoraConfig`).
        gains: how feedback becomes gains, see `trainers.rewards.gains.GainsConfig`.
        position_bias: null, `interventions` (estimated from the train requests), or a folder that holds one.
        exposure: also divide by the share of like requests that showed the item (`gains.shown_rates`); null = where `position_bias`
            is set.
        split: requests to train on: "train", or "valid", which SFT has not seen (choose no settings on it then).
        hard_set: parquet file with a column `request_id`: only these requests are used; null for all.
        max_requests: at most so many prompts, drawn at random among the requests that can be rewarded; null for all.
        end_of_reasoning: text of the token that ends a reasoning (rollout "reasoning").
        max_length: most tokens of prompt, reasoning and SID together; null takes the model's prompt settings.
        seed: of the choice of requests, the order, the rollouts and LoRA.
    """

    rewards: dict = field(default_factory=lambda: {"list_ndcg": 1.0})
    args: dict = field(default_factory=dict)
    train: Literal["rows", "lora", "all"] = "all"
    lora: dict = field(default_factory=dict)
    gains: dict = field(default_factory=dict)
    position_bias: str | None = None
    exposure: bool | None = None
    split: Literal["train", "valid"] = "train"
    hard_set: str | None = None
    max_requests: int | None = None
    end_of_reasoning: str = "</think>"
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        from sidtune.trainers.grpo.args import checked_args
        from sidtune.trainers.rewards.batch import build_rewards
        from sidtune.trainers.rewards.gains import GainsConfig

        checked_args(self.args, "args")
        build_rewards(self.rewards)
        build(GainsConfig, self.gains, "gains")
        if self.lora and self.train != "lora":
            raise ConfigError(f"LoRA options need train: lora, but train is '{self.train}'; change one of them.")
        named = [
            one.get("reward", name) if isinstance(one, dict) else name for name, one in self.rewards.items() if one != 0
        ]
        if "list_ndcg" in named and (self.position_bias or self.exposure):
            logger.warning(
                "list_ndcg divides by the best list, and with it the correction of a request's only positive: the reward "
                "stays that of raw feedback there; use list_dcg with position_bias or exposure."
            )
        check_range(self, 1, "max_requests", "max_length", most=10**9)
        check_range(self, 0, "seed", most=SEEDS)

    @property
    def corrects_exposure(self) -> bool:
        """Whether gains are divided by the chance that the item was shown."""
        return self.position_bias is not None if self.exposure is None else self.exposure

"""Config of debiased GRPO: TRL's `GRPOConfig` with every fix its own switch, and two presets that set many of them.

- `faithful`: CRS's R-GRPO as far as it is known: reasonings are sampled, the whole beam list behind each is the answer,
  and the rest is GRPO (length and standard-deviation bias included).
- `strict`: nothing known to be biased (`specs/crs_debiased_grpo.md` 4): constant length normaliser, no standard
  deviation, leave-one-out baseline, degenerate groups snapped to zero, log-probabilities over the trie for old, new and
  reference policy, importance-weighted KL, a higher upper clip. The sheet also masks truncated reasonings; then the policy
  never sees a reward of one that it did not close, and the reward `format` does nothing. Here a reasoning that is cut by force
  and closed is a rollout like any other, whose sampled tokens earn what the list behind it earns.

A preset fills in only what is left at None; `preset_values` says what it filled. Numbers that the paper does not
publish are the sheet's starting values (2.7). Settings that contradict each other are refused in one sentence before
any work.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from sidtune.core.errors import ConfigError, nearest
from sidtune.trainers.grpo.advantages import BASELINES, SCALES
from sidtune.trainers.grpo.losses import CLIPPED, LOSSES

ROLLOUTS = ("reasoning", "sample", "without_replacement", "beam")
CREDITS = ("reasoning", "list", "sid")
POSITION_CREDITS = ("none", "tpma")
DIRECT = ("sample", "without_replacement", "beam")

PRESETS: dict[str, dict[str, Any]] = {
    "faithful": {
        "rollout": "reasoning",
        "loss_type": "grpo",
        "scale_rewards": "group",
        "baseline": "group_mean",
        "snap": 0.0,
        "trie_renormalize": False,
        "beta": 1e-3,
        "use_bias_correction_kl": False,
        "epsilon_high": 0.28,
        "mask_truncated_completions": False,
    },
    "strict": {
        "rollout": "sample",
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "baseline": "leave_one_out",
        "snap": 1e-6,
        "trie_renormalize": True,
        "beta": 0.0,
        "use_bias_correction_kl": True,
        "epsilon_high": 0.28,
        "mask_truncated_completions": True,
    },
}
# What stock TRL would do; the comparison of every fix starts here.
PRESETS["none"] = {
    "rollout": "sample",
    "loss_type": "dapo",
    "scale_rewards": "group",
    "baseline": "group_mean",
    "snap": 0.0,
    "trie_renormalize": False,
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "mask_truncated_completions": False,
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DebiasedGRPOConfig(GRPOConfig):
    """`GRPOConfig` with the switches below. A field that is None is filled by the preset.

    Attributes:
        preset: "faithful", "strict", or "none" (what stock TRL does).
        rollout: "reasoning" (num_generations reasonings, a beam list behind each), "sample" (independent constrained
            SIDs), "without_replacement" (distinct SIDs with the unbiased set estimator) or "beam" (beams with
            importance weights).
        credit: which tokens of a reasoning rollout are credited: "reasoning" (exact for a searched list) or
            "list" (Rao-Blackwell over the beams). Direct rollouts have "sid".
        num_beams: K, beams behind each reasoning.
        baseline: "group_mean", "leave_one_out" or "none". The set and beam rollouts bring baselines of their own: there
            "leave_one_out" and "group_mean" mean the one they have.
        snap: a group whose rewards differ by less gets no advantage; 0 switches it off, and baseline "none" has no use for it.
        trie_renormalize: log-probabilities of SID tokens over the legal codes (old, new and reference policy alike).
        shared_prompt: read the prompt of a group once where the model allows it.
        log_z_rows: about how many rows of a micro-batch measure the mass on legal tokens, which costs the whole head; 0
            = none.
        group_micro_batches: keep the rows of a group next to each other in micro-batches (TRL shuffles rows).
        position_credit: "none" or "tpma": an advantage for each code instead of one for the SID.
        position_weights: weight of each position for "tpma"; None: (2, 2, 2, 1, 1), as in the figure of OneSearch-V2, cut to the
            depth or with 1 for each further level.
        item_weight: weight of the whole item's advantage beside the position's.
        max_rollout_rows: most rows (prompts times beams or samples) decoded at once; None for all.
        patience: the run stops after so many generations in a row in which no group has differing rewards; 0 = never.
    """

    preset: str = _option("strict", "faithful, strict or none")
    rollout: str | None = _option(None, "reasoning, sample, without_replacement or beam")
    credit: str | None = _option(None, "reasoning or list (reasoning rollouts), sid (direct ones)")
    num_beams: int = _option(10, "beams behind each reasoning")
    baseline: str | None = _option(None, "group_mean, leave_one_out or none")
    snap: float | None = _option(None, "groups whose rewards differ by less get no advantage")
    trie_renormalize: bool | None = _option(None, "log-probabilities of SID tokens over the legal codes")
    shared_prompt: bool = _option(True, "read the prompt of a group once")
    log_z_rows: int = _option(8, "rows of a micro-batch that measure the mass on legal tokens")
    group_micro_batches: bool = _option(True, "keep groups together in micro-batches")
    position_credit: str = _option("none", "none or tpma")
    position_weights: list[float] | None = _option(None, "weights of the positions for tpma")
    item_weight: float = _option(1.0, "weight of the item's advantage beside the position's")
    max_rollout_rows: int | None = _option(None, "most rows decoded at once")
    patience: int = _option(20, "stop after so many generations without any differing rewards")
    # TRL's own, filled by the preset where they are None.
    loss_type: str | None = _option(None, "TRL's loss_type")
    scale_rewards: str | None = _option(None, "group, batch or none")
    beta: float | None = _option(None, "KL coefficient")
    epsilon_high: float | None = _option(None, "upper clip")
    mask_truncated_completions: bool | None = _option(None, "leave out reasonings cut at their limit")
    use_bias_correction_kl: bool | None = _option(None, "importance-weighted KL")

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        own = [f for f in fields(cls) if f.init]
        return {f.name: f.default_factory() if f.default is MISSING else f.default for f in own}  # type: ignore[misc]

    @classmethod
    def of(cls, args: GRPOConfig) -> DebiasedGRPOConfig:
        """A copy, or TRL's config with the switches of preset "none"; what is settled (sizes, devices) stays."""
        made = cls.__new__(cls)
        if not isinstance(args, cls):
            made.__dict__.update(cls._defaults(), preset="none")
        made.__dict__.update(vars(args))
        if not isinstance(args, cls):
            made.settle()
        return made

    @classmethod
    def check_settings(cls, values: dict[str, Any]) -> None:
        """Refuses settings that contradict each other, without building a config (which reads the launch and the
        devices).

        Args:
            values: some of the fields, of the right types.

        Raises:
            ConfigError: as when the config is built, but for the batch sizes, which depend on the launch.
        """
        bare = object.__new__(cls)
        bare.__dict__.update({**cls._defaults(), **values})
        bare.settle()

    def settle(self) -> None:
        """Fills what is None from the preset and refuses what contradicts itself."""
        if self.preset not in PRESETS:
            raise ConfigError(f"There is no preset '{self.preset}': {nearest(str(self.preset), PRESETS)}")
        self._check_choices()
        self.preset_values = self._filled()
        self._check_rollout()
        self._check_objective()
        self._check_decoding()

    def __post_init__(self) -> None:
        self.settle()
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(f"The GRPO arguments do not go together: {' '.join(str(error).split())}") from None

    def _filled(self) -> dict[str, Any]:
        """Fills what is None from the preset; returns what was filled."""
        values = dict(PRESETS[self.preset])
        filled = {name: value for name, value in values.items() if getattr(self, name) is None}
        for name, value in filled.items():
            setattr(self, name, value)
        if self.credit is None:
            filled["credit"] = self.credit = "reasoning" if self.rollout == "reasoning" else "sid"
        if "baseline" in filled and self.rollout == "beam":
            filled["baseline"] = self.baseline = "group_mean"
        if "baseline" in filled and self.rollout == "without_replacement":
            filled["baseline"] = self.baseline = "leave_one_out"
        if "scale_rewards" in filled and self.rollout in ("without_replacement", "beam"):
            filled["scale_rewards"] = self.scale_rewards = "none"
        if "mask_truncated_completions" in filled and self.rollout == "reasoning":
            filled["mask_truncated_completions"] = self.mask_truncated_completions = False
        return filled

    def _check_choices(self) -> None:
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)  # type: ignore[arg-type]
        for name, known in (
            ("rollout", ROLLOUTS),
            ("credit", CREDITS),
            ("baseline", BASELINES),
            ("scale_rewards", SCALES),
            ("position_credit", POSITION_CREDITS),
            ("loss_type", LOSSES),
            ("importance_sampling_level", ("token", "sequence")),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ConfigError(f"There is no {name} '{value}': {nearest(str(value), known)}")
        if self.num_beams < 1 or min(self.patience, self.log_z_rows) < 0 or (self.snap is not None and self.snap < 0):
            raise ConfigError(
                f"num_beams must be at least 1, patience, log_z_rows and snap at least 0, got {self.num_beams}, {self.patience}, "
                f"{self.log_z_rows} and {self.snap}; correct them."
            )
        if min(self.beta or 0, self.epsilon, self.epsilon_high or 0, self.item_weight) < 0:
            raise ConfigError(
                f"beta, epsilon, epsilon_high and item_weight must not be negative, got {self.beta}, {self.epsilon}, "
                f"{self.epsilon_high} and {self.item_weight}; correct them."
            )

    def _check_rollout(self) -> None:
        reasons = self.rollout == "reasoning"
        if reasons != (self.credit != "sid"):
            right = "reasoning or list" if reasons else "sid"
            raise ConfigError(f"rollout '{self.rollout}' has no credit '{self.credit}'; use {right}.")
        if self.baseline == "none" and self.scale_rewards == "group":
            raise ConfigError(
                "Without a baseline equal rewards keep their advantage, which the standard deviation of their group, 0, cannot "
                "divide; set scale_rewards: none or batch, or a baseline."
            )
        if self.baseline == "leave_one_out" and self.num_generations == 1:
            raise ConfigError("A leave-one-out baseline needs at least two rows in a group; raise num_generations.")
        if self.rollout == "beam" and self.baseline == "leave_one_out":
            raise ConfigError(
                "Beams are no independent samples, so there is no leave-one-out baseline for them; use group_mean, which is "
                "weighted by their probabilities."
            )
        if self.rollout in ("without_replacement", "beam") and self.scale_rewards != "none":
            raise ConfigError(
                f"rollout '{self.rollout}' weights its rows by their probabilities, which a division by a standard deviation "
                "would spoil; set scale_rewards: none."
            )
        if self.rollout == "without_replacement" and self.baseline == "group_mean":
            raise ConfigError(
                "A set drawn without replacement has a baseline of its own; set baseline: leave_one_out, or none."
            )
        if self.rollout != "sample" and self.position_credit != "none":
            raise ConfigError("position_credit compares independent samples of SIDs; use rollout: sample with it.")
        if self.temperature != 1.0 and (self.rollout == "beam" or self.credit == "list"):
            raise ConfigError(
                "Beams are searched at temperature 1, so their probabilities are those of the policy only at temperature 1; "
                f"got {self.temperature}."
            )

    def _check_objective(self) -> None:
        sequence = self.importance_sampling_level == "sequence"
        if sequence and self.beta and self.use_bias_correction_kl:
            raise ConfigError(
                "use_bias_correction_kl is right only for token-level importance sampling; set it to false, or "
                "importance_sampling_level: token."
            )
        if self.multi_objective_aggregation == "normalize_then_sum" and (
            self.preset == "strict" or self.rollout in ("without_replacement", "beam")
        ):
            raise ConfigError(
                "normalize_then_sum divides by standard deviations whatever scale_rewards says, which preset 'strict' and the "
                "set and beam rollouts exclude; use sum_then_normalize and fixed reward weights."
            )
        if self.loss_type == "cispo" and (self.epsilon_high is None or self.epsilon_high < 1):
            raise ConfigError(
                f"cispo caps the ratio at epsilon_high itself, so {self.epsilon_high} would shrink every gradient; set "
                "epsilon_high to 5.0 or so."
            )
        if self.position_credit != "none" and sequence:
            raise ConfigError("Position-level credit needs token-level ratios; set importance_sampling_level: token.")
        if self.credit == "list" and self.loss_type not in CLIPPED:
            raise ConfigError(f"credit 'list' needs a clipped loss_type ({', '.join(CLIPPED)}), got {self.loss_type}.")
        if self.preset == "strict" and (self.loss_type in ("grpo", "sapo") and self.rollout == "reasoning"):
            raise ConfigError(
                f"loss_type {self.loss_type} divides by the length of each reasoning, which preset 'strict' excludes; use "
                "dr_grpo or dapo."
            )

    def _check_decoding(self) -> None:
        if self.use_vllm or self.use_transformers_continuous_batching or self.generation_kwargs:
            raise ConfigError(
                "Rollouts are decoded over the catalogue's trie by the model itself; remove use_vllm, "
                "use_transformers_continuous_batching and generation_kwargs."
            )
        cut = self.top_p != 1.0 or (self.top_k or 0) > 0 or self.min_p is not None or self.repetition_penalty != 1.0
        if cut:
            raise ConfigError(
                "top_p, top_k, min_p and repetition_penalty sample from another distribution than the one whose gradient is "
                "taken; leave them at their defaults."
            )
        if self.temperature <= 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}.")


def position_weights(given: list[float] | None, depth: int) -> list[float]:
    """Weights of the positions for TPMA: those given, or the figure's (2, 2, 2, 1, 1), cut or filled with 1 to the depth.

    Raises:
        ConfigError: not one weight per level.
    """
    if given is None:
        return [2.0 if level < 3 else 1.0 for level in range(depth)]
    if len(given) != depth:
        raise ConfigError(f"position_weights must hold one weight for each of the {depth} levels, got {len(given)}.")
    return [float(w) for w in given]

"""Debiased GRPO over a catalogue of semantic IDs: TRL's `GRPOTrainer` with rollouts, credit and log-probabilities of
its own.

Overriding points (everything else is TRL's and stays untouched; `trl_surface.py` names what they rely on):

1. `__init__`: hands TRL a rollout function and one function per reward.
2. `_generate_and_score_completions`: afterwards, sets the advantages of our estimators and carries group, row and list
   tensors.
3. `_calculate_rewards`: before, scores the rollouts by leaf numbers; keeps the gathered rewards.
4. `_prepare_inputs`: afterwards, puts the rows of a group next to each other again (TRL shuffles rows).
5. `_get_per_token_logps_and_entropies`: normalises SID tokens over the trie for the old, new and reference policy, and
   reads the prompt of a group once.
6. `_compute_loss`: adds the surrogate of searched lists; the rest is TRL's loss. Nothing is computed, forward or
   backward, where no group has anything to learn from.
7. `log`: adds log Z.
8. `_get_train_sampler`: the order of an epoch is a function of seed and epoch, the same for a resumed run.

`common/hooks.py` adds what both trainers have: no weight decay on embedding rows that are trained alone or beside LoRA, and no
telemetry.

The paper (CRS) fixes neither formula nor numbers; `specs/crs_debiased_grpo.md` 2.7 reconstructs them, the config names choices.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from sidtune.core.errors import ConfigError, SidtuneError
from sidtune.core.finite import NOT_NUMBERS
from sidtune.trainers.common import trl_surface
from sidtune.trainers.common.hooks import TrlHooks, causal_config, check_dataset, default_args
from sidtune.trainers.grpo.args import check_launch
from sidtune.trainers.grpo.config import DebiasedGRPOConfig
from sidtune.trainers.grpo.credit import Credit
from sidtune.trainers.grpo.diagnostics import Health, LegalMass, StopDegenerate, ended_metrics
from sidtune.trainers.grpo.list_loss import list_loss
from sidtune.trainers.grpo.logps.group_logps import LogpsOutput, group_logps
from sidtune.trainers.grpo.rollout_rewards import (
    RolloutRewards,
    SidCatalogue,
    sorted_rewards,
    with_leaves,
)
from sidtune.trainers.grpo.rollouts import Rollout, RolloutMaker, Rows
from sidtune.trainers.grpo.sampler import RepeatedEpochs, regrouped
from sidtune.trainers.grpo.sid_positions import SidTable, read_ids
from sidtune.trainers.rewards.batch import CombinedReward

logger = logging.getLogger(__name__)


class DebiasedGRPOTrainer(TrlHooks, GRPOTrainer):
    """Trains a causal LM by group-relative rewards of catalogue items.

    Args:
        model: a causal `PreTrainedModel`, a PEFT model around one with what trains already chosen, or a name or folder.
        rewards: `build_rewards(...)`, or the mapping it takes; or what TRL takes as `reward_funcs`; None when only
            `reward_funcs` reward.
        args: the config; a plain `GRPOConfig` is run with preset "none", what it says stays; None is our default.
        train_dataset: columns `prompt` (text or messages, shown in logs) and, if the prompts are encoded already,
            `prompt_ids`; `target_leaves`, or `target_items` (item ids, one or a list), and `target_gains` (lists; gains
            default to 1); `<name>_leaves` and `<name>_gains` for further judgements; any other column reaches the rewards.
        eval_dataset: the same, a mapping of names to such, or None.
        processing_class: the tokenizer; None is that of the model.
        catalogue: the trie, the token of each code, and what is known of each leaf.
        end_token_id: the token that ends a reasoning (rollout "reasoning").
        reward_funcs: reward functions of TRL's kind, one or a list; `args.reward_weights` weighs them (default 1 each).
        train: what trains ("rows", "lora" or "all"); chooses the weight decay, nothing else. None: "lora" for a PEFT model
            or with a `peft_config`, else "all".
        options: passed on to TRL (`callbacks`, `peft_config`, ...).

    Raises:
        ConfigError: settings that contradict each other, or no reward.
        DataError: prompts or targets that do not fit, or a misspelt target column.
        SidtuneError: while training, when the run can no longer learn.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        rewards: CombinedReward | Mapping[str, Any] | Callable | list | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        catalogue: SidCatalogue | None = None,
        end_token_id: int | None = None,
        reward_funcs: Callable | list | None = None,
        train: str | None = None,
        **options: Any,
    ) -> None:
        trl_surface.check(trl_surface.GRPO_NAMES)
        causal_config(model, "GRPO")
        check_dataset(train_dataset, "train_dataset")
        if not isinstance(catalogue, SidCatalogue):
            raise ConfigError(
                f"Rollouts need the catalogue, got {catalogue!r}; pass catalogue=SidCatalogue.from_semantic_ids(...)."
            )
        args = default_args(DebiasedGRPOConfig, model, "GRPO") if args is None else DebiasedGRPOConfig.of(args)
        combined, functions = sorted_rewards(rewards, reward_funcs, catalogue)
        self._rewarding = RolloutRewards(combined, catalogue, args.credit == "list")
        if combined is None and not functions:
            raise ConfigError("There is no reward; name one in `rewards` or pass reward_funcs.")
        args.reward_weights = self._rewarding.all_weights(args.reward_weights, len(functions))
        data = [
            None if given is None else with_leaves(given, name, combined, catalogue)
            for name, given in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset))
        ]
        self.health = Health()
        self._rollout: Rollout | None = None
        self._given_prompts: list[list[int]] | None = None
        self._gathered_rewards: Tensor | None = None
        self._in_loss = False
        self._told_idle = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*'rollout_func'.*")  # named in trl_surface.py
            super().__init__(
                model=model,
                reward_funcs=[*self._rewarding.functions(), *functions],
                args=args,
                train_dataset=data[0],
                eval_dataset=data[1],
                processing_class=processing_class,
                rollout_func=self._roll_out,
                train=train,
                **options,
            )
        check_launch(self)
        self._prepare_catalogue(catalogue, end_token_id)
        self.add_callback(StopDegenerate(self.health, args.patience))
        filled = ", ".join(f"{name}={value}" for name, value in args.preset_values.items())
        logger.info("Preset '%s' set %s.", args.preset, filled or "nothing")

    def _prepare_catalogue(self, catalogue: SidCatalogue, end_token_id: int | None) -> None:
        tokens = torch.from_numpy(np.array(catalogue.sid_token_ids, dtype=np.int64))
        reasoned = self.args.rollout == "reasoning"
        self.table = SidTable(catalogue.trie, tokens, reasoned)
        special = (self._tokenizer.eos_token_id, self._tokenizer.pad_token_id, end_token_id)
        self._maker = RolloutMaker(self.args, catalogue.trie, tokens, *special)
        self.marks = (special[0], end_token_id if reasoned else None)
        self._credit = Credit(self.args, catalogue.trie)
        self._legal = {mode: LegalMass(catalogue.trie.depth) for mode in ("train", "eval")}
        if not reasoned:  # a constant that divides dr_grpo's loss: the tokens that a SID has
            self.max_completion_length = catalogue.trie.depth

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        sampler = super()._get_train_sampler(dataset)
        if self.shuffle_dataset:
            sampler = RepeatedEpochs.like(sampler)
            self._epoch_callback.sampler = sampler
        return sampler

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _rows(self, count: int) -> Rows:
        return Rows(self.accelerator.process_index * count, count, self._group_size)

    def _roll_out(self, prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
        """TRL's rollout function."""
        step = self.state.global_step + 1
        self.check_weights(step)  # a rollout of broken weights ends in an error that knows nothing of steps
        prompt_ids = self._given_prompts or self._tokenize_prompts(prompts)[0]
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            try:
                rollout = self._maker(model, prompt_ids, self._rows(len(prompts)))
            except SidtuneError as error:
                if str(error) != NOT_NUMBERS:
                    raise
                raise self._broken("score of the rollouts", step) from None
        self._rollout = rollout
        fields: dict[str, Any] = {"leaves": rollout.leaves.tolist(), "leaf_scores": rollout.scores.tolist()}
        if rollout.closed is not None:
            fields |= {"closed": rollout.closed.tolist(), "reasoning_length": rollout.reasoning_lengths.tolist()}
        return {
            "prompt_ids": rollout.prompt_ids,
            "completion_ids": rollout.completion_ids,
            "logprobs": None,
            "env_mask": rollout.credit_mask,
            **fields,
        }

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        self._rewarding.score(self._rollout, inputs)
        self._gathered_rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._gathered_rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._given_prompts = [row["prompt_ids"] for row in inputs] if "prompt_ids" in inputs[0] else None
        output = super()._generate_and_score_completions(inputs)
        rows, device = self._rows(len(inputs)), output["advantages"].device
        result = self._credit(
            *(self._rollout, self._gathered_rewards, self.reward_weights, self._rewarding.matches()),
            *(rows, output["completion_ids"].shape[1], self._gather),
        )
        output["advantages"] = result.advantages.float().to(device)
        output["group_ids"] = torch.from_numpy(rows.groups).to(device)
        output["row_ids"] = torch.from_numpy(rows.numbers).to(device)
        if self.args.credit == "list":
            output |= self._list_tensors(result.scale, device)
        output["idle"] = torch.tensor(self._is_idle(output), device=device)
        result.metrics["group/skipped"] = float(output["idle"])
        for name, value in result.metrics.items():
            self._metrics[self._mode][name].append(value)
        if self._rollout.cut is not None:
            self._tell_cut(self._rollout)
        if self.model.training:
            self.health.saw_generation(result.metrics)
        return output

    def _is_idle(self, output: dict[str, Any]) -> bool:
        """Whether no row of any process has anything to learn from, and the step of the optimizer may be left out for it."""
        moved = [output[name].any().long() for name in ("advantages", "list_coefficients") if name in output]
        if self._gather(torch.stack(moved)).any() or not self.model.training:
            return False
        other = self.beta != 0 or self._entropy_bonus_enabled or self.aux_loss_enabled
        # A step that mixes generations would reduce only some of its gradients; loss scaling and DeepSpeed need every one.
        whole = self.args.steps_per_generation % self.args.gradient_accumulation_steps == 0
        bound = self.is_deepspeed_enabled or self.accelerator.scaler is not None
        idle = not other and not bound and (whole or self.accelerator.num_processes == 1)
        if idle and not self._told_idle:
            self._told_idle = True
            logger.warning(
                "In the generation of step %d the rewards of every group were equal: its forward and backward passes are skipped "
                "and nothing moves. The metric group/skipped counts such generations; this is said once.",
                self.state.global_step + 1,
            )
        return idle

    def _tell_cut(self, rollout: Rollout) -> None:
        """TRL takes a completion for ended that ends in EOS; of reasonings only those are that were not cut at their limit."""
        lengths = torch.tensor([sum(mask) for mask in rollout.credit_mask])
        for name, value in ended_metrics(self._gather(rollout.cut.long()).bool(), self._gather(lengths)).items():
            self._metrics[self._mode][name][-1] = value

    def _gather(self, values: Tensor) -> Tensor:
        """Rows of all processes, in order, on the CPU."""
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()

    def _list_tensors(self, scale: Tensor, device: torch.device) -> dict[str, Tensor]:
        """What the surrogate of the searched lists needs, row by row."""
        coefficients = self._rewarding.item_coefficients / scale[:, None]
        return {
            "list_tokens": self._maker.tokens_of(self._rollout.leaves).to(device),
            "list_old": self._rollout.scores.to(device),
            "list_coefficients": coefficients.float().to(device),
        }

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        every = self.args.steps_per_generation * self.num_iterations
        fresh = self.model.training and (self._step % every == 0 or self._buffered_inputs is None)
        inputs = super()._prepare_inputs(generation_batch)
        if fresh and self.args.group_micro_batches:
            self._buffered_inputs = regrouped(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ours = self.args.shared_prompt or self.args.rollout == "reasoning"
        if not self.args.trie_renormalize and (not ours or compute_aux_loss):
            return super()._get_per_token_logps_and_entropies(
                *(model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss),
                **options,
            )
        if compute_aux_loss:
            raise ConfigError(
                "The load-balancing loss of a mixture-of-experts model is not computed beside trie_renormalize; set "
                "router_aux_loss_coef: 0."
            )
        if any(value is not None for value in options.values()):
            raise ConfigError("DebiasedGRPOTrainer reads text only; leave images out of the data.")
        size = batch_size or len(input_ids)
        if self.args.shared_prompt:  # a chunk that cut a group would read its prompt twice
            size = -(-size // self._group_size) * self._group_size
        parts = []
        for n in range(0, len(input_ids), size):
            ids, mask = input_ids[n : n + size], attention_mask[n : n + size]
            prompt, completion = (ids[:, :-logits_to_keep], ids[:, -logits_to_keep:])
            masks = (mask[:, :-logits_to_keep], mask[:, -logits_to_keep:])
            parts.append(
                self._logps(model, prompt, masks[0], completion, masks[1], self.table, entropy=compute_entropy)
            )
        log_probs = torch.cat([part.log_probs for part in parts])
        entropies = torch.cat([part.entropies for part in parts]) if compute_entropy else None
        if self._in_loss and all(part.log_z is not None for part in parts):
            start, _ = self.table.find(input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:])
            self._legal[self._mode].add(torch.cat([part.log_z for part in parts]), start)
        self._in_loss = False
        return log_probs, entropies, None

    def _logps(
        self,
        model: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        table: SidTable,
        *,
        entropy: bool = False,
        groups: Tensor | None = None,
    ) -> LogpsOutput:
        options: dict[str, Any] = {}
        if self.args.trie_renormalize:
            table = table.to(completion_ids.device)
            start, _ = table.find(completion_ids, completion_mask)
            options = {"trie": table.trie, "sid_token_ids": table.tokens, "sid_start": start}
            # What stands behind a SID is credited nowhere, and its log-probability would cost the whole head.
            columns = torch.arange(completion_ids.shape[1], device=start.device)
            options["scored"] = (columns < (start + table.trie.depth)[:, None]) | (start < 0)[:, None]
        # Only a loss logs log Z, which costs the whole head.
        measured = self.args.log_z_rows if options and self._in_loss else 0
        if measured:
            options |= {"compute_log_z": True, "log_z_rows": measured}
        with self.accelerator.autocast():
            return group_logps(
                *(
                    model,
                    prompt_ids,
                    prompt_mask,
                    read_ids(completion_ids, completion_mask, *self.marks),
                    completion_mask,
                ),
                target_ids=completion_ids,
                groups=groups,
                temperature=self.temperature,
                compute_entropy=entropy,
                share_prompts=self.args.shared_prompt,
                float32_head=self.args.cast_lm_head_to_fp32,
                **options,
            )

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if inputs.get("idle"):
            return torch.zeros((), device=inputs["advantages"].device, requires_grad=True)
        inputs = dict(inputs)
        self._in_loss = True
        loss = super()._compute_loss(model, inputs)
        self._in_loss = False
        if self.args.credit == "list":
            loss = loss + list_loss(self, model, inputs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.trie_renormalize:
            prefix = "" if self._mode == "train" else "eval_"
            found = self._legal[self._mode].read(self.accelerator, self.accelerator.device)
            logs.update({prefix + name: value for name, value in found.items()})
        super().log(logs, start_time)

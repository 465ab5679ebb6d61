"""Every TRL, transformers and accelerate name this room relies on, checked in one place before the first training step.

Our trainers subclass TRL's at a few hooks, of which many are not public API. A release that renames one of them would
otherwise show up as a wrong curve or as a stack trace hours into a run; here it becomes one sentence that names what is
missing and which versions are known to work. The table is also the to-do list of whoever raises the version range, which
ends at the minor of TRL that the tests ran with; `tests/trainers/test_trl_meanings.py` asks what the private names mean.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
from dataclasses import dataclass

from sidtune.core.errors import SidtuneError

TRL_VERSIONS = ">=1.16,<1.17"
TRANSFORMERS_VERSIONS = ">=5.20,<6"
ACCELERATE_VERSIONS = ">=1.10"


@dataclass(frozen=True)
class Name:
    """One name we rely on.

    Attributes:
        path: `module:attribute` or `module:attribute.attribute`.
        parameters: words, parameters that must exist when the object is callable, or dataclass fields when it is a config.
        why: what of ours breaks without it.
    """

    path: str
    parameters: str = ""
    why: str = ""


_TRAINER = "trl.trainer.sft_trainer:SFTTrainer"
_OUTPUT = "trl.trainer.utils:FusedCausalLMOutput"
NAMES: tuple[Name, ...] = (
    Name(
        f"{_TRAINER}.__init__",
        "model args train_dataset eval_dataset processing_class callbacks optimizers",
        "SidSFTTrainer passes these on",
    ),
    Name(f"{_TRAINER}.compute_loss", "model inputs return_outputs num_items_in_batch", "the loss we measure"),
    Name(f"{_TRAINER}.prediction_step", "prediction_loss_only", "evaluation calls compute_loss without the logits"),
    Name(f"{_TRAINER}.log", "logs start_time", "our metrics are added there"),
    Name(f"{_TRAINER}._set_signature_columns_if_needed", "", "keeps the column `task` in the batches"),
    Name(f"{_TRAINER}._prepare_dataset", "", "tokenises texts, packs examples"),
    Name(f"{_TRAINER}._send_telemetry", "", "switched off: sidtune opens no connection the user did not ask for"),
    Name(f"{_TRAINER}._get_train_sampler", "train_dataset", "the order of an epoch is a function of seed and epoch"),
    Name(f"{_TRAINER}.get_decay_parameter_names", "model", "no weight decay on embedding rows"),
    Name(f"{_TRAINER}._save_checkpoint", "model trial", "checkpoints of a stage"),
    Name(f"{_TRAINER}._save", "output_dir state_dict", "checkpoints hold what trains"),
    Name(f"{_TRAINER}._load_from_checkpoint", "resume_from_checkpoint model", "resuming a stage"),
    Name(f"{_TRAINER}.train", "resume_from_checkpoint", "resuming a stage"),
    Name(f"{_TRAINER}.training_step", "", "stops at a loss that is not finite"),
    Name(f"{_TRAINER}._get_grad_norm", "model grad_norm", "stops at a gradient that is not finite"),
    Name(f"{_TRAINER}._maybe_log_save_evaluate", "", "no checkpoint of weights that are not finite"),
    Name(
        "trl.trainer.sft_trainer:DataCollatorForLanguageModeling",
        "pad_token_id padding_free return_position_ids pad_to_multiple_of return_tensors",
        "our collator extends it",
    ),
    Name("trl.trainer.sft_trainer:DataCollatorForLanguageModeling.torch_call", "examples", "our collator extends it"),
    Name(_OUTPUT, "log_probs is_top1 label_mask", "loss per task and accuracy per SID level"),
    Name("trl.trainer.utils:add_fused_lm_head", "model outputs", "per-token log-probabilities"),
    Name("trl.trainer.utils:maybe_gather_lm_head_ctx", "params", "row training under ZeRO-3"),
    Name("trl.trainer.utils:_use_triton", "device", "scores only the labelled positions on CPU"),
    Name(
        "trl.trainer.sft_config:SFTConfig",
        "max_length packing packing_strategy padding_free eval_packing dataset_kwargs model_init_kwargs "
        "train_sampling_strategy average_tokens_across_devices ddp_backend use_cpu bf16 fp16 "
        "gradient_checkpointing report_to save_total_limit save_only_model accelerator_config",
        "fields set by the stages",
    ),
    Name("transformers:TrainerCallback.on_epoch_begin", "", "tells the sampler its epoch after a resume"),
    Name("transformers:TrainerCallback.on_save", "", "marks a checkpoint as complete"),
    Name("transformers:Trainer.set_initial_training_values", "", "a finished training is only loaded"),
    Name(
        "transformers.masking_utils:find_packed_sequence_indices", "position_ids", "packed rows without flash attention"
    ),
    Name("accelerate:Accelerator.reduce", "tensor reduction", "sums metrics over processes"),
    Name("accelerate:Accelerator.get_state_dict", "model", "gathers sharded weights"),
    Name("accelerate.utils:broadcast_object_list", "object_list", "processes agree on what to do"),
)
_GRPO = "trl.trainer.grpo_trainer:GRPOTrainer"
GRPO_NAMES: tuple[Name, ...] = (
    Name(
        f"{_GRPO}.__init__",
        "model reward_funcs args train_dataset eval_dataset processing_class callbacks rollout_func",
        "DebiasedGRPOTrainer passes these on",
    ),
    Name(f"{_GRPO}._generate_and_score_completions", "inputs", "sets the advantages of our estimators"),
    Name(
        f"{_GRPO}._calculate_rewards",
        "inputs prompts completions completion_ids_list",
        "scores rollouts by leaf numbers and keeps the gathered rewards",
    ),
    Name(f"{_GRPO}._prepare_inputs", "generation_batch", "keeps groups together in micro-batches"),
    Name(
        f"{_GRPO}._get_per_token_logps_and_entropies",
        "model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss",
        "log-probabilities over the trie, of old, new and reference policy",
    ),
    Name(f"{_GRPO}._compute_loss", "model inputs", "ECPO and the surrogate of searched lists"),
    Name(f"{_GRPO}._tokenize_prompts", "prompts", "prompts that are not encoded yet"),
    Name(f"{_GRPO}._get_train_sampler", "dataset", "the order of an epoch is a function of seed and epoch"),
    Name(f"{_GRPO}.get_decay_parameter_names", "model", "no weight decay on embedding rows"),
    Name(f"{_GRPO}.log", "logs start_time", "our metrics are added there"),
    Name(f"{_GRPO}._send_telemetry", "", "switched off: sidtune opens no connection the user did not ask for"),
    Name("trl.models:unwrap_model_for_generation", "model accelerator gather_deepspeed3_params", "rollouts"),
    Name(
        "trl.trainer.utils:RepeatSampler",
        "data_source mini_repeat_count batch_size repeat_count shuffle seed",
        "our sampler extends it",
    ),
    Name(
        "trl.trainer.grpo_config:GRPOConfig",
        "loss_type scale_rewards beta epsilon epsilon_high delta mask_truncated_completions "
        "use_bias_correction_kl importance_sampling_level multi_objective_aggregation num_generations "
        "num_generations_eval num_iterations steps_per_generation generation_batch_size max_completion_length "
        "reward_weights temperature ds3_gather_for_generation shuffle_dataset use_vllm",
        "fields the presets and the recipe set",
    ),
    Name("trl.kernels.chunked_logprob:ChunkedLogProbFunction", "", "log-probabilities over the whole vocabulary"),
)


def missing(names: tuple[Name, ...] = NAMES) -> list[str]:
    """Sentences on what is missing; an empty list means that the installed versions fit."""
    found = []
    for name in names:
        module, _, attributes = name.path.partition(":")
        try:
            target = functools.reduce(getattr, attributes.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            found.append(f"{name.path} ({name.why})")
            continue
        if not name.parameters:
            continue
        known = _parameters(target)
        absent = [p for p in name.parameters.split() if p not in known]
        if absent:
            found.append(f"{', '.join(repr(p) for p in absent)} of {name.path} ({name.why})")
    return found


def _parameters(target: object) -> set[str]:
    fields = getattr(target, "__dataclass_fields__", None)
    return set(fields) if fields is not None else set(inspect.signature(target).parameters)  # type: ignore[arg-type]


def check(names: tuple[Name, ...] = NAMES) -> None:
    """Raises SidtuneError when the installed TRL, transformers or accelerate lacks a name we rely on."""
    absent = missing(names)
    if absent:
        installed = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("trl", "transformers", "accelerate"))
        raise SidtuneError(
            f"The installed packages ({installed}) lack what sidtune's trainers rely on: {'; '.join(absent)}. Install "
            f"trl{TRL_VERSIONS}, transformers{TRANSFORMERS_VERSIONS} and accelerate{ACCELERATE_VERSIONS}, or adapt "
            f"sidtune/trainers/common/trl_surface.py and the trainers to the new names."
        )

"""The loss of the beam lists behind reasonings (credit "list"), for `DebiasedGRPOTrainer`; the formula is in `losses.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sidtune.trainers.grpo.losses import list_surrogate, row_weights
from sidtune.trainers.grpo.rollouts import pad_left
from sidtune.trainers.grpo.sid_positions import SidTable, read_ids


def list_loss(trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The Rao-Blackwell term of the beams behind each reasoning, weighted like the row's own tokens."""
    tokens, old, coefficients = inputs["list_tokens"], inputs["list_old"], inputs["list_coefficients"]
    rows, beams, depth = tokens.shape
    ids, mask = _prefixes(trainer, inputs, depth)
    owner = torch.arange(rows, device=ids.device).repeat_interleave(beams)
    table = SidTable(trainer.table.trie, trainer.table.tokens, reasoned=False)
    flat = tokens.flatten(0, 1)
    scored = trainer._logps(model, ids[owner], mask[owner], flat, torch.ones_like(flat), table, groups=owner)
    log_probs = scored.log_probs.sum(1).view(rows, beams)
    loss = list_surrogate(log_probs, old, coefficients, trainer.epsilon_low, trainer.epsilon_high)
    training = trainer.model.training
    accumulation = trainer.current_gradient_accumulation_steps if training else 1.0
    normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    normalizer = normalizer * accumulation / trainer.args.steps_per_generation if training else normalizer
    credited = inputs["completion_mask"] * inputs["tool_mask"]
    weights = row_weights(trainer.loss_type, credited, trainer.max_completion_length, accumulation, normalizer)
    return (loss * weights * credited.any(1)).sum()


def _prefixes(trainer: Any, inputs: dict[str, Any], depth: int) -> tuple[Tensor, Tensor]:
    """Prompt, reasoning and end mark of each row, padded on the left."""
    prompts = inputs["prompt_ids"]
    completions = read_ids(inputs["completion_ids"], inputs["completion_mask"], *trainer.marks)
    lengths = inputs["completion_mask"].sum(1).tolist()
    seen = inputs["prompt_mask"].sum(1).tolist()
    rows = [
        prompts[n, prompts.shape[1] - seen[n] :].tolist() + completions[n, : lengths[n] - 1 - depth].tolist()
        for n in range(len(prompts))
    ]
    ids, mask = pad_left(rows, trainer._tokenizer.pad_token_id)
    return ids.to(prompts.device), mask.to(prompts.device)

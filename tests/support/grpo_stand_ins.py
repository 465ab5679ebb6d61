"""Tiny catalogues, models and data for the tests of GRPO."""

from __future__ import annotations

import inspect
import itertools
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from sft_stand_ins import VOCABULARY, WORDS, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from sidtune.decoding.trie import SidTrie
from sidtune.trainers.grpo.config import DebiasedGRPOConfig
from sidtune.trainers.grpo.rollout_rewards import SidCatalogue
from sidtune.trainers.grpo.sid_positions import SidTable
from sidtune.trainers.grpo.trainer import DebiasedGRPOTrainer

PATHS = np.array(list(itertools.product(range(3), range(3))))
SID_TOKENS = np.arange(WORDS + 2, VOCABULARY)
END = 7  # the word that ends a reasoning


def catalogue(paths: np.ndarray = PATHS, **options) -> SidCatalogue:
    return SidCatalogue(SidTrie.from_codes(paths, (3, 3)), SID_TOKENS, **options)


def prompts(rows: int = 8, seed: int = 3, longest: int = 6) -> Dataset:
    """Prompts of words with one target leaf each."""
    random = np.random.default_rng(seed)
    ids = [(8 + random.integers(0, WORDS - 8, random.integers(2, longest))).tolist() for _ in range(rows)]
    return Dataset.from_dict(
        {
            "prompt": [" ".join(f"w{n - 2}" for n in row) for row in ids],
            "prompt_ids": ids,
            "target_leaves": [[int(row[0] % 9)] for row in ids],
            "target_gains": [[1.0]] * rows,
        }
    )


def config(folder, **options) -> DebiasedGRPOConfig:
    defaults = {
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "activation_checkpointing": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_completion_length": 5,
        "lr_scheduler_type": "constant",
    }
    return DebiasedGRPOConfig(output_dir=str(folder), **(defaults | options))


def trainer(folder, rewards=None, model=None, data=None, trainer_options=None, **options) -> DebiasedGRPOTrainer:
    arguments = config(folder, **options)
    extra = {"end_token_id": END} if arguments.rollout == "reasoning" else {}
    return DebiasedGRPOTrainer(
        model if model is not None else tiny_model(),
        {"prefix_match": {"weights": [0.5, 0.5]}, "hit": 1.0} if rewards is None else rewards,
        arguments,
        prompts() if data is None else data,
        processing_class=tiny_tokenizer(),
        **({"catalogue": catalogue()} | extra | (trainer_options or {})),
    )


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class Logps(NamedTuple):
    """Attributes:
    log_probs: (B, C). entropies: (B, C) or None. log_z: (B, C) logarithm of the mass on legal tokens, 0 off the SID, or None.
    """

    log_probs: Tensor
    entropies: Tensor | None
    log_z: Tensor | None


def plain_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    table: SidTable | None,
    *,
    temperature: float = 1.0,
    compute_entropy: bool = False,
) -> Logps:
    """Per-token log-probabilities of the last `completion_length` columns.

    Args:
        model: a causal LM, wrapped or not. input_ids, attention_mask: (B, P + C), prompts padded left, completions right.
        table: SIDs to renormalise; None: the whole vocabulary everywhere.
        temperature: divides the logits.
        compute_entropy: also the entropy, over the legal codes at SID positions.
    """
    keep = completion_length
    options = {"logits_to_keep": keep + 1, "use_cache": False}
    if takes_positions(model):
        options["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(
            min=0
        )  # models with learned positions count padding
    output = model(input_ids=input_ids, attention_mask=attention_mask, **options)
    logits = output.logits[:, -keep - 1 : -1].float() / temperature
    completion, mask = input_ids[:, -keep:], attention_mask[:, -keep:]
    total = logits.logsumexp(-1)
    log_probs = logits.gather(-1, completion[..., None])[..., 0] - total
    entropies = None
    if compute_entropy:
        with torch.no_grad():
            entropies = torch.special.entr((logits - total[..., None]).exp()).sum(-1)
    if table is None:
        return Logps(log_probs, entropies, None)
    log_z = torch.zeros_like(log_probs)
    start, codes = table.to(input_ids.device).find(completion, mask)
    rows = (start >= 0).nonzero()[:, 0]
    nodes = torch.zeros_like(rows)
    for level in range(table.trie.depth):
        columns = start[rows] + level
        legal = table.trie.legal_mask(level, nodes)
        scores = logits[rows, columns][:, table.trie.level_tokens(table.tokens)[level]].masked_fill(
            ~legal, float("-inf")
        )
        inside = scores.logsumexp(-1)
        code = codes[rows, level]
        log_probs = log_probs.index_put((rows, columns), scores.gather(1, code[:, None])[:, 0] - inside)
        log_z = log_z.index_put((rows, columns), (inside - total[rows, columns]).detach())
        if entropies is not None:
            shares = (scores - inside[:, None]).exp().detach()
            entropies = entropies.index_put((rows, columns), torch.special.entr(shares).sum(-1))
        nodes = table.trie.step(nodes, code)
    return Logps(log_probs, entropies, log_z)


def takes_positions(model: nn.Module) -> bool:
    """Whether the model inside wrappers (DDP, DeepSpeed, PEFT) takes `position_ids`."""
    while hasattr(model, "module"):
        model = model.module
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(model.forward).parameters

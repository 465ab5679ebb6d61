"""What `benchmarks/grpo.py` measures on: model, catalogue, sampling by `generate`, and the two trainers of its `step` rows."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from sidtune.decoding.trie import SidTrie
from sidtune.trainers.sft.trainer import score_labelled_only

DEPTH, CODES, TEXT, GROUP, VOCABULARY, ITEMS = 5, 256, 1000, 16, 150_000, 100_000


def make_model(vocabulary: int = VOCABULARY) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


class Catalogue:
    """Items of `DEPTH` codes, small codes more frequent, so that prefixes are shared down to the last level."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.codes = (CODES * draw.random((ITEMS, DEPTH)) ** 6).astype(np.int64)
        self.trie = SidTrie.from_codes(self.codes, (CODES,) * DEPTH)
        self.offsets = TEXT + CODES * np.arange(DEPTH)
        self.tokens = TEXT + np.arange(CODES * DEPTH)

    def dictionary(self) -> dict[tuple[int, ...], list[int]]:
        """Prefix of tokens -> next tokens: what people write for `prefix_allowed_tokens_fn`."""
        legal: dict[tuple[int, ...], set[int]] = {}
        for row in (self.codes + self.offsets).tolist():
            for length in range(DEPTH):
                legal.setdefault(tuple(row[:length]), set()).add(row[length])
        return {prefix: sorted(after) for prefix, after in legal.items()}


def sample_by_generate(
    model: Qwen3ForCausalLM, ids: Tensor, mask: Tensor, allowed: dict[tuple[int, ...], list[int]], count: int = GROUP
) -> tuple[Tensor, Tensor]:
    """(rows, DEPTH) sampled tokens and (rows,) their log-probabilities by `generate` with a callback."""
    width = ids.shape[1]
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        num_return_sequences=count,
        max_new_tokens=DEPTH,
        min_new_tokens=DEPTH,
        return_dict_in_generate=True,
        output_scores=True,
        prefix_allowed_tokens_fn=lambda _, row: allowed[tuple(row[width:].tolist())],
    )
    tokens = out.sequences[:, width:]
    steps = [scores.log_softmax(dim=-1).gather(1, tokens[:, [n]])[:, 0] for n, scores in enumerate(out.scores)]
    return tokens, torch.stack(steps, dim=1).sum(dim=1)


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter() - self.start)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *(f"w{n}" for n in range(2, TEXT)), *(f"<sid_{n}>" for n in range(CODES * DEPTH))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def data(prompt: int) -> Dataset:
    draw = np.random.default_rng(2)
    ids = draw.integers(2, TEXT, (64, prompt)).tolist()
    text = [" ".join(f"w{n}" for n in row) for row in ids]
    return Dataset.from_dict(
        {"prompt": text, "prompt_ids": ids, "target_leaves": [[n] for n in range(64)], "target_gains": [[1.0]] * 64}
    )


def settings(folder: str, prompts: int, steps: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": prompts * GROUP,
        "num_generations": GROUP,
        "max_completion_length": DEPTH + 1,
        "max_steps": steps,
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "loss_type": "dr_grpo",
        "beta": 0.0,
    } | dict.fromkeys([_checkpointing_name()], False)


def _checkpointing_name() -> str:
    """transformers renames this field within the versions that are supported."""
    new = "activation_checkpointing"
    return new if new in GRPOConfig.__dataclass_fields__ else "gradient_checkpointing"


def our_trainer(catalogue: Catalogue, folder: str, prompt: int, prompts: int, steps: int, watch: StepTimes) -> Any:
    from sidtune.trainers.grpo.config import DebiasedGRPOConfig
    from sidtune.trainers.grpo.rollout_rewards import SidCatalogue
    from sidtune.trainers.grpo.trainer import DebiasedGRPOTrainer

    return DebiasedGRPOTrainer(
        make_model(),
        {"prefix_match": {"weights": [0.2] * DEPTH}},
        DebiasedGRPOConfig(**settings(folder, prompts, steps), preset="strict", rollout="sample"),
        data(prompt),
        processing_class=tokenizer(),
        catalogue=SidCatalogue(catalogue.trie, catalogue.tokens),
        callbacks=[watch],
    )


def stock_trainer(catalogue: Catalogue, folder: str, prompt: int, prompts: int, steps: int, watch: StepTimes) -> Any:
    allowed = catalogue.dictionary()

    def rollout(texts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        ids = [trainer.processing_class(text)["input_ids"] for text in texts]
        batch = torch.tensor(ids)
        tokens, _ = sample_by_generate(trainer.model, batch, torch.ones_like(batch), allowed, 1)
        completions = [[*row, 1] for row in tokens.tolist()]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(row[0] % 2) for row in completion_ids]

    return GRPOTrainer(
        make_model(),
        reward,
        GRPOConfig(**settings(folder, prompts, steps)),
        data(prompt),
        processing_class=tokenizer(),
        rollout_func=rollout,
        callbacks=[watch],
    )


def peak_mb() -> float:
    """Largest resident set of this process. `getrusage` also counts the parent's before the program was started."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def run_side(side: str, prompt: int, prompts: int, steps: int) -> None:
    """Trains a few steps and prints the median time of all but the first, and the peak memory."""
    warnings.simplefilter("ignore")
    peak = {"imports_mb": peak_mb()}
    watch = StepTimes()
    build = our_trainer if side == "ours" else stock_trainer
    with tempfile.TemporaryDirectory() as folder, score_labelled_only(torch.device("cpu")):
        build(Catalogue(), folder, prompt, prompts, steps, watch).train()
    peak["peak_mb"] = peak_mb()
    print("RESULT " + json.dumps({"times": watch.times[1:], **peak}), flush=True)

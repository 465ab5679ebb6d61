"""Training on whole histories against one windowed copy of the history per target: tokens and seconds of an epoch.

    python benchmarks/whole_history.py [--quick] [--json FILE]

Both sides learn the same targets of the same ShopWorld with the same model and the same trainer (batches grouped by
length, about the same number of tokens in each, CPU, fp32). Before any time is taken, the loss of every target is
compared: in one pass over the history, and at the end of its own copy. With a window that covers the whole past
("all turns") all of them must agree to 1e-4; with a shorter window the copies are cheaper and learn something else, so
only the targets that the window covers are compared.

Ratios are baseline over ours: above 1 the one pass is cheaper. Our own measurement; no paper is involved.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from sidtune.data_builders.prompts.encoding import encode_examples
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.shop_world.world import ShopWorld
from sidtune.data_builders.tasks.behaviour import request_to_sid, whole_history
from sidtune.data_builders.tasks.input import TaskInput
from sidtune.tokenizers.base_models.from_scratch import build_model, train_lm_tokenizer
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import Vocabulary, extend_vocabulary
from sidtune.trainers.common.args import sft_config
from sidtune.trainers.common.batches import TaskCollator, measure
from sidtune.trainers.sft.trainer import SidSFTTrainer, score_labelled_only

ALL_TURNS = 100_000
TOKENS_OF_A_BATCH = 4096
LEVELS = (32, 32, 32)


@dataclass
class Setup:
    """A world, a model and a tokenizer with semantic IDs."""

    world: ShopWorld
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    sids: SemanticIds

    def input(self, max_history: int) -> TaskInput:
        tables = self.world.to_tables()
        serializer = Serializer(self.tokenizer, "plain")
        return TaskInput(
            tables.items,
            tables.users,
            tables.events,
            tables.requests,
            self.sids.texts(),
            serializer,
            max_history=max_history,
        )

    def windowed(self, max_history: int) -> Dataset:
        return encode_examples(self.tokenizer, request_to_sid(self.input(max_history), all_positives=True))

    def whole(self) -> Dataset:
        return encode_examples(self.tokenizer, whole_history(self.input(ALL_TURNS), max_turns=ALL_TURNS, overlap=0))


def make_setup(quick: bool) -> Setup:
    """A shop whose users have about 20 (quick) or 40 requests, and a Qwen3 of 0.2 (quick) or 1 million parameters."""
    users, requests = (40, 1200) if quick else (200, 8000)
    world = ShopWorld.from_options(n_items=600, n_users=users, n_requests=requests, late_user_share=0.0)
    tables = world.to_tables()
    texts = [t for column in (tables.items["title"], tables.requests["query"]) for t in column.to_pylist() if t]
    tokenizer = train_lm_tokenizer(texts, vocab_size=1024)
    codes = np.stack([np.random.default_rng(level).integers(0, LEVELS[level], 600) for level in range(3)], axis=1)
    sids = SemanticIds(tables.items["item_id"].to_pylist(), codes.astype(np.int32), LEVELS)
    size = {"hidden_size": 64, "num_hidden_layers": 2} if quick else {"hidden_size": 128, "num_hidden_layers": 4}
    fields = {"intermediate_size": 3 * size["hidden_size"], "num_attention_heads": 4, "num_key_value_heads": 2}
    fields |= {"head_dim": size["hidden_size"] // 4, "max_position_embeddings": 8192}
    model = build_model({"model_type": "qwen3", **size, **fields}, tokenizer)
    vocabulary = extend_vocabulary(model, tokenizer, sids, init="mean")
    return Setup(world, model, tokenizer, vocabulary, sids)


def same_targets(whole: Dataset, windowed: Dataset) -> np.ndarray:
    """Rows of `windowed` (whose window covers everything) that hold the targets of `whole`."""
    ends = set()
    for row in whole:
        labels = np.array(row["labels"])
        last = np.flatnonzero((labels != -100) & (np.append(labels[1:], -100) == -100))
        ends.update(tuple(row["input_ids"][: place + 1]) for place in last.tolist())
    return np.array([n for n, ids in enumerate(windowed["input_ids"]) if tuple(ids) in ends])


@torch.no_grad()
def target_losses(setup: Setup, dataset: Dataset) -> dict[tuple[int, ...], float]:
    """(tokens up to and with a learned token) → its loss, from the fused LM head that training uses."""
    model = setup.model.eval()
    collator = TaskCollator(pad_token_id=setup.tokenizer.pad_token_id)
    found = {}
    with score_labelled_only(torch.device("cpu")):
        for row in dataset:
            batch = collator([{"input_ids": row["input_ids"], "labels": row["labels"]}])
            losses = -model(**batch, fused_lm_head=True).log_probs[0]
            for place in (batch["labels"][0, 1:] != -100).nonzero().flatten().tolist():
                found[tuple(row["input_ids"][: place + 2])] = float(losses[place])
    return found


def largest_difference(setup: Setup, whole: dict[tuple[int, ...], float], windowed: Dataset) -> tuple[float, int]:
    """Largest difference of the losses of common targets, and how many tokens were compared."""
    copies = target_losses(setup, windowed)
    common = [key for key in copies if key in whole]
    return max(abs(whole[key] - copies[key]) for key in common), len(common)


def epoch(setup: Setup, dataset: Dataset, folder: str) -> dict[str, Any]:
    """Trains one epoch from the same start; seconds of the training loop, tokens with and without padding."""
    model = type(setup.model)(setup.model.config)
    model.load_state_dict(setup.model.state_dict())
    sizes = measure(dataset)
    batch = max(1, round(TOKENS_OF_A_BATCH / sizes.tokens.mean()))
    values = {"per_device_train_batch_size": batch, "num_train_epochs": 1, "save_strategy": "no", "disable_tqdm": True}
    values |= {"train_sampling_strategy": "group_by_length", "use_cpu": True, "bf16": False}
    values |= {"activation_checkpointing": False, "logging_strategy": "no", "logging_first_step": False}
    config = sft_config(values, output_dir=folder, max_length=None, seed=0, evaluate=False, where="benchmark")
    trainer = SidSFTTrainer(model, config, dataset, None, setup.tokenizer)
    started = time.perf_counter()
    trainer.train()
    return {
        "seconds": time.perf_counter() - started,
        "tokens": int(sizes.tokens.sum()),
        "targets": int(sizes.targets.sum()),
        "examples": len(dataset),
        "batch": batch,
    }


def compare(setup: Setup, windows: list[int], folder: str) -> list[dict[str, Any]]:
    """One row per window."""
    whole = setup.whole()
    covering = setup.windowed(ALL_TURNS)
    rows = same_targets(whole, covering)
    add_fused_lm_head(setup.model, outputs=("log_probs", "is_top1"))
    losses = target_losses(setup, whole)
    epoch(setup, whole.select(range(min(8, len(whole)))), folder)  # the first steps of a process are slow
    ours = epoch(setup, whole, folder)
    results = []
    for window in windows:
        copies = (covering if window == ALL_TURNS else setup.windowed(window)).select(rows)
        difference, compared = largest_difference(setup, losses, copies)
        theirs = epoch(setup, copies, folder)
        name = "all turns" if window == ALL_TURNS else f"{window} turns"
        complete = window < ALL_TURNS or compared == ours["targets"]
        results.append(
            {
                "name": "epoch over whole histories",
                "baseline": f"one copy per target, window of {name}",
                "ours_s": round(ours["seconds"], 3),
                "baseline_s": round(theirs["seconds"], 3),
                "ratio": round(theirs["seconds"] / ours["seconds"], 2),
                "equal": bool(difference < 1e-4 and complete and ours["targets"] == theirs["targets"]),
                "largest_difference": difference,
                "tokens_compared": compared,
                "learned_tokens": ours["targets"],
                "ours_tokens": ours["tokens"],
                "baseline_tokens": theirs["tokens"],
                "token_ratio": round(theirs["tokens"] / ours["tokens"], 2),
                "ours_examples": ours["examples"],
                "baseline_examples": theirs["examples"],
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small world; ends within five minutes on two cores")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    setup = make_setup(arguments.quick)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(setup, [10, ALL_TURNS] if arguments.quick else [10, 50, ALL_TURNS], folder)
    for row in rows:
        print(
            f"{row['baseline']}: {row['ratio']} x the time, {row['token_ratio']} x the tokens "
            f"({row['baseline_tokens']} against {row['ours_tokens']}), equal: {row['equal']}"
        )
    if arguments.json:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if not all(row["equal"] for row in rows):
        raise SystemExit("The losses of a target differ between the two sides; the times mean nothing.")


if __name__ == "__main__":
    main()

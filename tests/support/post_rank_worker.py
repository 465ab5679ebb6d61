"""What `test_post_rank_distributed.py` runs, in one process or in several: both training steps of LLM4PR on a toy table.

accelerate launch ... tests/support/post_rank_worker.py ROOT OUTPUT MODES, MODES of `all`, `A` and `B` (LoRA
layouts) separated by commas
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from lm_stand_ins import tiny_model, tiny_tokenizer
from post_rank_sources import toy_table

from sidtune.core.processes import end_processes
from sidtune.models.post_ranking.files import add_lora
from sidtune.models.post_ranking.model import PostRankForCausalLM
from sidtune.models.post_ranking.processor import PostRankProcessor, build_config
from sidtune.models.post_ranking.templates import TEMPLATES
from sidtune.trainers.post_ranking.data import field_specs
from sidtune.trainers.post_ranking.trainer import adapt_features, learn_to_post_rank, paper_arguments

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
ROWS, STEPS = 8, 4


def table():
    """32 requests of four candidates each, no two of a list alike: every batch has as many answer tokens of both tasks."""
    random = np.random.default_rng(0)
    relevance = np.stack([random.permutation(4) for _ in range(32)]).astype(float)
    features = random.normal(size=(32, 4, 3)) + relevance[..., None]
    return toy_table(relevance, features, random.normal(size=(32, 5)), ["train"] * 32)


def train(root: Path, output: str, mode: str) -> None:
    rows = table()
    language_model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    # Token means of two halves equal the mean of both only where each has as many answer tokens; " I" and " II" have not, here.
    TEMPLATES["even"] = dataclasses.replace(TEMPLATES["v1"], one=" A", two=" B")
    config = build_config(
        language_model,
        tokenizer,
        field_specs(rows, np.arange(32)),
        rows.d_q,
        d_h=8,
        adapter="mlp_query",
        template_version="even",
    )
    torch.manual_seed(0)
    model = PostRankForCausalLM.from_base(language_model, config)
    processor = PostRankProcessor(tokenizer, config)
    options = {"per_device_train_batch_size": ROWS // PROCESSES, "max_steps": STEPS, "logging_steps": 1, "seed": 2}
    options |= {"save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3}
    work = root / f".work_{output}_{mode}"
    told = []
    # LoRA cannot go on weights that ZeRO-3 has shared out already: each step needs a launch of its own there.
    if mode != "B":
        args = paper_arguments(work / "fa", **options)
        adapted = adapt_features(
            model, processor, rows, np.arange(32), args, train="all" if mode == "all" else "adapters"
        )
        told += adapted.state.log_history
    if mode != "all":
        torch.manual_seed(1)
        model = add_lora(model, mode, r=4, alpha=4, dropout=0.0)
    trainer = learn_to_post_rank(
        model, processor, rows, np.arange(32), paper_arguments(work / "pr", **options), adapter_learning_rate=2e-3
    )
    told += trainer.state.log_history
    folder = root / f"{output}_{mode}"
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (folder / "log.json").write_text(json.dumps(told))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for one in sys.argv[3].split(","):
        train(Path(sys.argv[1]), sys.argv[2], one)
    end_processes()

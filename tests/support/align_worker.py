"""What `test_align_encoder_distributed.py` runs, in one process or in several: the aligned encoder on all five terms.

accelerate launch ... tests/support/align_worker.py ROOT OUTPUT RUNS, RUNS of `plain`, `whole` and `stopped` separated by commas:
`plain` has no dropout, so that one process can make the same; the others have some, and `stopped` is killed, started again,
and once more when it is done
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
from transformers import TrainerCallback

from sidtune.core.processes import end_processes, on_main
from sidtune.tokenizers.encoders.scratch import scratch_encoder
from sidtune.trainers.contrastive.losses import AlignedLossConfig
from sidtune.trainers.contrastive.trainer import AlignedExamples, aligned_args, save_aligned, train_aligned

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
MICRO_BATCHES = 2  # of a step, whoever computes them
ROWS, TEXTS, STEPS = 24, 16, 6  # three steps an epoch
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


class Kill(TrainerCallback):
    """Dies after a step, on every process; the step is in the middle of the second epoch, one after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def examples() -> AlignedExamples:
    """Rows of every term, of different numbers and with missing items, between texts of different lengths."""
    draw = np.random.default_rng(0)
    queries = [" ".join(["find", *["more"] * (n % 5), f"a{n}"]) for n in range(TEXTS)]
    items = [" ".join(["thing", *["very"] * (n % 3), f"b{n}"]) for n in range(TEXTS)]
    sizes = {"q2q": (10, 2), "i2i": (15, 2), "q2i": (ROWS, 2), "rank": (9, 4), "relevance": (14, 2)}
    pairs = {term: draw.integers(0, TEXTS, size) for term, size in sizes.items()}
    pairs["rank"][::3, 2] = -1
    return AlignedExamples(queries, items, pairs, draw.random(14))


def train(
    root: Path, output: str, run: str | None = None, dropout: float = 0.1, seed: int = 0, kill: bool = False
) -> None:
    """One run, or its continuation from what lies in the work folder of `run`; curves and weights go to `output`."""
    data = examples()
    config = {**TINY, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model, tokenizer = scratch_encoder(data.texts, config, 300, seed)
    values = {
        "per_device_train_batch_size": ROWS // 3 // MICRO_BATCHES,
        "gradient_accumulation_steps": MICRO_BATCHES // PROCESSES,
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "disable_tqdm": True,
    }
    args = aligned_args(values, root / f".work_{run or output}", seed=3)
    callbacks = [Kill()] if kill else []
    trainer = train_aligned(model, tokenizer, data, args, AlignedLossConfig(), max_length=16, callbacks=callbacks)

    def write() -> None:
        (root / output).mkdir()
        save_aligned(root / output, trainer.accelerator.unwrap_model(trainer.model), tokenizer, "mean", 16)
        (root / output / "log.json").write_text(json.dumps(trainer.state.log_history))

    on_main(write)


def stop_and_go_on(root: Path, output: str) -> None:
    """What the later starts begin with does not matter."""
    try:
        train(root, output, kill=True)
    except KeyboardInterrupt:
        train(root, output, seed=5)
        train(root, f"{output}_done", output, seed=6)


def main(root: Path, output: str, runs: str) -> None:
    for name in runs.split(","):
        if name == "stopped":
            stop_and_go_on(root, f"{output}_stopped")
        else:
            train(root, f"{output}_{name}", dropout=0.0 if name == "plain" else 0.1)
    end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

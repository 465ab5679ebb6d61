"""Debiased GRPO against stock TRL: the update of a group, the rollout, and the whole training step.

    python benchmarks/grpo.py [--quick] [--json FILE]

Same model (a randomly initialised Qwen3: 4 layers, width 256, vocabulary 150,000, tied), prompts, catalogue and completions;
one thread; results are compared before anything is timed, and the calls of a case run alternately in this one process.

`update` rows: forward and backward of a policy-gradient loss over SIDs of 5 tokens, G = 16 completions per prompt.
* ours: the prompt read once, softmax over the trie's legal codes. Checked: log-probabilities within 1e-5 and gradients
  within 1e-4 of the plain computation (one row per completion, all logits, illegal ones masked).
* ours, whole vocabulary: the quantity that TRL computes; log-probabilities and gradients checked against TRL's own.
* baselines: TRL's `_get_per_token_logps_and_entropies` with its fused head on the scored positions, as it runs on GPUs
  (TRL scores every position where Triton is missing, which is far slower here; "every position", timed once), and the plain
  computation of the renormalised quantity, which is what has to be added to TRL without us.

Prompts have one length. Where TRL pads prompts on the left it also shifts their positions, and float32 rounding of the
rotary angles then sets it apart by up to 4e-5 (measured against float64: TRL 4e-5, ours 7e-6).

`least_gflop` counts the work of the packed rows (real tokens through the layers, attention over what each token may see,
the legal rows of the head; backward twice that) and `baseline_gflop` that of the baseline; their ratio `possible` is what
arithmetic allows. `times_least` is our time over `least_gflop` at the rate of this machine's matrix product.

`rollout` rows: `sid_sample` against sampling by `generate` with `prefix_allowed_tokens_fn` over a Python dictionary. Both draw
from the same distribution; checked by the log-probability each side reports for its own samples, against `group_logps`.

`step` rows: steps of `DebiasedGRPOTrainer` against stock `GRPOTrainer` whose `rollout_func` calls that `generate`, each side in
processes of its own, alternately; optimizer included, stock scoring only the scored positions. Peak memory is that of the
process (resident set), `imports_mb` of it before the model is made. Rewards and losses differ; nothing is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from sidtune.benchmarks.grpo_steps import (
    CODES,
    DEPTH,
    GROUP,
    ITEMS,
    TEXT,
    VOCABULARY,
    Catalogue,
    make_model,
    run_side,
    sample_by_generate,
)
from sidtune.decoding.sampling import sid_sample
from sidtune.trainers.grpo.logps.group_logps import group_logps
from sidtune.trainers.sft.trainer import score_labelled_only

LOGP_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


class Job:
    """Prompts, G completions of each, and the calls to compare."""

    def __init__(self, model: Qwen3ForCausalLM, catalogue: Catalogue, prompt: int, prompts: int) -> None:
        draw = np.random.default_rng(1)
        self.model, self.catalogue = model.train(), catalogue
        ids = torch.from_numpy(draw.integers(2, TEXT, (prompts, prompt)))
        mask = torch.ones_like(ids)
        chosen = catalogue.codes[draw.integers(0, ITEMS, prompts * GROUP)] + catalogue.offsets
        self.prompt_ids, self.prompt_mask = (part.repeat_interleave(GROUP, dim=0) for part in (ids, mask))
        self.completion = torch.from_numpy(chosen)
        self.completion_mask = torch.ones_like(self.completion)
        self.advantages = torch.from_numpy(draw.standard_normal((prompts * GROUP, 1))).float()
        self.ids, self.mask = ids, mask

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.prompt_ids, self.prompt_mask, self.completion, self.completion_mask

    def step(self, log_probs: Callable[[], Tensor]) -> Tensor:
        """Forward and backward; returns the log-probabilities."""
        self.model.zero_grad(set_to_none=True)
        values = log_probs()
        ((values - values.detach()).exp() * self.advantages).mean().neg().backward()
        return values.detach()

    def ours(self) -> Tensor:
        start = torch.zeros(len(self.completion), dtype=torch.int64)
        trie = {"trie": self.catalogue.trie, "sid_token_ids": self.catalogue.tokens, "sid_start": start}
        return group_logps(self.model, *self.rows(), **trie).log_probs

    def ours_free(self) -> Tensor:
        return group_logps(self.model, *self.rows()).log_probs

    def trl(self, compact: bool = True) -> Tensor:
        trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=contextlib.nullcontext, is_main_process=True))
        ids = torch.cat([self.prompt_ids, self.completion], dim=1)
        mask = torch.cat([self.prompt_mask, self.completion_mask], dim=1)
        with score_labelled_only(ids.device) if compact else contextlib.nullcontext():
            return GRPOTrainer._get_per_token_logps_and_entropies(trainer, self.model, ids, mask, DEPTH)[0]

    def plain(self) -> Tensor:
        """One row per completion, all logits, illegal ones masked: the skeleton of the sheet, with a vectorised mask."""
        ids = torch.cat([self.prompt_ids, self.completion], dim=1)
        mask = torch.cat([self.prompt_mask, self.completion_mask], dim=1)
        logits = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=DEPTH + 1).logits[:, :-1]
        nodes = torch.zeros(len(ids), dtype=torch.int64)
        columns = []
        for level in range(DEPTH):
            codes = self.completion[:, level] - int(self.catalogue.offsets[level])
            first = TEXT + CODES * level
            legal = self.catalogue.trie.legal_mask(level, nodes)
            scores = logits[:, level, first : first + CODES].masked_fill(~legal, float("-inf")).log_softmax(dim=-1)
            columns.append(scores.gather(1, codes[:, None])[:, 0])
            nodes = self.catalogue.trie.step(nodes, codes)
        return torch.stack(columns, dim=1)

    def compare(self, mine: Callable[[], Tensor], other: Callable[[], Tensor]) -> dict[str, Any]:
        """Largest differences; gradients relative to the largest entry of each parameter's gradient."""
        results = []
        for call in (mine, other):
            values = self.step(call)
            results.append((values, {n: p.grad for n, p in self.model.named_parameters()}))
        self.model.zero_grad(set_to_none=True)
        (a, left), (b, right) = results
        logp = float((a - b).abs().max())
        gradient = max(float((left[n] - right[n]).abs().max() / right[n].abs().max()) for n in right)
        return {
            "equal": logp < LOGP_TOLERANCE and gradient < GRADIENT_TOLERANCE,
            "largest_logp_difference": logp,
            "largest_relative_gradient_difference": gradient,
        }

    def work(self, restricted: bool) -> dict[str, float]:
        """See `least_gflop` in the module's docstring."""
        config = self.model.config
        weights = sum(p.numel() for n, p in self.model.model.named_parameters() if "embed" not in n)
        wide = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        lengths = self.mask.sum(dim=1)
        branch = DEPTH - 1
        tokens = int(lengths.sum()) + len(self.completion) * branch
        pairs = int((lengths * (lengths + 1) // 2).sum())
        pairs += GROUP * int((lengths * branch).sum()) + len(self.completion) * branch * (branch + 1) // 2
        full = lengths + branch
        plain_tokens, plain_pairs = GROUP * int(full.sum()), GROUP * int((full * (full + 1) // 2).sum())
        scored, head = self.completion.numel(), 2 * config.hidden_size
        ours = 3 * (2 * weights * tokens + wide * pairs + head * scored * (CODES if restricted else VOCABULARY))
        baseline = 3 * (2 * weights * plain_tokens + wide * plain_pairs + head * scored * VOCABULARY)
        return {
            "tokens": tokens,
            "baseline_tokens": plain_tokens,
            "least_gflop": round(ours / 1e9, 2),
            "baseline_gflop": round(baseline / 1e9, 2),
            "possible": round(baseline / ours, 2),
        }


def paired_times(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each call over alternating rounds."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            times[place].append(time.perf_counter() - start)
    return [statistics.median(values) for values in times]


def update_rows(job: Job, name: str, rounds: int, rate: float, every_position: bool) -> list[dict[str, Any]]:
    same = {"ours": job.compare(job.ours, job.plain), "free": job.compare(job.ours_free, job.trl)}
    calls = [job.ours, job.ours_free, job.trl, job.plain]
    ours, free, trl, plain = paired_times([lambda call=call: job.step(call) for call in calls], rounds)
    table = [
        ("update", "TRL, scored positions", ours, trl, "ours", True),
        ("update", "plain logits, renormalised", ours, plain, "ours", True),
        ("update, whole vocabulary", "TRL, scored positions", free, trl, "free", False),
    ]
    if every_position:
        (slow,) = paired_times([lambda: job.step(lambda: job.trl(compact=False))], 1)
        table.append(("update", "TRL, every position (as it runs on a CPU)", ours, slow, "ours", True))
    rows = []
    for kind, baseline, ours_s, baseline_s, which, restricted in table:
        work = job.work(restricted)
        rows.append(
            {
                "name": f"{kind}, {name}",
                **seconds(baseline, ours_s, baseline_s),
                **same[which],
                **work,
                "times_least": round(ours_s * rate / (work["least_gflop"] * 1e9), 2),
                "rounds": rounds,
            }
        )
    return rows


def seconds(baseline: str, ours_s: float, baseline_s: float) -> dict[str, Any]:
    ratio = round(baseline_s / ours_s, 2)
    return {"baseline": baseline, "ours_s": round(ours_s, 5), "baseline_s": round(baseline_s, 5), "ratio": ratio}


def rollout_rows(job: Job, name: str, rounds: int) -> list[dict[str, Any]]:
    catalogue, allowed = job.catalogue, job.catalogue.dictionary()
    job.model.eval()

    def ours() -> tuple[Tensor, Tensor]:
        found = sid_sample(
            job.model,
            job.ids,
            job.mask,
            trie=catalogue.trie,
            sid_token_ids=catalogue.tokens,
            num_samples=GROUP,
        )
        tokens = catalogue.trie.leaf_codes(found.leaves).flatten(0, 1) + torch.from_numpy(catalogue.offsets)
        return tokens, found.log_probs.flatten()

    def stock() -> tuple[Tensor, Tensor]:
        return sample_by_generate(job.model, job.ids, job.mask, allowed)

    errors = [sampling_error(job, *call()) for call in (ours, stock)]
    ours_s, stock_s = paired_times([ours, stock], rounds)
    return [
        {
            "name": f"rollout, {name}",
            **seconds("generate + prefix_allowed_tokens_fn, sampling", ours_s, stock_s),
            "equal": max(errors) < 1e-4,
            "largest_logp_difference": max(errors),
            "rounds": rounds,
        }
    ]


@torch.no_grad()
def sampling_error(job: Job, tokens: Tensor, log_probs: Tensor) -> float:
    """Largest difference of reported log-probabilities of samples from those of `group_logps`."""
    start = torch.zeros(len(tokens), dtype=torch.int64)
    trie = {"trie": job.catalogue.trie, "sid_token_ids": job.catalogue.tokens, "sid_start": start}
    mask = torch.ones_like(tokens)
    truth = group_logps(job.model, job.prompt_ids, job.prompt_mask, tokens, mask, **trie).log_probs.sum(dim=1)
    return float((truth - log_probs).abs().max())


# The whole step: each side runs in a process of its own, which prints one line of JSON.


def step_row(prompt: int, prompts: int, steps: int, rounds: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "stock": []}
    for _ in range(rounds):
        for side, results in found.items():
            command = [sys.executable, __file__, "--side", side, str(prompt), str(prompts), str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise RuntimeError(f"The {side} side of the whole step failed:\n{done.stderr[-3000:]}")
            results.append(json.loads(lines[0].removeprefix("RESULT ")))
    ours_s, stock_s = (statistics.median(t for r in results for t in r["times"]) for results in found.values())
    row = {"name": f"step, prompt {prompt}, prompts {prompts}, G {GROUP}", **seconds("GRPOTrainer", ours_s, stock_s)}
    memory = {side: max(r["peak_mb"] for r in results) for side, results in found.items()}
    return {
        **row,
        "equal": None,
        "ours_peak_mb": round(memory["ours"]),
        "baseline_peak_mb": round(memory["stock"]),
        "imports_mb": round(found["ours"][0]["imports_mb"]),
        "rounds": rounds * (steps - 1),
    }


def machine(rate: float) -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gflop_per_s": round(rate / 1e9, 1),
    }


def machine_rate() -> float:
    """FLOP/s of a matrix product of the model's shape; the best of several."""
    a, b = torch.randn(2048, 256), torch.randn(256, 768)
    return 2 * 2048 * 256 * 768 / min(paired_times([lambda: a @ b], 1)[0] for _ in range(20))


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 prompts instead of 4, fewer rounds; under 5 minutes")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.side:
        run_side(options.side[0], *(int(value) for value in options.side[1:]))
        return {}
    prompts, rounds = (2, 2) if options.quick else (4, 3)
    model, catalogue, rate = make_model(), Catalogue(), machine_rate()
    add_fused_lm_head(model)
    rows: list[dict[str, Any]] = []

    def report(found: list[dict[str, Any]]) -> dict[str, Any]:
        """Prints and writes what there is so far, so that a long run that is stopped loses nothing."""
        for row in found:
            print(f"{row['name']}: {row['ratio']:.1f}x against {row['baseline']}, equal: {row['equal']}", flush=True)
        rows.extend(found)
        result = {"machine": machine(rate), "rows": rows}
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result

    for prompt in (256, 512):
        name = f"prompt {prompt}, prompts {prompts}, G {GROUP}"
        job = Job(model, catalogue, prompt, prompts)
        report(update_rows(job, name, rounds, rate, every_position=prompt == 256 and not options.quick))
        report(rollout_rows(job, name, rounds))
    for prompt, steps, repeats in [(256, 3, 1)] if options.quick else [(256, 4, 2), (512, 4, 2)]:
        result = report([step_row(prompt, prompts, steps, repeats)])
    return result


if __name__ == "__main__":
    main()

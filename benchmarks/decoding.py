"""Constrained decoding of SIDs: `sid_beam_search` against Hugging Face `generate` under the same constraint.

    python benchmarks/decoding.py [--quick] [--json FILE]

Same model, prompts, catalogue and beam width; the results are compared before anything is timed, and every pair runs
alternately in this one process. Baselines: `generate` with `prefix_allowed_tokens_fn` over a Python dictionary of
prefixes (built beforehand, not timed), and `generate` with our vectorised `SidLogitsProcessor`. Both with
`renormalize_logits=True` and `length_penalty=0.0`, which gives our scores. The model is a randomly initialised Qwen3
(4 layers, width 256), batch 4, prompts of different lengths padded on the left.

`equal`: per rank the scores agree to 1e-5, and a SID found by one side only scores within 1e-5 of the last rank (SIDs
may trade places when their scores are equal up to float32 rounding). `leaves_differing` counts ranks with another SID.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM

from sidtune.decoding.beam_search import BeamOutput, sid_beam_search
from sidtune.decoding.logits_processor import SidLogitsProcessor
from sidtune.decoding.trie import SidTrie

BATCH, DEPTH, TEXT_TOKENS, TOLERANCE = 4, 3, 1000, 1e-5


@dataclass(frozen=True)
class Case:
    """One size of the job: catalogue items, prompt tokens, beams, vocabulary rows, codes per level."""

    items: int
    prompt: int
    beams: int
    vocabulary: int
    codes: int = 256

    @property
    def name(self) -> str:
        return f"items {self.items}, prompt {self.prompt}, beams {self.beams}, vocabulary {self.vocabulary}"


QUICK = [
    Case(10_000, 128, 10, 50_000),
    Case(10_000, 128, 50, 50_000),
    Case(100_000, 128, 50, 50_000),
    Case(10_000, 128, 50, 150_000),
]
FULL = [Case(i, p, k, 150_000) for i in (10_000, 1_000_000) for p in (128, 512) for k in (10, 50, 200)]


def make_model(vocabulary: int) -> Qwen3ForCausalLM:
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
    return Qwen3ForCausalLM(config).eval()


@dataclass
class Job:
    """A case made concrete: model, catalogue in both forms, prompts."""

    case: Case
    model: Qwen3ForCausalLM

    def __post_init__(self) -> None:
        draw = np.random.default_rng(0)
        sizes = (self.case.codes,) * DEPTH
        codes = draw.integers(0, self.case.codes, (self.case.items, DEPTH))
        self.trie = SidTrie.from_codes(codes, sizes)
        self.tokens = TEXT_TOKENS + np.arange(sum(sizes))
        self.allowed = prefix_dictionary(codes + TEXT_TOKENS + self.case.codes * np.arange(DEPTH))
        self.ids = torch.from_numpy(draw.integers(1, TEXT_TOKENS, (BATCH, self.case.prompt)))
        self.mask = torch.ones_like(self.ids)
        for row in range(BATCH):
            self.mask[row, : row * self.case.prompt // 8] = 0

    def ours(self) -> BeamOutput:
        return sid_beam_search(
            self.model, self.ids, self.mask, trie=self.trie, sid_token_ids=self.tokens, num_beams=self.case.beams
        )

    def generate(self, **constraint: Any) -> BeamOutput:
        beams = self.case.beams
        out = self.model.generate(
            input_ids=self.ids,
            attention_mask=self.mask,
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=DEPTH,
            min_new_tokens=DEPTH,
            length_penalty=0.0,
            do_sample=False,
            renormalize_logits=True,
            return_dict_in_generate=True,
            output_scores=True,
            **constraint,
        )
        codes = out.sequences[:, -DEPTH:] - TEXT_TOKENS - self.case.codes * torch.arange(DEPTH)
        nodes = self.trie.find(codes)
        leaves = torch.where(nodes >= 0, nodes - self.trie.level_starts[DEPTH], -1)
        return BeamOutput(leaves.view(BATCH, beams), out.sequences_scores.view(BATCH, beams))

    def with_callback(self) -> BeamOutput:
        start = self.case.prompt
        return self.generate(prefix_allowed_tokens_fn=lambda _, row: self.allowed[tuple(row[start:].tolist())])

    def with_processor(self) -> BeamOutput:
        processor = SidLogitsProcessor(self.trie, self.tokens, self.case.prompt)
        return self.generate(logits_processor=LogitsProcessorList([processor]))


def prefix_dictionary(tokens: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    """Prefix of tokens -> next tokens: what people write for `prefix_allowed_tokens_fn`."""
    legal: dict[tuple[int, ...], set[int]] = {}
    for row in tokens.tolist():
        for length in range(len(row)):
            legal.setdefault(tuple(row[:length]), set()).add(row[length])
    return {prefix: sorted(after) for prefix, after in legal.items()}


def same_up_to_rounding(a: BeamOutput, b: BeamOutput) -> bool:
    """See `equal` in the module's docstring."""
    if not torch.allclose(a.scores, b.scores, atol=TOLERANCE, rtol=0):
        return False
    for mine, other in ((a, b), (b, a)):
        for row in range(len(mine.leaves)):
            alone = ~torch.isin(mine.leaves[row], other.leaves[row])
            if (mine.scores[row][alone] > mine.scores[row, -1] + TOLERANCE).any():
                return False
    return bool((a.leaves >= 0).all() and (b.leaves >= 0).all())


def paired_times(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each call over alternating rounds."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            times[place].append(time.perf_counter() - start)
    return [statistics.median(values) for values in times]


def measure(case: Case, model: Qwen3ForCausalLM, rounds: int) -> list[dict[str, Any]]:
    job = Job(case, model)
    baselines = {
        "generate + prefix_allowed_tokens_fn": job.with_callback,
        "generate + SidLogitsProcessor": job.with_processor,
    }
    found = job.ours()
    others = {name: call() for name, call in baselines.items()}
    ours_s, *baseline_s = paired_times([job.ours, *baselines.values()], rounds)
    rows = []
    for (name, other), seconds in zip(others.items(), baseline_s, strict=True):
        rows.append(
            {
                "name": case.name,
                "baseline": name,
                "ours_s": round(ours_s, 5),
                "baseline_s": round(seconds, 5),
                "ratio": round(seconds / ours_s, 2),
                "equal": same_up_to_rounding(found, other),
                "leaves_differing": int((found.leaves != other.leaves).sum()),
                "largest_score_difference": float((found.scores - other.scores).abs().max()),
                "rounds": rounds,
            }
        )
    return rows


def machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, well under 5 minutes on 2 cores")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    models: dict[int, Qwen3ForCausalLM] = {}
    for case in QUICK if options.quick else FULL:
        model = models.setdefault(case.vocabulary, make_model(case.vocabulary))
        for row in measure(case, model, rounds=2 if options.quick else 3):
            rows.append(row)
            print(f"{row['name']}: {row['ratio']:.1f}x against {row['baseline']}, equal: {row['equal']}", flush=True)
    result = {"machine": machine(), "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()

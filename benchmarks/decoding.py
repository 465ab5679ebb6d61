"""Constrained decoding of SIDs: `sid_beam_search` against Hugging Face `generate`, constrained and not.

    python benchmarks/decoding.py [--quick] [--json FILE]

Same model, prompts, catalogue and beam width; the results are compared before anything is timed, and all calls of a case
run alternately in this one process. Baselines:

* `generate` with `prefix_allowed_tokens_fn` over a Python dictionary of prefixes (built beforehand, not timed);
* `generate` with our vectorised `SidLogitsProcessor`; both with `renormalize_logits=True` and `length_penalty=0.0`, which
  gives our scores;
* `generate` without any constraint: the price of a beam search that may name what does not exist (its `equal` is null).

The model is a randomly initialised Qwen3 (4 layers, width 256, vocabulary 150,000), batch 4, prompts of different lengths
padded on the left, three SID levels of 256 codes. `growth` rows time our search on 10^4 and on 10^7 items alternately.

`equal`: per rank the scores agree to 1e-5, and a SID found by one side only scores within 1e-5 of the last rank (SIDs may
trade places when their scores are equal up to float32 rounding). `leaves_differing` counts ranks with another SID.

`least_gflop` and `least_mb` are the least work of the job: every real prompt token and every beam token through the layers
once, attention over what each token may see, the level's rows of the head; the weights read once per pass (three passes)
and the cache written and read once. `times_least` is our time over the larger of the two bounds, at the matrix product
and copy rates of this machine, measured in this run. `cache_prompt_mb` is the cache of the prompts as our search held it
(it must not depend on the beam), `cache_beams_mb` that of the beams, `cache_per_beam_mb` what one copy per beam takes.
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
from tqdm.auto import tqdm
from transformers import LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM

from sidtune.decoding.beam_search import sid_beam_search
from sidtune.decoding.engine.prompt_cache import PackedBeams
from sidtune.decoding.items import BeamOutput
from sidtune.decoding.logits_processor import SidLogitsProcessor
from sidtune.decoding.trie import SidTrie

BATCH, DEPTH, TEXT_TOKENS, TOLERANCE = 4, 3, 1000, 1e-5


@dataclass(frozen=True)
class Case:
    """One size of the job: catalogue items, prompt tokens, beams, vocabulary rows, codes per level; baselines (all)."""

    items: int
    prompt: int
    beams: int
    vocabulary: int
    codes: int = 256
    only: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"items {self.items}, prompt {self.prompt}, beams {self.beams}, vocabulary {self.vocabulary}"


CALLBACK, PROCESSOR, FREE = (
    "generate + prefix_allowed_tokens_fn",
    "generate + SidLogitsProcessor",
    "generate, unconstrained",
)
QUICK = [
    Case(10_000, 128, 10, 150_000),
    Case(10_000, 128, 50, 150_000),
    Case(10_000, 512, 50, 150_000, only=(FREE,)),
    Case(1_000_000, 128, 10, 150_000, only=(CALLBACK,)),
]
# What does not depend on the catalogue is measured at its smallest size only.
FULL = [
    Case(items, prompt, beams, 150_000, only=() if items == 10_000 else (CALLBACK,))
    for items in (10_000, 1_000_000, 10_000_000)
    for prompt in (128, 512)
    for beams in (10, 50, 200)
]
GROWTH = [(p, k) for p in (128, 512) for k in (10, 50, 200)]


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
        self.allowed = prefix_dictionary(self.trie, self.case.codes)
        self.ids = torch.from_numpy(draw.integers(1, TEXT_TOKENS, (BATCH, self.case.prompt)))
        self.mask = torch.ones_like(self.ids)
        for row in range(BATCH):
            self.mask[row, : row * self.case.prompt // 8] = 0

    def ours(self) -> BeamOutput:
        return sid_beam_search(
            self.model, self.ids, self.mask, trie=self.trie, sid_token_ids=self.tokens, num_beams=self.case.beams
        )

    def unconstrained(self) -> None:
        self.model.generate(**self.settings(), return_dict_in_generate=True, output_scores=False)

    def settings(self) -> dict[str, Any]:
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "num_beams": self.case.beams,
            "num_return_sequences": self.case.beams,
            "max_new_tokens": DEPTH,
            "min_new_tokens": DEPTH,
            "length_penalty": 0.0,
            "do_sample": False,
        }

    def generate(self, **constraint: Any) -> BeamOutput:
        beams = self.case.beams
        out = self.model.generate(
            **self.settings(), renormalize_logits=True, return_dict_in_generate=True, output_scores=True, **constraint
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


def prefix_dictionary(trie: SidTrie, codes: int) -> dict[tuple[int, ...], list[int]]:
    """Prefix of tokens -> next tokens: what people write for `prefix_allowed_tokens_fn`."""
    legal: dict[tuple[int, ...], list[int]] = {}
    starts, edges, level = trie.child_start.tolist(), trie.codes.tolist(), 0
    prefixes: list[tuple[int, ...]] = [()]
    for level in range(trie.depth):
        first, offset, after = trie.level_starts[level], TEXT_TOKENS + codes * level, []
        for place, prefix in enumerate(prefixes):
            below = edges[starts[first + place] : starts[first + place + 1]]
            legal[prefix] = [offset + code for code in below]
            if level + 1 < trie.depth:
                after += [(*prefix, offset + code) for code in below]
        prefixes = after
    return legal


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


def measure(case: Case, model: Qwen3ForCausalLM, rounds: int, rates: tuple[float, float]) -> list[dict[str, Any]]:
    job = Job(case, model)
    calls = {CALLBACK: job.with_callback, PROCESSOR: job.with_processor, FREE: job.unconstrained}
    baselines = {name: call for name, call in calls.items() if name in case.only or not case.only}
    found = job.ours()
    others = {name: call() for name, call in baselines.items()}
    ours_s, *baseline_s = paired_times([job.ours, *baselines.values()], rounds)
    work = least_work(job, ours_s, rates)
    rows = []
    for (name, other), seconds in zip(others.items(), baseline_s, strict=True):
        row = {"name": case.name, "baseline": name, "ours_s": round(ours_s, 5), "baseline_s": round(seconds, 5)}
        row |= {"ratio": round(seconds / ours_s, 2), "equal": None, "rounds": rounds, **work}
        if other is not None:
            row["equal"] = same_up_to_rounding(found, other)
            row["leaves_differing"] = int((found.leaves != other.leaves).sum())
            row["largest_score_difference"] = float((found.scores - other.scores).abs().max())
        rows.append(row)
    return rows


def least_work(job: Job, seconds: float, rates: tuple[float, float]) -> dict[str, float]:
    """See `least_gflop` and the fields after it in the module's docstring."""
    config, trie, beams = job.model.config, job.trie, job.case.beams
    layers, wide = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    weights = sum(p.numel() for name, p in job.model.model.named_parameters() if "embed" not in name)
    lengths = job.mask.sum(dim=1)
    widths = [min(beams, trie.allowed_counts[level]) for level in range(DEPTH)]
    fed = sum(widths[1:]) * BATCH
    prompt, seen = int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum()) + int(lengths.sum()) * sum(widths[1:])
    head = 2 * config.hidden_size * job.case.codes * sum(widths) * BATCH
    flop = 2 * weights * (prompt + fed) + 4 * layers * wide * seen + head
    row = 2 * layers * config.num_key_value_heads * config.head_dim * 4
    cache, per_beam = cache_bytes(job)
    byte = 4 * weights * DEPTH + prompt * row * DEPTH + fed * row * 2
    bound = max(flop / rates[0], byte / rates[1])
    return {
        "least_gflop": round(flop / 1e9, 3),
        "least_mb": round(byte / 1e6, 2),
        "times_least": round(seconds / bound, 2),
        "cache_prompt_mb": round(cache / 1e6, 3),
        "cache_beams_mb": round(per_beam / 1e6, 3),
        "cache_per_beam_mb": round(BATCH * beams * (job.case.prompt + DEPTH - 1) * row / 1e6, 3),
    }


def cache_bytes(job: Job) -> tuple[int, int]:
    """Bytes of keys and values that our search held for the prompts and for the beams."""
    held: list[tuple[int, int]] = []
    advance = PackedBeams.advance

    def watched(self: PackedBeams, tokens: torch.Tensor, parents: torch.Tensor) -> None:
        advance(self, tokens, parents)
        size = sum(
            part.numel() * part.element_size() for layer in self._cache.layers for part in (layer.keys, layer.values)
        )
        columns = self._cache.layers[0].keys.shape[2]
        held.append((size * self._mask.shape[1] // columns, size - size * self._mask.shape[1] // columns))

    PackedBeams.advance = watched  # type: ignore[method-assign]
    try:
        job.ours()
    finally:
        PackedBeams.advance = advance  # type: ignore[method-assign]
    return held[-1]


def machine_rates() -> tuple[float, float]:
    """FLOP/s of a matrix product of the model's shape, bytes/s of a copy; the best of several."""
    a, b, c = torch.randn(2048, 256), torch.randn(256, 768), torch.randn(32_000_000)
    product = min(paired_times([lambda: a @ b], 1)[0] for _ in range(20))
    copy = min(paired_times([lambda: c.clone()], 1)[0] for _ in range(5))
    return 2 * 2048 * 256 * 768 / product, 2 * 4 * len(c) / copy


def growth(model: Qwen3ForCausalLM, prompt: int, beams: int, sizes: tuple[int, int], rounds: int) -> dict[str, Any]:
    small, large = (Job(Case(items, prompt, beams, model.config.vocab_size), model) for items in sizes)
    small.ours(), large.ours()
    small_s, large_s = paired_times([small.ours, large.ours], rounds)
    name = f"growth from {sizes[0]} to {sizes[1]} items, prompt {prompt}, beams {beams}"
    row = {"name": name, "baseline": f"{sizes[0]} items", "ours_s": round(large_s, 5), "baseline_s": round(small_s, 5)}
    return {**row, "ratio": round(small_s / large_s, 3), "growth": round(large_s / small_s, 3), "equal": None}


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
    model, rates = make_model(150_000), machine_rates()
    for case in tqdm(QUICK if options.quick else FULL, desc="cases"):
        for row in measure(case, model, rounds=1 if case.beams > 50 else 2 if case.prompt > 128 else 3, rates=rates):
            rows.append(row)
            tqdm.write(f"{row['name']}: {row['ratio']:.1f}x against {row['baseline']}, equal: {row['equal']}")
            save(rows, rates, options.json)
    for prompt, beams in GROWTH[1::3] if options.quick else GROWTH:
        sizes = (10_000, 1_000_000) if options.quick else (10_000, 10_000_000)
        rows.append(growth(model, prompt, beams, sizes, rounds=9))
        tqdm.write(f"{rows[-1]['name']}: {rows[-1]['growth']:.3f}x")
    return save(rows, rates, options.json)


def save(rows: list[dict[str, Any]], rates: tuple[float, float], file: Path | None) -> dict[str, Any]:
    """Writes what there is so far, so that a long run that is stopped loses nothing."""
    rate = {"gflop_per_s": round(rates[0] / 1e9, 1), "gb_per_s": round(rates[1] / 1e9, 2)}
    result = {"machine": {**machine(), **rate}, "rows": rows}
    if file:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()

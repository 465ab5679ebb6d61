"""Rows of one prompt packed behind one another: every token once, within the limits, and cut where that is cheaper."""

from __future__ import annotations

import numpy as np
import torch
from decoding_oracles import LEVEL_SIZES, random_codes, random_token_ids
from group_oracles import Rows, random_rows

from sidtune.trainers.grpo.logps.packing import branch_tokens, pack, plain_rows, read_batch


def _rows(seed: int = 3, **more) -> Rows:
    return random_rows(seed, random_codes(0), random_token_ids(0), LEVEL_SIZES, **more)


def test_packing_covers_every_token_once_and_fits_its_limits():
    random = np.random.default_rng(0)
    for _ in range(30):
        rows, width, length = int(random.integers(1, 30)), int(random.integers(1, 40)), int(random.integers(1, 30))
        numbers = random.integers(0, 6, rows)
        prompts = torch.tensor(random.integers(0, 3, (6, width))[numbers])
        seen = torch.tensor(np.arange(width) >= random.integers(0, width, 6)[numbers][:, None])
        answered = torch.tensor(np.arange(length) < random.integers(0, length + 1, rows)[:, None])
        batch = read_batch(prompts, seen, torch.zeros(rows, length), answered)
        limit = int(random.integers(1, 200))
        for passes in (pack(batch, 8, max_tokens=limit), plain_rows(batch, limit), pack(batch, 100_000)):
            targets = torch.cat([p.target for p in passes])
            assert sorted(targets.tolist()) == answered.flatten().nonzero().flatten().tolist()
        for part in pack(batch, 8, max_tokens=limit):
            branches = torch.unique(part.branch[part.branch > 0]).numel()
            assert part.source.numel() <= limit or len(part.source) == 1
            assert branches <= len(part.target)


def test_a_long_group_is_cut_where_attention_would_cost_more_than_the_prompt():
    prompts = torch.ones(16, 50, dtype=torch.int64)
    answered = torch.ones(16, 400, dtype=torch.bool)
    batch = read_batch(prompts, prompts, torch.zeros(16, 400), answered)
    (rows,) = pack(batch, 64)
    assert len(rows.source) == 16 and branch_tokens(50, 64) < 400
    (rows,) = pack(batch, 65_536)
    assert len(rows.source) == 2

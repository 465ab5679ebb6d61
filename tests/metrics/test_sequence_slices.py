"""Slices of a next-item ranking against plain loops over the users."""

import numpy as np
import pytest
from next_item_worlds import random_catalogue, random_sequences

from sidtune.metrics.statistics.sequence_slices import (
    HISTORY,
    PREFIX,
    TARGET,
    labels,
    markdown_slices,
    mean_slices,
    slices,
)
from sidtune.trainers.next_item.trainer import measure_targets

SEQUENCES = random_sequences(users=60, items=30, seed=2)
CODES = random_catalogue(SEQUENCES).codes
EXAMPLES = SEQUENCES.held_out("test")


def ranking(seed):
    """Twelve of the thirty items per user, some places empty."""
    draw = np.random.default_rng(seed)
    rows = np.stack([draw.permutation(30)[:12] for _ in range(len(EXAMPLES))])
    rows[::7, 8:] = -1
    return rows


def by_loop(ranked):
    """Group → values of its users, and the shares of SID prefixes."""
    counts = np.zeros(30, dtype=int)
    for user in range(len(SEQUENCES)):
        for row in SEQUENCES.rows[SEQUENCES.offsets[user] : SEQUENCES.training_stops[user]]:
            counts[row] += 1
    found, hits = {}, np.zeros(3)
    for place, row in enumerate(ranked):
        history = SEQUENCES.rows[EXAMPLES.starts[place] : EXAMPLES.firsts[place]]
        target = SEQUENCES.rows[EXAMPLES.firsts[place]]
        rank = [n for n, item in enumerate(row[:10]) if item == target]
        value = 1 / np.log2(rank[0] + 2) if rank else 0.0
        often, long = counts[target], len(history)
        popular = "0" if often == 0 else "1-5" if often <= 5 else "6-20" if often <= 20 else "over 20"
        length = "0-5" if long <= 5 else "6-10" if long <= 10 else "over 10"
        found.setdefault((TARGET, f"{popular} times"), []).append(value)
        found.setdefault((HISTORY, f"{length} items"), []).append(value)
        for level in range(3):
            hits[level] += any(
                CODES[n, : level + 1].tolist() == CODES[target, : level + 1].tolist() for n in row[:10] if n >= 0
            )
    return found, hits / len(ranked)


def test_slices_equal_a_loop():
    ranked = ranking(0)
    ndcg = measure_targets(ranked, SEQUENCES, EXAMPLES).per_request["ndcg@10"]
    found, (groups, prefixes) = slices(ranked, ndcg, SEQUENCES, EXAMPLES, CODES), by_loop(ranked)
    assert {(kind, label) for kind in (TARGET, HISTORY) for label in found[kind]} == set(groups) and len(groups) >= 5
    for (kind, label), values in groups.items():
        assert found[kind][label]["users"] == len(values)
        assert found[kind][label]["value"] == pytest.approx(np.mean(values))
    assert [cell["value"] for cell in found[PREFIX].values()] == pytest.approx(prefixes)
    assert 1 > prefixes[0] > prefixes[1] > prefixes[2] > 0


def test_means_over_seeds_and_the_table():
    seeds = [ranking(seed) for seed in (0, 1)]
    ndcg = [measure_targets(ranked, SEQUENCES, EXAMPLES).per_request["ndcg@10"] for ranked in seeds]
    parts = [slices(r, n, SEQUENCES, EXAMPLES, CODES) for r, n in zip(seeds, ndcg, strict=True)]
    mean = mean_slices(parts)
    for kind, groups in mean.items():
        for label, cell in groups.items():
            assert cell["value"] == pytest.approx(np.mean([part[kind][label]["value"] for part in parts]))
    text = "\n".join(markdown_slices({"one": mean}))
    assert f"| {mean[PREFIX]['level 3']['value']:.4f} |" in text and f"| {len(EXAMPLES)} |" in text
    assert markdown_slices({}) == []


def test_labels_name_every_group():
    assert labels((0, 5, 20), "times") == ["0 times", "1-5 times", "6-20 times", "over 20 times"]

"""Where a next-item model loses: its figures by popularity of the target, by length of the history, and by SID level.

The slices are read from the same stored rankings as the table, so nothing is ranked and no target is read once more. Bounds of the
groups are fixed (our choice), so two data sets and two models stand beside each other.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from sidtune.data_builders.sequences.item_sequences import ItemSequences, SequenceExamples

TARGET, HISTORY, PREFIX = "target in training", "history", "SID prefix"
TARGET_BOUNDS, HISTORY_BOUNDS = (0, 5, 20), (5, 10)
PLACES = 10


def group_of(values: np.ndarray, bounds: tuple[int, ...]) -> np.ndarray:
    """(n,) int64: group g holds the values above bounds[g - 1] and up to bounds[g]; the last one all above the last bound."""
    return np.searchsorted(np.array(bounds), values, side="left")


def labels(bounds: tuple[int, ...], unit: str) -> list[str]:
    """Names of the groups: '0 times', '1-5 times', 'over 5 times'."""
    below = [-1, *bounds[:-1]]
    spans = [f"{low + 1}-{high}" if low + 1 < high else str(high) for low, high in zip(below, bounds, strict=True)]
    return [f"{span} {unit}" for span in spans] + [f"over {bounds[-1]} {unit}"]


def prefix_found(ranked: np.ndarray, targets: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(n, depth) bool: whether one of the first ten ranked items shares the target's first l + 1 codes.

    Args:
        ranked: (n, k) item rows, -1 for an empty place. targets: (n,) item rows. codes: (N, depth).
    """
    first = ranked[:, :PLACES]
    same = (codes[np.maximum(first, 0)] == codes[targets][:, None]) & (first >= 0)[..., None]
    return np.logical_and.accumulate(same, axis=2).any(axis=1)


def slices(
    ranked: np.ndarray, ndcg: np.ndarray, sequences: ItemSequences, examples: SequenceExamples, codes: np.ndarray
) -> dict[str, dict[str, dict[str, float]]]:
    """The figures of one ranking, by group.

    Args:
        ranked: (n, k >= 10) item rows. ndcg: (n,) NDCG@10 of each user.
        sequences, examples: the users and their targets. codes: (N, depth) codes of the SID levels.

    Returns:
        Kind of group → its label → `users` (how many) and `value`: the mean NDCG@10 of the group, and under
        "SID prefix" the share of all users with such a prefix among their first ten items. Empty groups are left out.
    """
    targets = sequences.rows[examples.firsts]
    counts, lengths = sequences.training_counts()[targets], examples.firsts - examples.starts
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind, values, bounds, unit in (
        (TARGET, counts, TARGET_BOUNDS, "times"),
        (HISTORY, lengths, HISTORY_BOUNDS, "items"),
    ):
        group = group_of(values, bounds)
        found[kind] = {
            label: {"users": int(np.sum(group == n)), "value": float(ndcg[group == n].mean())}
            for n, label in enumerate(labels(bounds, unit))
            if np.any(group == n)
        }
    share = prefix_found(ranked, targets, codes).mean(axis=0)
    found[PREFIX] = {
        f"level {level + 1}": {"users": len(targets), "value": float(value)} for level, value in enumerate(share)
    }
    return found


def mean_slices(by_seed: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Means over seeds; the groups are the same for all, as the users are."""
    first = by_seed[0]
    return {
        kind: {
            label: {
                "users": cell["users"],
                "value": statistics.fmean(one[kind][label]["value"] for one in by_seed),
            }
            for label, cell in groups.items()
        }
        for kind, groups in first.items()
    }


def markdown_slices(where: dict[str, Any]) -> list[str]:
    """Lines of the table of all rows; empty without rows."""
    if not where:
        return []
    first = next(iter(where.values()))
    places = [(kind, label) for kind, groups in first.items() for label in groups]
    heads = [f"{kind} {label}" for kind, label in places]
    users = [f"{first[kind][label]['users']:,}" for kind, label in places]
    lines = ["| system | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    lines.append("| users | " + " | ".join(users) + " |")
    for name, row in where.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[kind][label]['value']:.4f}" for kind, label in places) + " |")
    text = (
        "Where each row loses: NDCG@10 by how often the target stands in the training parts and by items of history, and the "
        "share of users with an item among their first ten that shares the target's SID up to that level (SIDs of the first "
        "trained system)."
    )
    return ["", text, "", *lines]

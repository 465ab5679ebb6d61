"""What a way of treating collisions costs: moved items, distortion, and how well items can be ranked at all.

The ceilings are metrics on items: what a model would reach that always names the right code first, with the items of a
code in expansion order and every item asked for equally often. `ceiling_hr1` is the share of items that stand first in
their code, `ceiling_ndcg10` the mean of `1 / log2(1 + place)` over items within the first ten. They say what sharing
alone takes away; whether codes that were moved or lengthened are harder to learn, only a trained model can say. Our
choice throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sidtune.core.errors import DataError
from sidtune.tokenizers.quantizers.base import Quantizer
from sidtune.tokenizers.sids.arguments import check_quantizer
from sidtune.tokenizers.sids.collisions import CollisionMethod
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vectors import check_vectors

_BLOCK = 65_536


@dataclass(frozen=True)
class CollisionCost:
    """One way of treating collisions, beside the codes as the quantizer gave them.

    Attributes:
        method: its name.
        items, codes: N and the number of distinct codes after it.
        tokens: tokens of one SID, a suffix included.
        reassigned: items whose quantizer levels changed; `reassigned_share` of N.
        moved_error_before, moved_error_after: mean squared distance of the moved items to what their code decodes to;
            None when none moved.
        relative_error_before, relative_error: squared error of all items over the squared deviation from their mean.
        icr: share of items that own their code.
        cur_total: distinct codes over the product of the level sizes.
        lost_rate: (items - codes) / items.
        largest_group: items of the most crowded code.
        ceiling_hr1, ceiling_ndcg10: see the module.
        notes: what could not be done as asked, full sentences.
    """

    method: str
    items: int
    codes: int
    tokens: int
    reassigned: int
    reassigned_share: float
    moved_error_before: float | None
    moved_error_after: float | None
    relative_error_before: float
    relative_error: float
    icr: float
    cur_total: float
    lost_rate: float
    largest_group: int
    ceiling_hr1: float
    ceiling_ndcg10: float
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def squared_errors(vectors: np.ndarray, codes: np.ndarray, quantizer: Quantizer) -> np.ndarray:
    """(n,) float64 squared distance of each vector (n, d) to what its codes (n, l) decode to."""
    errors = np.empty(len(vectors))
    for start in range(0, len(vectors), _BLOCK):
        part = slice(start, start + _BLOCK)
        difference = vectors[part].astype(np.float64) - quantizer.decode(codes[part])
        errors[part] = np.einsum("nd,nd->n", difference, difference)
    return errors


def deviation(vectors: np.ndarray) -> float:
    """Sum of squared deviations of vectors (n, d) from their mean, float64; 0 when all are equal."""
    centre = vectors.mean(axis=0, dtype=np.float64)
    blocks = (vectors[start : start + _BLOCK] for start in range(0, len(vectors), _BLOCK))
    return float(sum(((block - centre) ** 2).sum() for block in blocks))


def places(sids: SemanticIds) -> np.ndarray:
    """(N,) int64 place of each item within its code, from 1, in expansion order."""
    _, offsets, rows = sids.paths()
    place = np.empty(len(sids), dtype=np.int64)
    place[rows] = np.arange(len(rows)) - np.repeat(offsets[:-1], np.diff(offsets)) + 1
    return place


def collision_cost(
    before: SemanticIds, after: SemanticIds, vectors: np.ndarray, quantizer: Quantizer, method: CollisionMethod
) -> CollisionCost:
    """Compares the codes as the quantizer gave them for `vectors` (N, d) with what `method.resolve` made of them.

    Raises:
        DataError: other items, other vectors, or another quantizer.
    """
    check_quantizer(before, quantizer)
    check_quantizer(after, quantizer)
    if before.item_ids != after.item_ids:
        raise DataError("The semantic IDs before and after are of other items or in another order; compare equal ones.")
    vectors = check_vectors(vectors, quantizer.dims, rows=len(before))
    codes = after.codes[:, : quantizer.depth]
    moved = (codes != before.codes).any(axis=1)
    first = squared_errors(vectors, before.codes, quantizer)
    last = first.copy()
    if moved.any():
        last[moved] = squared_errors(vectors[moved], codes[moved], quantizer)
    spread, shared, place = deviation(vectors), after.collisions(), places(after)
    return CollisionCost(
        method=method.name,
        items=len(after),
        codes=shared.codes,
        tokens=after.depth,
        reassigned=int(moved.sum()),
        reassigned_share=float(moved.mean()),
        moved_error_before=float(first[moved].mean()) if moved.any() else None,
        moved_error_after=float(last[moved].mean()) if moved.any() else None,
        relative_error_before=relative(first.sum(), spread),
        relative_error=relative(last.sum(), spread),
        icr=1.0 - shared.sharing_rate,
        cur_total=shared.codes / float(np.prod(np.array(after.level_sizes, dtype=np.float64))),
        lost_rate=shared.lost_rate,
        largest_group=shared.largest_group,
        ceiling_hr1=float((place == 1).mean()),
        ceiling_ndcg10=float(np.where(place <= 10, 1.0 / np.log2(1.0 + place), 0.0).mean()),
        notes=list(method.notes),
    )


def relative(error: float, spread: float) -> float:
    """A summed squared error over a summed squared deviation; where nothing deviates, 0 or 1 as the error is 0 or not."""
    return float(error / spread) if spread > 0 else float(error > 0)


def compare_collisions(
    sids: SemanticIds, vectors: np.ndarray, quantizer: Quantizer, methods: Sequence[CollisionMethod]
) -> list[CollisionCost]:
    """The cost of each method on the same codes, in the order given."""
    resolved = [method.resolve(sids, vectors, quantizer) for method in methods]
    return [collision_cost(sids, made, vectors, quantizer, m) for made, m in zip(resolved, methods, strict=True)]


def costs_to_markdown(costs: Sequence[CollisionCost]) -> str:
    """One table, a line per method, and the notes below."""
    lines = [
        "| collisions | tokens | moved items | error of moved, before → after | error / variance | ICR | CUR | items "
        "beyond one per code | largest group | ceiling HR@1 | ceiling NDCG@10 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cost in costs:
        moved = (
            "" if cost.moved_error_after is None else f"{cost.moved_error_before:.3g} → {cost.moved_error_after:.3g}"
        )
        lines.append(
            f"| {cost.method} | {cost.tokens} | {cost.reassigned:,} ({cost.reassigned_share:.1%}) | {moved} | "
            f"{cost.relative_error:.4f} | {cost.icr:.1%} | {cost.cur_total:.3%} | {cost.lost_rate:.1%} | "
            f"{cost.largest_group} | {cost.ceiling_hr1:.3f} | {cost.ceiling_ndcg10:.3f} |"
        )
    notes = [f"- {cost.method}: {note}" for cost in costs for note in cost.notes]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"

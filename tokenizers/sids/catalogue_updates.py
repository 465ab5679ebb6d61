"""New items for a catalogue whose codebooks are frozen, and how far the catalogue has drifted from them.

New items get codes from the codebooks as they are; items that have a SID keep it, and no token is added, so a model
trained on the old SIDs stays valid row by row. What changes is how well the codebooks fit. `measure_drift` compares the
items the codebooks were learned from (batch 0) with all items added since, and `recommend` says when to learn again.

The rule of the recommendation is our choice (`DriftLimits`); no source gives one. New codebooks mean new SIDs for every
item and a model trained again, so the limits ask for a clear sign:
- new items fit worse: their mean squared error over that of items the codebooks have not seen either. For that, the
  codebooks are trained once more on a part of the learned items, and the rest is measured (`held_out_error`). Without it
  the comparison is with the learned items themselves, which every codebook fits better, so that limit is wider;
- the catalogue has grown by a large part;
- more items share a code than when the codes were learned (ICR).
Codes that no learned item used are another matter: their token rows were never trained. They call for further training of
the model, not for new codebooks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.quantizers.base import Quantizer
from sidtune.tokenizers.sids.arguments import check_quantizer
from sidtune.tokenizers.sids.collision_cost import deviation, relative, squared_errors
from sidtune.tokenizers.sids.collisions import CollisionMethod
from sidtune.tokenizers.sids.quality import entropy_bits
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vectors import check_vectors

_SAME = 0.01  # relative distance at which two vectors of one text count as equal


@dataclass(frozen=True)
class DriftLimits:
    """When learning again is recommended. All values are our choice.

    Attributes:
        max_error_ratio: error of the added items over the held-out error.
        max_in_sample_ratio: the same over the error of the learned items, where no held-out error was measured.
        max_added_share: added items over learned items.
        max_icr_drop: ICR as learned minus ICR now.
        max_cold_share: added items whose SID holds a token no learned item used; above it, the model should be trained.
    """

    max_error_ratio: float = 1.25
    max_in_sample_ratio: float = 2.0
    max_added_share: float = 0.5
    max_icr_drop: float = 0.1
    max_cold_share: float = 0.02

    def __post_init__(self) -> None:
        check_range(self, 0, *asdict(self))


@dataclass(frozen=True)
class Part:
    """SIDs of one part of the catalogue, counted within that part.

    Attributes:
        items, codes: N and the number of distinct codes.
        icr: share of items that own their code.
        lost_rate: (items - codes) / items.
        largest_group: items of the most crowded code.
        cur: per level, distinct prefixes over the product of the level sizes.
        entropy_bits: per level, entropy of the codes over items.
        mse: mean squared error per entry of the vectors. None without vectors.
        relative_error: summed squared error over what the deviation from the learned items' mean would give for as many
            learned items, so that all parts have one scale. None without vectors.
    """

    items: int
    codes: int
    icr: float
    lost_rate: float
    largest_group: int
    cur: list[float]
    entropy_bits: list[float]
    mse: float | None = None
    relative_error: float | None = None


@dataclass(frozen=True)
class Drift:
    """The report.

    Attributes:
        levels: names of the levels for the table.
        learned, added, now: the items the codebooks were learned from, all added since, and all together.
        new_items: items of this run, the last part of the added ones.
        added_share: added over learned items.
        error_ratio: error of the added items over the reference, both under the codes the quantizer itself gives, so that
            items moved off crowded codes do not count; None without vectors, or where the reference is 0.
        reference: `held_out` or `learned`; None without vectors.
        held_out_mse: mean squared error per entry of learned items under codebooks that did not see them; None if not
            measured.
        on_learned_codes: share of added items whose SID a learned item has too.
        cold_tokens: SID tokens that added items use and no learned one does, at most 20 of `cold_token_count`.
        cold_share: share of added items with such a token.
        divergence_bits: per level, Jensen-Shannon divergence of the codes of learned and added items, 0 to 1. A few
            items differ by chance alone, so no rule looks at it.
        retrain: whether learning again is recommended.
        recommendation: full sentences.
    """

    levels: list[str]
    learned: Part
    added: Part
    now: Part
    new_items: int
    added_share: float
    error_ratio: float | None
    reference: str | None
    held_out_mse: float | None
    on_learned_codes: float
    cold_tokens: list[str]
    cold_token_count: int
    cold_share: float
    divergence_bits: list[float]
    retrain: bool = False
    recommendation: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def to_markdown(self) -> str:
        parts = (self.learned, self.added, self.now)
        rows = [("items", [f"{p.items:,}" for p in parts]), ("distinct codes", [f"{p.codes:,}" for p in parts])]
        rows.append(("ICR (items with a code of their own)", [f"{p.icr:.2%}" for p in parts]))
        rows.append(("items beyond one per code", [f"{p.lost_rate:.2%}" for p in parts]))
        rows.append(("largest group", [f"{p.largest_group}" for p in parts]))
        for level, name in enumerate(self.levels):
            rows.append((f"CUR of prefix {name}", [f"{p.cur[level]:.4%}" for p in parts]))
            rows.append((f"entropy of level {name} (bits)", [f"{p.entropy_bits[level]:.2f}" for p in parts]))
        if self.learned.mse is not None:
            rows.append(("mean squared error", [f"{p.mse:.3g}" for p in parts]))
            rows.append(("error / variance as learned", [f"{p.relative_error:.3f}" for p in parts]))
        if self.error_ratio is not None:
            name = "unseen items" if self.reference == "held_out" else "items as learned"
            rows.append((f"error over that of {name}", ["", f"{self.error_ratio:.2f}", ""]))
        lines = ["| drift | as learned | added since | now |", "|---|---:|---:|---:|"]
        lines += [f"| {name} | {' | '.join(values)} |" for name, values in rows]
        return "\n".join([*lines, "", *(f"- {sentence}" for sentence in self.recommendation)]) + "\n"


def extend_catalogue(
    sids: SemanticIds,
    quantizer: Quantizer,
    new_ids: Sequence[str],
    new_vectors: np.ndarray,
    popularity: np.ndarray | None = None,
    method: CollisionMethod | None = None,
) -> SemanticIds:
    """Semantic IDs with the new items appended; the rows, codes and tokens of the old ones stay as they are.

    Args:
        sids, quantizer: in use, and frozen.
        new_ids, new_vectors: (n,) ids without a SID, and (n, d) vectors of the encoder the codebooks were trained with.
        popularity: (n,), default 0.
        method: what becomes of new items on a crowded code, default expansion; old items never move.

    Raises:
        DataError: nothing to add, ids in use or given twice, vectors of another width or number, a quantizer of other
            codes, or no free suffix left.
        ConfigError: a method that would change old SIDs.
    """
    check_quantizer(sids, quantizer)
    if not len(new_ids):
        raise DataError("There are no new items to add; every item has a semantic ID already.")
    vectors = check_vectors(new_vectors, quantizer.dims, "vectors of new items", len(new_ids))
    # `extended` looks at the ids, but only after the codes are made, and encoding may take long.
    used = [item_id for item_id in new_ids if item_id in sids]
    if used:
        raise DataError(f"{len(used)} new items have semantic IDs already (first: '{used[0]}'); leave them out.")
    extended = sids.extended(new_ids, quantizer.encode(vectors), popularity)
    if method is None or (sids.suffix_level and method.name == "suffix"):
        return extended
    return method.resolve(extended, vectors, quantizer, fixed=len(sids))


def check_same_encoder(stored: np.ndarray, fresh: np.ndarray) -> None:
    """Refuses vectors of another encoder: items must get the vector again that they have `stored` (n, d).

    A text that was edited since gives another vector of the same encoder, so up to half of the items may differ.

    Raises:
        DataError: another width, or more than half of the rows differ by over 1 % of their length.
    """
    if fresh.shape != stored.shape:
        raise DataError(
            f"The encoder gives vectors of {fresh.shape[1]} dimensions, the codebooks were trained on {stored.shape[1]}; "
            "use the encoder they were trained with."
        )
    if not len(stored):
        return
    distance = np.linalg.norm(fresh.astype(np.float64) - stored, axis=1)
    other = distance > _SAME * np.maximum(np.linalg.norm(stored, axis=1), np.finfo(np.float32).tiny)
    if other.mean() > 0.5:
        raise DataError(
            f"{int(other.sum())} of {len(other)} items that have a semantic ID get another vector than when the "
            "codebooks were trained, so this is another encoder (or another catalogue); use the encoder saved with the "
            "codebooks, or learn the semantic IDs again."
        )


def held_out_error(quantizer: Quantizer, vectors: np.ndarray, share: float = 0.2, seed: int = 0) -> float:
    """Mean squared error per entry of learned items under codebooks of the same kind that did not see them.

    Args:
        quantizer: kind and options; it is not changed.
        vectors: (N, d) of the learned items. share: part that is held out, between 0 and 1. seed: of the draw.

    Raises:
        ConfigError: share out of range. DataError: fewer than two items.
    """
    if not 0 < share < 1:
        raise ConfigError(f"The held-out share must lie between 0 and 1, got {share}.")
    vectors = check_vectors(vectors, quantizer.dims)
    if len(vectors) < 2:
        raise DataError("A held-out error needs at least two learned items; set held_out_share to 0.")
    order = np.random.default_rng(seed).permutation(len(vectors))
    count = min(max(1, round(share * len(vectors))), len(vectors) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would say, it has said when the codebooks were learned
        other = type(quantizer)(quantizer.config).fit(vectors[np.sort(order[count:])])
    rest = vectors[np.sort(order[:count])]
    return float(squared_errors(rest, other.encode(rest), other).sum() / rest.size)


def measure_drift(
    sids: SemanticIds,
    added: np.ndarray,
    new_items: int | None = None,
    vectors: np.ndarray | None = None,
    quantizer: Quantizer | None = None,
    held_out_mse: float | None = None,
    limits: DriftLimits | None = None,
) -> Drift:
    """Compares the items added since the codebooks were learned with those they were learned from.

    Args:
        sids: all items.
        added: (N,) bool, True for items added since; at least one of each kind.
        new_items: how many of them this run added, default all.
        vectors, quantizer: (N, d) in row order, and what codes them; with both the errors are reported too.
        held_out_mse: see `held_out_error`.
        limits: of the recommendation, default `DriftLimits()`.

    Raises:
        DataError: shapes that do not fit, or no learned or no added item.
    """
    added = np.asarray(added)
    if added.dtype != bool or added.shape != (len(sids),) or added.all() or not added.any():
        raise DataError(
            f"`added` must be {len(sids)} booleans, with learned and added items among them; got {added.dtype} of "
            f"shape {added.shape}."
        )
    errors, spread, width = None, 0.0, 1
    if vectors is not None and quantizer is not None:
        check_quantizer(sids, quantizer)
        vectors = check_vectors(vectors, quantizer.dims, rows=len(sids))
        errors = squared_errors(vectors, sids.codes[:, : quantizer.depth], quantizer)
        spread, width = deviation(vectors[~added]) / int((~added).sum()), vectors.shape[1]
    parts = [_part(sids, rows, errors, spread, width) for rows in (~added, added, np.ones(len(sids), dtype=bool))]
    reference = None if errors is None else "learned" if held_out_mse is None else "held_out"
    drift = Drift(
        levels=sids.level_names(),
        learned=parts[0],
        added=parts[1],
        now=parts[2],
        new_items=int(added.sum()) if new_items is None else new_items,
        added_share=parts[1].items / parts[0].items,
        error_ratio=None if errors is None else _error_ratio(vectors, added, quantizer, held_out_mse),
        reference=reference,
        held_out_mse=held_out_mse,
        on_learned_codes=_on_learned_codes(sids, added),
        divergence_bits=[_divergence(sids, added, level) for level in range(sids.depth)],
        **_cold(sids, added),
    )
    return recommend(drift, limits or DriftLimits())


def _error_ratio(vectors: Any, added: np.ndarray, quantizer: Any, held_out_mse: float | None) -> float | None:
    def mse(part: np.ndarray) -> float:
        return float(squared_errors(part, quantizer.encode(part), quantizer).sum() / part.size)

    base = mse(vectors[~added]) if held_out_mse is None else held_out_mse
    return mse(vectors[added]) / base if base else None


def _part(sids: SemanticIds, rows: np.ndarray, errors: np.ndarray | None, spread: float, width: int) -> Part:
    codes = sids.codes[rows]
    distinct, counts = np.unique(codes, axis=0, return_counts=True)  # sorted, so a prefix is new where a column changes
    changes = np.logical_or.accumulate(distinct[1:] != distinct[:-1], axis=1)
    space = np.cumprod(np.array(sids.level_sizes, dtype=np.float64))
    return Part(
        items=len(codes),
        codes=len(distinct),
        icr=float((counts == 1).sum() / len(codes)),
        lost_rate=(len(codes) - len(distinct)) / len(codes),
        largest_group=int(counts.max()),
        cur=((changes.sum(axis=0) + 1) / space).tolist(),
        entropy_bits=[entropy_bits(np.bincount(column)) for column in codes.T],
        mse=None if errors is None else float(errors[rows].sum() / (len(codes) * width)),
        relative_error=None if errors is None else relative(errors[rows].sum(), spread * len(codes)),
    )


def _on_learned_codes(sids: SemanticIds, added: np.ndarray) -> float:
    group = np.unique(sids.codes, axis=0, return_inverse=True)[1].reshape(-1)
    known = np.bincount(group[~added], minlength=group.max() + 1) > 0
    return float(known[group[added]].mean())


def _cold(sids: SemanticIds, added: np.ndarray) -> dict[str, Any]:
    """Tokens of added items that no learned item uses, and the share of added items that hold one."""
    used = np.zeros(sum(sids.level_sizes), dtype=bool)
    used[(sids.codes[~added] + sids.token_offsets).ravel()] = True
    new = sids.codes[added] + sids.token_offsets
    cold = np.unique(new[~used[new]])
    names = np.array(sids.tokens(), dtype=object)[cold].tolist()
    share = float((~used[new]).any(axis=1).mean())
    return {"cold_tokens": names[:20], "cold_token_count": len(names), "cold_share": share}


def _divergence(sids: SemanticIds, added: np.ndarray, level: int) -> float:
    size = sids.level_sizes[level]
    shares = [np.bincount(sids.codes[rows, level], minlength=size) / rows.sum() for rows in (~added, added)]
    middle = (shares[0] + shares[1]) / 2
    return float(max(0.0, entropy_bits(middle) - (entropy_bits(shares[0]) + entropy_bits(shares[1])) / 2))


def recommend(drift: Drift, limits: DriftLimits) -> Drift:
    """The same report with `retrain` and the sentences of `recommendation` filled in by the rule of the module."""
    again = []
    if drift.error_ratio is not None:
        held_out = drift.reference == "held_out"
        limit = limits.max_error_ratio if held_out else limits.max_in_sample_ratio
        if drift.error_ratio > limit:
            others = "items the codebooks have not seen either" if held_out else "those they were learned from"
            again.append(
                f"Learn the SIDs again: the added items fit the codebooks {drift.error_ratio:.2f} times worse than {others} "
                f"(limit {limit:g})."
            )
    if drift.added_share > limits.max_added_share:
        again.append(
            f"Learn the SIDs again: {drift.added.items:,} items were added to the {drift.learned.items:,} the codebooks were "
            f"learned from ({drift.added_share:.0%}, limit {limits.max_added_share:.0%})."
        )
    drop = drift.learned.icr - drift.now.icr
    if drop > limits.max_icr_drop:
        again.append(
            f"Learn the SIDs again with larger level_sizes, or with a suffix: the share of items with a code of their own fell "
            f"from {drift.learned.icr:.1%} to {drift.now.icr:.1%} (limit {limits.max_icr_drop:.0%} points)."
        )
    sentences = again or ["Keep the codebooks: no limit of the drift rule is passed."]
    if drift.cold_share > limits.max_cold_share:
        sentences = [
            *sentences,
            f"Train the model on the new items: {drift.cold_share:.1%} of the added items hold one of {drift.cold_token_count} "
            f"tokens no learned item used (first: {drift.cold_tokens[0]}), whose rows were never trained.",
        ]
    return Drift(**{**vars(drift), "retrain": bool(again), "recommendation": sentences})

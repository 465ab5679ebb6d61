"""How good are these semantic IDs? One report for any tokenizer, with warnings that name the fix.

From OneSearch (section 3.1.3): CUR, the share of code prefixes in use, `CUR_l = |{(a_1..a_l)}| / (k_1 * ... * k_l)`,
and ICR, the share of items that own their code alone. Everything else is our choice: use, entropy and Gini per level,
the reconstruction error relative to the variance, how many true neighbours survive in code space (expected value when a
code with several items straddles the cut, so neither row order nor luck matters), how many levels neighbours share, and
the thresholds of the warnings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sidtune.core.errors import ConfigError
from sidtune.tokenizers.quantizers.base import Quantizer
from sidtune.tokenizers.sids.arguments import check_quantizer
from sidtune.tokenizers.sids.collision_cost import deviation, relative
from sidtune.tokenizers.sids.neighbours import nearest_rows, neighbour_overlap, shared_levels
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vectors import check_vectors

_BLOCK = 65_536  # rows held in float64 at once


@dataclass(frozen=True)
class SidThresholds:
    """When a number is called known bad. All values are our choice, meant to be quiet on sound semantic IDs.

    Attributes:
        min_normalized_entropy: a level below this has collapsed.
        min_utilisation: a level must use this share of the codes it could use (at most one per item).
        min_icr: share of items that own their code.
        max_lost_rate: (items - codes) / items.
        max_group: items of one code; decoding shows a few per code, the rest can hardly be found.
        max_suffix: codes of a suffix level, each a token that means nothing by itself.
        max_relative_error: reconstruction error over variance; at 1 the catalogue's mean does as well.
        min_level_gain: each level must remove this share of the variance.
        min_shared_gain: neighbours must share this many levels more than random pairs.
    """

    min_normalized_entropy: float = 0.3
    min_utilisation: float = 0.5
    min_icr: float = 0.5
    max_lost_rate: float = 0.3
    max_group: int = 20
    max_suffix: int = 256
    max_relative_error: float = 0.95
    min_level_gain: float = 0.001
    min_shared_gain: float = 0.1


@dataclass(frozen=True)
class LevelQuality:
    """One level of a SID.

    Attributes:
        name, size: letter of the level and number of codes k_l.
        used, utilisation: codes that occur, and their share of the size.
        entropy_bits: entropy of the codes over items, in bits.
        normalized_entropy: the same over log2(size); 1 for a level of one code.
        gini: inequality of the code counts, unused codes included: 0 equal, 1 - 1/size when one code has everything.
        cur: distinct prefixes up to this level over the product of the level sizes.
        prefixes: distinct prefixes up to this level.
        relative_error: squared reconstruction error of the prefix over the variance; None without quantizer and vectors.
    """

    name: str
    size: int
    used: int
    utilisation: float
    entropy_bits: float
    normalized_entropy: float
    gini: float
    cur: float
    prefixes: int
    relative_error: float | None = None


@dataclass(frozen=True)
class SidQuality:
    """The report.

    Attributes:
        items, depth, codes: N, L and the number of distinct codes M.
        icr, sharing_rate: share of items that own their code, and that share it.
        lost_rate, distinct_rate: (N - M) / N and M / N.
        largest_group: items of the most crowded code.
        cur_total: CUR over all levels.
        levels: one `LevelQuality` per level.
        mse: mean squared difference of vectors and their reconstruction, per entry.
        relative_error: sum of squared errors over the sum of squared deviations from the mean vector.
        neighbours: how many nearest neighbours k were compared, `sampled_items` how many items.
        neighbour_overlap: mean expected share of an item's k cosine neighbours that are among its k nearest in the
            decoded space.
        shared_levels_neighbours, shared_levels_random: mean length of the common code prefix of an item and its k
            neighbours, and of an item and k random others.
        warnings: full sentences, each with what to do.
    """

    items: int
    depth: int
    codes: int
    icr: float
    sharing_rate: float
    lost_rate: float
    distinct_rate: float
    largest_group: int
    cur_total: float
    levels: list[LevelQuality]
    mse: float | None = None
    relative_error: float | None = None
    neighbours: int | None = None
    sampled_items: int | None = None
    neighbour_overlap: float | None = None
    shared_levels_neighbours: float | None = None
    shared_levels_random: float | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def to_markdown(self) -> str:
        rows = [
            ("items", f"{self.items:,}"),
            ("distinct codes", f"{self.codes:,}"),
            ("ICR (items with a code of their own)", f"{self.icr:.2%}"),
            ("items that share a code", f"{self.sharing_rate:.2%}"),
            ("items beyond one per code", f"{self.lost_rate:.2%}"),
            ("largest group", f"{self.largest_group}"),
            ("CUR, all levels", f"{self.cur_total:.4%}"),
        ]
        if self.relative_error is not None:
            rows += [("mean squared error", f"{self.mse:.3g}"), ("error / variance", f"{self.relative_error:.3f}")]
        if self.neighbour_overlap is not None:
            rows.append((f"{self.neighbours} neighbours kept", f"{self.neighbour_overlap:.2%}"))
        if self.shared_levels_neighbours is not None:
            pair = f"{self.shared_levels_neighbours:.2f} / {self.shared_levels_random:.2f}"
            rows.append(("levels shared by neighbours / random pairs", pair))
        lines = ["| semantic IDs | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
        lines += ["| level | codes | used | entropy (bits) | of max. | Gini | CUR of prefix | error / variance |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for level in self.levels:
            error = "" if level.relative_error is None else f"{level.relative_error:.3f}"
            lines.append(
                f"| {level.name} | {level.size} | {level.utilisation:.1%} | {level.entropy_bits:.2f} | "
                f"{level.normalized_entropy:.1%} | {level.gini:.2f} | {level.cur:.4%} | {error} |"
            )
        if self.warnings:
            lines += ["", *(f"- {warning}" for warning in self.warnings)]
        return "\n".join(lines) + "\n"


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of non-negative counts (k,), zeros included."""
    ordered = np.sort(counts.astype(np.float64))
    rank = np.arange(1, len(ordered) + 1)
    return float(((2 * rank - len(ordered) - 1) * ordered).sum() / (len(ordered) * ordered.sum()))


def entropy_bits(counts: np.ndarray) -> float:
    """Shannon entropy of counts (k,), in bits."""
    share = counts[counts > 0] / counts.sum()
    return float(max(0.0, -(share * np.log2(share)).sum()))


def _levels(sids: SemanticIds, errors: list[float] | None) -> list[LevelQuality]:
    paths = sids.paths()[0]
    # Rows of `paths` are sorted, so a prefix is new exactly where any of its columns changes.
    changes = np.logical_or.accumulate(paths[1:] != paths[:-1], axis=1)
    levels, space = [], 1.0
    names = sids.level_names()
    for n, size in enumerate(sids.level_sizes):
        counts = np.bincount(sids.codes[:, n], minlength=size)
        used, bits, space = int((counts > 0).sum()), entropy_bits(counts), space * size
        prefixes = int(changes[:, n].sum()) + 1
        levels.append(
            LevelQuality(
                name=names[n],
                size=size,
                used=used,
                utilisation=used / size,
                entropy_bits=bits,
                normalized_entropy=bits / np.log2(size).item() if size > 1 else 1.0,
                gini=gini(counts),
                cur=prefixes / space,
                prefixes=prefixes,
                relative_error=errors[n] if errors is not None and n < len(errors) else None,
            )
        )
    return levels


def _errors(vectors: np.ndarray, codes: np.ndarray, quantizer: Quantizer) -> tuple[float, list[float]]:
    """Mean squared error per entry at full depth, and squared error over variance for each prefix."""
    squared, spread = np.zeros(codes.shape[1]), deviation(vectors)
    for start in range(0, len(vectors), _BLOCK):
        block, part = vectors[start : start + _BLOCK].astype(np.float64), codes[start : start + _BLOCK]
        squared += [((block - quantizer.decode(part[:, : n + 1])) ** 2).sum() for n in range(codes.shape[1])]
    return float(squared[-1] / vectors.size), [relative(error, spread) for error in squared]


def _check(sids: SemanticIds, vectors: Any, quantizer: Quantizer | None, neighbours: int, sample: int) -> Any:
    if neighbours < 1 or sample < 1:
        raise ConfigError(f"neighbours and sample must be at least 1, got {neighbours} and {sample}.")
    if vectors is None:
        return None
    if quantizer is not None:
        check_quantizer(sids, quantizer)
    return check_vectors(vectors, None if quantizer is None else quantizer.dims, rows=len(sids))


def sid_quality(
    sids: SemanticIds,
    vectors: np.ndarray | None = None,
    quantizer: Quantizer | None = None,
    *,
    neighbours: int = 10,
    sample: int = 2000,
    seed: int = 0,
    thresholds: SidThresholds | None = None,
) -> SidQuality:
    """Measures semantic IDs, with or without a suffix level.

    Args:
        vectors: (N, d) item vectors in row order; without them nothing about geometry is reported.
        quantizer: the quantizer the codes came from; without it nothing about reconstruction is reported.
        neighbours: nearest neighbours per item, at most N - 1.
        sample, seed: items whose neighbours are looked up, drawn without replacement.
        thresholds: of the warnings, default `SidThresholds()`.

    Raises:
        ConfigError, DataError: numbers out of range, vectors or quantizer of other items.
    """
    vectors = _check(sids, vectors, quantizer, neighbours, sample)
    collisions = sids.collisions()
    values: dict[str, Any] = {}
    errors = None
    if vectors is not None and quantizer is not None:
        codes = sids.codes[:, : quantizer.depth]
        values["mse"], errors = _errors(vectors, codes, quantizer)
        values["relative_error"] = errors[-1]
    if vectors is not None and len(sids) > 1:
        values |= _neighbour_values(sids, vectors, quantizer, min(neighbours, len(sids) - 1), sample, seed)
    levels = _levels(sids, errors)
    report = SidQuality(
        items=len(sids),
        depth=sids.depth,
        codes=collisions.codes,
        icr=1.0 - collisions.sharing_rate,
        sharing_rate=collisions.sharing_rate,
        lost_rate=collisions.lost_rate,
        distinct_rate=collisions.codes / len(sids),
        largest_group=collisions.largest_group,
        cur_total=levels[-1].cur,
        levels=levels,
        **values,
    )
    report.warnings.extend(known_bad(report, sids, thresholds or SidThresholds()))
    return report


def _neighbour_values(
    sids: SemanticIds, vectors: np.ndarray, quantizer: Quantizer | None, k: int, sample: int, seed: int
) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    rows = np.sort(draw.choice(len(sids), size=min(sample, len(sids)), replace=False))
    near = nearest_rows(vectors, rows, k)
    other = draw.integers(0, len(sids) - 1, size=near.shape)
    other += other >= rows[:, None]  # any row but one's own
    values: dict[str, Any] = {
        "neighbours": k,
        "sampled_items": len(rows),
        "shared_levels_neighbours": shared_levels(sids.codes, rows, near),
        "shared_levels_random": shared_levels(sids.codes, rows, other),
    }
    if quantizer is not None:
        values["neighbour_overlap"] = neighbour_overlap(sids.codes[:, : quantizer.depth], quantizer, rows, near)
    return values


def known_bad(report: SidQuality, sids: SemanticIds, limits: SidThresholds) -> list[str]:
    """One sentence per known-bad value: what it is, what it leads to, and what to change."""
    found = []
    for level in report.levels[: len(report.levels) - sids.suffix_level]:
        place = f"level '{level.name}'"
        reachable = min(level.size, report.items)
        if level.normalized_entropy < limits.min_normalized_entropy and report.items > 1:
            found.append(
                f"The codes of {place} have collapsed ({level.used} of {level.size} in use, entropy "
                f"{level.entropy_bits:.2f} of {np.log2(level.size):.2f} bits); check that the item vectors differ, "
                "scale them to length 1, or train the quantizer longer."
            )
        elif level.used < limits.min_utilisation * reachable:
            found.append(
                f"Only {level.used} of the {level.size} codes of {place} are in use; lower its size to about "
                f"{level.used} or use vectors of more dimensions."
            )
    found += _crowding(report, sids, limits)
    found += _geometry(report, limits)
    return found


def _crowding(report: SidQuality, sids: SemanticIds, limits: SidThresholds) -> list[str]:
    found = []
    space = np.prod(np.array(sids.level_sizes, dtype=np.float64))
    if report.levels[0].size > report.items:
        found.append(
            f"Level 'a' has {report.levels[0].size} codes for {report.items} items, so it can name every item by "
            "itself and later levels carry nothing; lower level_sizes[0]."
        )
    if space < report.items:
        found.append(
            f"The levels spell only {space:,.0f} codes for {report.items:,} items, so items must share; enlarge "
            "level_sizes or add a level."
        )
    elif report.icr < limits.min_icr:
        found.append(
            f"Only {report.icr:.1%} of the items have a code of their own (ICR); enlarge level_sizes, add a level, "
            "give the items more text, or append a suffix level with with_suffix()."
        )
    if report.lost_rate > limits.max_lost_rate:
        found.append(
            f"{report.items - report.codes:,} of {report.items:,} items come after the first of their code, so "
            "ranking among them is by popularity alone; enlarge the last level or add one."
        )
    if sids.suffix_level and sids.level_sizes[-1] > limits.max_suffix:
        found.append(
            f"The suffix level adds {sids.level_sizes[-1]:,} tokens that mean nothing by themselves (limit {limits.max_suffix:,}), "
            f"since up to {int(sids.codes[:, -1].max()) + 1:,} items share the levels before it; look for duplicate or empty texts "
            "among them, enlarge level_sizes or add a level, or use collisions: {name: next_nearest}."
        )
    if report.largest_group > limits.max_group:
        found.append(
            f"One code ({sids.collisions().largest_code}) holds {report.largest_group} items, most of which a result "
            "list will never show; look for duplicate or empty texts among them, or append a suffix level with "
            "with_suffix()."
        )
    return found


def _geometry(report: SidQuality, limits: SidThresholds) -> list[str]:
    found = []
    if report.relative_error is not None and report.relative_error > limits.max_relative_error:
        found.append(
            f"The codes rebuild the item vectors no better than the catalogue's mean (error / variance "
            f"{report.relative_error:.2f}); check that vectors, codes and quantizer are of the same items in the same "
            "order."
        )
    errors = [level.relative_error for level in report.levels if level.relative_error is not None]
    for n, (before, after) in enumerate(zip([1.0, *errors], errors, strict=False)):
        # After a (nearly) exact level there is nothing left to gain.
        if before - after < limits.min_level_gain and before > limits.min_level_gain:
            found.append(
                f"Level '{report.levels[n].name}' does not lower the reconstruction error ({before:.4f} to "
                f"{after:.4f}); drop it, or train the quantizer again."
            )
    if report.shared_levels_neighbours is not None:
        gain = report.shared_levels_neighbours - report.shared_levels_random
        if gain < limits.min_shared_gain:
            found.append(
                f"Neighbours share {report.shared_levels_neighbours:.2f} levels and random pairs "
                f"{report.shared_levels_random:.2f}, so the codes do not follow the vectors; check their row order, "
                "or lower level_sizes[0] so that like items can meet."
            )
    return found

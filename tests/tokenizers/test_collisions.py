"""Treatments of collisions against plain loops, brute force and scipy's optimal assignment; their costs by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.items import BeamOutput, rank_items
from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from sidtune.tokenizers.registry import COLLISIONS
from sidtune.tokenizers.sids import collisions
from sidtune.tokenizers.sids.collision_cost import collision_cost, compare_collisions, costs_to_markdown, places
from sidtune.tokenizers.sids.collisions import (
    CapacityAware,
    CapacityConfig,
    Expand,
    NextNearest,
    NextNearestConfig,
    Suffix,
    SuffixConfig,
    deferred_acceptance,
    last_level_costs,
    make_collisions,
    places_needed,
)
from sidtune.tokenizers.sids.quality import sid_quality
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

SIZES = (4, 3, 5)


def world(items: int = 90, seed: int = 0, sizes: tuple[int, ...] = SIZES):
    """Crowded semantic IDs: many items, few codes, popularity with ties."""
    draw = np.random.default_rng(seed)
    vectors = draw.normal(size=(items, 6)).astype(np.float32)
    quantizer = ResidualKMeans(ResidualKMeansConfig(sizes, iterations=5)).fit(vectors)
    names = [f"item {n}" for n in draw.permutation(items)]
    sids = SemanticIds(names, quantizer.encode(vectors), sizes, draw.integers(0, 4, items))
    return sids, vectors, quantizer


def distance(quantizer, vector, code) -> float:
    return float(((vector.astype(np.float64) - quantizer.decode(np.array([code]))[0]) ** 2).sum())


def order_of(sids: SemanticIds) -> list[int]:
    return sorted(range(len(sids)), key=lambda row: (-sids.popularity[row], sids.item_ids[row]))


def plain_next_nearest(sids, vectors, quantizer, capacity: int, fixed: int = 0) -> np.ndarray:
    """The definition, one item after another."""
    made, size = sids.codes.copy(), sids.level_sizes[-1]
    for prefix in {tuple(code[:-1]) for code in sids.codes.tolist()}:
        rows = [row for row in order_of(sids) if tuple(sids.codes[row, :-1]) == prefix]
        rows = [row for row in rows if row < fixed] + [row for row in rows if row >= fixed]
        taken, movers = np.zeros(size, dtype=int), []
        for row in rows:
            last = sids.codes[row, -1]
            if row < fixed or taken[last] < capacity:
                taken[last] += 1
            else:
                movers.append(row)
        limit = capacity
        while np.maximum(limit - taken, 0).sum() < len(movers):
            limit += 1
        for row in movers:
            costs = [distance(quantizer, vectors[row], (*prefix, last)) for last in range(size)]
            best = min((last for last in range(size) if taken[last] < limit), key=lambda last: (costs[last], last))
            taken[best], made[row, -1] = taken[best] + 1, best
    return made


@pytest.mark.parametrize("capacity", [1, 2, 5])
@pytest.mark.parametrize("fixed", [0, 40])
def test_next_nearest_is_the_plain_loop(capacity, fixed):
    for seed in range(3):
        sids, vectors, quantizer = world(seed=seed)
        made = NextNearest(NextNearestConfig(capacity)).resolve(sids, vectors[fixed:], quantizer, fixed)
        np.testing.assert_array_equal(made.codes, plain_next_nearest(sids, vectors, quantizer, capacity, fixed))
        assert made.item_ids == sids.item_ids and made.level_sizes == sids.level_sizes
        np.testing.assert_array_equal(made.popularity, sids.popularity)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_deferred_acceptance_serves_one_after_another(data):
    draw = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    groups, codes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    room = draw.integers(0, 4, (groups, codes))
    group = np.sort(np.concatenate([np.full(draw.integers(0, room[g].sum() + 1), g) for g in range(groups)]))
    costs = draw.integers(0, 6, (len(group), codes)).astype(float)  # many ties
    rank = draw.permutation(len(group))
    left, expected = room.copy(), np.empty(len(group), dtype=np.int64)
    for row in np.argsort(rank):
        free = [code for code in range(codes) if left[group[row], code]]
        expected[row] = min(free, key=lambda code: (costs[row, code], code))
        left[group[row], expected[row]] -= 1
    np.testing.assert_array_equal(deferred_acceptance(costs, group, room, rank), expected)


def total(sids, vectors, quantizer) -> float:
    return sum(distance(quantizer, vector, code) for vector, code in zip(vectors, sids.codes, strict=True))


def test_capacity_aware_is_the_best_of_all_assignments():
    checked = 0
    for seed in range(12):
        sids, vectors, quantizer = world(items=14, seed=seed, sizes=(3, 3))
        made = CapacityAware(CapacityConfig(capacity=2)).resolve(sids, vectors, quantizer)
        for prefix in range(3):
            rows = np.flatnonzero(sids.codes[:, 0] == prefix)
            if not 0 < len(rows) <= 6:
                continue
            best = min(
                sum(distance(quantizer, vectors[row], (prefix, last)) for row, last in zip(rows, choice, strict=True))
                for choice in itertools.product(range(3), repeat=len(rows))
                if np.bincount(choice, minlength=3).max() <= 2
            )
            got = sum(distance(quantizer, vectors[row], made.codes[row]) for row in rows)
            assert got == pytest.approx(best, rel=1e-6)
            checked += (sids.codes[rows] != made.codes[rows]).any()
    assert checked > 5


@pytest.mark.parametrize("fixed", [0, 30])
def test_capacity_aware_is_scipys_optimum_over_the_whole_catalogue(fixed):
    """One assignment of all movable items to all places of all codes, forbidden where the prefix differs."""
    sids, vectors, quantizer = world(items=60, seed=3)
    made = CapacityAware(CapacityConfig(capacity=2)).resolve(sids, vectors[fixed:], quantizer, fixed)
    codes = np.array(list(itertools.product(*map(range, SIZES))))
    limit = {}  # the documented capacity of each prefix
    for prefix in {tuple(code[:-1]) for code in sids.codes.tolist()}:
        inside = (sids.codes[:, :-1] == prefix).all(axis=1)
        taken = np.bincount(sids.codes[:fixed][inside[:fixed], -1], minlength=SIZES[-1])
        limit[prefix] = 2
        while np.maximum(limit[prefix] - taken, 0).sum() < inside[fixed:].sum():
            limit[prefix] += 1
    places_ = [
        code
        for code in codes.tolist()
        for _ in range(limit.get(tuple(code[:-1]), 2) - int((sids.codes[:fixed] == code).all(axis=1).sum()))
    ]
    decoded = quantizer.decode(np.array(places_)).astype(np.float64)
    cost = ((vectors[fixed:, None].astype(np.float64) - decoded) ** 2).sum(axis=2)
    cost[(sids.codes[fixed:, None, :-1] != np.array(places_)[:, :-1]).any(axis=2)] = 1e6
    best = cost[linear_sum_assignment(cost)].sum()
    assert best < 1e5  # feasible
    new = SemanticIds(sids.item_ids[fixed:], made.codes[fixed:], SIZES)
    assert total(new, vectors[fixed:], quantizer) == pytest.approx(best, rel=1e-9)
    nearest = NextNearest(NextNearestConfig(2)).resolve(sids, vectors[fixed:], quantizer, fixed)
    assert best <= total(SemanticIds(sids.item_ids[fixed:], nearest.codes[fixed:], SIZES), vectors[fixed:], quantizer)


METHODS = {
    "next": NextNearest(NextNearestConfig(2)),
    "exact": CapacityAware(CapacityConfig(2)),
    "regret": CapacityAware(CapacityConfig(2, max_exact_pairs=0)),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_every_reassignment_keeps(name, monkeypatch):
    method = METHODS[name]
    sids, vectors, quantizer = world(items=120, seed=7)
    made = method.resolve(sids, vectors, quantizer)
    assert (made.codes != sids.codes).any()
    np.testing.assert_array_equal(made.codes[:, :-1], sids.codes[:, :-1])
    crowded = False
    for prefix in {tuple(code[:-1]) for code in sids.codes.tolist()}:
        rows = (sids.codes[:, :-1] == prefix).all(axis=1)
        before, after = (np.bincount(part.codes[rows, -1], minlength=SIZES[-1]) for part in (sids, made))
        assert after.max() <= max(2, -(-rows.sum() // SIZES[-1]))
        if before.max() <= 2:
            np.testing.assert_array_equal(made.codes[rows], sids.codes[rows])
        crowded |= rows.sum() > 2 * SIZES[-1]
    assert crowded == any("more items than 5 last codes can take at 2 each" in note for note in method.notes)
    assert any("regret" in note for note in method.notes) == (name == "regret")

    order = np.random.default_rng(1).permutation(len(sids))
    mixed = SemanticIds([sids.item_ids[row] for row in order], sids.codes[order], SIZES, sids.popularity[order])
    again = method.resolve(mixed, vectors[order], quantizer)
    np.testing.assert_array_equal(again.codes, made.codes[order])

    monkeypatch.setattr(collisions, "_BLOCK_PAIRS", 7)
    monkeypatch.setattr(collisions, "_BLOCK_ENTRIES", 31)
    np.testing.assert_array_equal(method.resolve(sids, vectors, quantizer).codes, made.codes)


def test_the_regret_fallback_is_feasible_and_no_better_than_the_optimum():
    sids, vectors, quantizer = world(items=120, seed=7)
    costs = {
        name: total(method.resolve(sids, vectors, quantizer), vectors, quantizer) for name, method in METHODS.items()
    }
    assert costs["exact"] <= costs["regret"] + 1e-9 and costs["exact"] < costs["next"]


def test_a_catalogue_that_has_room_becomes_unique_and_moves_no_more_than_it_must():
    _, vectors, quantizer = world(items=60, seed=2, sizes=(2, 50))
    vectors = np.random.default_rng(9).normal(size=(40, 6)).astype(np.float32)  # other items than the codebooks' own
    sids = SemanticIds([f"i{n}" for n in range(40)], quantizer.encode(vectors), (2, 50))
    shared = sids.collisions()
    assert shared.codes < 40
    made = NextNearest().resolve(sids, vectors, quantizer)
    assert made.collisions().codes == 40 == CapacityAware().resolve(sids, vectors, quantizer).collisions().codes
    assert (made.codes != sids.codes).any(axis=1).sum() == 40 - shared.codes


def test_one_level_is_enough():
    sids, vectors, quantizer = world(items=12, seed=1, sizes=(12,))
    crowded = SemanticIds(sids.item_ids, np.zeros((12, 1), dtype=int), (12,), sids.popularity)
    made = CapacityAware().resolve(crowded, vectors, quantizer)
    np.testing.assert_array_equal(made.codes, sids.codes)  # as many centroids as items: each gets its own back
    assert NextNearest().resolve(crowded, vectors, quantizer).collisions().codes == 12


class Bent(ResidualKMeans):
    """A quantizer whose decoder is not additive."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.tanh(super().decode(codes))


def test_costs_are_distances_to_what_the_quantizer_decodes():
    _, vectors, quantizer = world(items=9)
    bent = Bent(quantizer.config).fit(vectors)
    prefixes = np.random.default_rng(0).integers(0, 3, (9, 2))
    for one in (quantizer, bent):
        expected = [[distance(one, v, (*p, last)) for last in range(5)] for v, p in zip(vectors, prefixes, strict=True)]
        np.testing.assert_allclose(last_level_costs(one, vectors, prefixes), expected, rtol=1e-12)


def test_places_needed_is_the_smallest_that_suffices():
    draw = np.random.default_rng(0)
    for _ in range(200):
        taken, count, capacity = draw.integers(0, 9, (3, 4)), draw.integers(0, 30, 3), int(draw.integers(1, 6))
        expected = []
        for row, wanted in zip(taken, count, strict=True):
            limit = capacity
            while np.maximum(limit - row, 0).sum() < wanted:
                limit += 1
            expected.append(limit)
        assert places_needed(taken, count, capacity).tolist() == expected


def test_suffix_and_expand():
    sids, vectors, quantizer = world()
    assert Expand().resolve(sids, vectors, quantizer) is sids
    made = Suffix(SuffixConfig(size=50)).resolve(sids, vectors, quantizer)
    np.testing.assert_array_equal(made.codes, sids.with_suffix(50).codes)
    assert made.level_sizes == (*SIZES, 50) and Suffix().resolve(made, vectors, quantizer) is made
    with pytest.raises(ConfigError, match="cannot be added to semantic IDs that a model was trained on"):
        Suffix().resolve(sids, vectors[10:], quantizer, fixed=10)
    with pytest.raises(ConfigError, match="have a suffix level"):
        NextNearest().resolve(made, vectors, quantizer)


@pytest.mark.parametrize("name", ["next_nearest", "capacity"])
def test_reassignment_refuses_what_does_not_fit(name):
    sids, vectors, quantizer = world()
    method = make_collisions(name)
    with pytest.raises(DataError, match="89 item vectors for 90 items"):
        method.resolve(sids, vectors[1:], quantizer)
    with pytest.raises(DataError, match="5 dimensions"):
        method.resolve(sids, vectors[:, :5], quantizer)
    with pytest.raises(DataError, match="another run"):
        method.resolve(SemanticIds(sids.item_ids, sids.codes, (4, 3, 6)), vectors, quantizer)
    with pytest.raises(ConfigError, match="fixed must lie in"):
        method.resolve(sids, vectors, quantizer, fixed=91)
    np.testing.assert_array_equal(method.resolve(sids, vectors[:0], quantizer, fixed=90).codes, sids.codes)


def test_options_are_strict():
    assert [make_collisions(name).name for name in COLLISIONS] == list(COLLISIONS)
    for name, options, words in [
        ("next_neares", {}, "did you mean 'next_nearest'"),
        ("capacity", {"capasity": 3}, "did you mean 'capacity'"),
        ("capacity", {"capacity": 0}, "at least 1"),
        ("next_nearest", {"capacity": "many"}, "an integer"),
        ("capacity", {"max_exact_pairs": -1}, "max_exact_pairs"),
        ("suffix", {"size": 0}, "at least 1"),
        ("expand", {"size": 3}, "unknown key"),
    ]:
        with pytest.raises(ConfigError, match=words):
            make_collisions(name, options)


def test_costs_by_hand():
    """Two centroids at 0 and 10 below one prefix; items at 0, 1, 2 (popularity falling) and 10."""
    vectors = np.array([[0.0], [1.0], [2.0], [10.0]], dtype=np.float32)
    quantizer = ResidualKMeans(ResidualKMeansConfig((1, 3)))
    quantizer._set_tensors(
        {"level_0": np.zeros((1, 1)), "level_1": np.array([[0.0], [10.0], [4.0]]), "scales": np.ones(2)}
    )
    codes = quantizer.encode(vectors)
    assert codes[:, 1].tolist() == [0, 0, 0, 1]
    sids = SemanticIds(list("abcd"), codes, (1, 3), np.array([9.0, 8.0, 7.0, 6.0]))
    methods: list[Any] = [Expand(), Suffix(), NextNearest(NextNearestConfig(2)), CapacityAware(CapacityConfig(2))]
    expand, suffix, nearest, capacity = compare_collisions(sids, vectors, quantizer, methods)
    spread = ((vectors - vectors.mean()) ** 2).sum()
    assert expand.reassigned == suffix.reassigned == 0 and expand.moved_error_after is None
    assert expand.relative_error == expand.relative_error_before == pytest.approx(5 / spread)  # 0 + 1 + 4 + 0
    assert (expand.codes, expand.largest_group, expand.icr, expand.lost_rate) == (2, 3, 0.25, 0.5)
    assert expand.ceiling_hr1 == 0.5 and expand.cur_total == pytest.approx(2 / 3)
    assert expand.ceiling_ndcg10 == pytest.approx((1 + 1 + 1 / np.log2(3) + 1 / np.log2(4)) / 4)
    assert (suffix.tokens, suffix.icr, suffix.ceiling_ndcg10) == (3, 1.0, 1.0)
    assert nearest.reassigned == 1 and nearest.moved_error_before == nearest.moved_error_after == 4  # c: 2 → 0 or 4
    assert nearest.largest_group == 2 and nearest.ceiling_hr1 == 0.75
    assert capacity.relative_error == nearest.relative_error
    table = costs_to_markdown([expand, nearest])
    assert "| next_nearest | 2 | 1 (25.0%) | 4 → 4 |" in table and len(table.splitlines()) == 4


def test_costs_agree_with_the_quality_report_and_the_ceilings_with_ranked_items():
    sids, vectors, quantizer = world(items=120, seed=7)
    for method in (Expand(), Suffix(), NextNearest(), CapacityAware()):
        made = method.resolve(sids, vectors, quantizer)
        cost, quality = collision_cost(sids, made, vectors, quantizer, method), sid_quality(made, vectors, quantizer)
        for name in ("icr", "cur_total", "lost_rate", "largest_group", "codes"):
            assert getattr(cost, name) == pytest.approx(getattr(quality, name)), name
        assert cost.relative_error == pytest.approx(quality.relative_error)
        assert cost.to_dict()["tokens"] == quality.depth
        codes, offsets, rows = made.paths()
        leaf = np.empty(len(made), dtype=np.int64)
        leaf[rows] = np.repeat(np.arange(len(codes)), np.diff(offsets))
        beams = BeamOutput(leaves=torch.from_numpy(leaf)[:, None], scores=torch.zeros(len(made), 1))
        ranked = rank_items(beams, made, 10)[0]
        place = (ranked == np.arange(len(made))[:, None]).argmax(axis=1) + 1
        found = (ranked == np.arange(len(made))[:, None]).any(axis=1)
        np.testing.assert_array_equal(place[found], places(made)[found])
        assert cost.ceiling_hr1 == pytest.approx((place[found] == 1).sum() / len(made))
        assert cost.ceiling_ndcg10 == pytest.approx((1 / np.log2(1 + place[found])).sum() / len(made))
    with pytest.raises(DataError, match="other items"):
        other = SemanticIds([*sids.item_ids[1:], "x"], sids.codes, SIZES)
        collision_cost(sids, other, vectors, quantizer, Expand())
    with pytest.raises(DataError, match="119 item vectors for 120 items"):
        collision_cost(sids, sids, vectors[1:], quantizer, Expand())

"""Balanced residual k-means against a greedy loop, and OneSearch's statements about balance (sheet, 5.6)."""

from __future__ import annotations

import numpy as np
import pytest
from quantizer_data import clusters, nearest_by_hand, own_share, power_law, relative_error
from sklearn.datasets import load_digits

from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.quantizers import balanced_kmeans
from sidtune.tokenizers.quantizers.balanced_kmeans import (
    BalancedKMeans,
    BalancedKMeansConfig,
    capacity_assignment,
    equal_size_kmeans,
)
from sidtune.tokenizers.quantizers.product_quantizer import ProductQuantizer, ProductQuantizerConfig
from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig


def greedy(points: np.ndarray, centroids: np.ndarray, capacity: int) -> np.ndarray:
    """All pairs by (distance, row, centroid); a pair is taken when row and centroid are free."""
    pairs = [
        (float(((point - centroid) ** 2).sum()), row, place)
        for row, point in enumerate(points)
        for place, centroid in enumerate(centroids)
    ]
    chosen, room = [-1] * len(points), [capacity] * len(centroids)
    for _, row, place in sorted(pairs):
        if chosen[row] < 0 and room[place] > 0:
            chosen[row], room[place] = place, room[place] - 1
    return np.array(chosen)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("block", [1 << 25, 20])
def test_capacity_assignment_is_the_greedy_one(seed, block, monkeypatch):
    monkeypatch.setattr(balanced_kmeans, "_PAIRS", block)
    draw = np.random.default_rng(seed)
    count, size = int(draw.integers(5, 60)), int(draw.integers(1, 8))
    # Small integers: distances are exact in float32 and full of ties.
    points = draw.integers(-3, 4, size=(count, 2)).astype(np.float32)
    centroids = draw.integers(-3, 4, size=(size, 2)).astype(np.float32)
    capacity = -(-count // size) + int(draw.integers(0, 3))
    found = capacity_assignment(points, centroids, capacity)
    np.testing.assert_array_equal(found, greedy(points, centroids, capacity))
    assert np.bincount(found).max() <= capacity


def test_too_little_room_is_refused():
    with pytest.raises(ConfigError, match="cannot hold 5 vectors"):
        capacity_assignment(np.zeros((5, 2), np.float32), np.zeros((2, 2), np.float32), 2)


def test_equal_size_kmeans_fills_evenly_and_centroids_are_means():
    points = power_law(700, dims=8, centres=20)
    centroids, chosen = equal_size_kmeans(points, 9)
    counts = np.bincount(chosen, minlength=9)
    assert counts.max() <= 78 and counts.sum() == 700  # ceil(700 / 9)
    for place in range(9):
        np.testing.assert_allclose(centroids[place], points[chosen == place].mean(axis=0), rtol=0, atol=1e-4)
    everywhere_same, spread = equal_size_kmeans(np.ones((10, 3), np.float32), 4)
    assert np.bincount(spread).max() <= 3 and np.isfinite(everywhere_same).all()


@pytest.fixture(scope="module")
def skewed():
    vectors = power_law(8000)
    options = {"level_sizes": (64, 32, 16), "iterations": 10}
    plain = ResidualKMeans(ResidualKMeansConfig(**options))
    last = BalancedKMeans(BalancedKMeansConfig(**options))
    every = BalancedKMeans(BalancedKMeansConfig(**options, balanced_levels=(0, 1, 2), balance_rounds=3))
    return vectors, *((q, q.fit_encode(vectors)) for q in (plain, last, every))


def test_only_the_last_level_is_balanced(skewed):
    _, (_, plain), (_, balanced), _ = skewed
    np.testing.assert_array_equal(plain[:, :2], balanced[:, :2])
    assert np.bincount(balanced[:, 2]).max() <= 500  # ceil(8000 / 16)
    assert np.bincount(plain[:, 2]).max() > 1000


def test_balance_multiplies_distinct_codes_at_a_small_cost(skewed):
    """Sheet: 625 → 2166 distinct codes (factor above 2.5), error 0.087 → 0.103; all levels: more than twice the error."""
    vectors, (plain, codes), (last, balanced), (every, collapsed) = skewed
    assert len(np.unique(balanced, axis=0)) > 2.5 * len(np.unique(codes, axis=0))
    error = relative_error(vectors, plain.decode(codes))
    assert error < relative_error(vectors, last.decode(balanced)) < 1.25 * error
    assert relative_error(vectors, every.decode(collapsed)) > 2 * error


def test_balancing_all_levels_costs_codes_of_their_own_after_the_tail(skewed):
    """Sheet 5.6, last part: two OPQ codes behind the head, ICR 0.889 with the last level balanced, 0.755 with all levels."""
    vectors, _, (last, balanced), (every, collapsed) = skewed
    share = {}
    for name, head, codes in (("last", last, balanced), ("every", every, collapsed)):
        left = vectors - head.decode(codes)
        tail = ProductQuantizer(ProductQuantizerConfig(parts=2, codes_per_part=64, rotation_rounds=2, iterations=10))
        share[name] = own_share(np.concatenate([codes, tail.fit_encode(left)], axis=1))
    assert share["every"] < share["last"] - 0.05


def test_balance_does_nothing_for_digits():
    """Sheet 5.6: on near-uniform data there is nothing to gain (570 against 576 distinct codes)."""
    vectors = load_digits().data.astype(np.float32)
    sizes = {"level_sizes": (16, 8, 8)}
    plain = ResidualKMeans(ResidualKMeansConfig(**sizes)).fit_encode(vectors)
    balanced = BalancedKMeans(BalancedKMeansConfig(**sizes)).fit_encode(vectors)
    ratio = len(np.unique(balanced, axis=0)) / len(np.unique(plain, axis=0))
    assert 0.9 < ratio < 1.3


def test_new_vectors_take_the_nearest_centroid(skewed):
    _, _, (last, _), _ = skewed
    new = power_law(200, seed=7)
    codes, residual = last.encode(new), new
    for level, book in enumerate(last.codebooks):
        np.testing.assert_array_equal(codes[:, level], nearest_by_hand(residual, book))
        residual = residual - book[codes[:, level]]
    assert np.abs(new - last.decode(codes) - last.residual(new)).max() < 1e-4


def private_oracle(quantizer, residual, prefix):
    """Centroids of each parent from the saved tensors, by loops."""
    tensors = quantizer._tensors()
    parents = {int(p): n for n, p in enumerate(tensors["private_parents"])}
    found = []
    for row, before in zip(residual, prefix, strict=True):
        sizes = quantizer.level_sizes
        key = int(before[-1]) if quantizer.config.balance == "private_code" else int(before[0] * sizes[1] + before[1])
        place = parents.get(key)
        if place is None:
            found.append((0, np.zeros_like(row)))
            continue
        start, end = tensors["private_starts"][place : place + 2]
        book = tensors["private_centroids"][start:end].astype(np.float64)
        best = int(((book - row) ** 2).sum(axis=1).argmin())
        found.append((best, book[best]))
    return found


@pytest.mark.parametrize("balance", ["private_code", "private_prefix"])
def test_private_centroids(balance):
    vectors = clusters()
    options = {"level_sizes": (8, 8, 6), "iterations": 10}
    quantizer = BalancedKMeans(BalancedKMeansConfig(**options, balance=balance))
    codes = quantizer.fit_encode(vectors)
    np.testing.assert_array_equal(codes, quantizer.encode(vectors))
    plain = ResidualKMeans(ResidualKMeansConfig(**options)).fit(vectors)
    np.testing.assert_array_equal(codes[:, :2], plain.encode(vectors)[:, :2])
    new = np.concatenate([clusters(200, seed=9), 3 * clusters(50, seed=8)])
    found, residual = quantizer.encode(new), quantizer.residual(new, 2)
    oracle = private_oracle(quantizer, residual, found[:, :2])
    np.testing.assert_array_equal(found[:, 2], [code for code, _ in oracle])
    rebuilt = quantizer.decode(found[:, :2]) + np.array([vector for _, vector in oracle])
    assert np.abs(quantizer.decode(found) - rebuilt).max() < 1e-5
    assert np.abs(new - quantizer.decode(found) - quantizer.residual(new)).max() < 1e-4
    # A parent with at most k distinct vectors gives each its own centroid: nothing is left.
    key = codes[:, 1] if balance == "private_code" else codes[:, 0] * 8 + codes[:, 1]
    small = np.isin(key, np.flatnonzero(np.bincount(key) <= 6))
    assert np.abs(quantizer.residual(vectors)[small]).max(initial=0) < 1e-5
    if balance == "private_prefix":
        assert small.any()
    assert relative_error(vectors, quantizer.decode(codes)) < relative_error(
        vectors, plain.decode(plain.encode(vectors))
    )
    assert quantizer.codebooks[2].shape == (6, 20)


def test_options_are_checked(tmp_path):
    for options, message in [
        ({"balance": "private_code", "balanced_levels": (0,)}, "last of at least two levels"),
        ({"balanced_levels": (3,)}, r"\[-3, 3\)"),
        ({"balance": "equal"}, "must be one of .equal_size"),
        ({"balance": "private_prefix", "normalize_residuals": True}, "plain residuals"),
        ({"balance_rounds": -1}, "at least 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            BalancedKMeansConfig(**options)
    quantizer = BalancedKMeans(BalancedKMeansConfig(level_sizes=(4, 4), balance="private_code")).fit(clusters(100))
    tensors = quantizer._tensors()
    del tensors["private_starts"]
    with pytest.raises(DataError, match="private_starts"):
        BalancedKMeans(quantizer.config)._set_tensors(tensors)

"""Residual k-means against brute force, scikit-learn and the identity `vector = sum of centroids + residual`."""

from __future__ import annotations

import json
import re
import tracemalloc
import warnings

import faiss
import numpy as np
import pytest
from quantizer_data import clusters
from safetensors.numpy import load_file, save_file
from sklearn.cluster import KMeans

from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.quantizers import nearest_centroids as module
from sidtune.tokenizers.quantizers import residual_kmeans
from sidtune.tokenizers.quantizers.base import Quantizer, load_quantizer, make_quantizer
from sidtune.tokenizers.quantizers.nearest_centroids import nearest_centroids
from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from sidtune.tokenizers.registry import QUANTIZERS


def clustered(count: int = 3000, dims: int = 24, seed: int = 0) -> np.ndarray:
    """Vectors around 40 centres of unequal size, unit length."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(40, dims))
    share = 1.0 / np.arange(1, 41)
    which = draw.choice(40, size=count, p=share / share.sum())
    vectors = centres[which] + 0.5 * draw.normal(size=(count, dims))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make(sizes=(32, 16, 8), **options) -> ResidualKMeans:
    return ResidualKMeans(ResidualKMeansConfig(level_sizes=sizes, **options))


def brute_force(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Argmin of float64 squared distances, one row at a time; ties to the lowest index."""
    wide = centroids.astype(np.float64)
    return np.array([((wide - point.astype(np.float64)) ** 2).sum(axis=1).argmin() for point in points])


@pytest.fixture(scope="module")
def fitted() -> tuple[np.ndarray, ResidualKMeans]:
    vectors = clustered()
    return vectors, make().fit(vectors)


def test_assignment_is_brute_force_argmin_on_every_row(fitted):
    vectors, quantizer = fitted
    codes, residual = quantizer.encode(vectors), vectors
    assert codes.shape == (3000, 3) and codes.dtype == np.int32
    for level, book in enumerate(quantizer.codebooks):
        np.testing.assert_array_equal(codes[:, level], brute_force(residual, book))
        residual = residual - book[codes[:, level]]


def test_residual_identity_and_error_falls_with_depth(fitted):
    vectors, quantizer = fitted
    codes = quantizer.encode(vectors)
    errors = [float((vectors**2).sum(axis=1).mean())]
    for depth in (1, 2, 3):
        residual = quantizer.residual(vectors, depth)
        assert np.abs(vectors - quantizer.decode(codes[:, :depth]) - residual).max() < 1e-4
        errors.append(float((residual**2).sum(axis=1).mean()))
    assert errors[0] > errors[1] > errors[2] > errors[3] > 0
    np.testing.assert_array_equal(quantizer.residual(vectors, 0), vectors)


def test_first_level_is_plain_faiss_kmeans_and_as_good_as_sklearn():
    vectors = clustered()
    ours = make((32,), seed=5).fit(vectors)
    plain = faiss.Kmeans(24, 32, niter=25, seed=5, max_points_per_centroid=10_000, min_points_per_centroid=1)
    plain.train(vectors)
    np.testing.assert_array_equal(ours.codebooks[0], plain.centroids)
    inertia = float((ours.residual(vectors).astype(np.float64) ** 2).sum())
    other = KMeans(32, init="random", n_init=1, max_iter=25, random_state=0).fit(vectors).inertia_
    assert inertia < 1.1 * other


def test_ties_go_to_the_lowest_index():
    centroids = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    points = np.array([[1, 0], [0, 1], [0.5, 0.5], [2, 2], [0, 0]], dtype=np.float32)
    np.testing.assert_array_equal(nearest_centroids(points, centroids), [0, 1, 0, 0, 0])
    many = np.repeat(points, 50, axis=0)
    np.testing.assert_array_equal(nearest_centroids(many, centroids), np.repeat([0, 1, 0, 0, 0], 50))


def test_near_ties_are_decided_exactly():
    """Points half-way between two centroids: float32 distances cannot tell on which side of the middle they lie."""
    draw = np.random.default_rng(3)
    centroids = draw.normal(size=(64, 48)).astype(np.float32)
    pairs = np.argsort(((centroids[:, None] - centroids) ** 2).sum(axis=2), axis=1)[:, :2]  # a centroid and its nearest
    points = (centroids[pairs[:, 0]] + centroids[pairs[:, 1]]) / 2 + 1e-7 * draw.normal(size=(20, 64, 48))
    points = points.reshape(-1, 48).astype(np.float32)
    index = faiss.IndexFlatL2(48)
    index.add(centroids)
    plain = index.search(points, 1)[1][:, 0]
    exact = brute_force(points, centroids)
    assert (plain != exact).any(), "the case is too easy to show anything"
    np.testing.assert_array_equal(nearest_centroids(points, centroids), exact)


def test_same_seed_same_codes_and_batches_do_not_matter(fitted):
    vectors, quantizer = fitted
    again = make().fit(vectors)
    for ours, theirs in zip(quantizer.codebooks, again.codebooks, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    codes = quantizer.encode(vectors)
    again.config.chunk_size = 7
    np.testing.assert_array_equal(again.encode(vectors), codes)
    np.testing.assert_array_equal(np.concatenate([quantizer.encode(vectors[i : i + 1]) for i in range(50)]), codes[:50])
    other = make(seed=1).fit(vectors)
    assert not np.array_equal(other.codebooks[0], quantizer.codebooks[0])


def test_save_and_load_keep_codes_and_codebooks_bitwise(fitted, tmp_path):
    vectors, quantizer = fitted
    quantizer.save_pretrained(tmp_path / "q")
    assert sorted(p.name for p in (tmp_path / "q").iterdir()) == ["codebooks.safetensors", "quantizer_config.json"]
    new = clustered(500, seed=9)
    for loaded in (ResidualKMeans.from_pretrained(tmp_path / "q"), load_quantizer(str(tmp_path / "q"))):
        assert type(loaded) is ResidualKMeans and loaded.config == quantizer.config
        np.testing.assert_array_equal(loaded.encode(vectors), quantizer.encode(vectors))
        np.testing.assert_array_equal(loaded.encode(new), quantizer.encode(new))
        np.testing.assert_array_equal(loaded.decode(loaded.encode(new)), quantizer.decode(quantizer.encode(new)))


def test_more_codes_than_distinct_vectors_are_padded_and_reported():
    vectors = np.repeat(np.eye(5, dtype=np.float32), 4, axis=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantizer = make((8, 3)).fit(vectors)
    assert len(caught) == 1, "one warning for all levels"
    assert re.search(
        r"Level 1 .* 8 codes but only 5 distinct vectors .* lower level_sizes\[0\]", str(caught[0].message)
    )
    codes = quantizer.encode(vectors)
    assert len(quantizer.notes) == 2 and len(np.unique(codes[:, 0])) == 5 and codes[:, 0].max() < 5
    np.testing.assert_array_equal(quantizer.decode(codes), vectors)
    np.testing.assert_array_equal(quantizer.codebooks[0][5:], np.repeat(quantizer.codebooks[0][:1], 3, axis=0))
    draw = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    assert quantizer.encode(draw)[:, 0].max() < 5, "a padding code must stay unused for new items too"


def test_a_pile_of_equal_vectors_takes_one_centroid():
    """Nine tenths of the rows are one vector; the other codes must serve the rest."""
    rest = clustered(200, 8, seed=2)
    vectors = np.concatenate([np.repeat(rest[:1], 1800, axis=0), rest])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer = make((32, 8)).fit(vectors)
    codes = quantizer.encode(vectors)
    assert len(np.unique(codes[:, 0])) == 32
    assert all(np.isfinite(book).all() for book in quantizer.codebooks)
    assert len(np.unique(quantizer.codebooks[0], axis=0)) == 32


def test_weights_and_subsampling_train_on_large_input():
    vectors = np.concatenate([clustered(2000, 8), clustered(2000, 8)])
    quantizer = make((16, 4), max_points_per_centroid=20).fit(vectors)
    residual = quantizer.residual(vectors)
    assert np.isfinite(residual).all() and (residual**2).sum() < ((vectors - vectors.mean(axis=0)) ** 2).sum()


def test_one_code_per_level_and_one_row():
    quantizer = make((1, 1)).fit(np.ones((1, 3), dtype=np.float32))
    np.testing.assert_array_equal(quantizer.encode(np.zeros((2, 3))), [[0, 0], [0, 0]])


def test_normalized_residuals_decode_with_mean_lengths(tmp_path):
    vectors = clustered()
    quantizer = make(normalize_residuals=True).fit(vectors)
    codes, residual = quantizer.encode(vectors), vectors
    for level, book in enumerate(quantizer.codebooks):
        np.testing.assert_array_equal(codes[:, level], brute_force(residual, book))
        residual = residual - book[codes[:, level]]
        residual = residual / np.linalg.norm(residual, axis=1, keepdims=True)
    errors = [float(((vectors - quantizer.decode(codes[:, :n])) ** 2).mean()) for n in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    quantizer.save_pretrained(tmp_path / "q")
    np.testing.assert_array_equal(ResidualKMeans.from_pretrained(tmp_path / "q").decode(codes), quantizer.decode(codes))


def spoil(row: int, value: float) -> np.ndarray:
    vectors = clustered(100)
    vectors[row, 2] = value
    return vectors


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        (spoil(7, np.nan), r"1 of 100 item vectors hold NaN, infinite or huge values \(first: row 7\)"),
        (spoil(3, np.inf), r"first: row 3"),
        (spoil(3, 1e30), r"huge"),
        (np.zeros((0, 4)), r"empty"),
        (np.zeros((4, 0)), r"empty"),
        (np.zeros(4), r"shape \(n, d\), got float64 of shape \(4,\)"),
        (np.array([["a", "b"]]), r"Expected item vectors as numbers"),
    ],
)
def test_bad_vectors_are_refused(vectors, sentence):
    with pytest.raises(DataError, match=sentence):
        make().fit(vectors)


def test_wrong_width_unfitted_and_bad_codes_are_refused(fitted, tmp_path):
    _, quantizer = fitted
    with pytest.raises(DataError, match="7 dimensions, but the codebooks were trained on 24"):
        quantizer.encode(np.zeros((3, 7)))
    with pytest.raises(DataError, match="no codebooks yet"):
        make().encode(np.zeros((3, 7)))
    with pytest.raises(DataError, match="no codebooks yet"):
        make().save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    with pytest.raises(DataError, match=r"level 2 lies outside 0\.\.15"):
        quantizer.decode(np.array([[0, 16, 0]]))
    with pytest.raises(DataError, match="level 1 lies outside"):
        quantizer.decode(np.array([[-1]]))
    with pytest.raises(DataError, match="Expected integer codes"):
        quantizer.decode(np.zeros((2, 4), dtype=int))
    with pytest.raises(ConfigError, match="depth must lie in"):
        quantizer.residual(np.zeros((2, 24)), 4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"level_sizes": []}, "one positive integer per level"),
        ({"level_sizes": [8, 0]}, "one positive integer per level"),
        ({"level_sizes": "888"}, "level_sizes"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"seed": -1}, "seed"),
        ({"levels": [8]}, "did you mean 'level_sizes'"),
        ({"seed": "x"}, "'seed' must be an integer"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_quantizer("residual_kmeans", options)


def test_registry_lists_working_classes():
    for name in QUANTIZERS:
        cls = QUANTIZERS.get(name)
        assert issubclass(cls, Quantizer) and cls.name == name
    with pytest.raises(ConfigError, match="did you mean 'residual_kmeans'"):
        make_quantizer("residual_kmean")


def test_damaged_folders_are_named(fitted, tmp_path):
    _, quantizer = fitted
    folder = tmp_path / "q"
    with pytest.raises(DataError, match="does not exist"):
        ResidualKMeans.from_pretrained(folder)
    quantizer.save_pretrained(folder)
    record = json.loads((folder / "quantizer_config.json").read_text())
    tensors = load_file(folder / "codebooks.safetensors")

    def write(**changes):
        (folder / "quantizer_config.json").write_text(json.dumps(record | changes))

    write(config=record["config"] | {"level_sizes": [32, 16, 9]})
    with pytest.raises(DataError, match=r"'level_2' has shape \(8, 24\), expected \(9, 24\)"):
        load_quantizer(folder)
    write(quantizer="other")
    with pytest.raises(DataError, match="holds the quantizer 'other'"):
        ResidualKMeans.from_pretrained(folder)
    with pytest.raises(ConfigError, match="no quantizer named 'other'"):
        load_quantizer(folder)
    (folder / "quantizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="describes no quantizer"):
        load_quantizer(folder)
    write()
    save_file({k: v for k, v in tensors.items() if k != "level_1"}, folder / "codebooks.safetensors")
    with pytest.raises(DataError, match="lacks the tensor 'level_1'"):
        load_quantizer(folder)
    (folder / "codebooks.safetensors").write_bytes(b"\x00" * 11)
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_quantizer(folder)
    (folder / "codebooks.safetensors").unlink()
    with pytest.raises(DataError, match=r"codebooks\.safetensors does not exist"):
        load_quantizer(folder)


def rows_with_repeats() -> np.ndarray:
    base = clusters(300, dims=7)
    base[10] = 0.0
    rows = np.concatenate([base, base[::3], base[:20], -0.0 * base[:1]])
    return rows[np.random.default_rng(1).permutation(len(rows))]


@pytest.mark.parametrize("collide", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_repeated_rows_are_merged_as_by_sorting(collide, flat, monkeypatch):
    if collide:  # all rows of one hash: equality of the rows themselves must decide
        monkeypatch.setattr(residual_kmeans, "_row_hashes", lambda points: np.zeros(len(points), dtype=np.uint64))
    points = rows_with_repeats()
    if flat:  # the first columns say nothing about the order
        points[:, :4] = 1.0
    distinct, counts = residual_kmeans.merged(points)
    expected, expected_counts = np.unique(points, axis=0, return_counts=True)
    np.testing.assert_array_equal(distinct, expected)
    np.testing.assert_array_equal(counts, expected_counts)
    alone = clusters(100, dims=7)
    found, none = residual_kmeans.merged(alone)
    assert (collide or (found is alone and none is None)) and len(found) == 100


def test_the_draw_is_that_of_faiss():
    points = clusters(3000)
    assert residual_kmeans.training_rows(3000, 30, 100, seed=5) is None
    rows = residual_kmeans.training_rows(3000, 30, 20, seed=5)
    assert len(np.unique(rows)) == 600
    kmeans = faiss.Kmeans(20, 30, niter=3, seed=5, max_points_per_centroid=20, min_points_per_centroid=1)
    kmeans.train(points)
    options = {"seed": 5, "iterations": 3, "max_points_per_centroid": 20}
    ours, distinct = residual_kmeans.train_centroids(points, 30, **options)
    np.testing.assert_array_equal(ours, kmeans.centroids)
    assert distinct == 600


def test_a_draw_of_equal_rows_does_not_hide_the_others():
    points = np.zeros((4000, 3), dtype=np.float32)
    points[:40] = clusters(40, dims=3)
    centroids, distinct = residual_kmeans.train_centroids(points, 50, seed=0, max_points_per_centroid=2)
    assert distinct == 41
    np.testing.assert_array_equal(np.unique(centroids, axis=0), np.unique(points, axis=0))


@pytest.mark.parametrize("crowd", ["two", "dozen", "all"])
def test_many_near_ties(crowd, monkeypatch):
    """Two centroids equally near, a dozen, or all 100 of them, up to what float32 cannot tell."""
    draw = np.random.default_rng(3)
    spokes = draw.normal(size=(100, 24))
    book = (spokes / np.linalg.norm(spokes, axis=1, keepdims=True)).astype(np.float32)
    if crowd == "dozen":
        book[12:] *= 3
    wide = book.astype(np.float64)
    near = np.argsort(((wide[:, None] - wide) ** 2).sum(axis=2), axis=1)[:, :2]
    middle = np.tile(wide[near].mean(axis=1), (16, 1)) if crowd == "two" else np.zeros((1600, 24))
    points = (middle + 3e-8 * draw.normal(size=(1600, 24))).astype(np.float32)
    expected = brute_force(points, book)
    index = faiss.IndexFlatL2(24)
    index.add(book)
    assert (index.search(points, 1)[1][:, 0] != expected).any(), "the case is too easy to show anything"
    np.testing.assert_array_equal(nearest_centroids(points, book), expected)
    monkeypatch.setattr(module, "_SCORES", 700)  # blocks of seven rows
    monkeypatch.setattr(module, "_CACHED", 300)  # of three
    monkeypatch.setattr(module, "_NUMBERS", 240)  # blocks of ten pairs
    monkeypatch.setattr(module, "_PAIRS", 20)  # decided before all are known
    np.testing.assert_array_equal(nearest_centroids(points, book), expected)


def test_crowds_of_equal_centroids_take_no_memory():
    """A level with more codes than distinct residuals repeats a centroid; every row near it has all of them as candidates."""
    book = np.ones((2000, 4), dtype=np.float32)
    book[7:9] = 3.0
    points = np.repeat(np.array([[1.0], [2.9], [1.1]], dtype=np.float32), 4, axis=1)[np.arange(6000) % 3]
    tracemalloc.start()
    found = nearest_centroids(points, book)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, np.array([0, 7, 0])[np.arange(6000) % 3])
    assert peak < 120 << 20, "all 8 million pairs at once take more than that"


def test_training_and_encoding_leave_the_vectors_alone():
    vectors = clusters()
    before = vectors.copy()
    quantizer = ResidualKMeans(ResidualKMeansConfig(level_sizes=(8, 8, 8), iterations=3, chunk_size=100)).fit(vectors)
    quantizer.encode(vectors), quantizer.residual(vectors), quantizer.residual(vectors, 0)
    np.testing.assert_array_equal(vectors, before)

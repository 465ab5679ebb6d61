"""Product quantization and RQ-OPQ against brute force, faiss's factory and the OneSearch sheet (5.2, 5.3, 5.5, 5.7)."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from quantizer_data import clusters, nearest_by_hand, own_share, power_law, relative_error
from sklearn.datasets import load_digits

from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.quantizers.product_quantizer import ProductQuantizer, ProductQuantizerConfig
from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from sidtune.tokenizers.quantizers.rq_opq import RqOpq, RqOpqConfig

pytestmark = pytest.mark.medium


def product(**options) -> ProductQuantizer:
    return ProductQuantizer(
        ProductQuantizerConfig(**{"parts": 4, "codes_per_part": 16, "rotation_rounds": 5, **options})
    )


@pytest.mark.parametrize("rotate", [True, False])
def test_product_codes_are_the_argmin_of_each_part(rotate):
    vectors = clusters(dims=22)  # 22 is not a multiple of 4, so it is padded
    quantizer = product(rotate=rotate).fit(vectors)
    codes, new = quantizer.encode(vectors), clusters(150, dims=22, seed=5)
    assert codes.shape == (1200, 4) and codes.dtype == np.int32
    found, turned = quantizer.encode(new), new.astype(np.float64) @ quantizer.rotation.T.astype(np.float64)
    for m in range(4):
        part = turned[:, 6 * m : 6 * m + 6]
        wide = quantizer._centroids[m].astype(np.float64)
        np.testing.assert_array_equal(found[:, m], [((wide - row) ** 2).sum(axis=1).argmin() for row in part])
    np.testing.assert_allclose(quantizer.rotation.T @ quantizer.rotation, np.eye(22), atol=1e-5)
    quantizer.config.chunk_size = 7
    np.testing.assert_array_equal(quantizer.encode(vectors), codes)
    np.testing.assert_array_equal(np.concatenate([quantizer.encode(row[None]) for row in vectors[:50]]), codes[:50])


def test_near_ties_after_the_rotation_are_decided_exactly():
    quantizer = product(parts=2).fit(clusters())
    book, width = quantizer._centroids[0].astype(np.float64), 10
    pairs = np.argsort(((book[:, None] - book) ** 2).sum(axis=2), axis=1)[:, :2]
    middle = np.zeros((16 * 40, 20))
    middle[:, :width] = np.tile((book[pairs[:, 0]] + book[pairs[:, 1]]) / 2, (40, 1))
    vectors = (middle @ quantizer.rotation + 1e-7 * np.random.default_rng(0).normal(size=middle.shape)).astype(
        np.float32
    )
    turn = quantizer.rotation[:width].astype(np.float64)
    expected = np.array([((book - turn @ row) ** 2).sum(axis=1).argmin() for row in vectors.astype(np.float64)])
    plain = nearest_by_hand((vectors @ quantizer.rotation.T)[:, :width], quantizer._centroids[0])
    assert (plain != expected).any(), "the case is too easy to show anything"
    np.testing.assert_array_equal(quantizer.encode(vectors)[:, 0], expected)


def test_rotation_helps_and_more_codes_help():
    draw = np.random.default_rng(2)
    vectors = (draw.normal(size=(1500, 8)) * np.array([4, 4, 3, 2, 1, 0.5, 0.2, 0.1])).astype(np.float32)
    error = {}
    for rotate, size in [(False, 16), (True, 16), (True, 64)]:
        quantizer = product(rotate=rotate, codes_per_part=size, rotation_rounds=15, parts=2).fit(vectors)
        error[rotate, size] = relative_error(vectors, quantizer.decode(quantizer.encode(vectors)))
    assert error[True, 64] < error[True, 16] < 0.8 * error[False, 16]


@pytest.mark.slow
def test_same_error_as_the_faiss_factory():
    """Sheet 5.7: `OPQ2,IVF1,PQ2x8` has no other error than our rotation and codebooks."""
    vectors = clusters(10_000, dims=12)  # faiss wants 39 rows per code, else it prints warnings
    quantizer = product(parts=2, codes_per_part=256, rotation_rounds=2).fit(vectors)
    ours = float(((vectors - quantizer.decode(quantizer.encode(vectors))) ** 2).sum())
    index = faiss.index_factory(12, "OPQ2,IVF1,PQ2x8", faiss.METRIC_L2)
    faiss.downcast_VectorTransform(index.chain.at(0)).niter = 2  # as many rounds as ours; 50 take half a minute
    index.train(vectors)
    theirs = float(((vectors - index.sa_decode(index.sa_encode(vectors))) ** 2).sum())
    assert abs(ours - theirs) < 0.02 * theirs
    # With their codebooks in our class the codes, and so the errors, are the same to rounding.
    plain = faiss.IndexPreTransform(faiss.OPQMatrix(12, 2), faiss.IndexPQ(12, 2, 8))
    faiss.downcast_VectorTransform(plain.chain.at(0)).niter = 1
    plain.train(vectors)
    matrix = faiss.downcast_VectorTransform(plain.chain.at(0))
    inner = faiss.downcast_index(plain.index).pq
    quantizer.rotation = faiss.vector_to_array(matrix.A).reshape(12, 12)
    quantizer._centroids = faiss.vector_to_array(inner.centroids).reshape(2, 256, 6)
    ours = float(((vectors - quantizer.decode(quantizer.encode(vectors))) ** 2).sum())
    theirs = float(((vectors - plain.sa_decode(plain.sa_encode(vectors))) ** 2).sum())
    assert abs(ours - theirs) < 1e-5 * theirs


def test_parts_with_few_vectors_and_prefixes():
    few = np.repeat(np.eye(6, dtype=np.float32), 3, axis=0)
    with pytest.warns(UserWarning, match="distinct vectors to cover"):
        quantizer = product(parts=2).fit(few)
    np.testing.assert_allclose(quantizer.decode(quantizer.encode(few)), few, atol=1e-5)
    vectors = clusters()
    quantizer = product().fit(vectors)
    codes = quantizer.encode(vectors)
    books = quantizer.codebooks
    mean = quantizer._means.reshape(-1) @ quantizer.rotation
    summed = mean + sum(book[codes[:, m]] for m, book in enumerate(books))
    np.testing.assert_allclose(quantizer.decode(codes), summed, atol=1e-4)
    np.testing.assert_allclose(
        quantizer.decode(codes[:, :2]), mean + books[0][codes[:, 0]] + books[1][codes[:, 1]], atol=1e-4
    )
    errors = [relative_error(vectors, quantizer.decode(codes[:, : n + 1])) for n in range(4)]
    assert 1 > errors[0] > errors[1] > errors[2] > errors[3]
    with pytest.warns(UserWarning, match="distinct"):
        assert product(parts=2).fit(np.ones((1, 4), np.float32)).encode(np.ones((1, 4), np.float32)).shape == (1, 2)


@pytest.fixture(scope="module")
def sheet():
    """Power-law mixture, N = 20,000, RQ 128-32-16 and a tail of 2 × 256."""
    vectors = power_law(20_000)
    quantizer = RqOpq(RqOpqConfig(head_sizes=(128, 32, 16), balance="none", iterations=10, rotation_rounds=2))
    return vectors, quantizer, quantizer.fit_encode(vectors)


def test_tail_raises_the_share_of_items_with_a_code_of_their_own(sheet):
    """Sheet 5.5: ICR below 0.02 → above 0.80 (measured there 0.0066 → 0.8887), error 0.0743 → 0.0311."""
    vectors, quantizer, codes = sheet
    assert own_share(codes[:, :3]) < 0.02 and own_share(codes) > 0.80
    errors = [relative_error(vectors, quantizer.decode(codes[:, :n])) for n in (3, 4, 5)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] < 0.10 and errors[2] < 0.5 * errors[0]


def test_head_is_residual_kmeans_and_errors_fall_on_every_level(sheet):
    vectors, quantizer, codes = sheet
    head = ResidualKMeans(ResidualKMeansConfig(level_sizes=(128, 32, 16), iterations=10)).fit(vectors)
    np.testing.assert_array_equal(head.encode(vectors), codes[:, :3])
    np.testing.assert_array_equal(quantizer.encode(vectors), codes)
    residual, rows = vectors[:400], slice(0, 400)
    for level, book in enumerate(quantizer.codebooks[:3]):
        np.testing.assert_array_equal(codes[rows, level], nearest_by_hand(residual, book))
        residual = residual - book[codes[rows, level]]
    errors = [float((vectors**2).sum())]
    errors += [float(((vectors - quantizer.decode(codes[:, :n])) ** 2).sum()) for n in range(1, 6)]
    assert all(a > b for a, b in zip(errors, errors[1:], strict=False))
    whole = quantizer.decode(codes[:, :3]) + quantizer.residual(vectors)
    assert np.abs(vectors - whole).max() < 1e-4


def test_digits_of_the_sheet():
    """Sheet 5.5: 16-8-8 and 2 × 16 codes on scikit-learn's digits, ICR 0.1157 → 0.8069."""
    vectors = load_digits().data.astype(np.float32)
    quantizer = RqOpq(RqOpqConfig(head_sizes=(16, 8, 8), tail_size=16, balance="none", rotation_rounds=10))
    codes = quantizer.fit_encode(vectors)
    assert 0.07 < own_share(codes[:, :3]) < 0.17 and 0.72 < own_share(codes) < 0.88
    # The control of equal length: five levels of residual k-means do as well (0.7924), so ICR alone proves nothing.
    control = own_share(ResidualKMeans(ResidualKMeansConfig(level_sizes=(16, 8, 8, 16, 16))).fit_encode(vectors))
    assert 0.72 < control < 0.88 and abs(control - own_share(codes)) < 0.08


def test_five_levels_of_residual_kmeans_do_as_well_as_the_tail(sheet):
    """Sheet 5.5: ICR of the control of equal length 0.9210, with the tail 0.8887; neither is below three levels."""
    vectors, _, codes = sheet
    sizes = (128, 32, 16, 256, 256)
    control = ResidualKMeans(ResidualKMeansConfig(level_sizes=sizes, iterations=5, max_points_per_centroid=20))
    share = own_share(control.fit_encode(vectors))
    assert share > 0.85 and share > own_share(codes) - 0.05


def test_letters(sheet):
    _, quantizer, _ = sheet
    assert quantizer.level_sizes == (128, 32, 16, 256, 256) and quantizer.level_letters() is None
    assert RqOpq(RqOpqConfig(shared_letter=True)).level_letters() == "abcdd"
    assert RqOpq(RqOpqConfig(head_sizes=(4,), tail_parts=3, shared_letter=True)).level_letters() == "abbb"


def test_balanced_head_of_the_default():
    vectors = power_law(3000, dims=16)
    quantizer = RqOpq(RqOpqConfig(head_sizes=(32, 16, 8), tail_size=32, rotation_rounds=3))
    codes = quantizer.fit_encode(vectors)
    assert np.bincount(codes[:, 2]).max() <= 375
    assert own_share(codes) >= own_share(codes[:, :3])
    assert relative_error(vectors, quantizer.decode(codes)) < relative_error(vectors, quantizer.decode(codes[:, :3]))
    queries = power_law(50, dims=16, seed=3)  # coded later, with frozen codebooks
    assert quantizer.encode(queries).shape == (50, 5)


def test_options_are_checked():
    for config, options, message in [
        (RqOpqConfig, {"tail_size": 100}, "power of two"),
        (RqOpqConfig, {"balance": "even"}, "must be one of .equal_size"),
        (RqOpqConfig, {"head_sizes": ()}, "one positive integer per level"),
        (ProductQuantizerConfig, {"parts": 0}, "at least 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            config(**options)
    with pytest.raises(ConfigError, match="at least 4 dimensions"):
        product().fit(np.ones((10, 3), np.float32))
    with pytest.raises(DataError, match="no codebooks"):
        RqOpq().encode(np.ones((2, 4), np.float32))

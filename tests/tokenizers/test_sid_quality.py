"""The quality report: toys of the specification, scipy, brute force, and warnings that come when (and only when)
due."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from scipy.stats import entropy

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.tables.schema import table_from_rows
from sidtune.tokenizers.encoders.base import item_texts
from sidtune.tokenizers.encoders.tfidf import TfidfSvdConfig, TfidfSvdEncoder
from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from sidtune.tokenizers.sids.neighbours import nearest_rows, neighbour_overlap, shared_levels
from sidtune.tokenizers.sids.quality import SidThresholds, gini, known_bad, sid_quality
from sidtune.tokenizers.sids.semantic_ids import SemanticIds


def ids_of(codes, sizes) -> SemanticIds:
    return SemanticIds([f"i{n}" for n in range(len(codes))], np.asarray(codes), sizes)


def blobs(items: int = 600, dims: int = 12, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(20, dims))
    return (centres[draw.integers(0, 20, items)] + 0.3 * draw.normal(size=(items, dims))).astype(np.float32)


@pytest.fixture(scope="module")
def learned() -> tuple[SemanticIds, np.ndarray, ResidualKMeans]:
    vectors = blobs()
    quantizer = ResidualKMeans(ResidualKMeansConfig((64, 32, 16))).fit(vectors)
    return ids_of(quantizer.encode(vectors), (64, 32, 16)), vectors, quantizer


def test_toy_of_the_specification():
    report = sid_quality(ids_of([(0, 0), (0, 0), (1, 0), (1, 1)], (2, 2)))
    assert report.icr == 0.5 and report.sharing_rate == 0.5 and report.lost_rate == 0.25
    assert report.levels[0].cur == 1.0 and report.cur_total == 0.75 and report.distinct_rate == 0.75
    assert report.largest_group == 2 and report.mse is None and report.neighbour_overlap is None


def test_rates_equal_counters_on_random_codes():
    sizes = (5, 4, 6)
    codes = np.random.default_rng(0).integers(0, (4, 4, 6), (200, 3))
    report = sid_quality(ids_of(codes, sizes))
    counts = Counter(map(tuple, codes.tolist()))
    assert report.icr == pytest.approx(sum(n == 1 for n in counts.values()) / 200)
    for n, level in enumerate(report.levels):
        prefixes = {tuple(code[: n + 1]) for code in codes.tolist()}
        assert level.prefixes == len(prefixes) and level.cur == len(prefixes) / np.prod(sizes[: n + 1])
        column = np.bincount(codes[:, n], minlength=sizes[n])
        assert level.used == (column > 0).sum() and level.utilisation == level.used / sizes[n]
        assert level.entropy_bits == pytest.approx(entropy(column, base=2))
        assert level.normalized_entropy == pytest.approx(entropy(column, base=2) / np.log2(sizes[n]))
        pairs = np.abs(column[:, None] - column).sum() / (2 * len(column) ** 2 * column.mean())
        assert level.gini == pytest.approx(pairs)


def test_gini_of_known_distributions():
    assert gini(np.full(10, 3)) == pytest.approx(0.0)
    assert gini(np.array([0, 0, 0, 7])) == pytest.approx(0.75)


def test_row_order_does_not_matter(learned):
    sids, vectors, quantizer = learned
    mixed = np.random.default_rng(1).permutation(len(sids))
    other = SemanticIds([sids.item_ids[r] for r in mixed], sids.codes[mixed], sids.level_sizes)
    everything = {"sample": len(sids)}
    ours, theirs = (
        sid_quality(s, v, quantizer, **everything).to_dict() for s, v in ((sids, vectors), (other, vectors[mixed]))
    )
    random_pairs = ours.pop("shared_levels_random"), theirs.pop("shared_levels_random")
    assert random_pairs[0] == pytest.approx(random_pairs[1], abs=0.1)  # other pairs are drawn
    for key in ours:
        if isinstance(ours[key], float):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
    assert ours["icr"] == theirs["icr"] and ours["codes"] == theirs["codes"] and ours["warnings"] == theirs["warnings"]


def test_reconstruction_error(learned):
    sids, vectors, quantizer = learned
    report = sid_quality(sids, vectors, quantizer)
    wide = vectors.astype(np.float64)
    left = wide - quantizer.decode(sids.codes)
    assert report.mse == pytest.approx((left**2).mean())
    assert report.relative_error == pytest.approx((left**2).sum() / ((wide - wide.mean(axis=0)) ** 2).sum())
    errors = [level.relative_error for level in report.levels]
    assert 1 > errors[0] > errors[1] > errors[2] == report.relative_error > 0


def test_nearest_rows_equal_brute_force():
    vectors = blobs(300)
    vectors[5] = vectors[9] = vectors[77]  # equal vectors: ordered by row
    vectors[3] = 0
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    cosine = np.round(unit.astype(np.float64) @ unit.T.astype(np.float64), 6)
    rows = np.array([0, 5, 9, 77, 120, 299])
    for row, found in zip(rows, nearest_rows(vectors, rows, 10), strict=True):
        others = [r for r in range(300) if r != row]
        assert found.tolist() == sorted(others, key=lambda r: (-cosine[row, r], r))[:10]
    assert nearest_rows(vectors[:4], np.arange(4), 3).shape == (4, 3)


def test_shared_levels_counts_prefixes_only():
    codes = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 2], [1, 1, 2]])
    assert shared_levels(codes, np.array([0]), np.array([[1, 2, 3]])) == pytest.approx((2 + 1 + 0) / 3)


def test_neighbour_overlap_is_the_mean_over_random_orders_of_equal_items(learned):
    """Oracle: rank all items by decoded similarity with ties in random order, many times, and average."""
    sids, vectors, quantizer = learned
    codes = sids.codes[:, :1]  # 64 codes for 600 items: ties everywhere
    rows, draw = np.arange(0, 600, 60), np.random.default_rng(0)
    near = nearest_rows(vectors, rows, 30)
    decoded = quantizer.decode(codes).astype(np.float64)
    decoded /= np.linalg.norm(decoded, axis=1, keepdims=True)
    similarity = np.round(decoded[rows] @ decoded.T, 9)
    similarity[np.arange(len(rows)), rows] = -2.0
    shares = []
    for _ in range(400):
        order = np.lexsort((draw.random(similarity.shape), -similarity), axis=1)[:, :30]
        shares.append(np.mean([len(set(a) & set(b)) / 30 for a, b in zip(order, near, strict=True)]))
    assert neighbour_overlap(codes, quantizer, rows, near) == pytest.approx(np.mean(shares), abs=0.01)


def test_exact_codes_keep_all_neighbours():
    vectors = blobs(40)
    quantizer = ResidualKMeans(ResidualKMeansConfig((40,))).fit(vectors)
    report = sid_quality(ids_of(quantizer.encode(vectors), (40,)), vectors, quantizer)
    assert report.neighbour_overlap == pytest.approx(1.0) and report.relative_error == 0.0 and report.icr == 1.0
    assert report.shared_levels_neighbours == 0.0  # which is why one warning is due
    assert len(report.warnings) == 1 and "lower level_sizes[0]" in report.warnings[0]


def test_sound_ids_raise_no_warning(learned):
    sids, vectors, quantizer = learned
    report = sid_quality(sids, vectors, quantizer)
    assert report.warnings == []
    assert report.neighbour_overlap > 0.3 and report.shared_levels_neighbours > report.shared_levels_random + 0.5
    with_suffix = sid_quality(sids.with_suffix(), vectors, quantizer)
    assert with_suffix.warnings == [] and with_suffix.icr == 1.0
    assert with_suffix.neighbour_overlap == report.neighbour_overlap
    assert sid_quality(sids, vectors, quantizer) == report, "the same call gives the same numbers"


def spread(items: int, *sizes: int) -> np.ndarray:
    """Distinct codes, counting up."""
    return np.stack(np.unravel_index(np.arange(items), sizes), axis=1)


@pytest.mark.parametrize(
    ("codes", "sizes", "sentence"),
    [
        (np.zeros((50, 2), int), (4, 4), r"level 'a' have collapsed \(1 of 4 in use, entropy 0\.00 of 2\.00 bits\)"),
        (
            spread(400, 20, 20),
            (100, 20),
            r"Only 20 of the 100 codes of level 'a' are in use; lower its size to about 20",
        ),
        (spread(8, 2, 4), (16, 4), r"Level 'a' has 16 codes for 8 items.*lower level_sizes\[0\]"),
        (np.random.default_rng(0).integers(0, 3, (100, 2)), (3, 3), r"spell only 9 codes for 100 items.*add a level"),
        (np.repeat(spread(20, 5, 4), 2, axis=0), (5, 10), r"Only 0\.0% of the items have a code of their own"),
        (np.repeat(spread(20, 5, 4), 2, axis=0), (5, 10), r"20 of 40 items come after the first of their code"),
        (np.concatenate([spread(80, 10, 10), np.full((25, 2), 9)]), (10, 10), r"<a_9><b_9>\) holds 25 items"),
    ],
)
def test_known_bad_codes_are_named_with_a_fix(codes, sizes, sentence):
    warnings = sid_quality(ids_of(codes, sizes)).warnings
    assert any(re.search(sentence, warning) for warning in warnings), warnings
    assert all(warning.endswith(".") and ";" in warning for warning in warnings)


def test_vectors_of_other_rows_are_noticed(learned):
    sids, vectors, quantizer = learned
    report = sid_quality(sids, np.random.default_rng(2).permutation(vectors), quantizer)
    text = " ".join(report.warnings)
    assert "no better than the catalogue's mean" in text and "do not follow the vectors; check their row order" in text


def test_a_level_that_adds_nothing_is_named(learned):
    sids, vectors, quantizer = learned
    dead = ResidualKMeans(ResidualKMeansConfig((64, 32, 16)))
    books = [book.copy() for book in quantizer.codebooks]
    books[1][:] = 0
    dead._set_tensors({f"level_{n}": book for n, book in enumerate(books)} | {"scales": np.ones(3)})
    report = sid_quality(sids, vectors, dead)
    assert sum("Level 'b' does not lower the reconstruction error" in warning for warning in report.warnings) == 1


def test_thresholds_are_configurable(learned):
    sids, vectors, quantizer = learned
    report = sid_quality(sids, vectors, quantizer)
    strict = {
        "min_normalized_entropy": (1.01, "have collapsed"),
        "min_utilisation": (1.01, "are in use; lower its size"),
        "min_icr": (1.01, "code of their own"),
        "max_lost_rate": (-1.0, "come after the first"),
        "max_group": (0, "holds"),
        "max_relative_error": (-1.0, "no better than"),
        "min_level_gain": (0.95, "does not lower"),
        "min_shared_gain": (9.0, "do not follow the vectors"),
    }
    for name, (value, sentence) in strict.items():
        limits = SidThresholds(**{name: value})
        found = known_bad(report, sids, limits)
        assert found and all(sentence in warning for warning in found), name
        assert sid_quality(sids, vectors, quantizer, thresholds=limits).warnings == found
    assert {*strict, "max_suffix"} == {f.name for f in fields(SidThresholds)}
    assert len(known_bad(replace(report, largest_group=21), sids, SidThresholds())) == 1
    assert known_bad(replace(report, largest_group=21), sids, SidThresholds(max_group=21)) == []


@pytest.mark.parametrize(("shared", "size", "warned"), [(256, None, False), (257, None, True), (5, 1546, True)])
def test_a_suffix_level_of_many_tokens_is_told(shared, size, warned):
    codes = np.r_[np.zeros(shared, dtype=int), np.arange(1, 60)]
    sids = ids_of(codes[:, None].tolist(), (60,)).with_suffix(size)
    told = [warning for warning in sid_quality(sids).warnings if "suffix level adds" in warning]
    assert len(told) == warned
    if warned:
        assert (
            f"adds {size or shared:,} tokens" in told[0] and f"up to {shared} items" in told[0] and "enlarge" in told[0]
        )


def test_a_single_item_and_identical_vectors_are_survived():
    quantizer = ResidualKMeans(ResidualKMeansConfig((1,))).fit(np.ones((1, 3)))
    one = sid_quality(ids_of([[0]], (1,)), np.ones((1, 3)), quantizer)
    assert one.icr == 1.0 and one.levels[0].normalized_entropy == 1.0 and one.relative_error == 0.0
    same = sid_quality(ids_of([[0]] * 5, (1,)), np.ones((5, 3)), quantizer)
    assert same.neighbours == 4 and same.neighbour_overlap == pytest.approx(1.0) and same.warnings
    assert json.dumps(same.to_dict(), allow_nan=False)


def test_report_is_json_and_markdown(learned):
    sids, vectors, quantizer = learned
    report = sid_quality(sids, vectors, quantizer)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["levels"][2]["name"] == "c"
    text = report.to_markdown()
    assert f"| ICR (items with a code of their own) | {report.icr:.2%} |" in text and "| c | 16 | 100.0% |" in text
    bare = sid_quality(ids_of(np.zeros((30, 1), int), (2,)))
    assert "- The codes of level 'a' have collapsed" in bare.to_markdown()
    assert "mean squared error" in text and "mean squared error" not in bare.to_markdown()


def test_mismatched_input_is_refused(learned):
    sids, vectors, quantizer = learned
    with pytest.raises(DataError, match="599 item vectors for 600 items"):
        sid_quality(sids, vectors[:-1])
    with pytest.raises(DataError, match="11 dimensions"):
        sid_quality(sids, vectors[:, :-1], quantizer)
    with pytest.raises(DataError, match=r"levels of \[64, 32, 16\] codes, the semantic IDs \[64, 32, 17\]"):
        sid_quality(SemanticIds(sids.item_ids, sids.codes, (64, 32, 17)), vectors, quantizer)
    with pytest.raises(ConfigError, match="at least 1, got 0 and 2000"):
        sid_quality(sids, vectors, neighbours=0)


def office_texts(folder) -> list[str]:
    """The catalogue's texts with tags and list marks removed by the shortest means, as only this room is tested."""
    items = json.loads((folder / "amazon_office" / "Office_Products.item.json").read_text(encoding="utf-8"))
    rows = []
    for item_id, item in items.items():
        description = html.unescape(re.sub(r"<[^>]*>|^\[|]$", " ", item["description"]))[:400]
        rows.append({"item_id": item_id, "title": item["title"], "brand": item["brand"], "description": description})
    return item_texts(table_from_rows("items", rows), repeats={"title": 2})


def test_real_office_catalogue(real_data):
    texts = office_texts(real_data)
    vectors = TfidfSvdEncoder(TfidfSvdConfig(dims=64)).fit(texts).encode(texts)
    quantizer = ResidualKMeans(ResidualKMeansConfig((128, 128, 128))).fit(vectors)
    report = sid_quality(ids_of(quantizer.encode(vectors), (128, 128, 128)), vectors, quantizer)
    assert report.items == 3459 and report.warnings == []
    assert report.icr > 0.5 and report.lost_rate < 0.3 and report.relative_error < 0.25
    assert report.neighbour_overlap > 0.45 and report.shared_levels_neighbours > 0.8 > 0.1 > report.shared_levels_random
    assert all(level.utilisation > 0.95 and level.normalized_entropy > 0.7 for level in report.levels)
    published = SemanticIds.from_index_json(real_data / "amazon_office" / "Office_Products.index.json")
    theirs = sid_quality(published, vectors)
    assert theirs.icr > 0.98 and len(theirs.warnings) == 1
    assert "Only 88 of the 256 codes of level 'a' are in use" in theirs.warnings[0]

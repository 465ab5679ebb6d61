"""New items under frozen codebooks: equal to encoding all at once, old SIDs untouched; the drift report against sets and scipy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lm_stand_ins import LEVEL_SIZES, TITLES, tiny_model, tiny_tokenizer
from scipy.spatial.distance import jensenshannon

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.beam_search import sid_beam_search
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from sidtune.tokenizers.sids.catalogue_updates import (
    DriftLimits,
    check_same_encoder,
    extend_catalogue,
    held_out_error,
    measure_drift,
)
from sidtune.tokenizers.sids.collisions import CapacityAware, Expand, NextNearest, NextNearestConfig, Suffix
from sidtune.tokenizers.sids.quality import sid_quality
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import extend_vocabulary

SIZES = (6, 4, 4)


def catalogue(items: int = 200, later: int = 60, seed: int = 0, shift: float = 0.0):
    """Learned semantic IDs, and vectors of items that come later (moved by `shift` standard deviations)."""
    draw = np.random.default_rng(seed)
    vectors = draw.normal(size=(items, 6)).astype(np.float32)
    quantizer = ResidualKMeans(ResidualKMeansConfig(SIZES, iterations=8)).fit(vectors)
    sids = SemanticIds([f"old {n}" for n in range(items)], quantizer.encode(vectors), SIZES, draw.integers(0, 5, items))
    return sids, vectors, quantizer, (draw.normal(size=(later, 6)) + shift).astype(np.float32)


def names(later: np.ndarray) -> list[str]:
    return [f"new {n}" for n in range(len(later))]


def test_the_appended_map_is_the_map_made_at_once_by_the_frozen_codebooks(tmp_path):
    sids, vectors, quantizer, later = catalogue()
    quantizer.save_pretrained(tmp_path / "q")
    frozen = ResidualKMeans.from_pretrained(tmp_path / "q")
    popularity = np.arange(60.0)
    made = extend_catalogue(sids, frozen, names(later), later, popularity)
    whole = SemanticIds(
        [*sids.item_ids, *names(later)],
        quantizer.encode(np.concatenate([vectors, later])),
        SIZES,
        np.concatenate([sids.popularity, popularity]),
    )
    half = extend_catalogue(sids, frozen, names(later)[:30], later[:30], popularity[:30])
    twice = extend_catalogue(half, frozen, names(later)[30:], later[30:], popularity[30:])
    for other in (whole, twice):
        assert made.item_ids == other.item_ids and made.level_sizes == other.level_sizes
        for ours, theirs in zip(made.paths(), other.paths(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "method", [Expand(), Suffix(), NextNearest(), NextNearest(NextNearestConfig(2)), CapacityAware()]
)
def test_old_items_keep_their_sids_whatever_becomes_of_the_new(method):
    sids, vectors, quantizer, later = catalogue()
    start = method.resolve(sids, vectors, quantizer)
    if start.suffix_level:
        start = sids.with_suffix(100)
    made = extend_catalogue(start, quantizer, names(later), later, None, method)
    np.testing.assert_array_equal(made.codes[:200], start.codes)
    np.testing.assert_array_equal(made.popularity[:200], start.popularity)
    assert made.tokens() == start.tokens() and made.item_ids[:200] == start.item_ids
    assert made.collisions().largest_group <= {"expand": 99, "suffix": 1}.get(method.name, 7)
    if method.name in ("next_nearest", "capacity"):
        # 260 items in 24 prefixes of 4 codes: what is added stays as even as the frozen part allows.
        for prefix in np.unique(made.codes[:, :-1], axis=0):
            inside = (made.codes[:, :-1] == prefix).all(axis=1)
            old, now = (
                np.bincount(part[:, -1], minlength=4) for part in (made.codes[:200][inside[:200]], made.codes[inside])
            )
            room = method.config.capacity
            while np.maximum(room - old, 0).sum() < inside[200:].sum():
                room += 1
            assert (now <= np.maximum(old, room)).all()


def test_what_cannot_be_added_is_refused():
    sids, _, quantizer, later = catalogue()
    for ids, vectors, words in [
        ([], later[:0], "no new items to add"),
        (["new", "old 7"], later[:2], "have semantic IDs already .first: 'old 7'"),
        (["new", "new"], later[:2], "'new' occurs more than once"),
        (["new"], later[:2], "2 vectors of new items for 1 items"),
        (["new"], later[:1, :5], "5 dimensions, but the codebooks were trained on 6"),
        (["new"], np.full((1, 6), np.nan), "NaN"),
    ]:
        with pytest.raises(DataError, match=words):
            extend_catalogue(sids, quantizer, ids, vectors)
    with pytest.raises(DataError, match="another run"):
        extend_catalogue(SemanticIds(["a"], np.zeros((1, 2), int), (6, 4)), quantizer, ["b"], later[:1])
    with pytest.raises(ConfigError, match="a model was trained on"):
        extend_catalogue(sids, quantizer, names(later), later, None, Suffix())
    with pytest.raises(DataError, match="no free suffix left"):
        extend_catalogue(sids.with_suffix(), quantizer, names(later), np.tile(later[:1], (60, 1)))


def test_another_encoder_is_noticed_and_edited_texts_are_not_one():
    draw = np.random.default_rng(0)
    stored = draw.normal(size=(40, 8)).astype(np.float32)
    check_same_encoder(stored, stored + 1e-4)
    edited = stored.copy()
    edited[:20] = draw.normal(size=(20, 8))
    check_same_encoder(stored, edited)
    check_same_encoder(stored[:0], stored[:0])
    with pytest.raises(DataError, match="40 of 40 items .* another encoder"):
        check_same_encoder(stored, draw.normal(size=(40, 8)).astype(np.float32))
    with pytest.raises(DataError, match="7 dimensions, the codebooks were trained on 8"):
        check_same_encoder(stored, stored[:, :7])


def drift_of(shift: float = 0.0, items: int = 2000, later: int = 500, **options):
    sids, vectors, quantizer, new = catalogue(items, later, shift=shift)
    made = extend_catalogue(sids, quantizer, names(new), new)
    added = np.arange(len(made)) >= items
    everything = np.concatenate([vectors, new])
    held_out = held_out_error(quantizer, vectors)
    return (
        measure_drift(made, added, None, everything, quantizer, held_out, **options),
        made,
        added,
        everything,
        quantizer,
    )


def test_the_report_counts_what_sets_and_the_quality_report_count():
    drift, made, added, vectors, quantizer = drift_of(shift=0.7, items=90, later=30)
    for part, rows in ((drift.learned, ~added), (drift.added, added), (drift.now, added | True)):
        alone = SemanticIds([f"{n}" for n in range(rows.sum())], made.codes[rows], SIZES)
        quality = sid_quality(alone, vectors[rows], quantizer)
        for name in ("items", "codes", "icr", "lost_rate", "largest_group", "mse"):
            assert getattr(part, name) == pytest.approx(getattr(quality, name)), name
        assert part.cur == pytest.approx([level.cur for level in quality.levels])
        assert part.entropy_bits == pytest.approx([level.entropy_bits for level in quality.levels])
    assert drift.learned.relative_error == pytest.approx(sid_quality(
        SemanticIds([f"{n}" for n in range(90)], made.codes[~added], SIZES), vectors[~added], quantizer
    ).relative_error)  # fmt: skip
    assert drift.now.relative_error == pytest.approx(
        (90 * drift.learned.relative_error + 30 * drift.added.relative_error) / 120
    )
    learned, new = made.codes[~added], made.codes[added]
    known = set(map(tuple, learned.tolist()))
    assert drift.on_learned_codes == pytest.approx(np.mean([tuple(code) in known for code in new.tolist()]))
    for level, size in enumerate(SIZES):
        counts = [np.bincount(part[:, level], minlength=size) for part in (learned, new)]
        assert drift.divergence_bits[level] == pytest.approx(jensenshannon(*counts, base=2) ** 2, abs=1e-12)
    assert (drift.new_items, drift.added_share, drift.reference) == (30, pytest.approx(1 / 3), "held_out")
    assert drift.error_ratio == pytest.approx(drift.added.mse / drift.held_out_mse)
    table = drift.to_markdown()
    assert "| items | 90 | 30 | 120 |" in table and "| error over that of unseen items |" in table
    assert "\n- " in table and drift.to_dict()["now"]["items"] == 120


def test_tokens_no_learned_item_used_are_named():
    codes = np.array([[0, 0], [0, 1], [1, 1], [2, 1], [2, 2], [1, 1]])
    sids = SemanticIds(list("abcdef"), codes, (4, 4))
    drift = measure_drift(sids, np.arange(6) >= 3)
    assert drift.cold_tokens == ["<a_2>", "<b_2>"] and drift.cold_token_count == 2
    assert drift.cold_share == pytest.approx(2 / 3) and drift.on_learned_codes == pytest.approx(1 / 3)
    assert drift.error_ratio is None and drift.reference is None and drift.learned.mse is None
    assert any("first: <a_2>" in sentence and "never trained" in sentence for sentence in drift.recommendation)


def test_levels_that_share_a_letter_have_names_of_their_own_in_the_table():
    sids = SemanticIds(list("abcd"), np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]]), (2, 2, 2), letters="abb")
    table = measure_drift(sids, np.arange(4) >= 2).to_markdown()
    assert [table.count(f"CUR of prefix {name} |") for name in ("a", "b1", "b2", "c")] == [1, 1, 1, 0]


def test_the_held_out_error_is_that_of_codebooks_that_did_not_see_the_items():
    _, vectors, quantizer, _ = catalogue()
    order = np.random.default_rng(3).permutation(200)
    rest, seen = vectors[np.sort(order[:50])], vectors[np.sort(order[50:])]
    other = ResidualKMeans(ResidualKMeansConfig(SIZES, iterations=8)).fit(seen)
    expected = ((rest - other.decode(other.encode(rest))) ** 2).mean()
    before = copy.deepcopy(quantizer.codebooks)
    assert held_out_error(quantizer, vectors, 0.25, seed=3) == pytest.approx(expected, rel=1e-6)
    assert expected > ((vectors - quantizer.decode(quantizer.encode(vectors))) ** 2).mean()
    for ours, theirs in zip(before, quantizer.codebooks, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        held_out_error(quantizer, vectors, 1.0)
    with pytest.raises(DataError, match="at least two"):
        held_out_error(quantizer, vectors[:1])


def test_the_recommendation_follows_its_limits():
    same, far = drift_of()[0], drift_of(shift=2.0)[0]
    assert not same.retrain and same.error_ratio == pytest.approx(1, abs=0.08)
    assert same.recommendation == ["Keep the codebooks: no limit of the drift rule is passed."]
    assert far.retrain and far.error_ratio > 1.5 and "have not seen either (limit 1.25)" in far.recommendation[0]

    sids, vectors, quantizer, later = catalogue(300, 300)
    made = extend_catalogue(sids, quantizer, names(later), later)
    added, everything = np.arange(600) >= 300, np.concatenate([vectors, later])
    grown = measure_drift(made, added, limits=DriftLimits(max_icr_drop=1))
    assert grown.retrain and "300 items were added to the 300" in grown.recommendation[0]
    crowded = measure_drift(made, added, limits=DriftLimits(max_added_share=2, max_icr_drop=0.001))
    assert crowded.retrain and "fell from" in crowded.recommendation[0] and len(crowded.recommendation) == 1
    wide = DriftLimits(max_added_share=2, max_icr_drop=1)
    in_sample = measure_drift(made, added, None, everything, quantizer, limits=wide)
    assert in_sample.reference == "learned" and in_sample.error_ratio > 1 and not in_sample.retrain
    strict = DriftLimits(max_added_share=2, max_icr_drop=1, max_in_sample_ratio=1)
    assert measure_drift(made, added, None, everything, quantizer, limits=strict).retrain
    moved = NextNearest().resolve(made, later, quantizer, fixed=300)
    assert measure_drift(moved, added, None, everything, quantizer, limits=wide).error_ratio == in_sample.error_ratio


def test_the_report_refuses_what_does_not_fit():
    sids, vectors, quantizer, _ = catalogue()
    for added in (np.zeros(200, bool), np.ones(200, bool), np.zeros(199, bool), np.arange(200)):
        with pytest.raises(DataError, match="learned and added items among them"):
            measure_drift(sids, added)
    with pytest.raises(DataError, match="199 item vectors for 200 items"):
        measure_drift(sids, np.arange(200) > 100, None, vectors[1:], quantizer)
    with pytest.raises(ConfigError, match="max_icr_drop"):
        DriftLimits(max_icr_drop=-0.1)


def test_a_trained_model_scores_old_sids_as_before():
    draw = np.random.default_rng(1)
    codes = np.stack([draw.integers(0, size, 10) for size in LEVEL_SIZES], axis=1)
    sids = SemanticIds([f"old {n}" for n in range(10)], codes, LEVEL_SIZES)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    vocabulary = extend_vocabulary(model, tokenizer, sids, init="mean")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    later = np.stack([draw.integers(0, size, 8) for size in LEVEL_SIZES], axis=1)
    made = sids.extended([f"new {n}" for n in range(8)], later)
    vocabulary.check(tokenizer, made)
    before, after = SidTrie.from_semantic_ids(sids), SidTrie.from_semantic_ids(made)
    assert after.num_leaves > before.num_leaves
    ids = tokenizer(TITLES[:1], return_tensors="pt")["input_ids"]

    def scores(trie: SidTrie) -> dict[tuple[int, ...], float]:
        options = {"trie": trie, "sid_token_ids": vocabulary.sid_token_ids, "num_beams": trie.num_leaves}
        beams = sid_beam_search(model, ids, renormalize=False, **options)
        leaves = beams.leaves[0][beams.leaves[0] >= 0]
        return dict(zip(map(tuple, trie.leaf_codes(leaves).tolist()), beams.scores[0].tolist(), strict=False))

    old, new = scores(before), scores(after)
    assert len(old) == before.num_leaves and len(new) == after.num_leaves
    for code, value in old.items():
        assert new[code] == pytest.approx(value, abs=1e-5)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

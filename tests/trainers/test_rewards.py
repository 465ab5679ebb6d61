"""Rewards against slow second implementations, their invariances, and what a wrong config says."""

import itertools
import math

import numpy as np
import pytest

from sidtune.core.errors import ConfigError, DataError
from sidtune.trainers.rewards.batch import RewardBatch, Targets, build_rewards
from sidtune.trainers.rewards.lists import best_gains, list_gains
from sidtune.trainers.rewards.registry import REWARDS

CODES = np.array(
    [c for c in itertools.product(range(3), range(2), range(3)) if c not in ((0, 1, 2), (2, 0, 0), (2, 0, 1))], np.int32
)
LEAVES = len(CODES)


def batch(lists, targets, gains=None, codes=CODES, **fields):
    lists = np.asarray(lists, np.int64)
    lists = lists[:, None] if lists.ndim == 1 else lists
    fields.setdefault("scores", np.tile(-np.arange(1.0, lists.shape[1] + 1), (len(lists), 1)).astype(np.float32))
    return RewardBatch(lists=lists, targets=Targets.from_lists(targets, gains), leaf_codes=codes, **fields)


def random_batch(seed, rows=60, places=5, gains=(0.0, 0.5, 1.0, 2.0), **fields):
    rng = np.random.default_rng(seed)
    lists = np.stack([rng.choice(LEAVES, places, replace=False) for _ in range(rows)])
    lists[rng.random(lists.shape) < 0.15] = -1
    again = rng.random(rows) < 0.3
    lists[again, -1] = lists[again, 0]
    targets = [rng.integers(0, LEAVES, rng.integers(0, 4)).tolist() for _ in range(rows)]
    worth = [rng.choice(gains, len(t)).tolist() for t in targets]
    scores = np.sort(rng.normal(size=lists.shape).astype(np.float32))[:, ::-1].copy()
    return batch(lists, targets, worth, scores=scores, **fields)


def slow_gain(leaf, row_targets, row_gains, gammas):
    table = [0.0, *gammas, 1.0]
    best = 0.0
    for target, gain in zip(row_targets, row_gains, strict=True):
        shared = 0
        while shared < CODES.shape[1] and CODES[leaf][shared] == CODES[target][shared]:
            shared += 1
        best = max(best, gain * table[shared])
    return best


def rows_of(data):
    for r in range(len(data)):
        part = slice(data.targets.offsets[r], data.targets.offsets[r + 1])
        yield r, data.lists[r].tolist(), data.targets.leaves[part].tolist(), data.targets.gains[part].tolist()


@pytest.mark.parametrize("gammas", [(0.0, 0.0), (0.0, 0.4), (0.2, 0.2), (0.1, 0.6)])
@pytest.mark.parametrize("k", [None, 2, 8])
def test_list_ndcg_equals_a_plain_loop_over_the_whole_catalogue(gammas, k):
    data = random_batch(1)
    got = build_rewards({"list_ndcg": {"k": k, "gammas": list(gammas)}}, depth=3)(data)[:, 0]
    scored = 0
    for r, ranked, targets, gains in rows_of(data):
        if not any(g > 0 for g in gains):
            assert math.isnan(got[r])
            continue
        places = k or len(ranked)
        seen, total = set(), 0.0
        for place, leaf in enumerate(ranked[:places]):
            if leaf >= 0 and leaf not in seen:
                total += slow_gain(leaf, targets, gains, gammas) / math.log2(place + 2)
            seen.add(leaf)
        ideal = sorted((slow_gain(leaf, targets, gains, gammas) for leaf in range(LEAVES)), reverse=True)[:places]
        best = sum(g / math.log2(place + 2) for place, g in enumerate(ideal))
        assert got[r] == pytest.approx(total / best, abs=1e-12)
        scored += 1
    assert scored > 30


def test_the_best_list_reaches_one_and_is_never_beaten():
    data = random_batch(2, gains=(0.5, 1.0, 2.0))
    gammas = [0.1, 0.5]
    everything = batch(
        np.tile(np.arange(LEAVES), (len(data), 1)), [t for _, _, t, _ in rows_of(data)], [g for *_, g in rows_of(data)]
    )
    gains = list_gains(everything, gammas)
    np.testing.assert_allclose(best_gains(data, 6, gammas), -np.sort(-gains, axis=1)[:, :6])
    ideal = np.argsort(-gains, axis=1, kind="stable")[:, :5]
    best = batch(ideal, [t for _, _, t, _ in rows_of(data)], [g for *_, g in rows_of(data)])
    values = build_rewards({"list_ndcg": {"gammas": gammas}})(best)[:, 0]
    np.testing.assert_allclose(values[~np.isnan(values)], 1.0)
    assert np.nanmax(build_rewards({"list_ndcg": {"gammas": gammas}})(data)) <= 1 + 1e-12


def test_rank_reward_depends_on_the_rank_of_a_single_positive_only():
    reward = build_rewards({"list_ndcg": None})
    rng = np.random.default_rng(0)
    values = []
    for rank in range(6):
        others = rng.permutation(np.setdiff1d(np.arange(LEAVES), [7]))[:5]
        below = rng.permutation(others[rank:])
        first = np.insert(others, rank, 7)
        second = np.concatenate([others[:rank], [7], below])
        value = reward(batch(np.stack([first, second]), [[7], [7]]))[:, 0]
        assert value[0] == value[1] == pytest.approx(1 / math.log2(rank + 2))
        values.append(value[0])
    assert values[0] == 1.0 and all(a > b for a, b in itertools.pairwise(values))
    assert reward(batch([[0, 1, 2]], [[7]]))[0, 0] == 0.0
    # All-wrong by the top place, yet ordered by the list: what top-1 cannot see.
    data = batch([[1, 7, 2, 3], [1, 2, 7, 3], [1, 2, 3, 7]], [[7]] * 3)
    assert (build_rewards({"hit": None})(data) == 0).all()
    assert (np.diff(reward(data)[:, 0]) < 0).all()


def test_a_repeated_leaf_counts_once():
    for name in ("list_ndcg", "list_dcg"):
        reward = build_rewards({name: None})
        once, twice = batch([[1, 7, -1]], [[7, 8]]), batch([[1, 7, 7]], [[7, 8]])
        assert reward(once)[0, 0] == pytest.approx(reward(twice)[0, 0], abs=1e-15)
    assert build_rewards({"validity": None})(batch([[1, 7, 7, -1]], [[7]]))[0, 0] == 0.5


def test_rows_without_a_positive_are_unknown_not_zero():
    data = batch([[1, 2], [1, 2], [1, 2]], [[], [1], [2]], [[], [0.0], [1.0]], popularity_of_leaf=np.ones(LEAVES))
    reward = build_rewards(dict.fromkeys(["hit", "list_ndcg", "prefix_match"], 1.0))
    values = reward(data)
    assert np.isnan(values[:2]).all() and not np.isnan(values[2]).any()
    assert np.isnan(reward.total(values)).tolist() == [True, True, False]


def test_weights_add_what_could_be_scored():
    reward = build_rewards({"hit": 2, "validity": {"weight": 0.5}, "wide": {"reward": "hit", "k": 2, "weight": -1.0}})
    values = reward(batch([[1, 2], [3, -1]], [[2], []]))
    assert reward.names == ["hit", "validity", "wide"]
    np.testing.assert_array_equal(values, [[0.0, 1.0, 1.0], [np.nan, 0.5, np.nan]])
    np.testing.assert_allclose(reward.total(values), [0.5 - 1.0, 0.25])


def test_prefix_credit_stops_at_the_first_wrong_code():
    data = random_batch(4)
    weights = [2.0, 2.0, 1.0]
    share = build_rewards({"prefix_match": {"weights": weights}}, depth=3)(data)[:, 0]
    for r, ranked, targets, gains in rows_of(data):
        wanted = [t for t, g in zip(targets, gains, strict=True) if g > 0]
        mine = CODES[ranked[0]] if ranked[0] >= 0 else [-1] * 3
        right = [any(list(CODES[t][:n]) == list(mine[:n]) for t in wanted) for n in (1, 2, 3)]
        assert share[r] == pytest.approx(np.dot(right, weights) / 5.0 if wanted else math.nan, nan_ok=True)
    # A first code that is wrong opens nothing, as in the spec.
    leaf, target = (int(np.flatnonzero((c == CODES).all(axis=1))[0]) for c in ([0, 0, 1], [1, 0, 1]))
    assert build_rewards({"prefix_match": 1.0})(batch([leaf], [[target]])).tolist() == [[0.0]]


def test_popularity_correction():
    counts = np.arange(LEAVES) * 10.0
    share = (counts + 1) / (counts.sum() + LEAVES)
    penalty = build_rewards({"popularity_penalty": None})(batch([1, 8, -1], [[1]] * 3, popularity_of_leaf=counts))[:, 0]
    np.testing.assert_allclose(penalty[:2], -np.log(LEAVES * share[[1, 8]]))
    assert penalty[0] > penalty[1] and math.isnan(penalty[2])


def test_reasoning_rewards():
    data = batch(
        [[1], [1], [-1], [1], [1]],
        [[1]] * 5,
        closed=np.array([True, False, True, True, True]),
        reasoning_lengths=np.array([4, 8, 16, 24, 40]),
    )
    assert build_rewards({"format": None})(data)[:, 0].tolist() == [1, 0, 0, 1, 1]
    length = build_rewards({"reasoning_length": {"shortest": 8, "longest": 16}})(data)[:, 0]
    assert length.tolist() == [0.5, 0, 1, 0.5, 0]  # the second was cut: its length is not the model's
    for name in ("format", "reasoning_length"):
        with pytest.raises(ConfigError, match="reasoning"):
            build_rewards({name: None})(batch([1], [[1]]))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "at least one reward"),
        ({"list_ndgc": 1}, "did you mean 'list_ndcg'"),
        ({"mine": {"reward": "hitt"}}, "did you mean 'hit'"),
        ({"hit": {"weigth": 1}}, "did you mean 'weight'"),
        ({"hit": {"k": "ten"}}, "must be an integer or null"),
        ({"hit": {"k": 0}}, "k must be at least 1"),
        ({"hit": {"weight": float("nan")}}, "finite"),
        ({"hit": [1]}, "mapping of options"),
        ({"list_ndcg": {"gammas": [0.1]}}, "must hold 2 numbers"),
        ({"list_ndcg": {"gammas": [0.5, 0.1]}}, "not fall"),
        ({"prefix_match": {"weights": [1.0, -1.0, 1.0]}}, "at least 0"),
        ({"reasoning_length": {"shortest": 9, "longest": 3}}, "shortest"),
    ],
)
def test_a_wrong_config_says_so_before_any_work(config, words):
    with pytest.raises(ConfigError, match=words):
        build_rewards(config, depth=3)


def test_a_batch_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match="outside"):
        batch([[LEAVES]], [[0]])
    with pytest.raises(DataError, match="outside"):
        batch([[0]], [[LEAVES]])
    with pytest.raises(DataError, match="'closed' must|closed has 2"):
        batch([[0]], [[0]], closed=np.array([True, False]))
    with pytest.raises(DataError, match="lexicographic"):
        batch([[0]], [[0]], codes=CODES[::-1].copy())
    with pytest.raises(DataError, match="negative"):
        Targets.from_lists([[1]], [[-1.0]])
    with pytest.raises(DataError, match="offsets"):
        Targets.make([0, 3], [1])


def test_targets_of_repeated_prompts():
    targets = Targets.from_lists([[3], [], [1, 2]], [[1.0], [], [0.5, 2.0]])
    taken = targets.take(np.repeat([2, 0, 1], 2))
    assert taken.offsets.tolist() == [0, 2, 4, 5, 6, 6, 6]
    assert taken.leaves.tolist() == [1, 2, 1, 2, 3, 3] and taken.gains.tolist() == [0.5, 2.0, 0.5, 2.0, 1.0, 1.0]


def test_every_registered_reward_takes_defaults():
    fields = {
        "closed": np.array([True]),
        "reasoning_lengths": np.array([9]),
        "popularity_of_leaf": np.ones(LEAVES),
    }
    reward = build_rewards(dict.fromkeys(REWARDS, 1.0), depth=3)
    values = reward(batch([[1, 2, 3]], [[1]], **fields))
    assert values.shape == (1, len(list(REWARDS))) and np.isfinite(values).all()

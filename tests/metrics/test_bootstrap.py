"""Bootstrap against known distributions, against scipy, and against itself by user."""

import numpy as np
import pytest
import scipy.stats

from sidtune.core.errors import ConfigError, DataError
from sidtune.metrics.statistics import bootstrap
from sidtune.metrics.statistics.bootstrap import bootstrap_interval, holm, paired_bootstrap, resampled

pytestmark = pytest.mark.medium


@pytest.mark.parametrize("kind", ["normal", "few values"])
def test_interval_covers_the_true_mean_as_often_as_it_says(kind):
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(300):
        if kind == "normal":
            values, truth = rng.normal(3.0, 2.0, size=60), 3.0
        else:
            values, truth = rng.choice([0.0, 0.5, 1.0], p=[0.6, 0.2, 0.2], size=300), 0.3
        interval = bootstrap_interval(values, level=0.9, samples=400, seed=seed)
        covered += interval.low <= truth <= interval.high
    # 90 % of 300 is 270; four standard deviations of the binomial are 21, and percentile intervals are a little short.
    assert 245 <= covered <= 291


@pytest.mark.parametrize("values", [np.random.default_rng(0).exponential(size=400), np.arange(400) % 7 / 7.0])
def test_interval_is_that_of_scipy_and_of_theory(values):
    ours = bootstrap_interval(values, samples=20_000, seed=1)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2), batch=1000
    ).confidence_interval
    error = values.std() / np.sqrt(len(values))
    assert abs(ours.low - theirs.low) < 0.06 * error and abs(ours.high - theirs.high) < 0.06 * error
    assert ours.high - ours.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert ours.mean == pytest.approx(values.mean()) and ours.requests == ours.clusters == 400


def test_few_and_many_distinct_values_take_different_paths_to_the_same_distribution(monkeypatch):
    values = np.repeat([0.0, 0.3, 1.0], [50, 30, 20])
    quick = bootstrap_interval(values, samples=20_000, seed=1)
    jittered = bootstrap_interval(values + np.linspace(0, 1e-9, 100), samples=20_000, seed=1)
    assert (quick.low, quick.high) == (pytest.approx(jittered.low, abs=0.005), pytest.approx(jittered.high, abs=0.005))


def test_seed_decides_and_block_size_does_not_change_the_estimate(monkeypatch):
    values = np.random.default_rng(3).random(500)
    one = bootstrap_interval(values, seed=7)
    assert one == bootstrap_interval(values, seed=7) != bootstrap_interval(values, seed=8)
    monkeypatch.setattr(bootstrap, "_BLOCK", 1000)
    small = bootstrap_interval(values, seed=7)
    assert (small.low, small.high) == (one.low, one.high)


def test_clusters_of_one_row_change_nothing():
    rng = np.random.default_rng(4)
    values, other = rng.random(120), rng.random(120)
    labels = [f"u{n}" for n in rng.permutation(120)]
    assert bootstrap_interval(values, clusters=labels) == bootstrap_interval(values)
    assert bootstrap_interval(values, clusters=[None] * 120) == bootstrap_interval(values)
    assert bootstrap_interval(values, clusters=np.array(labels)) == bootstrap_interval(values)
    assert paired_bootstrap(values, other, clusters=labels) == paired_bootstrap(values, other)


def test_clusters_widen_the_interval_of_alike_requests_by_the_design_effect():
    rng = np.random.default_rng(6)
    users, each = 150, 9
    values = np.repeat(rng.random(users), each)
    labels = np.repeat([f"u{n}" for n in range(users)], each)
    plain = bootstrap_interval(values, samples=4000)
    clustered = bootstrap_interval(values, samples=4000, clusters=labels.tolist())
    assert clustered.clusters == users and clustered.requests == users * each
    # Nine copies of each user carry the information of one: the width grows by sqrt(9).
    assert (clustered.high - clustered.low) / (plain.high - plain.low) == pytest.approx(3.0, rel=0.1)


def test_clusters_of_uneven_size_resample_a_ratio():
    rng = np.random.default_rng(9)
    sizes = rng.integers(1, 6, size=80)
    labels = np.repeat(np.arange(80), sizes)
    values = rng.random(80)[labels] + rng.random(len(labels))
    ours = bootstrap_interval(values, samples=4000, seed=2, clusters=labels)
    draws = np.random.default_rng(10).integers(0, 80, size=(4000, 80))
    sums = np.array([values[labels == c].sum() for c in range(80)])
    slow = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    width = ours.high - ours.low
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(np.quantile(slow, 0.025), abs=0.06 * width)
    assert ours.high == pytest.approx(np.quantile(slow, 0.975), abs=0.06 * width)


def users_with_requests(rng, users, spread):
    """(n,) values and labels: as many requests as chance gives each user, alike within a user; the true mean is 0.2."""
    sizes, level = rng.geometric(1 / 8, users), rng.beta(0.6 / spread, 2.4 / spread, users)
    labels = np.repeat(np.arange(users), sizes)
    return (rng.random(len(labels)) < level[labels]).astype(float), labels


@pytest.mark.parametrize("users", [20, 60])
def test_few_users_are_covered_as_often_as_many(users):
    rng, covered, rejected = np.random.default_rng(1), 0, 0
    for seed in range(600):
        values, labels = users_with_requests(rng, users, 1.0)
        interval = bootstrap_interval(values, samples=300, seed=seed, clusters=labels)
        covered += interval.low <= 0.2 <= interval.high
        change = rng.normal(size=users)[labels] * (rng.random(len(labels)) < 0.4)
        rejected += paired_bootstrap(change, 0 * change, samples=300, seed=seed, clusters=labels).p_value <= 0.05
    assert 0.93 <= covered / 600 <= 0.97 and rejected / 600 <= 0.065


def test_the_chance_of_the_training_is_in_a_difference_of_trainings():
    """Two systems that are as good as each other; each of three trainings moves all users together."""
    rng, users_only, with_trainings = np.random.default_rng(2), 0, 0
    for seed in range(200):
        moved = rng.normal(scale=0.05, size=(3, 1)) + rng.normal(scale=0.2, size=(3, 400))
        a, b = moved.mean(axis=0), np.zeros(400)
        users_only += paired_bootstrap(a, b, samples=200, seed=seed).p_value <= 0.05
        found = paired_bootstrap(a, b, samples=200, seed=seed, seeds=moved.mean(axis=1).tolist())
        with_trainings += found.p_value <= 0.05
        assert found.seeds == 3 and found.low < found.difference < found.high
    assert users_only / 200 > 0.5 and with_trainings / 200 <= 0.08


def test_what_is_resampled_is_said():
    assert resampled(["a", "b", "a", None], 4) == "3 users"
    assert resampled([None, None], 2) == resampled(None, 2) == "2 requests"


def test_identical_runs_have_no_difference():
    values = np.random.default_rng(1).random(50)
    result = paired_bootstrap(values, values)
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_p_is_uniform_without_a_difference_and_small_with_one():
    rng = np.random.default_rng(12)
    p_values = []
    for seed in range(300):
        base = rng.normal(size=80)
        a, b = base + rng.normal(size=80), base + rng.normal(size=80)
        p_values.append(paired_bootstrap(a, b, samples=400, seed=seed).p_value)
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-3
    a = rng.normal(size=200)
    better = paired_bootstrap(a + 0.3 + 0.1 * rng.normal(size=200), a)
    assert better.p_value == pytest.approx(1 / 1001) and 0.27 < better.low < better.difference < better.high < 0.33
    # A small true difference is found because the requests are paired, and the sign follows the order.
    worse = paired_bootstrap(a, a + 0.3 + 0.1 * rng.normal(size=200))
    assert worse.difference < 0 and worse.high < 0


def test_p_agrees_with_the_t_test():
    rng = np.random.default_rng(13)
    a, b = rng.random(300), rng.random(300)
    b[:] = b + (a.mean() - b.mean()) - 0.04
    ours = paired_bootstrap(a, b, samples=20_000).p_value
    assert ours == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, abs=0.01)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []
    with pytest.raises(DataError, match="between 0 and 1"):
        holm([1.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([1.0]), "at least two values"),
        (lambda: bootstrap_interval([1.0, 2.0], clusters=["u", "u"]), "at least two clusters"),
        (lambda: bootstrap_interval([1.0, 2.0], clusters=["u"]), "2 values but 1 cluster labels"),
        (lambda: bootstrap_interval([1.0, np.nan]), "1 values that are not finite"),
        (lambda: bootstrap_interval([[1.0], [2.0]]), "shape"),
        (lambda: bootstrap_interval([1.0, 2.0], level=95), "between 0 and 1"),
        (lambda: bootstrap_interval([1.0, 2.0], samples=10), "at least 100"),
        (lambda: paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0]), "2 and 3 values"),
        (lambda: paired_bootstrap("a", [1.0]), "list of numbers, got 'a' as the first system"),
        (lambda: bootstrap_interval([1.0, 2.0], clusters=5), "Clusters must be a list"),
        (lambda: bootstrap_interval([1.0, 2.0], level="x"), "between 0 and 1, got 'x'"),
        (lambda: bootstrap_interval([1.0, 2.0], seed="x"), "whole number from 0, got 'x'"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises((DataError, ConfigError), match=message):
        call()

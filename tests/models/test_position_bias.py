"""Examination curves against known truths, second implementations and simulation; null feedback stays unknown."""

import numpy as np
import pytest
from scipy.optimize import minimize

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.shop_world.world import ShopWorld, ShopWorldConfig
from sidtune.data_builders.tables.schema import table_from_rows
from sidtune.models.position_bias.interventions import (
    Cells,
    PositionBias,
    PositionLog,
    components,
    estimate_by_interventions,
    situations,
)

pytestmark = pytest.mark.medium

THETA = np.array([1.0, 0.7, 0.5, 0.4, 0.25])


def simulated(seed, n=6000, groups=40, sorted_share=0.5, theta=THETA, a=None):
    """A ranker that prefers attractive groups for higher places, half of the time."""
    rng = np.random.default_rng(seed)
    a = rng.beta(1.5, 4, groups) if a is None else a
    shown = np.stack([rng.choice(groups, len(theta), replace=False) for _ in range(n // len(theta))])
    ranked = np.take_along_axis(shown, np.argsort(-a[shown], axis=1), axis=1)
    shown = np.where(rng.random((len(shown), 1)) < sorted_share, ranked, shown)
    place = np.tile(np.arange(len(theta)), (len(shown), 1))
    click = rng.random(shown.shape) < theta[place] * a[shown]
    cluster = np.repeat(np.arange(len(shown)), len(theta))
    return PositionLog.make(place.ravel(), click.ravel(), shown.ravel(), cluster)


def counted(log):
    groups, places = int(log.group.max()) + 1, len(log.positions)
    key = log.group * places + log.place
    shape = (groups, places)
    return (np.bincount(key, w, groups * places).reshape(shape) for w in (np.ones(len(log)), log.click))


@pytest.mark.parametrize("seed", [0, 1])
def test_interventions_maximise_the_profile_likelihood(seed):
    log = simulated(seed, n=1500, groups=25)
    shown, clicked = counted(log)

    def loss(x):
        theta = np.exp(np.concatenate([[0.0], x]))
        mass = shown @ theta
        return -(clicked.sum(0) @ np.log(theta)) + clicked.sum(1) @ np.log(np.where(mass > 0, mass, 1.0))

    best = minimize(loss, np.zeros(len(THETA) - 1), method="BFGS", options={"gtol": 1e-9})
    theta = np.exp(np.concatenate([[0.0], best.x]))
    np.testing.assert_allclose(estimate_by_interventions(log).examination, theta / theta.max(), atol=1e-5)


def test_interventions_are_exact_on_expected_counts():
    """Every group shown at every pair of places so often that its clicks are whole numbers: no noise, no error."""
    a = np.array([0.1, 0.4, 0.8])
    theta = np.array([1.0, 0.5, 0.25])
    place, click, group = [], [], []
    for g, shown in enumerate([(40, 40, 0), (0, 40, 80), (80, 0, 400)]):
        for k, times in enumerate(shown):
            ones = round(times * theta[k] * a[g])
            assert ones == pytest.approx(times * theta[k] * a[g])
            place += [k] * times
            group += [g] * times
            click += [1] * ones + [0] * (times - ones)
    np.testing.assert_allclose(
        estimate_by_interventions(PositionLog.make(place, click, group)).examination, theta, atol=1e-7
    )


def test_groups_that_say_nothing_change_nothing():
    log = simulated(3)
    base = estimate_by_interventions(log).examination
    rng = np.random.default_rng(0)
    for place, click in ((np.full(500, 4), np.ones(500)), (rng.integers(0, 5, 500), np.zeros(500))):
        group = np.concatenate([log.group, np.full(500, 10_000)])
        more = PositionLog.make(np.concatenate([log.place, place]), np.concatenate([log.click, click]), group)
        np.testing.assert_allclose(estimate_by_interventions(more).examination, base, atol=1e-6)


def test_naive_rates_are_wrong_where_the_estimates_are_right():
    log = simulated(0, n=400_000, sorted_share=0.9)
    shown, clicked = counted(log)
    naive = clicked.sum(0) / shown.sum(0)
    assert np.abs(naive / naive.max() - THETA).max() > 0.1
    np.testing.assert_allclose(estimate_by_interventions(log).examination, THETA, atol=0.02)


def test_unlinked_positions_are_named():
    place, group = [0, 1, 0, 1, 2, 3, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3]
    log = PositionLog.make(place, [1, 0, 0, 1, 1, 1, 0, 0], group)
    assert components(Cells.of(log)[0]).tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match=r"\[\[0, 1\], \[2, 3\]\]"):
        estimate_by_interventions(log)
    # A group without a click links nothing: it says 0 = 0.
    log = PositionLog.make([*place, 1, 2], [1, 0, 0, 1, 1, 1, 0, 0, 0, 0], [*group, 9, 9])
    assert components(Cells.of(log)[0]).tolist() == [0, 0, 1, 1]
    log = PositionLog.make([*place, 1, 2], [1, 0, 0, 1, 1, 1, 0, 0, 1, 0], [*group, 9, 9])
    assert components(Cells.of(log)[0]).tolist() == [0, 0, 0, 0]
    with pytest.raises(DataError, match="no click"):
        estimate_by_interventions(PositionLog.make([0, 1], [0, 0], [0, 0]))


def test_standard_errors_are_those_of_repeated_logs():
    a = np.random.default_rng(9).beta(1.5, 4, 40)
    spread = np.std([estimate_by_interventions(simulated(s, a=a)).examination for s in range(100)], axis=0, ddof=1)
    told = np.mean([estimate_by_interventions(simulated(s, a=a), samples=60).standard_error for s in range(4)], axis=0)
    np.testing.assert_allclose(told[1:], spread[1:], rtol=0.3)
    assert np.isnan(estimate_by_interventions(simulated(0)).standard_error).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_examination_of_the_shop_is_recovered(seed):
    world = ShopWorld(ShopWorldConfig(seed=seed))
    log = PositionLog.of_requests(world.to_tables().requests)
    found = estimate_by_interventions(log, samples=20)
    error = np.abs(found.examination - world.examination)
    naive = np.bincount(log.place, log.click) / np.bincount(log.place)
    assert np.abs(naive / naive.max() - world.examination).max() > 0.2
    assert error.max() < 0.15 and error.mean() < 0.04
    assert (error[1:] < 4 * found.standard_error[1:] + 0.01).all()


def test_a_shuffled_page_needs_no_groups():
    world = ShopWorld(ShopWorldConfig(n_requests=20_000, ranked_tiers=1, exploration_slots=0, examination_decay=0.8))
    found = estimate_by_interventions(PositionLog.of_requests(world.to_tables().requests, group="page"))
    np.testing.assert_allclose(found.examination, world.examination, atol=0.06)


def test_unknown_feedback_and_positions_are_left_out():
    def candidate(item, position, click):
        return {"item_id": item, "position": position, "click": click}

    rows = [
        {"query": "lamp", "candidates": [candidate("a", 1, 1), candidate("b", 2, None), candidate("c", None, 1)]},
        {"query": None, "context": [{"name": "page", "value": "home"}], "candidates": [candidate("a", 2, 0)]},
        {"query": None, "context": [{"name": "page", "value": "sale"}], "candidates": [candidate("a", 2, 1)]},
        {"query": "lamp", "context": [{"name": "page", "value": "x"}], "candidates": [candidate("a", 2, 0)]},
        {"query": "home", "candidates": []},
    ]
    rows = [{"request_id": str(n), "user_id": "u", "time": n, **row} for n, row in enumerate(rows)]
    requests = table_from_rows("requests", rows)
    log = PositionLog.of_requests(requests)
    assert log.positions[log.place].tolist() == [1, 2, 2, 2] and log.click.tolist() == [1, 0, 1, 0]
    assert log.group[0] == log.group[3] and len(set(log.group.tolist())) == 3
    told = situations(requests).tolist()
    assert told[0] == told[3] and len(set(told)) == 4
    with pytest.raises(DataError, match="'like'"):
        PositionLog.of_requests(requests, label="like")
    with pytest.raises(ConfigError, match="query_item"):
        PositionLog.of_requests(requests, group="item")
    with pytest.raises(DataError, match="0 or 1"):
        PositionLog.make([0], [2], [0])


def test_propensities_have_a_floor_and_a_nearest_position(tmp_path):
    bias = PositionBias(
        np.array([1, 2, 10]), np.array([1.0, 0.5, 0.01]), np.array([np.nan, 0.1, 0.2]), np.array([5, 6, 7]), "em"
    )
    assert bias.propensity([1, 2, 10, 0, 3, 99], floor=0.05).tolist() == [1.0, 0.5, 0.05, 1.0, 0.5, 0.05]
    with pytest.raises(ConfigError, match="floor"):
        bias.propensity([1], floor=0.0)
    bias.save_pretrained(tmp_path)
    again = PositionBias.from_pretrained(tmp_path)
    for name in ("positions", "examination", "standard_error", "impressions"):
        np.testing.assert_array_equal(getattr(again, name), getattr(bias, name))
    one = PositionBias(np.array([3]), np.ones(1), np.full(1, np.nan), np.ones(1, np.int64), "em")
    assert one.propensity([1, 3, 5]).tolist() == [1, 1, 1]
    path = tmp_path / "position_bias.json"
    path.write_text(path.read_text().replace("0.5", "1.5"))
    with pytest.raises(DataError, match="damaged"):
        PositionBias.from_pretrained(tmp_path)

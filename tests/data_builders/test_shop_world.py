"""ShopWorld against its equations: a slow second implementation, Monte-Carlo, bounds from the exact probabilities.

Every statistical bound is a z-score of a fixed seed, so a test never fails by chance once it has passed.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from sidtune.benchmarks import shop_world as slow
from sidtune.data_builders.shop_world import words
from sidtune.data_builders.shop_world.logging_policy import PageLayout, best
from sidtune.data_builders.shop_world.requests import HOURS, kind_weights, pick
from sidtune.data_builders.shop_world.world import ShopWorld, ShopWorldConfig

TINY = {
    "n_items": 150,
    "n_users": 10,
    "n_requests": 240,
    "n_departments": 3,
    "leaves_per_department": 4,
    "brands_per_department": 4,
    "page_size": 8,
    "exploration_slots": 2,
    "exploration_pool": 20,
    "launch_share": 0.3,
    "attribute_only_share": 0.1,
    "brand_query_share": 0.2,
}
SMALL = {**TINY, "n_requests": 20_000, "n_users": 200, "seed": 3}


@pytest.fixture(scope="module")
def tiny() -> ShopWorld:
    return ShopWorld.from_options(**TINY)


@pytest.fixture(scope="module")
def small() -> ShopWorld:
    return ShopWorld.from_options(**SMALL)


@pytest.fixture(scope="module")
def all_rows(small: ShopWorld) -> np.ndarray:
    return np.arange(small.config.n_requests)


def z_scores(observed: np.ndarray, probability: np.ndarray, axis: int | tuple[int, ...] = 0) -> np.ndarray:
    """Standardised difference between counts of independent events and their probabilities."""
    spread = np.sqrt((probability * (1.0 - probability)).sum(axis=axis))
    return (observed.sum(axis=axis) - probability.sum(axis=axis)) / np.maximum(spread, 1e-9)


# ---------------------------------------------------------------- second implementation


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 7, "exploration_slots": 0, "ranked_tiers": 2, "page_size": 7},
        {"seed": 1, "n_departments": 1, "n_items": 90, "recommendation_share": 1.0, "examination_decay": 0.0},
        {"seed": 2, "days": 3, "drift_days": 10, "recommendation_share": 0.0, "late_user_share": 1.0},
    ],
)
def test_equals_the_loop_implementation(changes: dict) -> None:
    world = ShopWorld.from_options(**{**TINY, **changes})
    requests = slow.loop_requests(world)
    log = slow.loop_log(world, requests, world.ranker.order.shape[1])
    assert slow.equal(world, requests, log)
    log[5][0] = (log[5][0][0], 1 - log[5][0][1], *log[5][0][2:])
    assert not slow.equal(world, requests, log), "the comparison sees one changed click"


def test_loop_comparison_crosses_a_chunk_border(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidtune.data_builders.shop_world.logged.LOG_CHUNK", 64)
    monkeypatch.setattr("sidtune.benchmarks.shop_world.LOG_CHUNK", 64)
    monkeypatch.setattr("sidtune.data_builders.shop_world.requests.QUERY_CHUNK", 50)
    monkeypatch.setattr("sidtune.data_builders.shop_world.logging_policy.RANK_CELLS", 1000)
    world = ShopWorld.from_options(**TINY)
    requests = slow.loop_requests(world)
    assert slow.equal(world, requests, slow.loop_log(world, requests, world.ranker.order.shape[1]))


def test_probabilities_equal_a_direct_sum_over_positions(tiny: ShopWorld) -> None:
    requests = slow.loop_requests(tiny)
    rows = np.arange(0, tiny.config.n_requests, 17)
    config = tiny.config
    click, order = tiny.click_probability(rows), tiny.order_probability(rows)
    attraction = tiny.attraction(rows)
    like, log_dwell = tiny.like_given_click(rows), tiny.dwell_log_mean(rows)
    chosen = np.arange(0, config.n_items, 7)
    assert np.allclose(tiny.attraction_of(rows, np.tile(chosen, (len(rows), 1))), attraction[:, chosen], atol=1e-12)
    for n, row in enumerate(rows):
        request = requests[row]
        layout = tiny.layouts[int(tiny.requests.is_recommendation[row])]
        expected = np.zeros(config.n_items)
        ranking = slow.loop_ranking(tiny, request)
        for positions, first, width in layout.tiers:
            for rank in range(first, first + width):
                for position in positions:
                    seen = (1.0 + position) ** -config.examination_decay / width
                    expected[ranking[rank]] += seen * slow.loop_attraction(tiny, request, ranking[rank])
        assert np.allclose(click[n], expected, atol=1e-12)
        for item in (0, 40, 99):
            assert attraction[n, item] == pytest.approx(slow.loop_attraction(tiny, request, item), abs=1e-12)
            taste = slow.loop_taste(tiny, request, item)
            assert like[n, item] == pytest.approx(
                slow.logistic(config.like_bias + config.like_taste * taste), abs=1e-12
            )
            assert log_dwell[n, item] == pytest.approx(config.dwell_log_mean + config.dwell_taste * taste, abs=1e-12)
        buys = order[n][click[n] > 0] / click[n][click[n] > 0]
        assert np.allclose(buys, tiny.order_given_click([row])[0][click[n] > 0])


# ---------------------------------------------------------------- exposure


def test_exposure_sums(tiny: ShopWorld) -> None:
    rows = np.arange(0, tiny.config.n_requests, 5)
    by_position = tiny.exposure_probability(rows, by_position=True)
    assert by_position.shape == (len(rows), tiny.config.n_items, tiny.config.page_size)
    assert np.allclose(by_position.sum(axis=1), 1.0), "every position shows exactly one item"
    total = tiny.exposure_probability(rows)
    assert np.allclose(by_position.sum(axis=2), total)
    assert total.max() <= 1.0 + 1e-12
    assert np.allclose(total.sum(axis=1), tiny.config.page_size)
    assert np.allclose(by_position @ tiny.examination, tiny.examined_exposure(rows))
    logged = by_position[np.arange(len(rows))[:, None], tiny.log.item[rows], np.arange(tiny.config.page_size)]
    assert (logged > 0).all()
    assert np.allclose(logged, tiny.propensity(rows))


@pytest.mark.parametrize("oversampling", [1.0, 1.5, 4.0])
def test_exposure_equals_monte_carlo(tiny: ShopWorld, oversampling: float) -> None:
    layout = PageLayout.make(tiny.config, oversampling)
    size, n = tiny.config.page_size, 20_000
    exact = layout.probability(size)
    shown = layout.draw(np.random.default_rng(0).random((n, layout.pool)), size)
    assert all(len(set(page)) == size for page in shown[:500].tolist())
    counts = np.stack([np.bincount(shown[:, k], minlength=layout.pool) for k in range(size)])
    assert not counts[exact == 0].any()
    inside = exact > 0
    z = (counts - n * exact)[inside] / np.sqrt(np.maximum(n * exact * (1 - exact), 1e-9))[inside]
    assert np.abs(z).max() < 4.5


def test_logged_pages_follow_the_exposure_probabilities(small: ShopWorld, all_rows: np.ndarray) -> None:
    rows = all_rows[::4]
    exact = small.exposure_probability(rows)
    shown = np.zeros_like(exact)
    np.put_along_axis(shown, small.log.item[rows].astype(np.int64), 1.0, axis=1)
    z = z_scores(shown, exact)[(exact * (1 - exact)).sum(axis=0) > 5]
    assert len(z) > 100 and np.abs(z).max() < 4.5
    assert abs((z**2).mean() - 1.0) < 4.0 * np.sqrt(2.0 / len(z))


def test_layout_covers_the_page_once() -> None:
    for size, slots, tiers in ((20, 3, 3), (5, 0, 9), (7, 6, 2), (1, 0, 1)):
        config = ShopWorldConfig(page_size=size, exploration_slots=slots, ranked_tiers=tiers)
        layout = PageLayout.make(config, 1.4)
        positions = np.concatenate([tier[0] for tier in layout.tiers])
        assert sorted(positions.tolist()) == list(range(size))
        borders = [(first, first + width) for _, first, width in layout.tiers]
        assert borders[0][0] == 0 and borders[-1][1] == layout.pool
        assert all(a[1] == b[0] for a, b in zip(borders, borders[1:], strict=False))


# ---------------------------------------------------------------- feedback


def test_clicks_follow_the_exact_probabilities(small: ShopWorld, all_rows: np.ndarray) -> None:
    """Counts of clicks and orders per item over the whole log against the sums of exact probabilities."""
    N = small.config.n_items
    observed, expected, variance = np.zeros((2, N)), np.zeros((2, N)), np.zeros((2, N))
    for part in np.array_split(all_rows, 10):
        probabilities = (small.click_probability(part), small.order_probability(part))
        for n, (what, p) in enumerate(zip((small.log.click, small.log.order), probabilities, strict=True)):
            np.add.at(observed[n], small.log.item[part].ravel(), what[part].ravel())
            expected[n] += p.sum(axis=0)
            variance[n] += (p * (1 - p)).sum(axis=0)
    often = variance > 5
    z = ((observed - expected) / np.sqrt(np.maximum(variance, 1e-9)))[often]
    assert often.sum() > 100 and np.abs(z).max() < 4.5
    assert abs((z**2).mean() - 1.0) < 4.0 * np.sqrt(2.0 / len(z)), "like chi-square, neither wider nor narrower"
    assert np.abs((observed - expected).sum(axis=1) / np.sqrt(variance.sum(axis=1))).max() < 3.5


def test_examination_curve(small: ShopWorld, all_rows: np.ndarray) -> None:
    attraction = small.attraction_of(all_rows, small.log.item)
    assert np.allclose(small.examination, [(1 + k) ** -0.4 for k in range(small.config.page_size)])
    assert np.abs(z_scores(small.log.click, attraction * small.examination)).max() < 3.5
    shifted = np.roll(small.examination, 1)
    assert np.abs(z_scores(small.log.click, attraction * shifted)).max() > 10, "another curve is refused"


def test_clicks_are_calibrated_at_every_level(small: ShopWorld, all_rows: np.ndarray) -> None:
    p = (small.attraction_of(all_rows, small.log.item) * small.examination).ravel()
    click = small.log.click.ravel()
    order = np.argsort(p)
    borders = np.searchsorted(np.cumsum(p[order]), np.linspace(0, p.sum(), 31)[1:-1])
    z = [float(z_scores(click[part], p[part])) for part in np.split(order, borders)]
    assert np.abs(z).max() < 4
    assert p.max() > 0.6 and p.min() < 0.01, "the range is wide enough to mean something"


def test_likes_orders_and_dwell_given_a_click(small: ShopWorld) -> None:
    row, position = np.nonzero(small.log.click)
    items = small.log.item[row, position]
    taste = small._taste(row, items[:, None])[:, 0]
    config, c = small.config, small.catalogue
    like_p = 1 / (1 + np.exp(-(config.like_bias + config.like_taste * taste)))
    laptop = small.requests.device[row] == words.DEVICES.index("laptop")
    buys = config.order_bias + config.order_taste * taste + config.order_laptop * laptop
    buys = buys + config.order_quality * c.quality[items] - config.order_price * c.price_level[items]
    order_p = 1 / (1 + np.exp(-buys))
    known = small.log.like[row, position] >= 0
    like = small.log.like[row, position]
    for observed, p in ((like[known], like_p[known]), (small.log.order[row, position], order_p)):
        by_level = np.array_split(np.argsort(p), 10)
        assert max(abs(float(z_scores(observed[part], p[part]))) for part in by_level) < 3.5
    standard = (
        np.log(small.log.dwell[row, position]) - config.dwell_log_mean - config.dwell_taste * taste
    ) / config.dwell_sigma
    assert stats.kstest(standard, "norm").pvalue > 1e-3


def test_nulls_and_consistency(small: ShopWorld) -> None:
    log = small.log
    unknown = log.like < 0
    assert np.all(unknown.all(axis=1) == unknown.any(axis=1)), "likes are known or unknown for a whole request"
    share = small.config.like_unknown_share
    assert abs(z_scores(unknown[:, 0], np.full(len(unknown), share))) < 3.5
    assert abs(z_scores(unknown[log.click.any(axis=1), 0], np.full(log.click.any(axis=1).sum(), share))) < 3.5
    assert np.array_equal(np.isnan(log.dwell), log.click == 0)
    assert not log.order[log.click == 0].any() and not (log.like[log.click == 0] > 0).any()
    assert (log.click.sum(axis=1) == 0).mean() > 0.1, "requests without clicks are kept"


# ---------------------------------------------------------------- requests and users


def test_request_shares(small: ShopWorld, all_rows: np.ndarray) -> None:
    r = small.requests
    assert stats.chisquare(np.bincount(r.kind, minlength=7), kind_weights(small.config) * len(all_rows)).pvalue > 1e-3
    assert kind_weights(small.config).sum() == pytest.approx(1.0)
    hours = np.bincount(r.time % 86_400 // 3600, minlength=24)
    assert stats.chisquare(hours, HOURS / HOURS.sum() * len(all_rows)).pvalue > 1e-3
    assert np.all(np.diff(r.time) >= 0)
    days = (r.time - small.config.start_time) // 86_400
    assert days.min() == 0 and days.max() == small.config.days - 1
    assert np.array_equal(r.period, days // small.config.drift_days)
    assert r.is_recommendation.mean() == pytest.approx(0.2, abs=0.01)


def test_intents_follow_interest_and_context(small: ShopWorld) -> None:
    r, users, leaf_department = small.requests, small.users, small.catalogue.leaf_department
    shift = users.place_shift[r.place] + users.daypart_shift[r.daypart]
    p = np.exp(users.interest[r.user, r.period] + shift[:, leaf_department])
    p /= p.sum(axis=1, keepdims=True)
    chosen = np.eye(p.shape[1])[r.leaf]
    assert np.abs(z_scores(chosen, p)).max() < 4
    for place in range(4):
        assert np.abs(z_scores(chosen[r.place == place], p[r.place == place])).max() < 4
    own = p[np.arange(len(p)), r.leaf]
    assert np.mean(own) == pytest.approx((p**2).sum(axis=1).mean(), rel=0.05), (
        "the user's own interest, not the mean one"
    )
    assert np.mean(own) > 1.5 * np.mean(p[np.random.default_rng(0).permutation(len(p)), r.leaf])


def test_context_shifts_the_mix(small: ShopWorld) -> None:
    r = small.requests
    table = np.zeros((4, small.config.n_departments))
    np.add.at(table, (r.daypart, small.catalogue.leaf_department[r.leaf]), 1)
    assert stats.chi2_contingency(table).pvalue < 1e-6


def test_default_users_have_histories() -> None:
    users = ShopWorld().users
    regular = users.requests[users.start == 0]
    assert regular.min() >= 15
    assert users.requests.sum() == 40_000
    assert 0.05 < (users.start > 0).mean() < 0.15


def test_tastes_drift_as_stated() -> None:
    config = ShopWorldConfig(
        **{**SMALL, "n_users": 3000, "profile_share": 0.0, "taste_drift": 0.3, "interest_drift": 0.0}
    )
    world = ShopWorld(config)
    colours = world.users.taste[:, :, config.n_brands : config.n_brands + 8] / config.colour_taste
    assert np.allclose(colours.var(axis=(0, 2)), 1.0, atol=0.06), "stationary"
    for lag in (1, 3):
        a, b = colours[:, 0].ravel(), colours[:, lag].ravel()
        assert np.corrcoef(a, b)[0, 1] == pytest.approx(0.7 ** (lag / 2), abs=0.03)
    assert np.ptp(world.users.interest, axis=1).max() == 0.0, "no drift where none is asked for"


def test_probabilities_use_the_taste_at_the_time_of_the_request() -> None:
    world = ShopWorld.from_options(**{**TINY, "taste_drift": 0.5, "launch_share": 0.0})
    frozen = dataclasses.replace(world.users, taste=world.users.taste[:, :1].repeat(world.config.n_periods, axis=1))
    rows = np.arange(world.config.n_requests)
    now = world.attraction(rows)
    world.users = frozen
    then = world.attraction(rows)
    first = world.requests.period == 0
    assert np.array_equal(now[first], then[first])
    assert np.abs(now[~first] - then[~first]).max(axis=1).min() > 1e-3


def test_profiles_tell_tastes() -> None:
    config = ShopWorldConfig(**{**SMALL, "n_users": 2000, "profile_share": 0.4})
    world = ShopWorld(config)
    groups = world.users.profile[:, 0] * 3 + world.users.profile[:, 1]
    colour = world.users.taste[:, 0, config.n_brands]
    explained = (
        sum(colour[groups == g].mean() ** 2 * (groups == g).mean() for g in np.unique(groups)) - colour.mean() ** 2
    )
    assert explained / colour.var() > 0.05
    segment = world.users.profile[:, 3]
    price = world.users.taste[:, 0, -1]
    assert price[segment == 2].mean() - price[segment == 0].mean() > 1.5 * price.std()
    assert np.bincount(segment).min() > 0.25 * config.n_users


# ---------------------------------------------------------------- rankings


def test_best_breaks_ties_by_row() -> None:
    rng = np.random.default_rng(0)
    for columns, k in ((7, 3), (50, 5), (300, 20), (300, 300), (40, 1)):
        for levels in (2, 5, 1000):
            score = rng.integers(0, levels, (30, columns)).astype(float)
            score[0] = 0.0
            score[rng.random(score.shape) < 0.2] = -np.inf
            expected = [sorted(range(columns), key=lambda c: (-row[c], c))[:k] for row in score]
            assert best(score, k).tolist() == expected


def test_oracle_and_ideal_rankings(tiny: ShopWorld) -> None:
    rows = np.arange(0, 60)
    for ranking, score in ((tiny.oracle_ranking, tiny.click_probability), (tiny.ideal_ranking, tiny.attraction)):
        exact = score(rows)
        top = ranking(rows, 12)
        assert top.shape == (60, 12)
        assert top.tolist() == [sorted(range(tiny.config.n_items), key=lambda c: (-row[c], c))[:12] for row in exact]
    shown = tiny.exposure_probability(rows)
    assert np.take_along_axis(shown, tiny.oracle_ranking(rows, 8), axis=1).min() > 0
    assert not np.array_equal(tiny.oracle_ranking(rows, 8), tiny.ideal_ranking(rows, 8))


def test_items_are_absent_before_their_launch(tiny: ShopWorld) -> None:
    early = tiny.catalogue.launch_period[None, :] > tiny.requests.period[:, None]
    rows = np.arange(tiny.config.n_requests)
    assert early.any()
    assert not np.take_along_axis(early, tiny.log.item.astype(np.int64), axis=1).any()
    assert not tiny.attraction(rows)[early].any()
    assert not tiny.exposure_probability(rows)[early].any()
    assert not tiny.mean_attraction(rows, 3)[early].any()
    late = np.isin(tiny.log.item, np.flatnonzero(tiny.catalogue.launch_period > 0))
    assert late.any(), "launched items do appear later"


def test_mean_attraction_is_the_mean_over_users(tiny: ShopWorld) -> None:
    row = int(np.flatnonzero(~tiny.requests.is_recommendation)[10])
    others = np.random.default_rng(5).choice(tiny.config.n_users, 6)
    request = slow.loop_requests(tiny)[row]
    for item in (1, 30, 77):
        each = [slow.loop_attraction(tiny, {**request, "user": int(user)}, item) for user in others]
        assert tiny.mean_attraction([row], 6, seed=5)[0, item] == pytest.approx(np.mean(each), abs=1e-12)


def test_taste_decides_the_clicks() -> None:
    """The order the world is built for: popularity < within category < with taste < oracle, with clear gaps."""
    world = ShopWorld(ShopWorldConfig(n_requests=15_000, n_users=400))
    table = {name: values["all"] for name, values in slow.reference_table(world).items()}
    names = list(table)
    popularity, category, asked, taste, page, no_taste, ideal, oracle = (table[name] for name in names)
    assert names[-1] == "oracle" and names[0] == "popularity"
    assert popularity + 0.1 < category < asked
    assert max(category, asked, page, no_taste) + 0.04 < taste
    assert taste + 0.08 < oracle
    assert ideal + 0.1 < oracle, "logged clicks are biased by exposure"


def test_pick_is_the_inverse_cdf() -> None:
    weights = np.array([[0.0, 2.0, 0.0, 1.0, 1.0]])
    draws = np.array([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-53])
    assert pick(weights, draws).tolist() == [1, 1, 3, 3, 4, 4]

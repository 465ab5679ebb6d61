"""ShopWorld against its own equations: a slow second implementation, Monte-Carlo, and bounds from the exact probabilities.

Every statistical bound is a z-score of a fixed seed, so a test never fails by chance once it has passed.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from sidtune.benchmarks import shop_world as slow
from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders import shop_words as words
from sidtune.data_builders.schema import SCHEMAS
from sidtune.data_builders.shop_catalogue import VALUES, leaf_nouns
from sidtune.data_builders.shop_logging import PageLayout, best
from sidtune.data_builders.shop_requests import HOURS, kind_weights, pick
from sidtune.data_builders.shop_world import ShopWorld, ShopWorldConfig, read

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
    monkeypatch.setattr("sidtune.data_builders.shop_world.LOG_CHUNK", 64)
    monkeypatch.setattr("sidtune.benchmarks.shop_world.LOG_CHUNK", 64)
    monkeypatch.setattr("sidtune.data_builders.shop_requests.QUERY_CHUNK", 50)
    monkeypatch.setattr("sidtune.data_builders.shop_logging.RANK_CELLS", 1000)
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
    z = z_scores(shown, exact)
    assert np.abs(z).max() < 4.5
    assert 0.6 < (z**2).mean() < 1.4


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
    z = (observed - expected) / np.sqrt(variance)
    assert np.abs(z).max() < 4.5
    assert np.all(((z**2).mean(axis=1) > 0.7) & ((z**2).mean(axis=1) < 1.3)), (
        "close to chi-square, neither over nor under"
    )
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
    z = [float(z_scores(click[part], p[part])) for part in np.array_split(order, 30)]
    assert np.abs(z).max() < 3.5
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
    assert stats.kstest(standard, "norm").pvalue > 0.01


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
    assert price[segment == 0].mean() < -0.5 and price[segment == 2].mean() > 0.5
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


# ---------------------------------------------------------------- catalogue text


def test_every_noun_names_one_leaf() -> None:
    config = ShopWorldConfig()
    nouns = [noun for group in leaf_nouns(config) for noun in group]
    assert len(nouns) == len(set(nouns)) == 3 * 64
    others = {*VALUES, *(b.lower() for b in words.BRANDS), *(m.lower() for m in words.MODELS)}
    others |= {name for d in words.DEPARTMENTS for name in d.names}
    assert not others & set(nouns)
    assert len(set(words.BRANDS)) == 64 and len(set(words.MODELS)) == len(words.MODELS)
    assert len(set(VALUES)) == len(VALUES) and not {m.lower() for m in words.MODELS} & {*VALUES}
    for d in words.DEPARTMENTS:
        assert len(d.leaves) == 8 and len(d.materials) == 4


def test_item_text_tells_category_brand_and_attributes() -> None:
    world = ShopWorld()
    items = world.to_tables().items.to_pylist()
    canonical = {nouns[0]: n for n, nouns in enumerate(leaf_nouns(world.config))}
    of_noun = {noun: n for n, nouns in enumerate(leaf_nouns(world.config)) for noun in nouns}

    def found(text: str, candidates: object) -> set[str]:
        return {c for c in candidates if re.search(rf"(?<![\w-]){re.escape(c)}(?![\w-])", text, re.IGNORECASE)}

    for row, item in list(enumerate(items))[::9]:
        both = f"{item['title']} {item['description']}"
        leaf = int(world.catalogue.leaf[row])
        assert {canonical[c] for c in found(item["description"], canonical)} == {leaf}
        assert {of_noun[c] for c in found(item["title"], of_noun)} == {leaf}
        assert found(both, words.BRANDS) == {item["brand"]}
        stated = {a["name"]: a["value"] for a in item["attributes"]}
        assert found(both, VALUES) == {stated["colour"], stated["style"], stated["material"]}
        assert f"size {stated['size']}" in both
        assert item["category"][2] in canonical and item["category"][0] in both and item["category"][1] in both
        phrase = words.PRICE_PHRASES[
            int(np.searchsorted([-0.43, 0.43], world.catalogue.price_level[row], side="right"))
        ]
        assert phrase in both
    titles = [item["title"] for item in items]
    assert len(set(titles)) > 0.95 * len(titles)
    prices = np.array([item["price"] for item in items])
    assert prices.min() > 0 and np.isfinite(prices).all()


def test_queries_say_the_scope(small: ShopWorld) -> None:
    r = small.requests
    queries = small.to_tables().requests["query"].to_pylist()
    nouns = leaf_nouns(small.config)
    for n in range(3000):
        kind, query = int(r.kind[n]), queries[n]
        if kind >= 5:
            assert query is None
            continue
        if kind <= 2:
            assert nouns[r.leaf[n]][r.noun[n]] in query
        if kind in (1, 4):
            assert VALUES[r.asked[n]] in query
        if kind == 2:
            assert words.BRANDS[r.brand[n]] in query
            assert small.catalogue.leaf_department[r.leaf[n]] in small.catalogue.brand_departments[r.brand[n]]
        if kind == 3:
            assert query in words.DEPARTMENTS[small.catalogue.leaf_department[r.leaf[n]]].names
    asked = [q for q, k in zip(queries, r.kind, strict=True) if k == 1]
    assert len({re.sub(r"[^ ,]+", "x", q) for q in asked}) > 2, "word order varies"


def test_popularity_is_long_tailed() -> None:
    c = ShopWorld().catalogue
    assert np.array_equal(np.sort(c.popularity)[::-1], (1.0 + np.arange(2000)) ** -0.8)
    assert np.corrcoef(np.argsort(np.argsort(c.popularity)), c.quality)[0, 1] > 0.3


# ---------------------------------------------------------------- tables


def test_tables_fit_the_schema_and_the_log(tiny: ShopWorld) -> None:
    tables = tiny.to_tables()
    for name in SCHEMAS:
        assert getattr(tables, name).schema.equals(SCHEMAS[name].arrow_schema), name
        getattr(tables, name).validate(full=True)
    assert tables.split_of_request is None and tables.notes
    items, requests = tables.items.to_pylist(), tables.requests.to_pylist()
    ids = [item["item_id"] for item in items]
    assert ids == sorted(ids) and ids[12] == "i00012" and len(set(ids)) == tiny.config.n_items
    assert tables.users["user_id"][7].as_py() == "u00007" and requests[123]["request_id"] == "r0000123"
    assert all(items[3][name] is None for name in ("exposures", "clicks", "orders", "image"))
    events = []
    for n, request in enumerate(requests):
        context = {pair["name"]: pair["value"] for pair in request["context"]}
        assert set(context) - {"department"} == {"place", "device", "daypart", "page"}
        assert ("department" in context) == (context["page"] == "browse")
        assert (request["query"] is None) == (context["page"] != "search") == bool(tiny.requests.is_recommendation[n])
        assert request["user_id"] == f"u{tiny.requests.user[n]:05d}" and request["time"] == tiny.requests.time[n]
        assert [c["position"] for c in request["candidates"]] == list(range(tiny.config.page_size))
        for c in request["candidates"]:
            position = c["position"]
            assert c["item_id"] == ids[tiny.log.item[n, position]] and c["click"] == tiny.log.click[n, position]
            assert c["order"] == tiny.log.order[n, position]
            assert c["like"] == (None if tiny.log.like[n, position] < 0 else tiny.log.like[n, position])
            assert (c["dwell"] is None) == (c["click"] == 0)
            for action in ("click", "like", "order"):
                if c[action]:
                    event = {"user_id": request["user_id"], "item_id": c["item_id"], "time": request["time"]}
                    query = {"query": request["query"], "request_id": request["request_id"]}
                    events.append({**event, "action": action, **query})
    assert tables.events.to_pylist() == events
    assert {event["action"] for event in events} == {"click", "like", "order"}


def test_equal_configs_give_equal_tables() -> None:
    first, second = read(**TINY), read("ignored", **TINY)
    for name in SCHEMAS:
        assert getattr(first, name).equals(getattr(second, name)), name
    other = read(**{**TINY, "seed": 1})
    for name in SCHEMAS:
        assert not getattr(first, name).equals(getattr(other, name)), name


def test_asking_for_truth_changes_nothing() -> None:
    plain, asked = ShopWorld.from_options(**TINY), ShopWorld.from_options(**TINY)
    asked.click_probability([3, 4])
    asked.oracle_ranking([5], 3)
    assert plain.to_tables().requests.equals(asked.to_tables().requests)


def test_request_rows(tiny: ShopWorld) -> None:
    ids = tiny.to_tables().requests["request_id"]
    assert np.array_equal(tiny.request_rows(ids), np.arange(tiny.config.n_requests))
    assert tiny.request_rows(["r0000007", "r0000001"]).tolist() == [7, 1]
    assert tiny.request_rows(pa.array(["r0000239"])).tolist() == [239]
    assert tiny.request_rows([]).tolist() == []
    for wrong in ("r0000240", "r7", "x"):
        with pytest.raises(DataError, match=f"'{wrong}' is not one of the 240 requests"):
            tiny.request_rows(["r0000001", wrong])


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_item": 10}, "unknown key 'n_item' .did you mean 'n_items'"),
        ({"n_items": "many"}, "'n_items' must be an integer"),
        ({"n_items": 10}, "10 items cannot fill 64 leaf categories"),
        ({"n_items": 0}, "'n_items' must be at least 1"),
        ({"n_items": 70}, "only .* items are on sale at the start"),
        ({"seed": -1}, "'seed' must not be negative"),
        ({"click_bias": float("nan")}, "'click_bias' must be a finite number"),
        ({"click_bias": 1e9}, "must lie within"),
        ({"launch_share": 1.5}, "'launch_share' is a share"),
        ({"brand_query_share": 0.9, "attribute_query_share": 0.2}, "must add up to at most 1"),
        ({"search_oversampling": 0.5}, "'search_oversampling' must be at least 1"),
        ({"examination_decay": -0.1}, "'examination_decay' must not be negative"),
        ({"n_departments": 9}, "'n_departments' must be at most 8"),
        ({"brands_per_department": 3}, "'brands_per_department' must be even"),
        ({"brands_per_department": 40}, "at most 64 brands"),
        ({"exploration_slots": 20}, "must be below 'page_size'"),
        ({"exploration_pool": 2}, "at least 'exploration_slots'"),
        ({"n_users": 900_000, "days": 3000}, "would not fit in memory"),
        ({"n_requests": 10**8}, "'n_requests' must be at most"),
    ],
)
def test_wrong_options_end_in_one_sentence(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(**options)
    assert "\n" not in str(caught.value) and str(caught.value).rstrip(")").endswith((".", "?"))


def test_wrong_rows_are_refused(tiny: ShopWorld) -> None:
    for rows in ([-1], [240], [0.5], [[1, 2]], np.ones(240, dtype=bool)):
        with pytest.raises(DataError, match="Request rows must be a flat list of whole numbers"):
            tiny.click_probability(rows)
    assert tiny.click_probability([]).shape == (0, tiny.config.n_items)
    assert tiny.oracle_ranking([], 3).shape == (0, 3)
    for k in (0, 151):
        with pytest.raises(DataError, match="k between 1 and 150"):
            tiny.oracle_ranking([0], k)
    for items in (np.array([[150]]), np.array([[-1]]), np.array([0]), np.array([[0.0]]), np.zeros((3, 2), dtype=int)):
        with pytest.raises(DataError, match="Item rows must be whole numbers"):
            tiny.attraction_of([0], items)


def test_pick_is_the_inverse_cdf() -> None:
    weights = np.array([[0.0, 2.0, 0.0, 1.0, 1.0]])
    draws = np.array([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-53])
    assert pick(weights, draws).tolist() == [1, 1, 3, 3, 4, 4]

"""Sessions of the simulated shop: exact utility, best lists, samples; the tables made of them know only the past."""

import itertools

import numpy as np
import pytest

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.post_ranking.schema import PostRankField
from sidtune.data_builders.post_ranking.shop_lists import session_table
from sidtune.data_builders.shop_world.best_order import best_order, order_value, random_value
from sidtune.data_builders.shop_world.config import ShopWorldConfig
from sidtune.data_builders.shop_world.sessions import SessionConfig, ShopSessions, production_candidates
from sidtune.data_builders.shop_world.world import ShopWorld

CONFIG = ShopWorldConfig(n_items=300, n_users=40, n_requests=900, n_departments=3, leaves_per_department=4, days=20)
ROWS = np.arange(300, 360)


@pytest.fixture(scope="module")
def world():
    return ShopWorld(CONFIG)


@pytest.fixture(scope="module")
def sessions(world):
    return ShopSessions(world, ROWS, production_candidates(world, ROWS, 6))


def slow_clicks(sessions, b, order):
    """The module's equation in plain Python, similarity from the catalogue's own arrays."""
    cat, config = sessions.world.catalogue, sessions.config
    items = sessions.items[b][list(order)]
    weights = {n: getattr(config, n) for n in ("brand", "colour", "style", "material", "leaf")}
    same = lambda i, j: sum(w * (getattr(cat, n)[i] == getattr(cat, n)[j]) for n, w in weights.items())  # noqa: E731
    attraction = sessions.world.attraction(sessions.rows[b : b + 1])[0]
    out = []
    for k, item in enumerate(items):
        beside = sum(same(item, items[j]) for j in (k - 1, k + 1) if 0 <= j < len(items)) / sum(weights.values())
        exam = (1 + k) ** -sessions.world.config.examination_decay
        out.append(exam * attraction[item] * (1 - config.interaction / 2 * beside))
    return out


def test_click_probabilities_equal_the_equation(sessions):
    rng = np.random.default_rng(0)
    for size in (6, 4, 1):
        order = np.stack([rng.permutation(6)[:size] for _ in ROWS])
        found = sessions.click_probability(order)
        expected = [slow_clicks(sessions, b, order[b]) for b in range(len(ROWS))]
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert (found >= 0).all() and (found <= 1).all()


def test_the_best_list_and_the_mean_list_equal_enumeration(sessions):
    every = list(itertools.permutations(range(6)))
    values = np.stack([sessions.utility(np.tile(one, (len(ROWS), 1))) for one in every])
    np.testing.assert_allclose(sessions.utility(sessions.best), values.max(axis=0), atol=1e-12)
    np.testing.assert_allclose(sessions.random_utility, values.mean(axis=0), atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_exact_search_equals_brute_force_on_random_lists(n):
    rng = np.random.default_rng(n)
    attraction, raw = rng.random((9, n)), rng.random((9, n, n))
    similarity = (raw + raw.transpose(0, 2, 1)) / 2
    weights = np.sort(rng.random(n))[::-1]
    every = np.array(list(itertools.permutations(range(n))))
    values = np.stack(
        [order_value(attraction, similarity, weights, 0.9, np.tile(one, (9, 1))).sum(axis=1) for one in every]
    )
    best = best_order(attraction, similarity, weights, 0.9)
    assert (np.sort(best, axis=1) == np.arange(n)).all()
    found = order_value(attraction, similarity, weights, 0.9, best).sum(axis=1)
    np.testing.assert_allclose(found, values.max(axis=0), atol=1e-12)
    np.testing.assert_allclose(random_value(attraction, similarity, weights, 0.9), values.mean(axis=0), atol=1e-12)


def test_without_interaction_the_best_list_is_the_sorted_one_and_with_it_it_is_not(world, sessions):
    plain = ShopSessions(world, ROWS, sessions.items, SessionConfig(interaction=0.0))
    np.testing.assert_allclose(plain.utility(plain.best), plain.utility(plain.by_attraction()), atol=1e-12)
    gap = sessions.utility(sessions.best) - sessions.utility(sessions.by_attraction())
    assert (gap >= -1e-12).all() and (gap > 1e-9).mean() > 0.6
    assert sessions.utility(sessions.best).mean() > 1.03 * sessions.utility(sessions.by_attraction()).mean()


def test_two_alike_neighbours_lose_clicks_and_apart_they_do_not(world):
    cat = world.catalogue
    same = ("brand", "colour", "style", "material", "leaf")
    twins = next(
        (i, j)
        for i, j in itertools.combinations(range(300), 2)
        if sum(getattr(cat, n)[i] == getattr(cat, n)[j] for n in same) >= 3
    )
    other = next(i for i in range(300) if all(getattr(cat, n)[i] != getattr(cat, n)[j] for n in same for j in twins))
    one = ShopSessions(world, ROWS[:1], np.array([[*twins, other]]))
    together, apart = one.click_probability(np.array([[0, 1, 2]])), one.click_probability(np.array([[0, 2, 1]]))
    np.testing.assert_allclose(apart[0], one.weights * one.attraction[0][[0, 2, 1]])
    assert together[0, 0] < apart[0, 0]


def test_sampled_clicks_have_the_stated_probabilities(world):
    rows = np.repeat(ROWS[:4], 6000)
    many = ShopSessions(world, rows, np.repeat(production_candidates(world, ROWS[:4], 5), 6000, axis=0))
    order = np.tile([2, 0, 1, 4, 3], (len(rows), 1))
    clicks, chance = many.sample(order, seed=1), many.click_probability(order)
    for b in range(4):
        part = slice(6000 * b, 6000 * (b + 1))
        error = np.sqrt(chance[part][0] * (1 - chance[part][0]) / 6000) + 1e-9
        assert (np.abs(clicks[part].mean(axis=0) - chance[part][0]) < 4.5 * error).all()
    np.testing.assert_array_equal(clicks, many.sample(order, seed=1))
    assert (clicks != many.sample(order, seed=2)).any()


def test_the_world_itself_is_untouched(world, sessions):
    before = ShopWorld(CONFIG).log
    _ = sessions.best, sessions.sample(sessions.incoming)
    for name in ("item", "click", "order"):
        np.testing.assert_array_equal(getattr(before, name), getattr(world.log, name))


def test_wrong_sessions_are_refused_in_a_sentence(world, sessions):
    for rows, items, says in (
        (ROWS[:1], np.array([[1, 1]]), "twice"),
        (ROWS[:2], np.array([[1, 2]]), "shape"),
        (ROWS[:1], np.arange(30)[None], "at most 12"),
        (ROWS[:1], np.array([[1, 900]]), "whole numbers"),
    ):
        with pytest.raises(DataError, match=says):
            ShopSessions(world, rows, items)
    for order in (np.zeros((60, 2), int), np.full((60, 1), 6), np.zeros((2, 1), int)):
        with pytest.raises(DataError, match="An order must name"):
            sessions.utility(order)
    with pytest.raises(DataError, match="production ranker"):
        production_candidates(world, ROWS, 0)
    for change in ({"interaction": 1.5}, {"brand": -1.0}):
        with pytest.raises(ConfigError):
            SessionConfig(**change)


def past_clicks(world, row):
    """(items, rows) the user of a request clicked strictly before it, in order."""
    times, log = world.requests.time, world.log
    found = []
    for other in range(row):
        if world.requests.user[other] == world.requests.user[row] and times[other] < times[row]:
            found += [int(item) for item, click in zip(log.item[other], log.click[other], strict=True) if click]
    return found


def test_the_table_holds_what_the_shop_knew_before_each_request(world, sessions):
    table = session_table(sessions, ["train"] * 60, history=4)
    batch = table.batch(np.arange(60))
    np.testing.assert_array_equal(batch.item_rows, sessions.items)
    place = np.argsort(sessions.best, axis=1)
    np.testing.assert_array_equal(batch.relevance, 6 - place)
    times, log = world.requests.time, world.log
    for b in range(0, 60, 7):
        row = ROWS[b]
        assert batch.history_rows[b][batch.history_mask[b]].tolist() == past_clicks(world, row)[-4:]
        earlier = times < times[row]
        for n, item in enumerate(sessions.items[b]):
            here = log.item[earlier] == item
            clicks, shown = (here & (log.click[earlier] == 1)).sum(), here.sum()
            expected = [np.log1p(clicks), np.log1p(shown), (clicks + 1) / (shown + 20)]
            np.testing.assert_allclose(batch.item_fields["past"][b, n], expected, rtol=1e-5)
    assert batch.history_mask.any()
    brand = batch.item_fields["brand"].argmax(axis=2)
    np.testing.assert_array_equal(brand, world.catalogue.brand[sessions.items])


def test_labels_and_own_fields_of_the_table(world, sessions):
    clicks = session_table(sessions, ["train"] * 60, label="clicks", seed=5).batch(np.arange(60)).relevance
    np.testing.assert_array_equal(clicks, sessions.sample(sessions.incoming, seed=5))
    assert np.isnan(session_table(sessions, ["train"] * 60, label="none").batch([0]).relevance).all()
    vectors = np.random.default_rng(0).normal(size=(300, 5)).astype(np.float32)
    field = PostRankField("generator", "id_embedding", "item", 5)
    table = session_table(
        sessions, ["test"] * 60, scores=np.tile([6.0, 5, 4, 3, 2, 1], (60, 1)), extra={field: vectors}
    )
    batch = table.batch([3])
    np.testing.assert_array_equal(batch.item_fields["generator"][0], vectors[sessions.items[3]])
    assert batch.init_score[0].tolist() == [6, 5, 4, 3, 2, 1]
    with pytest.raises(ConfigError, match="did you mean 'clicks'"):
        session_table(sessions, ["test"] * 60, label="click")
    with pytest.raises(DataError, match="60 sessions"):
        session_table(sessions, ["test"])

"""The market against enumeration of all that a reader can do, golden figures of the sheet, and its own coins."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.shop_world.coins import coins, normals
from sidtune.data_builders.shop_world.config import ShopWorldConfig
from sidtune.data_builders.shop_world.dials import HIGH, SHOP, Phenomena
from sidtune.data_builders.shop_world.examining import click_chances
from sidtune.data_builders.shop_world.market import VALUES, Market
from sidtune.data_builders.shop_world.world import ShopWorld

pytestmark = pytest.mark.medium
SMALL = ShopWorldConfig(seed=1, n_items=200, n_users=60, n_requests=3000, n_departments=3, leaves_per_department=4)
TINY = dataclasses.replace(
    SMALL, n_departments=1, leaves_per_department=2, exploration_slots=0, search_oversampling=1.0,
    recommendation_oversampling=1.0, launch_share=0.0, n_items=14, page_size=4,
)  # fmt: skip
# Sheet 5: clicks, orders and likes of production and of the ideal by attraction, requests 0, 40, ..., 20 places.
GOLDEN = {
    0: ((1.1036749620, 0.3726894412, 0.4639055448), (3.9237505301, 1.6193318421, 2.3014362110)),
    1: ((0.9489195189, 0.3409066195, 0.3814019079), (3.5958914382, 1.5951422046, 2.0104587661)),
    2: ((0.8861255297, 0.3216938041, 0.3551627196), (3.4242031146, 1.4966694448, 1.9356697932)),
}


def market(dials: Phenomena, config: ShopWorldConfig = SMALL) -> Market:
    return Market(ShopWorld(dataclasses.replace(config, phenomena=dataclasses.asdict(dials))))


@pytest.fixture(scope="module")
def world():
    return ShopWorld(SMALL)


@pytest.fixture(scope="module")
def lists(world):
    rows = np.arange(0, 3000, 10)
    return rows, Market(world).production(rows, 12)


@pytest.mark.parametrize("seed", GOLDEN)
def test_with_all_dials_off_it_is_the_shop_of_the_golden_figures(seed):
    market = Market(ShopWorld(ShopWorldConfig(seed=seed, n_items=1500, n_users=500, n_requests=20_000)))
    rows = np.arange(0, 20_000, 40)
    for found, wanted in zip((market.production(rows, 20), market.ideal(rows, 20)), GOLDEN[seed], strict=True):
        expected = market.serve(rows, found).expected
        sums = [expected[name].sum(axis=1).mean() for name in ("click", "order", "like")]
        np.testing.assert_allclose(sums, wanted, rtol=1e-9)


def test_with_all_dials_off_nothing_new_is_asked(world, lists, monkeypatch):
    rows, shown = lists
    for name in ("crowding.alike", "examining._cascade", "logged.sampled_clicks"):
        monkeypatch.setattr(f"sidtune.data_builders.shop_world.{name}", None, raising=False)
    served = Market(world).serve(rows, shown)
    attraction = world.attraction_of(rows, shown)
    np.testing.assert_array_equal(served.expected["click"], world.examination[:12] * attraction)


@pytest.mark.parametrize("dial", [one.name for one in dataclasses.fields(Phenomena)])
def test_each_dial_at_zero_is_a_world_without_it_and_moves_something_at_one(world, lists, dial):
    rows, shown = lists
    base = dataclasses.replace(SHOP, click_fatigue=0.2)
    off, on = dataclasses.replace(base, **{dial: 0.0}), dataclasses.replace(base, **{dial: 1.0})
    name = {"value_spread": "value", "noise_dwell": "dwell"}.get(dial, "click")
    if dial in ("score_distortion", "lexical_gap", "missing_attributes"):  # outcomes stay
        assert (market(off).total(rows, shown) == market(on).total(rows, shown)).all()
        return
    outcome = [market(one).serve(rows, shown).expected[name] for one in (off, on)]
    assert (outcome[0] != outcome[1]).any()
    plain, same = Market(world).serve(rows, shown).expected, market(Phenomena()).serve(rows, shown).expected
    assert all((plain[key] == same[key]).all() for key in plain)


def paths(a, o, x, eta, eta_o, phi, cascade):
    """P(click) of each place by adding up everything that one reader can do."""
    total, places = np.zeros(len(a)), len(a)
    if not cascade:
        for seen in itertools.product((0, 1), repeat=places):
            chance = math.prod(x[k] if s else 1 - x[k] for k, s in enumerate(seen))
            total += chance * _clicks(a, o, seen, 0, 0, phi, None)
        return total
    return _clicks(a, o, None, eta, eta_o, phi, x)


def _clicks(a, o, seen, eta, eta_o, phi, x):
    """Depth first over click and no click, order and no order, going on and going away."""
    found = np.zeros(len(a))

    def walk(k, m, chance):
        if k == len(a) or chance == 0:
            return
        own = a[k] * (1 - phi) ** m if seen is None or seen[k] else 0.0
        found[k] += chance * own
        if x is None:
            walk(k + 1, m + 1, chance * own)
            walk(k + 1, m, chance * (1 - own))
            return
        on = x[k + 1] / x[k] if k + 1 < len(a) else 0.0
        walk(k + 1, m + 1, chance * own * o[k] * on * (1 - eta) * (1 - eta_o))
        walk(k + 1, m + 1, chance * own * (1 - o[k]) * on * (1 - eta))
        walk(k + 1, m, chance * (1 - own) * on)

    walk(0, 0, 1.0 if x is None else x[0])
    return found


@pytest.mark.parametrize("phi", [0.0, 0.3])
@pytest.mark.parametrize(("eta", "eta_o"), [(0.0, 0.0), (0.3, 0.5), (0.6, 0.0), (1.0, 1.0)])
def test_chances_are_those_of_all_paths(eta, eta_o, phi):
    draw = np.random.default_rng(3)
    a, o, x = draw.random((12, 7)), draw.random((12, 7)), (1.0 + np.arange(7)) ** -0.4
    for share in (0.0, 0.4, 1.0):
        options = {"cascade": share, "stop_after_click": eta, "stop_after_order": eta_o, "fatigue": phi}
        click, looked = click_chances(a, o, x, **options)
        for row in range(12):
            parts = [paths(a[row], o[row], x, eta, eta_o, phi, kind) for kind in (False, True)]
            np.testing.assert_allclose(click[row], (1 - share) * parts[0] + share * parts[1], atol=1e-14)
        assert ((click <= looked + 1e-15) & (looked <= 1)).all()
    if phi == 0.0 and eta == eta_o == 0.0:
        np.testing.assert_allclose(click, x * a, atol=1e-15)


def test_stopping_earlier_earns_less():
    draw = np.random.default_rng(0)
    a, o, x = draw.random((30, 10)), draw.random((30, 10)), (1.0 + np.arange(10)) ** -0.4
    sums = [click_chances(a, o, x, cascade=1.0, stop_after_click=eta)[0].sum() for eta in (0, 0.3, 0.6, 1)]
    assert sums == sorted(sums, reverse=True) and sums[0] > 1.5 * sums[-1]


@pytest.mark.parametrize("dials", [Phenomena(), SHOP, HIGH])
def test_what_is_drawn_becomes_what_is_expected(world, lists, dials):
    shop, (rows, shown) = market(dials), lists
    expected = shop.serve(rows, shown).expected
    found = [shop.serve(rows, shown, coins=seed, sample=True).drawn for seed in range(150)]
    for name in ("click", "wanted", "order", "like", "dwell", "money"):
        draws = np.array([one[name].sum() for one in found])
        assert abs(draws.mean() - expected[name].sum()) < 4 * draws.std(ddof=1) / math.sqrt(len(draws))
    again = shop.serve(rows[::-1], shown[::-1], coins=3, sample=True).drawn
    assert all((again[name][::-1] == found[3][name]).all() for name in again)  # whatever the order of the requests


def test_coins_are_uniform_and_belong_to_what_they_decide():
    a, b = np.divmod(np.arange(10**6), 1000)
    u = coins(5, "attraction", a, b)
    assert abs(u.mean() - 0.5) < 0.002 and abs(12 * u.var() - 1) < 0.01 and (u >= 0).all() and (u < 1).all()
    table = u.reshape(1000, 1000)
    for one, other in ((table[:, 1:], table[:, :-1]), (table[1:], table[:-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.005
    assert abs(np.corrcoef(u, coins(6, "attraction", a, b))[0, 1]) < 0.005
    assert abs(np.corrcoef(u, coins(5, "order", a, b))[0, 1]) < 0.005
    order = np.random.default_rng(0).permutation(10**6)[:1000]
    np.testing.assert_array_equal(coins(5, "attraction", a[order], b[order]), u[order])
    z = normals(5, "watch", a, b)
    assert abs(z.mean()) < 0.005 and abs(z.std() - 1) < 0.005


def difference_variance(x, one, other, a, b):
    """Sheet 4, per request: variance of the difference in clicks of two lists under common coins, position readers."""
    total = (a * x * (1 - a * x)).sum() + (b * x * (1 - b * x)).sum()
    for k, (i, p) in enumerate(zip(one, a, strict=True)):
        for m, (j, q) in enumerate(zip(other, b, strict=True)):
            if i == j and k == m:
                total -= 2 * (p * x[k] - (p * x[k]) ** 2)
            elif i == j:
                total -= 2 * p * (1 - p) * x[k] * x[m]
            elif k == m:
                total -= 2 * p * q * x[k] * (1 - x[k])
    return total


def test_common_coins_make_differences_quiet(world, lists):
    market, (rows, shown) = Market(world), lists
    rows, shown, x = rows[:150], shown[:150], world.examination[:12]
    swapped = shown.copy()
    swapped[:, [3, 4]] = swapped[:, [4, 3]]
    attraction = [world.attraction_of(rows, one) for one in (shown, swapped)]
    wanted = sum(difference_variance(x, *p) for p in zip(shown, swapped, *attraction, strict=True))
    apart = sum((p * x * (1 - p * x)).sum() for both in attraction for p in both)
    sums = [
        [market.serve(rows, one, coins=s, sample=True).drawn["click"].sum() for one in (shown, swapped)]
        for s in range(600)
    ]
    found = np.var([a - b for a, b in sums], ddof=1)
    assert found == pytest.approx(wanted, rel=0.2) and wanted < 0.15 * apart  # a tenth of what independent draws have
    longer = np.concatenate([shown[:, :11], np.full((150, 1), -1)], axis=1)
    for name, value in market.serve(rows, longer, coins=9, sample=True).drawn.items():
        np.testing.assert_array_equal(
            value[:, :11], market.serve(rows, shown, coins=9, sample=True).drawn[name][:, :11]
        )


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("dials", [
    Phenomena(), Phenomena(cascade=1.0, stop_after_click=0.6), dataclasses.replace(SHOP, satiation=0.0, interaction=0.0),
])  # fmt: skip
def test_the_ideal_list_is_the_best_of_all(dials, value):
    config = dataclasses.replace(TINY, n_items=14, page_size=4)
    shop = market(dials, config)
    rows = np.arange(0, 3000, 150)
    every = np.array([*itertools.permutations(range(14), 4)])
    best = [shop.total(np.full(len(every), row), every, value).max() for row in rows]
    found = shop.total(rows, shop.ideal(rows, 4, value), value)
    np.testing.assert_array_less(found, np.array(best) + 1e-12)
    assert found.sum() >= 0.999 * sum(best) and (shop.upper_bound(rows, 4, value) >= np.array(best) - 1e-12).all()
    if value == "click":
        np.testing.assert_allclose(found, best, rtol=1e-12)


def test_where_items_interact_the_best_found_is_near_the_best_and_far_from_sorting():
    config = dataclasses.replace(TINY, n_items=12, page_size=5)
    rows = np.arange(0, 3000, 300)
    every = np.array([*itertools.permutations(range(12), 5)])
    lost, plain = [], market(Phenomena(), config)
    for satiation in (0.3, 0.9):
        shop = market(Phenomena(satiation=satiation, interaction=0.4), config)
        best = np.array([shop.total(np.full(len(every), row), every).max() for row in rows])
        found = shop.total(rows, shop.ideal(rows, 5))
        sort = shop.total(rows, plain.ideal(rows, 5))
        assert (found <= best + 1e-12).all() and found.sum() > 0.985 * best.sum() and (found >= sort - 1e-12).all()
        lost.append(1 - sort.sum() / best.sum())
    assert 0.005 < lost[0] < lost[1]


def test_personal_values_pay_when_items_bait():
    """Sheet 3.4: the oracle that knows each user's values against the best weights for everybody; nothing at 0."""
    rows, gains = np.arange(0, 3000, 10), []
    for spread, bait in ((0.0, 2.0), (0.5, 2.0), (1.0, 2.0)):
        shop = market(Phenomena(value_spread=spread, clickbait=bait))
        items = np.arange(200)[None, :]
        attraction, _, order, _ = shop.feedback(rows, items)
        aware = shop.total(rows, shop.ideal(rows, 10, "value"), "value").mean()
        static = [
            np.argsort(-attraction * (1 + w * order), axis=1, kind="stable")[:, :10]
            for w in (0, 1, 2, 3, 5, 8, 12, 20, 40, 1e6)
        ]
        gains.append(aware / max(shop.total(rows, one, "value").mean() for one in static) - 1)
    assert gains[0] == pytest.approx(0, abs=1e-12) and 0.005 < gains[1] < gains[2] and gains[2] > 0.04


def test_wrong_lists_and_dials_are_refused(world):
    market = Market(world)
    for shown, words in (
        ([[1, 1]], "an item twice"), ([[1, 500]], "outside the 200"), ([[0.5, 1.0]], "must be item rows"), ([[1], [2]], "shape"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            market.serve([5], shown)
    with pytest.raises(DataError, match="Request rows"):
        market.serve([9999], [[1]])
    with pytest.raises(ConfigError, match="cascade must lie in"):
        Phenomena(cascade=1.5)
    with pytest.raises(ConfigError, match="did you mean 'order'"):
        market.total([5], np.array([[1]]), "orders")
    empty = market.serve([5], [[-1, -1]]).expected
    assert empty["click"].sum() == 0 and market.serve([], np.zeros((0, 3), int)).expected["click"].shape == (0, 3)


def test_the_log_of_a_shop_with_dials_is_what_its_readers_do():
    """Clicks of many logged pages against the exact chances of those pages."""
    config = dataclasses.replace(
        SMALL, n_requests=20_000, phenomena={"cascade": 0.5, "stop_after_click": 0.6, "satiation": 0.5}
    )
    world = ShopWorld(config)
    expected = Market(world).serve(np.arange(20_000), world.log.item).expected["click"]
    clicks = world.log.click.astype(float)
    error = np.sqrt((expected * (1 - expected)).sum(axis=0)) / 20_000
    assert (np.abs(clicks.mean(axis=0) - expected.mean(axis=0)) < 4.5 * error).all()
    plain = ShopWorld(dataclasses.replace(config, phenomena={}))
    assert (plain.log.item == world.log.item).all() and plain.log.click.sum() > 1.3 * clicks.sum()


def test_a_shop_without_dials_is_the_shop_of_before():
    """The same tables whether the dials are not named or named and 0."""
    tables = [
        ShopWorld(dataclasses.replace(SMALL, phenomena=p)).to_tables() for p in ({}, {"cascade": 0.0, "clickbait": 0})
    ]
    assert all(getattr(tables[0], n).equals(getattr(tables[1], n)) for n in ("items", "users", "requests", "events"))


def department_tastes(part: float, seed: int = 0) -> tuple[float, float, ShopWorld]:
    world = ShopWorld(
        ShopWorldConfig(seed=seed, n_items=600, n_users=1500, n_requests=2000, phenomena={"taste_by_department": part})
    )
    own = world.users.by_department
    if own is None:
        return 1.0, 1.0, world
    columns = own[:, 0, :, :-1] - own[:, 0, :, :-1].mean(axis=0)
    pairs = [np.corrcoef(columns[:, 0, c], columns[:, 1, c])[0, 1] for c in range(columns.shape[2])]
    common = world.users.taste[:, 0, world.config.n_brands : -1]
    return float(np.mean(pairs)), float(own[:, 0, :, :-1].var(axis=0).mean() / common.var(axis=0).mean()), world


def test_tastes_of_two_departments_are_as_alike_as_the_dial_says():
    """Sheet 8, check 3: correlation 1, .5, 0 and the variance of the common tastes."""
    for part, wanted in ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)):
        alike, ratio, world = department_tastes(part)
        assert alike == pytest.approx(wanted, abs=0.06) and 0.85 < ratio < 1.15
        assert (world.users.by_department is None) == (part == 0.0)


def test_who_knows_the_department_gains_with_the_dial():
    """Sheet 3.1: the list by true tastes against the list by each user's mean taste, weighted by interest."""
    gains = []
    for part in (0.25, 0.5, 1.0):
        _, _, world = department_tastes(part)
        rows = np.flatnonzero(world.requests.kind == 0)[:300]
        aware = Market(world).total(rows, Market(world).ideal(rows, 10)).mean()
        own, interest = world.users.by_department, world.users.interest
        leaf = np.exp(interest - interest.max(axis=2, keepdims=True))
        share = np.stack(
            [leaf[:, :, world.catalogue.leaf_department == d].sum(axis=2) for d in range(world.config.n_departments)], 2
        )
        mean = (own * (share / share.sum(axis=2, keepdims=True))[..., None]).sum(axis=2)
        blind = ShopWorld(world.config)
        taste = world.users.taste.copy()
        taste[:, :, world.config.n_brands :] = mean
        blind.users = dataclasses.replace(world.users, taste=taste, by_department=None)
        gains.append(aware / Market(world).total(rows, Market(blind).ideal(rows, 10)).mean() - 1)
    assert 0.08 < gains[0] < 0.27 and 0.25 < gains[1] < 0.48 and gains[2] > 0.55 and gains == sorted(gains)


def test_scores_that_lie_by_department_keep_the_order_inside_it():
    """Sheet 3.11: the fields are off by more and more, a merged list loses little, and nothing at 0.

    The sheet's own figures are of another assignment of slopes and shifts to the departments.
    """
    config = ShopWorldConfig(seed=0, n_items=800, n_users=300, n_requests=4000)
    errors, lost = [], []
    for part in (0.0, 0.25, 0.5, 1.0):
        shop = market(Phenomena(score_distortion=part), config)
        home = np.flatnonzero(shop.world.requests.kind == 5)[:200]
        items = np.broadcast_to(np.arange(800), (len(home), 800))
        true, said = shop.feedback(home, items)[0], shop.scores(home, items)
        department = shop.world.catalogue.department
        if part == 0.0:
            np.testing.assert_array_equal(said, true)
        for field in range(config.n_departments):
            mine = department == field
            order = np.argsort(-true[:3, mine], axis=1, kind="stable")
            assert (np.diff(np.take_along_axis(said[:3, mine], order, axis=1), axis=1) <= 1e-15).all()
        gaps = [abs((true - said)[:, department == field].sum()) for field in range(config.n_departments)]
        errors.append(sum(gaps) / true.sum())
        merged = np.argsort(-said, axis=1, kind="stable")[:, :10]
        lost.append(1 - shop.total(home, merged).mean() / shop.total(home, shop.ideal(home, 10)).mean())
    assert errors[0] == lost[0] == 0 and errors == sorted(errors) and lost == sorted(lost)
    assert 0.03 < errors[1] < 0.12 and 0.15 < errors[3] < 0.4 and 0.003 < lost[3] < 0.08

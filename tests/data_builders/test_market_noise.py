"""Noise in the feed against sums over the logged pages, and against what the log drew."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sidtune.data_builders.shop_world.config import ShopWorldConfig
from sidtune.data_builders.shop_world.market import Market
from sidtune.data_builders.shop_world.world import ShopWorld

pytestmark = pytest.mark.medium
SMALL = ShopWorldConfig(seed=1, n_items=200, n_users=60, n_requests=20_000, n_departments=3, leaves_per_department=4)


def _shop(**dials):
    return ShopWorld(dataclasses.replace(SMALL, phenomena=dials))


@pytest.fixture(scope="module")
def plain():
    return _shop()


@pytest.mark.parametrize("part", [0.3, 0.6, 1.0])
def test_the_feed_keeps_its_clicks_and_the_dial_is_the_share_of_noise(plain, part):
    """Sheet check 6: the rate of clicks stays to 1e-12, noise is exactly its share, searches have none."""
    shop = _shop(feed_noise=part, noise_dwell=1.5)
    rows = np.arange(SMALL.n_requests)
    assert (shop.log.item == plain.log.item).all()
    before, after = (Market(world).serve(rows, plain.log.item).expected for world in (plain, shop))
    feed = plain.requests.is_recommendation
    assert all((before[name][~feed] == after[name][~feed]).all() for name in before)
    assert after["click"][feed].sum() == pytest.approx(before["click"][feed].sum(), rel=1e-12)
    assert 1 - after["wanted"][feed].sum() / after["click"][feed].sum() == pytest.approx(part, rel=1e-9)
    for name in ("wanted", "order", "like", "money"):  # what is meant falls to its share, item by item
        source = "click" if name == "wanted" else name
        np.testing.assert_allclose(after[name][feed], (1 - part) * before[source][feed], rtol=1e-9, atol=1e-15)


def test_the_log_holds_short_clicks_without_orders(plain):
    part, shift, feed = 0.5, 4.0, plain.requests.is_recommendation
    shop = _shop(feed_noise=part, noise_dwell=shift)
    log, clicked = shop.log, shop.log.click[feed] == 1
    assert (log.click[~feed] == plain.log.click[~feed]).all() and (log.order[~feed] == plain.log.order[~feed]).all()
    noise = np.log(log.dwell[feed][clicked]) < SMALL.dwell_log_mean - shift / 2  # 2.5 standard deviations either side
    n = clicked.sum()
    assert n > 1000 and abs(noise.mean() - part) < 0.02 + 4 * np.sqrt(part * (1 - part) / n)
    ordered = log.order[feed][clicked] == 1
    assert ordered[noise].mean() < 0.02 < 0.1 < ordered[~noise].mean()
    assert ((log.like[feed] == -1) == (plain.log.like[feed] == -1)).all()


def test_the_truth_of_the_shop_and_of_the_market_are_one(plain):
    shop, rows = _shop(feed_noise=0.4), np.flatnonzero(plain.requests.is_recommendation)[:40]
    lists = Market(shop).production(rows, 10)
    expected = Market(shop).serve(rows, lists).expected
    attraction, order = shop.attraction(rows), shop.order_given_click(rows)
    chosen = np.take_along_axis(attraction, lists, axis=1)
    np.testing.assert_allclose(expected["click"], chosen * shop.examination[:10], rtol=1e-12)
    np.testing.assert_allclose(
        expected["order"], expected["click"] * np.take_along_axis(order, lists, axis=1), rtol=1e-12
    )
    assert (shop.ideal_ranking(rows, 10) == plain.ideal_ranking(rows, 10)).all()  # noise does not turn the order

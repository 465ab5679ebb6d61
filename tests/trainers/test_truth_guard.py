"""A callback that asks the simulated shop for its truth ends the training of every trainer; what a real shop knows it may ask."""

from __future__ import annotations

import numpy as np
import pytest
from poisons import TRAINERS
from transformers import TrainerCallback

from sidtune.core.errors import DataError
from sidtune.data_builders.shop_world.market import Market
from sidtune.data_builders.shop_world.world import ShopWorld

pytestmark = pytest.mark.medium
ROWS = np.arange(5)
TRUTHS = {
    "attraction": lambda world, market: world.attraction(ROWS),
    "attraction_of": lambda world, market: world.attraction_of(ROWS, np.arange(4)[None, :]),
    "mean_attraction": lambda world, market: world.mean_attraction(ROWS, 2),
    "order_given_click": lambda world, market: world.order_given_click(ROWS),
    "click_probability": lambda world, market: world.click_probability(ROWS),
    "oracle_ranking": lambda world, market: world.oracle_ranking(ROWS, 3),
    "ideal_ranking": lambda world, market: world.ideal_ranking(ROWS, 3),
    "serve": lambda world, market: market.serve(ROWS, market.production(ROWS, 3)),
    "total": lambda world, market: market.total(ROWS, market.production(ROWS, 3)),
    "worth": lambda world, market: market.worth(ROWS),
    "ideal": lambda world, market: market.ideal(ROWS, 3),
    "upper_bound": lambda world, market: market.upper_bound(ROWS, 3),
}


@pytest.fixture(scope="module")
def world():
    return ShopWorld.from_options(n_items=200, n_users=20, n_requests=300, n_departments=3, leaves_per_department=4)


class Planted(TrainerCallback):
    def __init__(self, world, truths):
        self.world, self.truths, self.told = world, truths, []

    def on_step_end(self, *args, **kwargs):
        market = Market(self.world)
        self.world.propensity(ROWS)
        self.world.exposure_probability(ROWS)
        market.scores(ROWS, market.production(ROWS, 5))
        for truth in self.truths:
            try:
                truth(self.world, market)
            except DataError as error:
                self.told.append(str(error))
        if self.told:
            raise DataError(self.told[0])


@pytest.mark.parametrize("name", TRAINERS)
def test_a_callback_that_looks_ends_the_training(world, name, tmp_path):
    planted = Planted(world, TRUTHS.values())
    trainer = TRAINERS[name](tmp_path)
    trainer.add_callback(planted)
    with pytest.raises(DataError, match="asked the simulated shop for its truth.*look at the truth after the training"):
        trainer.train()
    assert len(planted.told) == len(TRUTHS) and trainer.state.global_step == 1
    for truth in TRUTHS.values():  # over, whatever ended it
        assert len(np.atleast_1d(np.asarray(truth(world, Market(world)), dtype=object)))


def test_a_callback_that_asks_what_a_shop_knows_trains_on(world, tmp_path):
    planted = Planted(world, [])
    trainer = TRAINERS["sft"](tmp_path)
    trainer.add_callback(planted)
    assert trainer.train().global_step > 1

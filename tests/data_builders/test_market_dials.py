"""Who knows of a phenomenon gains nothing without it, to the last bit, and something with it."""

from __future__ import annotations

import pytest

from sidtune.benchmarks import market_dials

pytestmark = pytest.mark.medium


@pytest.mark.parametrize("case", market_dials.CASES, ids=lambda case: case.dial)
def test_knowing_is_worth_nothing_at_0_and_more_with_the_dial(case, monkeypatch):
    monkeypatch.setattr(market_dials, "SIZE", {"n_items": 300, "n_users": 100, "n_requests": 1500})
    low, middle, high = (market_dials.gain(case, level, 0, 25) for level in (0.0, *case.levels[::2]))
    assert low == 0.0 <= middle < high and high > 0.01

"""Words of the market: paraphrases that no item has, and records that lack values. The shop beneath stays the same."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest

from sidtune.data_builders.shop_world import words
from sidtune.data_builders.shop_world.blanks import BLANK, BLANKABLE, left_out
from sidtune.data_builders.shop_world.config import ShopWorldConfig
from sidtune.data_builders.shop_world.items import item_table
from sidtune.data_builders.shop_world.market import Market
from sidtune.data_builders.shop_world.paraphrases import ASKED, LEAVES
from sidtune.data_builders.shop_world.requests import BROWSE, DEPARTMENT, HOME, query_texts
from sidtune.data_builders.shop_world.world import ShopWorld

pytestmark = pytest.mark.medium
SMALL = ShopWorldConfig(seed=1, n_items=200, n_users=60, n_requests=3000, n_departments=3, leaves_per_department=4)


def _shop(**dials):
    return ShopWorld(dataclasses.replace(SMALL, phenomena=dials))


def _words(text):
    return set(re.findall(r"\w+", text.casefold()))


def test_no_word_of_a_paraphrase_stands_in_the_text_of_an_item():
    """Sheet 3.9, and more: not even one word but the smallest; every leaf and every asked value has its own two."""
    shop = ShopWorld(ShopWorldConfig(n_requests=100))
    texts = item_table(shop.config, shop.catalogue)
    taken = set().union(*(_words(text) for name in ("title", "description") for text in texts[name].to_pylist()))
    taken |= set().union(*(_words(" ".join(nouns)) for d in words.DEPARTMENTS for _, nouns in d.leaves))
    small = _words("a the to in on for of with and by it this is as from at")
    phrases = [phrase for pair in (*LEAVES.values(), *ASKED.values()) for phrase in pair]
    assert {phrase: _words(phrase) & taken - small for phrase in phrases if _words(phrase) & taken - small} == {}
    assert len(set(phrases)) == len(phrases) == 2 * (len(LEAVES) + len(ASKED))
    assert set(LEAVES) == {nouns[0] for d in words.DEPARTMENTS for _, nouns in d.leaves}
    assert set(ASKED) == {*words.COLOURS, *words.STYLES, *words.MATERIALS}


def test_a_lexical_gap_changes_words_only():
    plain, gap = ShopWorld(SMALL), _shop(lexical_gap=0.3)
    assert all((getattr(plain.log, name) == getattr(gap.log, name)).all() for name in ("item", "click", "order"))
    assert item_table(SMALL, plain.catalogue).equals(item_table(gap.config, gap.catalogue))
    before, after = (query_texts(w.config, w.requests).to_pylist() for w in (plain, gap))
    kinds = plain.requests.kind
    changed = np.array([a != b for a, b in zip(before, after, strict=True)])
    can = ~np.isin(kinds, (DEPARTMENT, HOME, BROWSE))
    assert not changed[~can].any() and abs(changed[can].mean() - 0.3) < 4 * math.sqrt(0.21 / can.sum())
    phrases = {phrase for pair in (*LEAVES.values(), *ASKED.values()) for phrase in pair}
    assert all(any(phrase in text for phrase in phrases) for text, hard in zip(after, changed, strict=True) if hard)
    assert all((_shop(lexical_gap=1.0).requests.noun >= 3)[can])


def test_values_left_out_are_in_no_text_and_shown_lists_stay():
    plain, shop = ShopWorld(SMALL), _shop(missing_attributes=0.4)
    table, blank = item_table(shop.config, shop.catalogue).to_pylist(), left_out(shop.config)
    assert (plain.log.click == shop.log.click).all() and not left_out(SMALL).any()
    assert (abs(blank.mean(axis=0) - 0.4) < 4 * math.sqrt(0.24 / len(blank))).all()
    full = item_table(SMALL, plain.catalogue).to_pylist()
    for row, gone, whole in zip(table, blank, full, strict=True):
        values = {**{one["name"]: one["value"] for one in whole["attributes"]}, "brand": whole["brand"]}
        text, kept = f"{row['title']} {row['description']}", {one["name"] for one in row["attributes"]}
        for name, out in zip(BLANKABLE, gone, strict=True):
            assert not (out and _words(values[name]) <= _words(text))
            assert (row["brand"] is None) == out if name == "brand" else (name in kept) != out
        assert row["category"][-1] in text.casefold() or set(row["category"]) <= set(whole["category"])
        assert BLANK not in text and not re.search(
            r"  | [,.)]|,,|\(\)|\. ?,|^,|\b(by|in|from|of|and|with a)[ ]?([,.)]|$)", text
        )


@pytest.mark.parametrize(("share", "low", "high"), [(0.25, 0.08, 0.22), (0.5, 0.2, 0.4), (1.0, 0.4, 0.7)])
def test_what_a_reader_of_records_with_blanks_loses(share, low, high):
    """Sheet 3.9: 16, 31, 59 % of the clicks of the first ten, for a reader who takes the mean over what may be missing."""
    config = ShopWorldConfig(seed=0, n_requests=4000, phenomena={"missing_attributes": share})
    shop, blank, draw = ShopWorld(config), left_out(config), np.random.default_rng(0)
    rows = np.flatnonzero(shop.requests.kind == 0)[:40]
    catalogue, mean = shop.catalogue, 0.0
    for _ in range(24):
        other = draw.permutation(config.n_items)
        by_department = np.empty(config.n_items, dtype=np.int64)
        for d in range(config.n_departments):
            mine = np.flatnonzero(catalogue.department == d)
            by_department[mine] = draw.permutation(mine)
        guess = {
            name: np.where(out, getattr(catalogue, name)[by_department if name == "brand" else other], getattr(catalogue, name))
            for name, out in zip(BLANKABLE, blank.T, strict=True) if name != "material"
        }  # fmt: skip
        reader = ShopWorld(config)
        reader.catalogue = dataclasses.replace(catalogue, **guess)
        brand, colour, style = reader.catalogue.brand, reader.catalogue.colour, reader.catalogue.style
        reader._column_of = np.stack([brand, config.n_brands + colour, config.n_brands + len(words.COLOURS) + style])
        mean = mean + reader.attraction(rows)
    own = Market(shop)
    chosen = np.argsort(-mean, axis=1, kind="stable")[:, :10]
    assert low < 1 - own.total(rows, chosen).mean() / own.total(rows, own.ideal(rows, 10)).mean() < high

"""Mined pairs against plain loops over small random logs, and what a pair may and may not come from."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from data_folders import sound_rows, tables_of

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.mining.alignment_pairs import (
    CLICK,
    ORDER,
    SHOW,
    Behaviours,
    MiningConfig,
    behaviour_rows,
    behaviours,
    held_out_pairs,
    mine_pairs,
)
from sidtune.data_builders.mining.pairs import (
    Pairs,
    counted,
    interaction_matrix,
    item_cf,
    keep_similar,
    merged,
    swing,
)
from sidtune.data_builders.tables.schema import table_from_rows


def log(seed: int, owners: int = 14, things: int = 9, events: int = 70) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.integers(0, owners, events), (draw.random(events) ** 2 * things).astype(np.int64)


def sets_of(owners, things) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """Owners of each thing, things of each owner."""
    of_thing, of_owner = {}, {}
    for owner, thing in zip(owners.tolist(), things.tolist(), strict=True):
        of_thing.setdefault(thing, set()).add(owner)
        of_owner.setdefault(owner, set()).add(thing)
    return of_thing, of_owner


def best_by_loop(scores: dict[tuple[int, int], tuple[float, int]], k: int, min_support: int) -> dict:
    found = {}
    for left in {pair[0] for pair in scores}:
        mine = [(-score, right, support) for (a, right), (score, support) in scores.items() if a == left]
        mine = sorted(entry for entry in mine if entry[2] >= min_support)[:k]
        found.update({(left, right): (-score, support) for score, right, support in mine})
    return found


def as_dict(pairs: Pairs) -> dict[tuple[int, int], tuple[float, int]]:
    return {
        (int(a), int(b)): (float(s), int(n))
        for a, b, s, n in zip(pairs.left, pairs.right, pairs.score, pairs.support, strict=True)
    }


def assert_same(found: Pairs, expected: dict) -> None:
    got = as_dict(found)
    assert len(got) == len(found) and got.keys() == expected.keys() and expected
    for pair, (score, support) in expected.items():
        assert got[pair][0] == pytest.approx(score, rel=1e-12) and got[pair][1] == support


@pytest.mark.parametrize("seed", [0, 1])
def test_item_cf_equals_a_plain_loop(seed):
    owners, things = log(seed)
    of_thing, _ = sets_of(owners, things)
    scores = {}
    for i in of_thing:
        for j in of_thing.keys() - {i}:
            both = of_thing[i] & of_thing[j]
            if both:
                scores[i, j] = len(both) / math.sqrt(len(of_thing[i]) * len(of_thing[j])), len(both)
    matrix = interaction_matrix(owners, things, 14, 9)
    assert_same(item_cf(matrix, 100, 1), best_by_loop(scores, 100, 1))
    assert_same(item_cf(matrix, 3, 2), best_by_loop(scores, 3, 2))


def swing_by_loop(of_thing, of_owner, alpha: float, cap: int = 10**9) -> dict:
    kept = {i: set(sorted(owners, key=lambda u: (len(of_owner[u]), u))[:cap]) for i, owners in of_thing.items()}
    scores = {}
    for i in of_thing:
        for j in of_thing.keys() - {i}:
            total = 0.0
            for u, v in combinations(sorted(kept[i] & kept[j]), 2):
                w = 1 / math.sqrt(len(of_owner[u]) * len(of_owner[v]))
                total += w / (alpha + len(of_owner[u] & of_owner[v]))
            if total:
                scores[i, j] = total, len(of_thing[i] & of_thing[j])
    return scores


@pytest.mark.parametrize(("seed", "alpha"), [(0, 1.0), (1, 0.3), (2, 5.0)])
def test_swing_equals_a_plain_loop(monkeypatch, seed, alpha):
    monkeypatch.setattr("sidtune.data_builders.mining.pairs._OWNER_PAIRS", 40)  # several pieces
    owners, things = log(seed)
    expected = swing_by_loop(*sets_of(owners, things), alpha)
    matrix = interaction_matrix(owners, things, 14, 9)
    assert_same(swing(matrix, alpha, 100, 1), best_by_loop(expected, 100, 1))
    assert_same(swing(matrix, alpha, 2, 3), best_by_loop(expected, 2, 3))


def test_capped_swing_reads_the_owners_with_the_fewest_things():
    owners, things = log(3, events=120)
    expected = swing_by_loop(*sets_of(owners, things), 1.0, cap=4)
    assert expected != swing_by_loop(*sets_of(owners, things), 1.0)
    assert_same(swing(interaction_matrix(owners, things, 14, 9), 1.0, 100, 1, 4), best_by_loop(expected, 100, 1))


def test_repeats_count_once_and_ties_go_to_the_lower_row():
    matrix = interaction_matrix(np.array([0, 0, 0, 1, 1, 1]), np.array([2, 2, 0, 0, 1, 2]), 2, 3)
    assert matrix.sum() == 5
    pairs = item_cf(interaction_matrix(np.repeat([0, 1], 3), np.tile([0, 1, 2], 2), 2, 3), k=1)
    assert pairs.rows().tolist() == [[0, 1], [1, 0], [2, 0]]


def test_merged_pairs_have_no_direction():
    a = Pairs(np.array([1, 3]), np.array([0, 2]), np.array([0.5, 0.1]), np.array([2, 3]))
    b = Pairs(np.array([0, 4]), np.array([1, 1]), np.array([7.0, 9.0]), np.array([5, 1]))
    assert as_dict(merged(a, b)) == {(0, 1): (0.5, 5), (2, 3): (0.1, 3), (1, 4): (9.0, 1)}
    assert len(merged()) == 0


def test_counted_pairs_are_the_most_frequent():
    pairs = counted(np.array([0, 0, 0, 0, 1]), np.array([5, 5, 0, 6, 1]), k=2)
    assert as_dict(pairs) == {(0, 5): (2.0, 2), (0, 0): (1.0, 1), (1, 1): (1.0, 1)}  # a query row may equal an item row
    assert as_dict(counted(np.array([0, 0, 0]), np.array([5, 5, 0]), min_support=2)) == {(0, 5): (2.0, 2)}


def test_the_filter_is_a_strict_cosine_whatever_the_lengths(monkeypatch):
    monkeypatch.setattr("sidtune.data_builders.mining.pairs._CELLS", 10)
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(30, 4)) * draw.random((30, 1)), draw.normal(size=(20, 4))
    a[3] = 0
    left, right = draw.integers(0, 30, 50), draw.integers(0, 20, 50)
    left[0] = 3
    kept, values = keep_similar(Pairs(left, right, np.zeros(50), np.ones(50, int)), a, b, 0.2)
    for n in range(50):
        norm = np.linalg.norm(a[left[n]]) * np.linalg.norm(b[right[n]])
        assert values[n] == pytest.approx(a[left[n]] @ b[right[n]] / norm if norm else 0.0)
    assert kept.rows().tolist() == [[x, y] for x, y, v in zip(left, right, values, strict=True) if v > 0.2]
    one = Pairs(np.array([0]), np.array([0]), np.ones(1), np.ones(1, int))
    assert not len(keep_similar(one, np.eye(2), np.eye(2), 1.0)[0])
    with pytest.raises(ConfigError, match=r"a cosine in \[-1, 1\]"):
        keep_similar(one, np.eye(2), np.eye(2), 1.1)
    with pytest.raises(DataError, match="outside the 0 vectors"):
        keep_similar(one, np.eye(2)[:0], np.eye(2), 0.5)


def requests_of(*rows: tuple[str | None, list[tuple]]):
    """Requests of (query, [(item, click, order)])."""
    made = []
    for n, (query, shown) in enumerate(rows):
        candidates = [{"item_id": i, "position": p, "click": c, "order": o} for p, (i, c, o) in enumerate(shown)]
        made.append({"request_id": f"r{n}", "user_id": "u0", "time": n, "query": query, "candidates": candidates})
    return table_from_rows("requests", made)


def test_behaviour_is_the_strongest_over_all_requests_and_null_says_nothing():
    items = tables_of(sound_rows()).items
    requests = requests_of(
        ("a  b", [("i0", 0, 0), ("i1", 1, 0), ("i2", None, None), ("gone", 1, 1)]),
        ("a b", [("i0", 1, 1), ("i3", 0, None)]),
        (None, [("i2", 1, 0)]),
    )
    found = behaviours(requests, ["a b"], items)
    triples = set(zip(found.query.tolist(), found.item.tolist(), found.level.tolist(), strict=True))
    assert triples == {(0, 0, ORDER), (0, 1, CLICK), (0, 3, SHOW)}


def test_order_rows_name_an_item_of_each_level():
    draw = np.random.default_rng(0)
    query = np.sort(draw.integers(0, 6, 60))
    found = Behaviours(query, np.arange(60), draw.choice([SHOW, CLICK, ORDER], 60, p=[0.6, 0.3, 0.1]).astype(np.int8))
    only_shown = found.query == 2
    found.level[only_shown] = SHOW
    found.level[found.query == 3] = np.where(
        found.level[found.query == 3] == CLICK, ORDER, found.level[found.query == 3]
    )
    rows = behaviour_rows(found, per_query=200)
    level, of = dict(enumerate(found.level.tolist())), dict(enumerate(found.query.tolist()))
    for query, *items in rows.tolist():
        for item, wanted in zip(items, (ORDER, CLICK, SHOW), strict=True):
            there = [n for n in of if of[n] == query and level[n] == wanted]
            assert item in there if there else item == -1
    assert not (rows[:, 0] == 2).any() and (rows[rows[:, 0] == 3, 2] == -1).all()
    used = {tuple(pair) for row in rows.tolist() for pair in ((row[0], i) for i in row[1:]) if pair[1] >= 0}
    assert used == {(of[n], n) for n in of if of[n] != 2}  # with enough draws every item is drawn
    assert not len(behaviour_rows(Behaviours(*(np.empty(0, int),) * 3)))


def test_mined_pairs_come_from_the_given_tables_only():
    rows = sound_rows()
    tables = tables_of(rows)
    mined = mine_pairs(tables.items, tables.events, tables.requests, MiningConfig(min_support=1))
    clicked = {(row["user_id"], row["item_id"]) for row in rows["events"]}
    pairs = {(int(a[1:]), int(b[1:])) for u, a in clicked for v, b in clicked if u == v and a < b}
    assert {tuple(pair) for pair in mined.i2i.rows().tolist()} == pairs
    asked = {(r["query"], c["item_id"]) for r in rows["requests"] if r["query"] for c in r["candidates"] if c["click"]}
    assert {(mined.queries[q], f"i{i}") for q, i in mined.q2i.rows().tolist()} == asked
    q2q = {(a, b) for a, i in asked for b, j in asked if i == j and mined.queries.index(a) < mined.queries.index(b)}
    assert {(mined.queries[a], mined.queries[b]) for a, b in mined.q2q.rows().tolist()} == q2q
    stranger = table_from_rows("events", [{**rows["events"][0], "item_id": "gone"}, {**rows["events"][0]}])
    assert not len(mine_pairs(tables.items, stranger, tables.requests).i2i)


def test_held_out_pairs_know_which_are_new():
    tables = tables_of(sound_rows())
    early = requests_of(("x", [("i0", 1, 0)]))
    late = requests_of(("x", [("i0", 1, 0), ("i1", 0, 1), ("i2", 0, 0)]), ("new one", [("i0", 1, 0)]))

    def events(*choices):
        fields = ("user_id", "item_id", "time", "action")
        return table_from_rows("events", [dict(zip(fields, choice, strict=True)) for choice in choices])

    old = events(("u0", "i0", 1, "click"), ("u0", "i1", 2, "click"))
    later = events(
        ("u0", "i0", 9, "click"), ("u0", "i0", 9, "order"), ("u0", "i1", 10, "click"), ("u1", "i3", 11, "click"),
        ("u0", "i0", 12, "click"), ("u0", "i2", 13, "like"), ("u0", "i3", 14, "view"),
    )  # fmt: skip
    held = held_out_pairs(tables.items, later, late, old, early)
    assert held.queries == ["x", "new one"] and held.q2i.tolist() == [[0, 0], [0, 1], [1, 0]]
    assert held.q2i_new.tolist() == [False, True, True]
    assert held.i2i.tolist() == [[0, 1], [1, 2]] and held.i2i_new.tolist() == [False, True]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: item_cf(interaction_matrix(np.zeros(1, int), np.zeros(1, int), 1, 1), 0), "must be 1 or more, got 0"),
        (lambda: swing(interaction_matrix(np.zeros(1, int), np.zeros(1, int), 1, 1), 0.0), "alpha above 0"),
        (lambda: MiningConfig(methods=["swing", "wing"]), "holds 'wing'; name at least one of item_cf, swing"),
        (lambda: MiningConfig(actions=[]), "holds nothing"),
        (lambda: MiningConfig(k=0), "k must be at least 1"),
        (lambda: interaction_matrix(np.zeros(2, int), np.zeros(1, int), 1, 1), "lists of one length"),
        (
            lambda: interaction_matrix(np.array([3]), np.zeros(1, int), 1, 1),
            r"A row of the owners lies outside \[0, 1\)",
        ),
    ],
)
def test_wrong_options_are_told_in_one_sentence(make, sentence):
    with pytest.raises((ConfigError, DataError), match=sentence):
        make()

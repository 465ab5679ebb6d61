"""Beams to items against a plain loop."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.items import BeamOutput, LeafItems, rank_items
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.sids.semantic_ids import SemanticIds


@dataclass
class Ragged:
    offsets: np.ndarray
    rows: np.ndarray


def beam_of(leaves, scores):
    return BeamOutput(torch.tensor(leaves), torch.tensor(scores, dtype=torch.float32))


def loop(leaves, scores, items, k, exclude):
    """The documented policy, one item at a time."""
    rows, values = [], []
    for leaf_row, score_row, hidden in zip(leaves, scores, exclude, strict=True):
        found = []
        for score, leaf in sorted(zip(score_row, leaf_row, strict=True), key=lambda pair: (-pair[0], pair[1])):
            if leaf >= 0:
                mine = items.rows[items.offsets[leaf] : items.offsets[leaf + 1]].tolist()
                found += [(row, score) for row in mine if row not in hidden]
        found = found[:k] + [(-1, float("-inf"))] * (k - len(found))
        rows.append([row for row, _ in found])
        values.append([score for _, score in found])
    return rows, values


@st.composite
def searches(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    order = np.array(draw(st.permutations(range(sum(sizes)))), dtype=np.int64)
    items = LeafItems(np.cumsum([0, *sizes]), order)
    requests, beams = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    number = st.sampled_from([-0.5, -1.0, -1.5, -3.0])
    leaves, scores, hidden = [], [], []
    for _ in range(requests):
        live = draw(st.permutations(range(len(sizes))))[: draw(st.integers(0, min(beams, len(sizes))))]
        leaves.append(list(live) + [-1] * (beams - len(live)))
        scores.append(sorted((draw(number) for _ in live), reverse=True) + [float("-inf")] * (beams - len(live)))
        hidden.append(draw(st.lists(st.integers(-1, sum(sizes) + 1), max_size=6)))
    return items, leaves, scores, hidden, draw(st.integers(1, 12))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(searches(), st.booleans())
def test_ranking_is_the_plain_loop(search, as_lists):
    items, leaves, scores, hidden, k = search
    ragged = Ragged(
        np.cumsum([0, *map(len, hidden)]), np.array([row for part in hidden for row in part], dtype=np.int64)
    )
    exclude = hidden if as_lists else ragged
    rows, values = rank_items(beam_of(leaves, scores), items, k, exclude=exclude)
    expected = loop(leaves, scores, items, k, hidden)
    assert rows.dtype == np.int64 and values.dtype == np.float32
    assert rows.tolist() == expected[0]
    np.testing.assert_array_equal(values, np.array(expected[1], dtype=np.float32))
    if not any(hidden):
        same = rank_items(beam_of(leaves, scores), items, k)
        np.testing.assert_array_equal(same[0], rows)


def test_items_of_one_sid_come_by_popularity_then_id():
    codes = np.array([[1, 0], [0, 1], [1, 0], [1, 0], [0, 1]])
    sids = SemanticIds(["d", "b", "c", "a", "e"], codes, (2, 2), popularity=np.array([2.0, 1, 9, 2, 1]))
    trie = SidTrie.from_semantic_ids(sids)
    leaf = (trie.find(torch.tensor([[1, 0], [0, 1]])) - trie.level_starts[-2]).tolist()
    rows, scores = rank_items(beam_of([[*leaf, -1]], [[-0.1, -2.0, float("-inf")]]), sids, 6)
    assert [sids.item_ids[row] for row in rows[0, :5]] == ["c", "a", "d", "b", "e"]
    assert rows[0, 5] == -1 and scores[0, 5] == -np.inf
    np.testing.assert_allclose(scores[0, :5], [-0.1, -0.1, -0.1, -2, -2])


def test_a_leaf_with_most_of_the_catalogue_is_not_expanded_in_full(monkeypatch):
    items = LeafItems(np.array([0, 500_000, 500_003]), np.arange(500_003))
    beams = beam_of([[0, 1]] * 50, [[-1.0, -2.0]] * 50)
    seen = []
    isin = np.isin
    monkeypatch.setattr(np, "isin", lambda a, b: seen.append(len(a)) or isin(a, b))
    rows, _ = rank_items(beams, items, 10, exclude=[[0, 1]] * 50)
    assert rows.tolist() == [list(range(2, 12))] * 50
    assert len(seen) == 1 and seen[0] <= 50 * 2 * (10 + 2)


LEAVES = LeafItems(np.array([0, 2, 3]), np.array([1, 0, 2]))
BEAM = beam_of([[0, 1]], [[-1.0, -2.0]])
BAD = {
    "no items asked": (ConfigError, "at least 1", {"k": 0}),
    "beams of another catalogue": (DataError, "distinct SIDs", {"beam": beam_of([[0, 2]], [[-1.0, -2.0]])}),
    "shapes differ": (DataError, "one shape", {"beam": beam_of([[0, 1]], [[-1.0]])}),
    "too few exclusions": (DataError, "2 requests", {"exclude": [[0], [1]]}),
    "exclusions of another kind": (DataError, "int", {"exclude": 3}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_sentence(case):
    error, words, change = BAD[case]
    call = {"beam": BEAM, "k": 3, **change}
    with pytest.raises(error, match=words):
        rank_items(call.pop("beam"), LEAVES, call.pop("k"), **call)

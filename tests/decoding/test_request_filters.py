"""Filters of single requests against searches over a trie without the other items."""

import numpy as np
import pytest
import torch
from decoding_oracles import LEVEL_SIZES, make_model, random_codes, random_prompts, random_token_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from sidtune.core.errors import DataError
from sidtune.decoding.beam_search import sid_beam_search
from sidtune.decoding.filters import ItemFilter, RequestFilter
from sidtune.decoding.items import LeafItems, rank_items
from sidtune.decoding.sampling import sid_sample
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

TOKENS = random_token_ids(2)
TRIE = SidTrie.from_codes(random_codes(1), LEVEL_SIZES).bind(TOKENS)
IDS, MASK = random_prompts(3)
ALL = np.arange(TRIE.num_leaves)


def legal_nodes(trie, allowed):
    """Brute force: prefixes of the allowed leaves, as node numbers."""
    codes = trie.leaf_codes(torch.from_numpy(np.asarray(allowed, dtype=np.int64)))
    return {int(n) for length in range(trie.depth + 1) for n in trie.find(codes[:, :length]).tolist()}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.booleans())
def test_legal_nodes_are_the_prefixes_of_allowed_leaves(seed, with_exclude, with_only, restricted):
    draw = np.random.default_rng(seed)
    sizes = (3, 4, 3)
    whole = SidTrie.from_codes(np.stack([draw.integers(0, s, 14) for s in sizes], axis=1), sizes)
    stock = draw.random(whole.num_leaves) < 0.7
    trie = whole.restrict(stock) if restricted else whole
    some = lambda share: np.flatnonzero(draw.random(trie.num_leaves) < share)  # noqa: E731
    exclude = [some(0.4), None, some(0.9), some(0.0)] if with_exclude else None
    only = [None, some(0.3), some(0.5), some(0.0)] if with_only or not with_exclude else None
    filters = RequestFilter(trie, exclude, only)
    nodes = torch.arange(trie.num_nodes).expand(4, -1)
    allows = filters.allows(nodes)
    parts = torch.cat([filters.part(slice(0, 3)).allows(nodes[:3]), filters.part(torch.tensor([3])).allows(nodes[3:])])
    assert torch.equal(parts, allows)
    if trie.alive is not None:
        allows = allows & trie.alive
    for request in range(4):
        allowed = set(range(trie.num_leaves)) if not restricted else set(np.flatnonzero(stock).tolist())
        if only is not None and only[request] is not None:
            allowed &= set(only[request].tolist())
        if exclude is not None and exclude[request] is not None:
            allowed -= set(exclude[request].tolist())
        expected = legal_nodes(whole, sorted(allowed)) if allowed else set()
        assert set(allows[request].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("name", ["qwen3", "t5"])
@pytest.mark.parametrize("beams", [3, 40])
def test_a_filtered_search_equals_a_search_over_a_smaller_trie(name, beams):
    model, draw = make_model(name), np.random.default_rng(0)
    exclude = [draw.choice(ALL, 9, replace=False), None, ALL, draw.choice(ALL, 20, replace=False)]
    only = [None, draw.choice(ALL, 6, replace=False), ALL, ALL[:4]]
    filters = RequestFilter(TRIE, exclude, only)
    found = sid_beam_search(model, IDS, MASK, trie=TRIE, num_beams=beams, filters=filters)
    chunked = sid_beam_search(model, IDS, MASK, trie=TRIE, num_beams=beams, filters=filters, max_rows=1)
    assert torch.equal(found.leaves, chunked.leaves)
    for row in range(len(IDS)):
        allowed = np.ones(TRIE.num_leaves, dtype=bool)
        if only[row] is not None:
            allowed = np.isin(ALL, only[row])
        if exclude[row] is not None:
            allowed &= ~np.isin(ALL, exclude[row])
        part = IDS[row : row + 1], MASK[row : row + 1]
        alone = sid_beam_search(model, *part, trie=TRIE.restrict(allowed), num_beams=beams)
        assert torch.equal(alone.leaves[0], found.leaves[row])
        np.testing.assert_allclose(alone.scores[0], found.scores[row], atol=1e-5, rtol=1e-5)
    assert (found.leaves[2] == -1).all() and (found.leaves[0] >= 0).any()


def test_samples_obey_the_filter():
    model = make_model("qwen3")
    only = [ALL[:3], ALL[5:9], ALL[10:10], None]
    filters = RequestFilter(TRIE, None, only)
    for replacement in (True, False):
        drawn = sid_sample(
            model, IDS, MASK, trie=TRIE, num_samples=40, filters=filters, replacement=replacement,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        assert set(drawn.leaves[0].tolist()) - {-1} <= {0, 1, 2} and set(drawn.leaves[1].tolist()) - {-1} <= {
            5,
            6,
            7,
            8,
        }
        assert (drawn.leaves[2] == -1).all() and (drawn.log_probs[2] == -torch.inf).all()
        assert len(set(drawn.leaves[3].tolist())) > 4


def test_item_filters_are_exact_where_items_share_a_leaf():
    codes = np.array([[0, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 2], [1, 0, 2], [1, 0, 2], [2, 2, 2]])
    sids = SemanticIds([f"i{n}" for n in range(len(codes))], codes, LEVEL_SIZES)
    trie, items, model = (
        SidTrie.from_semantic_ids(sids).bind(TOKENS),
        LeafItems.from_semantic_ids(sids),
        make_model("gpt2"),
    )
    exclude = [np.array([0]), np.array([0, 1]), None, np.array([3, 4, 5, 6])]
    only = [None, None, np.array([1, 4, 6]), np.array([0, 3, 6])]
    chosen = ItemFilter(items, exclude, only)
    beams = sid_beam_search(model, IDS, MASK, trie=trie, num_beams=9, filters=chosen.leaves(trie))
    rows, scores = chosen.rank(beams, 7)
    everything = [set(range(7)) - {0}, set(range(7)) - {0, 1}, {1, 4, 6}, {0}]
    for row, allowed in enumerate(everything):
        assert set(rows[row][rows[row] >= 0].tolist()) == allowed
        leaf_mask = np.array(
            [bool(allowed & set(items.rows[a:b])) for a, b in zip(items.offsets, items.offsets[1:], strict=False)]
        )
        alone = sid_beam_search(
            model, IDS[row : row + 1], MASK[row : row + 1], trie=trie.restrict(leaf_mask), num_beams=9
        )
        expected, values = rank_items(alone, items, 7, exclude=[sorted(set(range(7)) - allowed)])
        assert rows[row].tolist() == expected[0].tolist()
        np.testing.assert_allclose(scores[row], values[0], atol=1e-5)
    part = chosen.part([3, 2])
    assert part.rank(type(beams)(beams.leaves[[3, 2]], beams.scores[[3, 2]]), 7)[0].tolist() == rows[[3, 2]].tolist()
    assert ItemFilter(items).leaves(trie) is None


def test_requests_that_share_a_list_share_its_keys():
    many = np.arange(TRIE.num_leaves)
    alone = RequestFilter(TRIE, [many[:9]], [many])
    together = RequestFilter(TRIE, [many[:3], *[many[:9]] * 49], [many] * 50)
    assert len(together._legal) == len(alone._legal) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs `exclude`"),
        ({"exclude": [None], "only": [None, None]}, "one entry per request"),
        ({"exclude": [np.array([10**6])]}, "names leaves"),
        ({"only": [np.array([-1])]}, "names leaves"),
    ],
)
def test_filters_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(DataError, match=words):
        RequestFilter(TRIE, **arguments)


def test_a_filter_of_other_requests_or_another_trie_is_refused():
    model, other = make_model("qwen3"), SidTrie.from_codes(random_codes(5, 9), LEVEL_SIZES)
    with pytest.raises(DataError, match="4 prompts"):
        sid_beam_search(model, IDS, MASK, trie=TRIE, filters=RequestFilter(TRIE, [None] * 3))
    with pytest.raises(DataError, match="nodes"):
        sid_beam_search(model, IDS, MASK, trie=TRIE, filters=RequestFilter(other, [None] * 4))
    items = LeafItems(np.arange(3), np.arange(2))
    with pytest.raises(DataError, match="item rows"):
        ItemFilter(items, exclude=[np.array([7])]).leaves(TRIE)

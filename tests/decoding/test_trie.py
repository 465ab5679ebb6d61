"""SidTrie against a dictionary of prefixes: legal sets, numbering, filters, look-ups, files."""

import itertools
import json

import numpy as np
import pytest
import torch
from decoding_oracles import prefix_dictionary, sorted_leaves
from hypothesis import given, settings
from hypothesis import strategies as st

from sidtune.core.errors import DataError
from sidtune.decoding.trie import META_FILE, TENSOR_FILE, SidTrie


@st.composite
def catalogues(draw):
    """(codes, level_sizes); now and then with levels so large that packed 64-bit keys do not fit."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 7, 2**31 - 1]), min_size=1, max_size=4))
    row = st.tuples(*(st.integers(0, size - 1) if size < 8 else st.sampled_from([0, 5, size - 1]) for size in sizes))
    rows = draw(st.lists(row, min_size=1, max_size=30))
    return np.array(rows, dtype=draw(st.sampled_from([np.int32, np.int64, np.uint32]))), tuple(sizes)


def node_of(trie: SidTrie, prefix: tuple[int, ...]) -> int:
    return int(trie.find(torch.tensor([prefix], dtype=torch.int64).reshape(1, -1))[0])


def check_legal_sets(trie: SidTrie, legal: dict[tuple[int, ...], list[int]]) -> None:
    """Every way to ask for the legal codes of a prefix gives the dictionary's answer."""
    for level in range(trie.depth):
        prefixes = sorted(prefix for prefix in legal if len(prefix) == level)
        if not prefixes:
            continue
        nodes = torch.tensor([node_of(trie, prefix) for prefix in prefixes])
        for constant_width in (None, level):
            codes, children, mask = trie.children(nodes, constant_width)
            for row, prefix in enumerate(prefixes):
                assert codes[row][mask[row]].tolist() == legal[prefix]
                for code, child in zip(codes[row][mask[row]].tolist(), children[row][mask[row]].tolist(), strict=True):
                    assert child == node_of(trie, (*prefix, code))
            assert (children[~mask] == -1).all()
        if trie.level_sizes[level] < 10:
            dense = trie.legal_mask(level, nodes)
            assert dense.shape == (len(prefixes), trie.level_sizes[level])
            for row, prefix in enumerate(prefixes):
                assert dense[row].nonzero().flatten().tolist() == legal[prefix]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(catalogues())
def test_trie_is_the_dictionary_of_prefixes(catalogue):
    codes, sizes = catalogue
    trie, legal, leaves = SidTrie.from_codes(codes, sizes), prefix_dictionary(codes), sorted_leaves(codes)
    assert (trie.depth, trie.level_sizes, trie.num_leaves) == (len(sizes), sizes, len(leaves))
    assert trie.num_allowed_leaves == len(leaves)
    assert trie.num_nodes == len({row[:length] for row in leaves for length in range(len(sizes) + 1)})
    assert [tuple(row) for row in trie.leaf_codes(torch.arange(trie.num_leaves)).tolist()] == leaves
    assert (trie.find(torch.tensor(leaves)) - trie.level_starts[-2]).tolist() == list(range(len(leaves)))
    check_legal_sets(trie, legal)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(catalogues(), st.data())
def test_filtered_prefix_is_legal_iff_an_allowed_leaf_is_below(catalogue, data):
    codes, sizes = catalogue
    trie, leaves = SidTrie.from_codes(codes, sizes), sorted_leaves(codes)
    flags = st.lists(st.booleans(), min_size=len(leaves), max_size=len(leaves))
    first, second = np.array(data.draw(flags)), np.array(data.draw(flags))
    for view, allowed in [
        (trie.restrict(first), first),
        (trie.restrict(first).restrict(torch.from_numpy(second)), first & second),
    ]:
        kept = np.array([leaf for leaf, flag in zip(leaves, allowed, strict=True) if flag]).reshape(-1, len(sizes))
        legal = prefix_dictionary(kept)
        check_legal_sets(view, legal)
        assert view.num_allowed_leaves == int(allowed.sum())
        assert view.num_leaves == trie.num_leaves
        found = view.find(torch.tensor(leaves))
        assert (found >= 0).tolist() == allowed.tolist()
        assert view.allowed_counts == tuple(
            len({row[:length] for row in map(tuple, kept.tolist())}) for length in range(len(sizes) + 1)
        )
    assert trie.num_allowed_leaves == len(leaves), "a view must not change the trie it looks at"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(catalogues())
def test_find_refuses_every_other_code(catalogue):
    codes, sizes = catalogue
    trie, leaves = SidTrie.from_codes(codes, sizes), set(sorted_leaves(codes))
    asked = list(itertools.product(*(sorted({-1, 2**40, *column.tolist()}) for column in codes.T)))
    assert (trie.find(torch.tensor(asked)) >= 0).tolist() == [row in leaves for row in asked]


def test_dead_and_complete_nodes_have_no_children():
    trie = SidTrie.from_codes(np.array([[1, 2], [0, 1], [1, 0]]), (2, 3))
    nodes = torch.tensor([-1, trie.num_nodes - 1, 0])
    assert trie.children(nodes)[2].sum(dim=1).tolist() == [0, 0, 2]
    assert trie.legal_mask(1, torch.tensor([[-1]])).tolist() == [[[False, False, False]]]
    assert trie.step(nodes, torch.tensor(1)).tolist() == [-1, -1, 2]
    assert trie.leaf_codes(torch.tensor([[-1, 2]])).tolist() == [[[-1, -1], [1, 2]]]
    nothing = trie.restrict(np.zeros(3, dtype=bool))
    assert nothing.num_allowed_leaves == 0 and not nothing.children(torch.tensor([0]))[2].any()


def test_leaves_are_the_paths_of_semantic_ids():
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds

    codes = np.random.default_rng(0).integers(0, 4, (60, 3))
    sids = SemanticIds([f"item{n}" for n in range(60)], codes, (4, 4, 4))
    trie = SidTrie.from_semantic_ids(sids)
    assert trie.level_sizes == sids.level_sizes
    np.testing.assert_array_equal(trie.leaf_codes(torch.arange(trie.num_leaves)).numpy(), sids.paths()[0])


def test_level_sizes_default_to_the_largest_codes():
    assert SidTrie.from_codes(torch.tensor([[3, 0], [1, 5]])).level_sizes == (4, 6)


def test_memory_is_proportional_to_the_nodes():
    trie = SidTrie.from_codes(np.random.default_rng(0).integers(0, 256, (20_000, 3)), (256, 256, 256))
    inner = trie.num_nodes - trie.num_leaves
    assert trie.codes.nbytes == 4 * trie.num_nodes
    assert trie.child_start.nbytes == 8 * (inner + 1)
    assert all(not isinstance(value, (dict, list)) for value in vars(trie).values())


@pytest.mark.parametrize("filtered", [False, True])
def test_round_trip_through_files(tmp_path, filtered):
    trie = SidTrie.from_codes(np.random.default_rng(0).integers(0, 4, (40, 3)), (4, 4, 5))
    if filtered:
        trie = trie.restrict(np.arange(trie.num_leaves) % 3 == 0)
    (tmp_path / "other.txt").write_text("stays")
    trie.save_pretrained(tmp_path)
    again = SidTrie.from_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.txt", META_FILE, TENSOR_FILE]
    assert again.level_sizes == trie.level_sizes and again.allowed_counts == trie.allowed_counts
    assert torch.equal(again.codes, trie.codes) and torch.equal(again.child_start, trie.child_start)
    leaves = trie.leaf_codes(torch.arange(trie.num_leaves))
    assert torch.equal(again.find(leaves), trie.find(leaves))


def test_push_and_load_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub.constants
    from hub_stand_in import hub_stand_in

    trie = SidTrie.from_codes(np.random.default_rng(0).integers(0, 4, (40, 3)), (4, 4, 5))
    with hub_stand_in() as (endpoint, state):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        trie.push_to_hub("tester/trie", token="hf_test")
        assert set(state.repos["tester/trie"]) >= {META_FILE, TENSOR_FILE}
        again = SidTrie.from_pretrained("tester/trie", cache_dir=tmp_path)
    assert torch.equal(again.codes, trie.codes) and torch.equal(again.child_start, trie.child_start)
    with pytest.raises(DataError, match="absent"):
        SidTrie.from_pretrained(tmp_path / "absent")


def _damage(folder, kind):
    from safetensors.torch import load_file, save_file

    tensors, meta = load_file(folder / TENSOR_FILE), json.loads((folder / META_FILE).read_text())
    if kind == "truncated":
        data = (folder / TENSOR_FILE).read_bytes()
        (folder / TENSOR_FILE).write_bytes(data[: len(data) // 2])
        return
    if kind == "missing":
        (folder / TENSOR_FILE).unlink()
        return
    if kind == "other catalogue":
        meta["level_sizes"] = [4, 4]
    if kind == "code out of range":
        tensors["codes"][-1] = 99
    if kind == "unsorted":
        tensors["codes"][1:3] = tensors["codes"][1:3].flip(0)
    if kind == "start out of range":
        tensors["child_start"][-1] += 1
    if kind == "descending":
        tensors["child_start"][1:3] = tensors["child_start"][1:3].flip(0)
    save_file(tensors, folder / TENSOR_FILE)
    (folder / META_FILE).write_text(json.dumps(meta))


DAMAGES = [
    "truncated", "missing", "other catalogue", "code out of range", "unsorted", "start out of range", "descending",
]  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, kind):
    SidTrie.from_codes(np.random.default_rng(0).integers(0, 4, (40, 3)), (4, 4, 4)).save_pretrained(tmp_path)
    _damage(tmp_path, kind)
    with pytest.raises(DataError, match="write"):
        SidTrie.from_pretrained(tmp_path)


BAD_CODES = [
    (np.zeros((0, 3), dtype=int), (2, 2, 2), "non-empty"),
    (np.zeros((2, 2)), (2, 2), "integer"),
    (np.zeros(3, dtype=int), (2,), "shape"),
    (np.zeros((2, 2), dtype=int), (2, 2, 2), "3 level sizes"),
    (np.array([[0, 0], [0, 2]]), (2, 2), "Row 1 has code 2 at level 1"),
    (np.array([[-1, 0]]), (2, 2), "Row 0 has code -1 at level 0"),
]


@pytest.mark.parametrize(("codes", "sizes", "words"), BAD_CODES)
def test_bad_codes_are_refused(codes, sizes, words):
    with pytest.raises(DataError, match=words):
        SidTrie.from_codes(codes, sizes)


@pytest.mark.parametrize("mask", [np.ones(2, dtype=bool), np.ones(3), torch.ones(3, 1, dtype=torch.bool)])
def test_bad_filters_are_refused(mask):
    with pytest.raises(DataError, match="leaf mask"):
        SidTrie.from_codes(np.array([[0], [1], [2]])).restrict(mask)

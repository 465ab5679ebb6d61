"""The three next-item networks: one pass over a history equals a copy per target, packing changes nothing, beams are exact."""

import itertools

import numpy as np
import pytest
import torch
from next_item_worlds import SIZES, one_history, random_catalogue, random_sequences, small_network
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.items import rank_items
from sidtune.decoding.next_item.ranking import HistoryRanker
from sidtune.decoding.next_item.search import mean_probability, score_leaves, search_network
from sidtune.models.next_item.network import NextItemConfig, load_network
from sidtune.trainers.next_item.data import NextItemRows

KINDS = ["items", "tokens", "t5"]
EXTRAS = {
    "plain": {},
    "all": {"user_tokens": 4, "level_embeddings": True, "item_embeddings": True, "ahead": 1, "tied": False},
}
SEQUENCES = random_sequences(users=8)
CATALOGUE = random_catalogue(SEQUENCES)


def batch_of(examples, **options):
    rows = NextItemRows(SEQUENCES, examples, CATALOGUE.codes, SIZES, **options)
    return rows, rows.collate(list(range(len(rows))))


def logits_by_target(network, rows, batch):
    """(user, items before the target, target) → its logits, level after level."""
    with torch.no_grad():
        found = network(**batch)
    where, place = (x.tolist() for x in batch["learn"].nonzero(as_tuple=True))
    result = {}
    for number, (row, at) in enumerate(zip(where, place, strict=True)):
        own = batch["segments"][row] == batch["segments"][row, at]
        shown = batch["target_rows"][row][own & (torch.arange(len(own)) < at)]
        user = int(rows.examples.users[rows.rows[row][int(batch["segments"][row, at])]])
        key = (user, tuple(shown.tolist()), int(batch["target_rows"][row, at]))
        result[key] = torch.cat([part[number] for part in found.logits])
    return result


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_equals_a_copy_per_target(kind, extra):
    network = small_network(kind, **EXTRAS[extra])
    whole = logits_by_target(network, *batch_of(SEQUENCES.whole_examples(50)))
    copies = logits_by_target(network, *batch_of(SEQUENCES.window_examples(50)))
    assert whole.keys() == copies.keys() and len(whole) > 10
    for key, value in whole.items():
        assert torch.allclose(value, copies[key], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_users_do_not_see_each_other(kind):
    network = small_network(kind)
    alone = logits_by_target(network, *batch_of(SEQUENCES.whole_examples(50)))
    rows, batch = batch_of(SEQUENCES.whole_examples(50), packed=14)
    assert int(batch["segments"].max()) >= 1 and len(rows) < len(SEQUENCES.whole_examples(50))
    packed = logits_by_target(network, rows, batch)
    assert packed.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.allclose(value, packed[key], atol=1e-5)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(("kind", "full"), [("items", False), ("tokens", False), ("t5", False), ("t5", True)])
def test_training_and_search_score_alike(kind, full, extra):
    network = small_network(kind, **EXTRAS[extra], **({"causal_encoder": False} if full else {}))
    examples = SEQUENCES.window_examples(50)
    trained = logits_by_target(network, *batch_of(examples))
    for (user, shown, target), expected in trained.items():
        history = one_history(CATALOGUE, np.array(shown), user)
        prefix = torch.from_numpy(CATALOGUE.codes[target])[None, None, :-1]
        with torch.no_grad():
            memory = network.read(**history)
            found = network.continue_codes(memory, prefix)
            steps = [network.next_logits(memory, prefix[..., :level]) for level in range(len(SIZES))]
        assert torch.allclose(torch.cat([part[0, 0] for part in found]), expected, atol=1e-5)
        assert torch.allclose(torch.cat([part[0, 0] for part in steps]), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_and_the_padding_do_not_matter(kind):
    network = small_network(kind)
    _, batch = batch_of(SEQUENCES.whole_examples(50))
    first = batch["learn"].long().argmax(dim=1)
    with torch.no_grad():
        before = network(**batch).logits
        row, place = batch["learn"].nonzero(as_tuple=True)
        changed = dict(batch)
        later = torch.arange(batch["rows"].shape[1]) > first[:, None]
        changed["codes"] = torch.where(later[..., None], (batch["codes"] + 1) % torch.tensor(SIZES), batch["codes"])
        after = network(**changed).logits
    earliest = place == first[row]
    for one, other in zip(before, after, strict=True):
        assert torch.allclose(one[earliest], other[earliest], atol=1e-6)
        assert not torch.allclose(one[~earliest], other[~earliest], atol=1e-4)


def test_user_tokens_are_read_and_never_learned():
    network = small_network("items", user_tokens=4)
    rows, batch = batch_of(SEQUENCES.whole_examples(50))
    targets = sum(
        max(0, stop - start - 1) for start, stop in zip(SEQUENCES.offsets, SEQUENCES.training_stops, strict=False)
    )
    for kind in KINDS:
        found = small_network(kind, user_tokens=4)(**batch)
        assert all(len(part) == targets for part in found.logits)
    with torch.no_grad():
        one, same, other = (network(**{**batch, "users": batch["users"] + shift}).logits[0] for shift in (0, 4, 1))
    assert torch.equal(one, same) and not torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_beams_equal_scoring_every_sid(kind):
    network = small_network(kind)
    trie = CATALOGUE.trie
    history = one_history(CATALOGUE, np.array([3, 17, 8]), 0)
    leaves = {tuple(c): n for n, c in enumerate(sorted({tuple(c) for c in CATALOGUE.codes.tolist()}))}
    expected = torch.full((trie.num_leaves,), float("nan"))
    with torch.no_grad():
        memory = network.read(**history)
        for code, leaf in leaves.items():
            logits = network.continue_codes(memory, torch.tensor(code[:-1])[None, None])
            total = 0.0
            for level in range(3):
                legal = sorted({other[level] for other in leaves if other[:level] == code[:level]})
                total += float(logits[level][0, 0, legal].log_softmax(0)[legal.index(code[level])])
            expected[leaf] = total
    assert float(expected.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    found = search_network(network, history, trie, trie.num_leaves + 2)
    order = torch.sort(expected, descending=True, stable=True).indices
    assert found.leaves[0, :-2].tolist() == order.tolist() and found.leaves[0, -2:].tolist() == [-1, -1]
    assert torch.allclose(found.scores[0, :-2], expected[order], atol=1e-5)
    scored = score_leaves(network, history, trie, torch.tensor([[5, -1, 0]]))[0]
    assert torch.allclose(scored[[0, 2]], expected[[5, 0]], atol=1e-5) and scored[1] == -torch.inf


@pytest.mark.parametrize("kind", KINDS)
def test_ranking_does_not_depend_on_the_batch_and_leaves_seen_items_out(kind):
    network = small_network(kind, user_tokens=3)
    examples = SEQUENCES.held_out("test")
    big = HistoryRanker(SEQUENCES, CATALOGUE, num_beams=60)
    small = HistoryRanker(SEQUENCES, CATALOGUE, num_beams=60, batch_items=1)
    rows, scores = big.rank(network, examples, 30)
    again, scores_again = small.rank(network, examples, 30)
    assert np.allclose(scores, scores_again, atol=1e-5)
    assert np.array_equal(rows, again)
    assert all(sorted(row) == list(range(30)) for row in rows.tolist())
    unseen, _ = HistoryRanker(SEQUENCES, CATALOGUE, num_beams=60, exclude_seen=True).rank(network, examples, 30)
    both = big.rank_both(network, examples, 30)
    assert np.array_equal(both[False], rows) and np.array_equal(both[True], unseen)
    for place, row in enumerate(unseen.tolist()):
        seen = set(SEQUENCES.rows[examples.starts[place] : examples.stops[place] - 1].tolist())
        assert [item for item in row if item >= 0] == [item for item in rows[place].tolist() if item not in seen]
    assert np.allclose(big.score(network, examples, rows), scores, atol=1e-5)


def test_seen_items_are_those_of_the_whole_history():
    network, full = small_network("items"), SEQUENCES.held_out("test")
    short = SEQUENCES.held_out("test", max_history=1)
    rows, _ = HistoryRanker(SEQUENCES, CATALOGUE, 60, exclude_seen=True).rank(network, short, 30)
    for place, row in enumerate(rows.tolist()):
        assert not set(row) & set(SEQUENCES.rows[full.starts[place] : full.stops[place] - 1].tolist())


@pytest.mark.parametrize(("kind", "extra"), itertools.product(KINDS, EXTRAS))
def test_flops_are_those_that_torch_counts(kind, extra):
    network = small_network(kind, **EXTRAS[extra])
    batch = {
        "rows": torch.zeros(3, 6, dtype=torch.int64),
        "codes": torch.zeros(3, 6, 3, dtype=torch.int64),
        "segments": torch.zeros(3, 6, dtype=torch.int64),
        "users": torch.arange(3),
        "learn": torch.tensor([[False] + [True] * 5] * 3),
    }
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        states = network(**batch).states
        for step in range(network.config.ahead):
            network.ahead_logits(states, step)
    assert network.forward_flops(3, 6, 15) == counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(tmp_path, kind):
    network = small_network(kind, **EXTRAS["all"])
    network.save_pretrained(tmp_path)
    again = load_network(tmp_path)
    assert again.config == network.config and again.parameters_count() == network.parameters_count()
    _, batch = batch_of(SEQUENCES.whole_examples(50))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(network(**batch).logits, again(**batch).logits, strict=True))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match="does not hold the weights of its config"):
        load_network(tmp_path)


def test_mean_probability_is_the_mean():
    one, other = np.log([[0.5, 0.1]]), np.log([[0.3, 0.2]])
    assert np.allclose(np.exp(mean_probability([one, other])), [[0.4, 0.15]])
    nothing = np.array([[-np.inf, -np.inf]])
    assert np.allclose(np.exp(mean_probability([one, nothing])), [[0.25, 0.05]])
    assert np.allclose(np.exp(mean_probability([one, other], [1, 3])), [[0.35, 0.175]])
    assert np.isneginf(mean_probability([nothing, nothing])).all()
    for scores, weights in (([], None), ([one], [1, 1]), ([one, other], [1, 0])):
        with pytest.raises(ConfigError, match="positive weight of each"):
            mean_probability(scores, weights)


def test_shared_sids_share_a_score_and_stand_by_popularity():
    rows, scores = HistoryRanker(SEQUENCES, CATALOGUE, 60).rank(small_network("items"), SEQUENCES.held_out("test"), 30)
    counts, shared = SEQUENCES.training_counts(), 0
    for row, score in zip(rows, scores, strict=True):
        for a, b, x, y in zip(row, row[1:], score, score[1:], strict=False):
            if CATALOGUE.leaves.leaf_of[a] == CATALOGUE.leaves.leaf_of[b]:
                shared += 1
                assert x == y and counts[a] >= counts[b]
    assert shared


def test_refusals():
    with pytest.raises(ConfigError, match="heads of an even size"):
        NextItemConfig([4], 3, "items", width=18, heads=4)
    with pytest.raises(ConfigError, match="needs level_sizes"):
        NextItemConfig()
    with pytest.raises(ConfigError, match="takes one target per row"):
        small_network("t5", causal_encoder=False)(**batch_of(SEQUENCES.whole_examples(50))[1])
    with pytest.raises(ConfigError, match="num_beams"):
        search_network(small_network("items"), one_history(CATALOGUE, np.array([1]), 0), CATALOGUE.trie, 0)
    with pytest.raises(DataError, match="Leaf 99"):
        history = one_history(CATALOGUE, np.array([1]), 0)
        score_leaves(small_network("items"), history, CATALOGUE.trie, torch.tensor([[99]]))


def test_ranker_agrees_with_rank_items():
    network, examples = small_network("tokens"), SEQUENCES.held_out("valid")
    history = one_history(CATALOGUE, SEQUENCES.rows[examples.starts[0] : examples.stops[0] - 1], 0)
    beams = search_network(network, history, CATALOGUE.trie, 60)
    expected, _ = rank_items(beams, CATALOGUE.sids, 30)
    assert np.array_equal(HistoryRanker(SEQUENCES, CATALOGUE, 60).rank(network, examples, 30)[0][0], expected[0])

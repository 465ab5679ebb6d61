"""Re-ranking baselines: equivariance, masks, a truth they learn, and their pieces against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from post_rank_sources import toy_table

from sidtune.benchmarks.rivals.registry import RERANKERS
from sidtune.benchmarks.rivals.rerankers.features import RerankerFeatures
from sidtune.benchmarks.rivals.rerankers.fitting import RerankerConfig, fit_reranker, rank_table, valid_ndcg
from sidtune.benchmarks.rivals.rerankers.listwise import list_loss
from sidtune.benchmarks.rivals.rerankers.prs import beam_lists
from sidtune.core.errors import ConfigError, DataError
from sidtune.metrics.list_ranking import ListMetrics, evaluate_lists

pytestmark = pytest.mark.medium

EQUIVARIANT = ("mlp", "setrank")


def contextual(requests=360, n=5, seed=0):
    """The query (one of two) says which of two features counts; the incoming order is random. Ragged: 3 to 5 items."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(requests, n, 3))
    asked = rng.integers(0, 2, requests)
    value = np.take_along_axis(x, np.broadcast_to(asked[:, None, None], (requests, n, 1)), axis=2)[..., 0]
    relevance = np.argsort(np.argsort(value, axis=1), axis=1).astype(float)
    relevance[np.arange(n) >= rng.integers(3, n + 1, requests)[:, None]] = np.nan
    splits = ["train"] * (requests - 120) + ["valid"] * 40 + ["test"] * 80
    return toy_table(relevance, x, np.eye(2)[asked], splits, scores=rng.normal(size=(requests, n)))


@pytest.fixture(scope="module")
def table():
    return contextual()


def build(name, table, **options):
    torch.manual_seed(0)
    kind = RERANKERS.get(name)
    return kind(RerankerFeatures(table, table.rows_of("train"), kind.use_rank), **options).eval()


def tensors(batch):
    return batch.map(torch.from_numpy)


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_permuting_the_list_permutes_the_scores(name, table):
    model, batch = build(name, table), table.batch(np.arange(50))
    rng = np.random.default_rng(0)
    order = np.argsort(np.where(batch.item_mask, rng.random(batch.item_mask.shape), 2.0), axis=1)
    with torch.no_grad():
        straight, moved = model(tensors(batch)), model(tensors(batch.reordered(order)))
    torch.testing.assert_close(moved, torch.gather(straight, 1, torch.from_numpy(order)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(straight[:, 0], straight[:, 1])


@pytest.mark.parametrize("name", ["dlcm", "prm", "seq2slate"])
def test_the_models_that_read_the_incoming_order_do_read_it(name, table):
    model, batch = build(name, table), table.batch(np.flatnonzero(np.diff(table.candidate_offsets) == 5)[:20])
    order = np.tile([4, 3, 2, 1, 0], (20, 1))
    with torch.no_grad():
        straight, moved = model(tensors(batch)), model(tensors(batch.reordered(order)))
    assert not torch.allclose(moved, torch.gather(straight, 1, torch.from_numpy(order)), atol=1e-5)


@pytest.mark.parametrize("name", list(RERANKERS))
def test_pads_change_nothing_and_get_no_score(name, table):
    model = build(name, table)
    lengths = np.diff(table.candidate_offsets)
    short, long = np.flatnonzero(lengths == 3)[:8], np.flatnonzero(lengths == 5)[:1]
    with torch.no_grad():
        alone = model(tensors(table.batch(short)))
        mixed = model(tensors(table.batch(np.concatenate([short, long]))))
    assert alone.shape == (8, 3) and mixed.shape == (9, 5)
    torch.testing.assert_close(mixed[:8, :3], alone, atol=1e-5, rtol=1e-5)
    assert torch.isneginf(mixed[:8, 3:]).all() and torch.isfinite(mixed[8]).all()
    order = model.rank(tensors(table.batch(np.concatenate([short, long]))))
    assert (order[:8, 3:] == torch.tensor([3, 4])).all()
    assert (order.sort(dim=1).values == torch.arange(5)).all()


@pytest.mark.parametrize("name", list(RERANKERS))
def test_losses_ignore_pads_and_train_every_weight(name, table):
    model = build(name, table, dropout=0.0).train()
    loss = model.loss(tensors(table.batch(np.arange(40))))
    loss.backward()
    unused = [key for key, p in model.named_parameters() if p.grad is None]
    assert math.isfinite(loss.item()) and not unused
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", list(RERANKERS))
def test_it_learns_a_truth_in_which_the_query_matters(name, table):
    config = RerankerConfig(
        epochs=8, patience=8, batch_size=24, learning_rate=1e-2, options={"dropout": 0.0, "hidden": 32}
    )
    fit = fit_reranker(name, table, table.rows_of("train"), table.rows_of("valid"), config)
    learned = valid_ndcg(fit.model, table, table.rows_of("test"))
    batch = table.batch(table.rows_of("test"), 0)  # their incoming order is random
    start = evaluate_lists(
        np.where(batch.item_mask, batch.init_rank, -1),
        batch.relevance,
        batch.item_mask,
        ListMetrics((5,), ("ndcg",), gain="linear"),
    ).means()["ndcg@5"]
    assert start < 0.86 and learned > 0.93, (name, start, learned)
    assert fit.losses[-1] < fit.losses[0] and fit.valid[fit.best_epoch] == max(fit.valid)


def test_fitting_is_seeded_and_leaves_the_global_generator_alone(table):
    config = RerankerConfig(epochs=2, batch_size=60, shuffle=0.5)
    before = torch.get_rng_state()
    one, two = (fit_reranker("prs", table, table.rows_of("train"), config=config) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert one.losses == two.losses
    np.testing.assert_array_equal(rank_table(one.model, table, [1, 2, 3]), rank_table(two.model, table, [1, 2, 3]))
    assert (
        one.losses
        != fit_reranker(
            "prs", table, table.rows_of("train"), config=RerankerConfig(epochs=2, batch_size=60, shuffle=0.5, seed=1)
        ).losses
    )


def test_orders_of_a_table_have_no_pads_and_do_not_depend_on_the_batches(table):
    model = build("mlp", table)
    order = rank_table(model, table, np.arange(30), batch_size=7)
    lengths = np.diff(table.candidate_offsets)[:30]
    assert [sorted(row[row >= 0].tolist()) for row in order] == [list(range(n)) for n in lengths]
    np.testing.assert_array_equal(order, rank_table(model, table, np.arange(30)))


def test_the_list_loss_equals_listnet_by_hand():
    scores = torch.tensor([[0.3, -1.0, 2.0, -torch.inf], [1.0, 2.0, 3.0, 0.0]])
    relevance = torch.tensor([[1.0, 3.0, torch.nan, torch.nan], [torch.nan] * 4])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    target = [math.exp(v) / (math.exp(1) + math.exp(3)) for v in (1, 3)]
    chance = [math.log(math.exp(v) / (math.exp(0.3) + math.exp(-1))) for v in (0.3, -1.0)]
    expected = -sum(t * c for t, c in zip(target, chance, strict=True))
    assert list_loss(scores, relevance, mask).item() == pytest.approx(expected, rel=1e-5)
    assert list_loss(scores[1:], relevance[1:], mask[1:]).item() == 0.0


def test_beam_lists_are_the_likeliest_orders():
    scores = torch.tensor([[0.5, -0.2, 1.3, 9.0], [0.1, 0.9, -0.4, 0.3]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])

    def chance(row, order):
        left, total = list(order), 0.0
        for item in order:
            total += scores[row, item].item() - math.log(sum(math.exp(scores[row, j].item()) for j in left))
            left.remove(item)
        return total

    wide = beam_lists(scores, mask, 24)
    for row, n in ((0, 3), (1, 4)):
        expected = sorted(itertools.permutations(range(n)), key=lambda o: -chance(row, o))
        found = [tuple(one[:n]) for one in wide[row].tolist()]
        assert found[: len(expected)] == expected
    assert wide[0, :, 3].tolist() == [3] * 24  # pads last in every list
    assert {tuple(one) for one in wide[0, 6:].tolist()} == {tuple(wide[0, 0].tolist())}


def test_seq2slate_likelihoods_sum_to_one_and_ties_share(table):
    model = build("seq2slate", table)
    row = np.flatnonzero(np.diff(table.candidate_offsets) == 4)[:1]
    batch = tensors(table.batch(row))
    with torch.no_grad():
        total = 0.0
        for order in itertools.permutations(range(4)):
            forced = torch.tensor([order])
            steps = model.decode(batch, forced)[1]
            total += torch.gather(steps, 2, forced[..., None]).sum().exp().item()
        assert total == pytest.approx(1.0, abs=1e-5)
        batch.relevance[:] = 2.0  # everything equal: any order is right, nothing to learn
        assert model.loss(batch).item() == pytest.approx(0.0, abs=1e-5)
        greedy = model.decode(batch)[0]
        assert model.rank(batch).tolist() == greedy.tolist()


@pytest.mark.slow
def test_the_evaluator_of_prs_learns_what_neighbours_do_to_each_other():
    """Items of two kinds; a place earns only next to another kind. No item scorer can see that, the evaluator can."""
    rng = np.random.default_rng(0)
    kind = rng.permuted(np.tile([0, 0, 1, 1], (300, 1)), axis=1)
    table = toy_table(np.ones((300, 4)), np.eye(2)[kind], np.ones((300, 1)), ["train"] * 220 + ["test"] * 80)

    def earned(batch, order):
        shown = torch.gather(batch.item_fields["x"][..., 0], 1, order)
        apart = (shown[:, 1:] != shown[:, :-1]).float()
        return torch.nn.functional.pad(apart, (1, 0)) + torch.nn.functional.pad(apart, (0, 1))

    options = {"place_values": earned, "beams": 24, "hidden": 64, "dropout": 0.0}
    config = RerankerConfig(epochs=100, batch_size=22, learning_rate=3e-3, options=options)
    model = fit_reranker("prs", table, table.rows_of("train"), config=config).model
    batch = tensors(table.batch(table.rows_of("test")))
    ours = earned(batch, model.rank(batch)).sum(dim=1).mean().item()
    chance = earned(batch, torch.arange(4).expand(80, -1)).sum(dim=1).mean().item()
    assert chance < 4.5 and ours > 5.8  # the best list alternates and earns 6


def test_missing_features_are_flagged_and_numbers_standardised():
    x = np.array([[[1.0, np.nan], [3.0, 1.0]]])
    table = toy_table(np.array([[1.0, 2.0]]), x, np.ones((1, 1)), ["train"], scores=np.array([[2.0, 4.0]]))
    features = RerankerFeatures(table, [0], use_rank=False)
    made = features(tensors(table.batch([0])))
    assert made.shape == (1, 2, features.width)
    own = made[0, :, 2 + 3 :]  # after the query with its flag, and the history's mean
    assert own.tolist() == [[0, 0, 0, -1, 1], [3, 1, 1, 1, 1]]


def test_wrong_requests_for_a_baseline_are_refused(table):
    with pytest.raises(ConfigError, match="did you mean 'setrank'"):
        fit_reranker("set_rank", table, [0])
    with pytest.raises(ConfigError, match="cannot take these options"):
        fit_reranker("mlp", table, [0], config=RerankerConfig(options={"hiden": 3}))
    with pytest.raises(DataError, match="no training requests"):
        fit_reranker("mlp", table, [])
    with pytest.raises(DataError, match="lower learning_rate"):
        fit_reranker("mlp", table, np.arange(200), config=RerankerConfig(learning_rate=1e30, batch_size=8))
    for change in ({"epochs": 0}, {"shuffle": 2.0}, {"learning_rate": 0.0}):
        with pytest.raises(ConfigError):
            RerankerConfig(**change)

"""Training of next-item networks: every loss term against plain loops, averaged weights, noise, choice of the model, resuming."""

import contextlib
import math
import shutil

import numpy as np
import pytest
import torch
from next_item_worlds import SIZES, random_catalogue, random_sequences, small_network
from transformers import TrainerCallback

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.next_item.ranking import HistoryRanker
from sidtune.models.next_item.network import NextTargets
from sidtune.trainers.next_item.data import Neighbours, NextItemRows, NoiseConfig, pack
from sidtune.trainers.next_item.loss import LossConfig, NextItemLoss
from sidtune.trainers.next_item.trainer import (
    FitSettings,
    NextItemTrainer,
    WeightAverage,
    draw_users,
    fit_arguments,
    measure_targets,
    train_next_item,
)

pytestmark = pytest.mark.medium

SEQUENCES = random_sequences(users=12)
CATALOGUE = random_catalogue(SEQUENCES)
CODES = torch.from_numpy(CATALOGUE.codes)


def rows_of(**options):
    return NextItemRows(SEQUENCES, SEQUENCES.whole_examples(50), CATALOGUE.codes, SIZES, **options)


def log_softmax(values):
    total = math.log(sum(math.exp(v) for v in values))
    return [v - total for v in values]


@pytest.mark.parametrize("softmax", ["trie", "level"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_code_losses_equal_a_loop(softmax, smoothing):
    loss = NextItemLoss(LossConfig(softmax=softmax, label_smoothing=smoothing), CATALOGUE.trie, CODES)
    items = torch.tensor([0, 7, 7, 22])
    logits = [torch.randn(4, size) for size in SIZES]
    found, plain = loss.code_losses(logits, items)
    known = {tuple(code) for code in CATALOGUE.codes.tolist()}
    for row, item in enumerate(items.tolist()):
        code, expected, expected_plain = CATALOGUE.codes[item].tolist(), 0.0, 0.0
        for level, size in enumerate(SIZES):
            legal = sorted({o[level] for o in known if list(o[:level]) == code[:level]})
            legal = legal if softmax == "trie" else list(range(size))
            log_p = dict(zip(legal, log_softmax([float(logits[level][row, c]) for c in legal]), strict=True))
            own, even = -log_p[code[level]], -sum(log_p.values()) / len(log_p)
            expected += (1 - smoothing) * own + smoothing * even
            expected_plain += own
        assert float(found[row]) == pytest.approx(expected, abs=1e-5)
        assert float(plain[row]) == pytest.approx(expected_plain, abs=1e-5)


def test_contrastive_masks_duplicates_of_the_target():
    network = small_network("items")
    loss = NextItemLoss(LossConfig(contrastive=1.0, temperature=0.5), CATALOGUE.trie, CODES)
    items, states = torch.tensor([3, 9, 3, 14]), torch.randn(4, 16)
    vectors = torch.stack([(network.codes.weight[CODES[i] + network.offsets]).mean(0) for i in items.tolist()]).detach()
    for row, found in enumerate(loss.contrast(network, states, items).tolist()):
        scores = [float(torch.cosine_similarity(states[row], vectors[n], dim=0)) / 0.5 for n in range(4)]
        others = [n for n in range(4) if n != row and items[n] != items[row]]
        expected = -log_softmax([scores[row], *(scores[n] for n in others)])[0]
        assert found == pytest.approx(expected, abs=1e-5)


def test_items_ahead_are_those_of_the_same_user():
    network = small_network("items", ahead=2)
    loss = NextItemLoss(LossConfig(ahead=1.0), CATALOGUE.trie, CODES)
    batch = rows_of(packed=14).collate([0, 1, 2])
    row, place = batch["learn"].nonzero(as_tuple=True)
    states = torch.randn(len(row), 16)
    found = loss.ahead(network, states, batch, row, place).tolist()
    ended = 0
    for n, (r, p) in enumerate(zip(row.tolist(), place.tolist(), strict=True)):
        expected = 0.0
        for step in range(2):
            later = p + 1 + step
            inside = later < batch["rows"].shape[1] and batch["segments"][r, later] == batch["segments"][r, p]
            ended += not inside
            if inside:
                logits = network.ahead_logits(states[n : n + 1], step)
                code = CODES[batch["rows"][r, later]]
                expected -= sum(logits[level][0].log_softmax(0)[code[level]].item() for level in range(3))
        assert found[n] == pytest.approx(expected, abs=1e-4)
    assert ended and len(row) > ended / 2


def test_all_terms_add_up_and_reach_the_weights():
    network = small_network("items", ahead=1, dropout=0.0)
    config = LossConfig(label_smoothing=0.1, contrastive=0.3, ahead=0.5)
    loss, batch = NextItemLoss(config, CATALOGUE.trie, CODES), rows_of().collate([0, 1, 2, 3])
    row, place = batch["learn"].nonzero(as_tuple=True)
    targets = network(**batch)
    items = batch["target_rows"][row, place]
    total, plain = loss(network, targets, batch)
    expected = loss.code_losses(targets.logits, items)[0] + 0.3 * loss.contrast(network, targets.states, items)
    expected = expected + 0.5 * loss.ahead(network, targets.states, batch, row, place)
    assert torch.allclose(total, expected) and not plain.requires_grad
    total.mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_the_loss_of_a_target_is_what_the_search_finds():
    network = small_network("tokens")
    examples = SEQUENCES.window_examples(50)
    rows = NextItemRows(SEQUENCES, examples, CATALOGUE.codes, SIZES)
    batch = rows.collate(list(range(len(rows))))
    with torch.no_grad():
        _, plain = NextItemLoss(LossConfig(), CATALOGUE.trie, CODES)(network, network(**batch), batch)
    ranker = HistoryRanker(SEQUENCES, CATALOGUE)
    scores = ranker.score(network, examples, SEQUENCES.rows[examples.firsts][:, None])
    assert np.allclose(-plain.numpy(), scores[:, 0], atol=1e-5)


@pytest.mark.parametrize("decay", [0.9, 0.5])
def test_average_is_the_weighted_sum_of_the_weights_so_far(decay):
    network = torch.nn.Linear(2, 1, bias=False)
    average = WeightAverage(network, decay)
    history = [network.weight.detach().clone()]
    for step in range(1, 8):
        with torch.no_grad():
            network.weight.add_(torch.randn(1, 2))
        history.append(network.weight.detach().clone())
        average.on_step_end(None, type("S", (), {"global_step": step})(), None)
    expected, share = torch.zeros(1, 2), 1.0
    for step in range(7, 0, -1):
        rate = min(decay, (1 + step) / (10 + step))
        expected += share * (1 - rate) * history[step]
        share *= rate
    expected += share * history[0]
    assert torch.allclose(average.weights["weight"], expected, atol=1e-6)
    with average.used():
        assert torch.equal(network.weight, average.weights["weight"])
    assert torch.equal(network.weight, history[-1])


def test_noise_changes_what_is_read_and_never_what_is_learned():
    every = list(range(len(rows_of()))) * 5
    clean = rows_of().collate(every)
    noisy = rows_of(noise=NoiseConfig(codes=0.4, items=0.4, shared_levels=1)).collate(every)
    for name in ("target_rows", "target_codes", "learn", "segments", "users"):
        assert torch.equal(clean[name], noisy[name])
    known = clean["rows"] >= 0
    changed = (noisy["rows"] != clean["rows"]) & known
    assert 0.1 < changed.sum() / known.sum() < 0.5 and torch.equal(noisy["rows"] < 0, ~known)
    assert torch.equal(CODES[noisy["rows"][changed]][:, 0], CODES[clean["rows"][changed]][:, 0])
    assert 0.15 < (noisy["codes"] != CODES[noisy["rows"].clamp(min=0)]).float().mean() < 0.4
    assert bool((noisy["codes"] < torch.tensor(SIZES)).all())


def test_neighbours_are_drawn_evenly_from_the_other_items_of_the_group():
    codes = np.array([[0, 0], [0, 1], [0, 2], [1, 0], [0, 3]])
    drawn = Neighbours(codes, 1).draw(torch.zeros(6000, dtype=torch.int64))
    counts = torch.bincount(drawn, minlength=5).tolist()
    assert counts[0] == counts[3] == 0 and all(1700 < counts[n] < 2300 for n in (1, 2, 4))
    assert Neighbours(codes, 1).draw(torch.tensor([3, 3])).tolist() == [3, 3]


def test_packing_places_every_example_once_and_keeps_the_size():
    lengths = np.random.default_rng(0).integers(2, 20, 200)
    lengths[5] = 40
    rows = pack(lengths, 30)
    assert sorted(np.concatenate(rows).tolist()) == list(range(200))
    assert all(lengths[row].sum() <= 30 or len(row) == 1 for row in rows)
    assert len(rows) <= 1.1 * lengths.sum() / 30 + 1


def settings(**changes):
    args = {"num_train_epochs": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2}
    return FitSettings(**{"args": args, "average": 0.8, "evaluate_every": 1, "valid_users": None, **changes})


def train(folder, stop_after=None, **changes):
    network = small_network("items", dropout=0.2)
    ranker = HistoryRanker(SEQUENCES, CATALOGUE, num_beams=30)
    rows = rows_of(noise=NoiseConfig(codes=0.1))
    if stop_after is None:
        return network, train_next_item(network, rows, ranker, settings(**changes), folder, seed=3)
    arguments = fit_arguments(settings(**changes), folder, len(rows), 3)
    valid = draw_users(SEQUENCES.held_out("valid"), None, 3)

    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop_after:
                raise KeyboardInterrupt

    trainer = NextItemTrainer(network, arguments, rows, ranker, valid, settings(**changes), [StopAt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return network, trainer


def test_the_best_validated_average_is_kept_and_a_resumed_run_is_the_same(tmp_path):
    network, trainer = train(tmp_path / "one")
    evaluations = [log for log in trainer.state.log_history if "eval_ndcg@10" in log]
    assert len(evaluations) == 6
    assert trainer.state.best_metric == max(log["eval_ndcg@10"] for log in evaluations)
    examples = SEQUENCES.held_out("valid")
    ranked, _ = HistoryRanker(SEQUENCES, CATALOGUE, num_beams=30).rank(network, examples, 10)
    assert measure_targets(ranked, SEQUENCES, examples).means()["ndcg@10"] == trainer.state.best_metric
    flops = [log["eval_flops"] for log in evaluations]
    assert flops == sorted(flops) and flops[0] > 0 and evaluations[-1]["eval_train_seconds"] > 0
    train(tmp_path / "two", stop_after=8)
    again, resumed = train(tmp_path / "two")
    assert resumed.state.best_metric == trainer.state.best_metric
    assert [log["eval_flops"] for log in resumed.state.log_history if "eval_flops" in log] == flops
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for name, value in trainer.average.weights.items():
        assert torch.equal(value, resumed.average.weights[name]), name


def test_patience_counts_the_evaluations_before_an_interruption(tmp_path):
    """No evaluation is better than the first one, so the run ends after `patience` more, stopped or not."""

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == stop_at:
                raise KeyboardInterrupt

    ends, begin = [], NextItemTrainer.__init__
    for stop_at in (0, 2, 4, 6):
        network, folder = small_network("items", dropout=0.2), tmp_path / str(stop_at)
        options = {"patience": 2, "args": {**settings().args, "learning_rate": 0.0}}
        given = (rows_of(), HistoryRanker(SEQUENCES, CATALOGUE, num_beams=30), settings(**options), folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(NextItemTrainer, "__init__", lambda self, *a: (begin(self, *a), self.add_callback(Stop()))[0])
            with pytest.raises(KeyboardInterrupt) if stop_at else contextlib.nullcontext():
                trainer = train_next_item(network, *given, seed=3)
        if stop_at:
            trainer = train_next_item(network, *given, seed=3)
        ends.append([log["step"] for log in trainer.state.log_history if "eval_ndcg@10" in log])
    assert ends == [[2, 4, 6]] * 4


def test_training_does_not_read_the_last_item_of_anyone(tmp_path):
    def trained(sequences):
        network = small_network("items")
        rows = NextItemRows(sequences, sequences.whole_examples(50), CATALOGUE.codes, SIZES)
        ranker = HistoryRanker(sequences, CATALOGUE)
        trainer = train_next_item(network, rows, ranker, settings(), tmp_path / "x", seed=0)
        shutil.rmtree(tmp_path / "x")
        return network, trainer.state.best_metric

    changed = SEQUENCES.rows.copy()
    last = SEQUENCES.held_out("test").firsts
    changed[last] = (changed[last] + 11) % 30
    other = type(SEQUENCES)(SEQUENCES.item_ids, SEQUENCES.user_ids, SEQUENCES.offsets, changed)
    (one, score), (two, same_score) = trained(SEQUENCES), trained(other)
    assert score == same_score
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_step_learns_the_mean_over_its_targets_and_counts_its_operations(tmp_path):
    network, batch = small_network("items"), rows_of().collate([0, 1, 2, 3])
    arguments = fit_arguments(settings(), tmp_path, 12, 0)
    ranker = HistoryRanker(SEQUENCES, CATALOGUE)
    trainer = NextItemTrainer(network, arguments, rows_of(), ranker, SEQUENCES.held_out("valid"), settings())
    with torch.no_grad():
        found = trainer.compute_loss(network, batch)
        _, plain = NextItemLoss(LossConfig(), CATALOGUE.trie, CODES)(network, network(**batch), batch)
    assert float(found) == pytest.approx(float(plain.mean()), rel=1e-6)
    assert trainer.floating_point_ops(batch) == 3 * network.forward_flops(*batch["learn"].shape, len(plain))


def test_measures_are_those_of_the_formula():
    examples = SEQUENCES.held_out("test")
    ranked = np.tile(np.arange(10), (len(examples), 1))
    result = measure_targets(ranked, SEQUENCES, examples)
    targets = SEQUENCES.rows[examples.firsts]
    expected = np.where(targets < 10, 1 / np.log2(targets + 2), 0.0)
    assert np.allclose(result.per_request["ndcg@10"], expected)
    assert np.allclose(result.per_request["recall@5"], targets < 5)


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="'eval_steps' cannot be set here"):
        FitSettings(args={"eval_steps": 3})
    with pytest.raises(ConfigError, match="average must be a share in"):
        FitSettings(average=1.0)
    with pytest.raises(ConfigError, match="label_smoothing"):
        LossConfig(label_smoothing=1.0)
    with pytest.raises(ConfigError, match="codes must be a share in"):
        NoiseConfig(codes=1.5)
    with pytest.raises(ConfigError, match="0 heads for them; set both or none"):
        train(tmp_path / "a", loss=LossConfig(ahead=1.0))
    lonely = type(SEQUENCES)(["a", "b"], ["u"], np.array([0, 1]), np.array([0]))
    with pytest.raises(DataError, match="nothing to learn"):
        NextItemRows(lonely, lonely.whole_examples(5), np.zeros((2, 1), dtype=np.int64), (1,))
    pair = type(SEQUENCES)(SEQUENCES.item_ids, ["u"], np.array([0, 2]), np.array([0, 1]))
    rows = NextItemRows(pair, pair.whole_examples(5), CATALOGUE.codes, SIZES)
    with pytest.raises(DataError, match="no validation target"):
        train_next_item(small_network("items"), rows, HistoryRanker(pair, CATALOGUE), settings(), tmp_path / "b")
    assert isinstance(small_network("items")(**rows_of().collate([0])), NextTargets)


@pytest.mark.parametrize("kind", ["items", "tokens", "t5"])
def test_bfloat16_learns_what_float32_learns(tmp_path, kind):
    extra = {"loss": LossConfig(contrastive=0.5, ahead=0.5, label_smoothing=0.1)}
    curves, networks = [], []
    for bf16 in (False, True):
        network = small_network(kind, ahead=1, dropout=0.0)
        args = {**settings().args, "bf16": bf16, "logging_steps": 1}
        ranker = HistoryRanker(SEQUENCES, CATALOGUE)
        trainer = train_next_item(
            network, rows_of(), ranker, settings(**extra, args=args), tmp_path / str(bf16), seed=0
        )
        curves.append([log["nll"] for log in trainer.state.log_history if "nll" in log])
        networks.append(network)
    assert len(curves[0]) > 3 and curves[0] != curves[1]  # the second one did round
    assert curves[1] == pytest.approx(curves[0], rel=0.01)
    assert all(p.dtype == torch.float32 for p in networks[1].parameters())

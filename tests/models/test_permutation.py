"""Orders out of logits and tokens, against plain Python and against all permutations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from post_rank_stand_ins import ranker, requests

from sidtune.core.errors import ConfigError, DataError
from sidtune.models.post_ranking.permutation import (
    PermutationLogitsProcessor,
    borda,
    parse_orders,
    permutation_losses,
    rank_in_windows,
    single_forward_order,
    window_starts,
)
from sidtune.models.post_ranking.ranker import PostRanker

LABELS, END = [7, 3, 9, 5, 11], 1


@pytest.mark.parametrize("prompt_length", [0, 2])
def test_processor_allows_unused_labels_then_the_end(prompt_length):
    random = np.random.default_rng(0)
    counts = [1, 3, 5]
    for length in range(6):
        rows = []
        for count in np.repeat(counts, 2):  # two beams per request
            rows.append([LABELS[n] for n in random.permutation(count)[:length]])
            rows[-1] += [END] * (length - len(rows[-1]))
        # Labels in the prompt are not used ones.
        ids = torch.tensor([[7, 3][:prompt_length] + row for row in rows], dtype=torch.long).reshape(6, -1)
        scores = torch.randn(6, 13)
        processor = PermutationLogitsProcessor(LABELS, torch.tensor(counts), END, prompt_length=prompt_length)
        found = processor(ids, scores)
        for row, count in enumerate(np.repeat(counts, 2)):
            allowed = set(LABELS[:count]) - set(rows[row]) or {END}
            assert set(found[row].isfinite().nonzero()[:, 0].tolist()) == allowed
            assert all(found[row, token] == scores[row, token] for token in allowed)


def test_renormalised_scores_are_log_probabilities():
    processor = PermutationLogitsProcessor(LABELS, torch.tensor([4]), END, renormalize=True)
    scores = torch.randn(1, 13)
    found = processor(torch.tensor([[3]]), scores)
    assert found.exp().sum().item() == pytest.approx(1.0)
    assert (found[0, 7] - found[0, 9]).item() == pytest.approx((scores[0, 7] - scores[0, 9]).item(), abs=1e-6)


def by_hand(tokens: list[int], count: int) -> tuple[list[int], int, int, int]:
    order, unknown, repeated = [], 0, 0
    for token in tokens:
        if token == END:
            break
        place = LABELS.index(token) if token in LABELS[:count] else None
        if place is None:
            unknown += 1
        elif place in order:
            repeated += 1
        else:
            order.append(place)
    missing = [place for place in range(count) if place not in order]
    return order + missing, unknown, repeated, len(missing)


def test_parser_equals_plain_python_on_random_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([*LABELS, END, END, 2])[torch.randint(0, 8, (400, 7), generator=generator)]
    counts = torch.randint(1, 6, (400,), generator=generator)
    found = parse_orders(tokens, LABELS, counts, END)
    for row, count in enumerate(counts.tolist()):
        order, *repairs = by_hand(tokens[row].tolist(), count)
        assert found.order[row].tolist() == order + [-1] * (5 - count)
        assert [int(x[row]) for x in (found.unknown, found.repeated, found.missing)] == repairs
        assert bool(found.valid[row]) == (sum(repairs) == 0)
    assert 0 < int(found.valid.sum()) < 400


def test_single_forward_sorts_label_logits_and_keeps_ties():
    logits = torch.zeros(2, 13)
    logits[0, LABELS] = torch.tensor([0.0, 2.0, 0.0, 2.0, 9.0])
    logits[0, 0] = 99.0
    found = single_forward_order(logits, LABELS, torch.tensor([4, 3]))
    assert found.order.tolist() == [[1, 3, 0, 2], [0, 1, 2, -1]]
    assert found.scores[0].tolist() == [0.0, 2.0, 0.0, 2.0] and found.scores[1, 3] == -math.inf


def test_too_many_candidates_are_refused():
    for count in (0, 6):
        with pytest.raises(ConfigError, match="can rank 1 to 5 candidates"):
            PermutationLogitsProcessor(LABELS, torch.tensor([3, count]), END)


@pytest.mark.parametrize("count", [1, 5, 20, 21, 30, 37, 100])
def test_windows_cover_the_list_from_the_back(count):
    starts = window_starts(count, 20, 10)
    assert starts[0] == max(count - 20, 0) and starts[-1] == 0 and starts == sorted(set(starts), reverse=True)
    assert all(before - after <= 10 for before, after in itertools.pairwise(starts))


def test_windows_bring_the_best_of_a_long_list_to_the_front():
    random = np.random.default_rng(0)
    values = [random.permutation(count) for count in (3, 20, 45, 100)]
    sizes = []

    def rank(rows, places):
        sizes.extend(len(place) for place in places)
        return [place[np.argsort(-values[row][place], kind="stable")] for row, place in zip(rows, places, strict=True)]

    orders = rank_in_windows([len(v) for v in values], rank)
    for value, order in zip(values, orders, strict=True):
        assert sorted(order.tolist()) == list(range(len(value)))
        # A stride of 10 carries the best ten of every suffix to the front.
        assert order[:10].tolist() == np.argsort(-value)[:10].tolist()
    assert max(sizes) == 20
    assert orders[1].tolist() == np.argsort(-values[1]).tolist()


def test_windows_refuse_nonsense():
    with pytest.raises(DataError, match="is no permutation"):
        rank_in_windows([3], lambda rows, places: [np.array([0, 0, 1])])
    for size, stride in ((1, 1), (5, 0), (5, 6)):
        with pytest.raises(ConfigError, match="A window needs"):
            window_starts(9, size, stride)


def test_borda_is_the_order_of_mean_places():
    random = np.random.default_rng(1)
    orders = np.stack([random.permutation(6) for _ in range(5)])
    places = {item: np.mean([row.tolist().index(item) for row in orders]) for item in range(6)}
    assert borda(orders).tolist() == sorted(range(6), key=lambda item: (places[item], item))
    assert borda([[2, 0, 1]]).tolist() == [2, 0, 1]
    assert borda([[1, 0], [0, 1]]).tolist() == [0, 1]


def order_scores(model, processor, one) -> dict[tuple[int, ...], float]:
    """Log-probability of every order, renormalised over unused labels at each place, by one full pass each."""
    labels = processor.config.label_token_ids
    found = {}
    for order in itertools.permutations(range(len(one.candidates))):
        inputs = processor.from_requests([one], targets=[np.array(order)])
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        answer = (inputs["labels"][0] >= 0).nonzero()[:, 0]
        total, left = 0.0, list(range(len(order)))
        for place, position in zip(order, answer[:-1].tolist(), strict=True):
            row = logits[position - 1, [labels[n] for n in left]].log_softmax(0)
            total += float(row[left.index(place)])
            left.remove(place)
        found[order] = total
    return found


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_beam_equals_enumeration_and_greedy_equals_stepwise_argmax(kind):
    model, processor = ranker(kind)
    batch = requests(2, seed=2, count=4) + requests(1, seed=3, count=3, history=0, query=None)
    inputs = processor.from_requests(batch, answers=False)
    beam = model.rank(**inputs, method="beam", num_beams=24)
    greedy = model.rank(**inputs)
    for row, one in enumerate(batch):
        scores = order_scores(model, processor, one)
        best = max(scores, key=scores.get)
        count = len(one.candidates)
        assert tuple(beam.order[row, :count].tolist()) == best
        assert float(beam.scores[row]) == pytest.approx(scores[best], abs=1e-4)
        # Greedy: at each place the best continuation; its mass is the sum over the orders that begin so.
        prefix = ()
        for _ in range(count):
            mass = {
                n: sum(math.exp(s) for order, s in scores.items() if order[: len(prefix) + 1] == (*prefix, n))
                for n in set(range(count)) - set(prefix)
            }
            prefix += (max(mass, key=mass.get),)
        assert tuple(greedy.order[row, :count].tolist()) == prefix


def test_every_length_gives_a_permutation():
    model, processor = ranker()
    batch = [requests(1, seed=count, count=count, history=0)[0] for count in range(1, 27)]
    inputs = processor.from_requests(batch, answers=False)
    for method in ("greedy", "beam", "single_forward", "unconstrained"):
        found = model.rank(**inputs, method=method, num_beams=2)
        for row, count in enumerate(range(1, 27)):
            assert sorted(found.order[row, :count].tolist()) == list(range(count))
            assert (found.order[row, count:] == -1).all()
        assert bool(found.valid.all()) == (method != "unconstrained")
    with pytest.raises(ConfigError, match="did you mean 'greedy'"):
        model.rank(**inputs, method="greedi")


def test_unconstrained_answers_are_parsed_as_they_come():
    model, processor = ranker()
    inputs = processor.from_requests(requests(2), answers=False)
    labels, end = processor.config.label_token_ids, processor.config.end_token_id
    said = torch.tensor(
        [[labels[2], labels[0], labels[2], end, labels[1]], [labels[3], labels[1], labels[0], labels[2], end]]
    )
    model.language_model.generate = lambda **options: type("Out", (dict,), {"sequences": said})()
    found = model.rank(**inputs, method="unconstrained")
    assert found.order.tolist() == [[2, 0, 1, 3], [3, 1, 0, 2]]
    assert (
        found.repeated.tolist() == [1, 0] and found.missing.tolist() == [2, 0] and found.valid.tolist() == [False, True]
    )


def test_ranker_serves_lists_of_any_length_and_is_independent_of_the_batch():
    model, processor = ranker()
    batch = requests(3) + requests(1, seed=4, count=43) + requests(1, seed=5, count=1)
    model.train()
    together = PostRanker(model, processor)
    orders = together.rank(batch)
    assert model.training
    assert [sorted(order.tolist()) == list(range(len(r.candidates))) for order, r in zip(orders, batch, strict=True)]
    assert [len(order) for order in orders] == [4, 4, 4, 43, 1]
    # 4 short lists and windows at 23, 13, 3, 0 of the long one.
    assert together.counts.prompts == 8 and together.counts.valid_rate == 1.0
    alone = PostRanker(model, processor, batch_size=1)
    assert [o.tolist() for o in alone.rank(batch)] == [o.tolist() for o in orders]
    assert alone.counts.prompt_tokens == together.counts.prompt_tokens


def test_self_consistency_forgets_the_incoming_order():
    """A model that only copies the incoming order has nothing to say; the mean over shuffles must show that."""
    model, processor = ranker()
    copying = PostRanker(model, processor)
    copying._prompted = lambda asked, shown, settings: [np.arange(len(place)) for place in shown]
    one = requests(1, count=4)
    assert copying.rank(one)[0].tolist() == [0, 1, 2, 3]
    first = np.array([copying.rank(one, shuffles=1, seed=seed)[0][0] for seed in range(60)])
    assert np.bincount(first, minlength=4).min() >= 5
    # A ranker that looks at the items only gives the same answer whatever the order was.
    fair = PostRanker(model, processor)
    fair._prompted = lambda asked, shown, settings: [np.argsort(-asked[0].relevance[p], kind="stable") for p in shown]
    one[0].relevance[:] = [2, 4, 1, 3]
    assert fair.rank(one, shuffles=5)[0].tolist() == [1, 3, 0, 2]
    with pytest.raises(ConfigError, match="shuffles and seed cannot be negative"):
        fair.rank(one, shuffles=-1)


def test_the_permutation_loss_is_that_of_constrained_decoding_place_by_place():
    """A slow telling: at each place the softmax over the labels that are not used yet, by hand."""
    generator = torch.Generator().manual_seed(3)
    logits, ids = torch.randn(3, 6, 20, generator=generator, requires_grad=True), [4, 9, 11, 2]
    targets = torch.tensor([[-100, 9, 4, 2, 11, 1], [-100, -100, 2, 9, 1, -100], [-100] * 6])
    losses, label = permutation_losses(logits, targets, ids)
    for row, places in enumerate(targets.tolist()):
        order = [token for token in places if token in ids]
        for place, token in enumerate(places):
            assert bool(label[row, place]) == (token in ids)
            if token not in ids:
                assert float(losses[row, place]) == 0
                continue
            left = order[order.index(token) :]
            scores = {other: float(logits[row, place, other]) for other in left}
            expected = np.log(sum(np.exp(s) for s in scores.values())) - scores[token]
            assert float(losses[row, place]) == pytest.approx(expected, abs=1e-5)
    assert float(losses[0, 4]) == 0  # the last label has no rival
    gradient = torch.autograd.grad(losses.sum(), logits)[0]
    assert gradient.isfinite().all() and float(gradient[2].abs().sum()) == 0
    assert float(gradient[0, 3, [9, 4]].abs().sum()) == 0 < float(gradient[0, 3, 11])  # used labels are no rivals

"""The five aligned terms against plain loops; masked negatives; which way the order margin pulls; weight 0 skips a term."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sidtune.core.errors import ConfigError, DataError
from sidtune.trainers.contrastive.losses import (
    TERMS,
    AlignedLossConfig,
    aligned_loss,
    info_nce,
    order_margin,
)
from sidtune.trainers.contrastive.trainer import AlignedExamples


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def nce_by_loop(left, right, a, b, tau) -> float:
    total = 0.0
    for i in range(len(left)):
        terms = []
        for j in range(len(left)):
            no_negative = b[j] == b[i] or a[j] == a[i] or b[j] == a[i]
            if j == i or not no_negative:
                terms.append(math.exp(float(left[i] @ right[j]) / tau))
        total -= math.log(math.exp(float(left[i] @ right[i]) / tau) / sum(terms))
    return total / len(left)


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_info_nce_equals_a_plain_loop_with_masked_negatives(tau):
    a, b = torch.tensor([0, 1, 2, 0, 4, 5]), torch.tensor([7, 8, 7, 9, 0, 10])  # equal b, equal a, b_j = a_i
    left, right = unit(6, 5), unit(6, 5, seed=1)
    found = info_nce(left, right, a, b, tau)
    assert float(found) == pytest.approx(nce_by_loop(left, right, a.tolist(), b.tolist(), tau), rel=1e-9)
    apart = info_nce(left, right, torch.arange(6), torch.arange(6, 12), tau)
    assert float(apart) == pytest.approx(float(F.cross_entropy(left @ right.T / tau, torch.arange(6))), rel=1e-9)
    assert float(found) < float(apart)


def test_a_repeated_pair_gives_its_twin_no_gradient_as_a_negative():
    left, right = unit(2, 4).requires_grad_(), unit(2, 4, seed=1).requires_grad_()
    info_nce(left, right, torch.tensor([0, 0]), torch.tensor([1, 2]), 0.05).backward()
    assert left.grad.abs().max() == 0 and right.grad.abs().max() == 0
    info_nce(left, right, torch.tensor([0, 3]), torch.tensor([1, 2]), 0.05).backward()
    assert left.grad.abs().min() > 0


def margin_by_loop(s, known, m_order, m_click) -> float:
    total = 0.0
    for (order, click, show), (o, c, w) in zip(s.tolist(), known.tolist(), strict=True):
        if o and c:
            total += max(0.0, m_order - order + click)
        if c and w:
            total += max(0.0, m_click - click + show)
        if o and w and not c:
            total += max(0.0, m_order + m_click - order + show)
    return total / len(s)


def test_the_order_margin_equals_a_plain_loop():
    query, items = unit(40, 3), unit(3, 40, 3, seed=1)
    known = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]).bool().repeat(10, 1)
    s = torch.einsum("bd,kbd->bk", query, items)
    found = order_margin(query, *items, known, 0.3, 0.7)
    assert float(found) == pytest.approx(margin_by_loop(s, known, 0.3, 0.7), rel=1e-9)


def test_the_order_margin_pulls_ordered_up_and_shown_down():
    query = torch.tensor([[1.0, 0.0]])
    items = [
        torch.tensor([[value, 0.0]], requires_grad=True) for value in (0.5, 0.5, 0.5)
    ]  # order, click, show: all level
    order_margin(query, *items, torch.ones(1, 3).bool(), 0.1, 0.1).backward()
    order, click, show = (item.grad[0, 0].item() for item in items)
    assert order < 0 < show and click == 0  # a step against the gradient: the ordered item nearer, the shown one away
    items = [
        torch.tensor([[value, 0.0]], requires_grad=True) for value in (0.8, 0.5, 0.2)
    ]  # in order and far enough apart
    loss = order_margin(query, *items, torch.ones(1, 3).bool(), 0.1, 0.1)
    loss.backward()
    assert loss.item() == 0 and all(item.grad.abs().max() == 0 for item in items)


def test_relevance_is_a_mean_squared_difference():
    query, item, score = unit(5, 3), unit(5, 3, seed=1), torch.rand(5)
    by_loop = sum((float(query[n] @ item[n]) - float(score[n])) ** 2 for n in range(5)) / 5
    places = {"relevance": torch.tensor([[n, n + 5] for n in range(5)]), "relevance_score": score}
    loss, _ = aligned_loss(torch.cat([query, item]), places, AlignedLossConfig())
    assert float(loss) == pytest.approx(by_loop, rel=1e-6)


def batch() -> dict[str, torch.Tensor]:
    draw = np.random.default_rng(0)
    places = {term: torch.from_numpy(draw.integers(0, 12, (4, 2))) for term in ("q2q", "i2i", "q2i", "relevance")}
    places["rank"] = torch.tensor([[0, 1, 2, 3], [4, -1, 5, 6], [7, 8, -1, 9], [7, 8, 3, -1]])
    places["relevance_score"] = torch.rand(4)
    return places


def test_the_loss_is_the_weighted_sum_and_weight_0_skips_a_term():
    vectors, places = unit(12, 6), batch()
    weights = dict(zip(TERMS, (0.5, 2.0, 1.0, 3.0, 0.25), strict=True))
    total, parts = aligned_loss(vectors, places, AlignedLossConfig(**weights))
    assert parts.keys() == set(TERMS)
    assert float(total) == pytest.approx(sum(weights[t] * float(parts[t]) for t in TERMS), rel=1e-9)
    for term in TERMS:
        alone, only = aligned_loss(vectors, places, AlignedLossConfig(**{**dict.fromkeys(TERMS, 0.0), term: 1.0}))
        assert only.keys() == {term} and float(alone) == pytest.approx(float(parts[term]), rel=1e-9)
        without, _ = aligned_loss(vectors, {k: v for k, v in places.items() if k != term}, AlignedLossConfig(**weights))
        assert float(total - without) == pytest.approx(weights[term] * float(parts[term]), abs=1e-9)


def test_gradients_of_the_whole_loss_agree_with_differences():
    places = batch()
    free = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)

    def whole(values):
        return aligned_loss(F.normalize(values, dim=-1), places, AlignedLossConfig(temperature=0.5))[0]

    assert torch.autograd.gradcheck(whole, (free,))


QUERIES, ITEMS = ["red shoe", "lamp", "red shoe"], ["shoe, red", "lamp", "", "chair"]


def examples() -> AlignedExamples:
    pairs = {
        "q2q": np.array([[0, 1], [0, 2]]),
        "q2i": np.array([[0, 0], [1, 1], [2, 2], [1, 3], [0, 3]]),
        "rank": np.array([[0, 0, -1, 3], [1, -1, 2, 3], [1, 0, 2, 3]]),
        "relevance": np.array([[0, 0], [1, 1], [1, 0]]),
    }
    return AlignedExamples(QUERIES, ITEMS, pairs, np.array([0.9, 0.5, 0.1]))


def test_examples_name_each_distinct_text_once_and_drop_pairs_of_equal_texts():
    data = examples()
    assert data.texts == ["red shoe", "lamp", "shoe, red", "unknown item", "chair"]
    assert data.rows["q2q"].tolist() == [[0, 1]] and len(data.rows["q2i"]) == 4 == len(data)  # "lamp" asks for "lamp"
    assert data.rows["rank"].tolist() == [[0, 2, -1, 4], [1, -1, 3, 4], [1, 2, 3, 4]]
    assert data.rows["relevance"].tolist() == [[0, 2], [1, 2]] and data.scores.tolist() == pytest.approx([0.9, 0.1])


def test_a_batch_points_back_to_the_same_texts():
    data = examples()
    for numbers in ([0], [0, 1, 2, 3], [7, 2, 13]):
        texts, places = data.batch(numbers)
        assert len(set(texts)) == len(texts)
        assert places.keys() == {"q2q", "q2i", "rank", "relevance", "relevance_score"}
        for term, rows in data.rows.items():
            wanted = [[None if t < 0 else data.texts[t] for t in rows[n % len(rows)]] for n in numbers]
            assert [[None if p < 0 else texts[p] for p in row] for row in places[term].tolist()] == wanted
        assert places["relevance_score"].tolist() == [data.scores[n % 2] for n in numbers]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AlignedLossConfig(**dict.fromkeys(TERMS, 0.0)), "All weights of the aligned loss are 0"),
        (lambda: AlignedLossConfig(q2q=-1.0), "q2q must be at least 0"),
        (lambda: AlignedLossConfig(temperature=0.0), "temperature of the aligned loss must be above 0"),
        (lambda: AlignedExamples(QUERIES, ITEMS, {"q2q": np.empty((0, 2), int)}), "no pairs to learn from"),
        (lambda: AlignedExamples(QUERIES, ITEMS, {"qq": np.empty((0, 2), int)}), "no term 'qq'"),
        (lambda: AlignedExamples(QUERIES, ITEMS, {"q2q": np.array([[0, 3]])}), "outside the 3 that were given"),
        (lambda: AlignedExamples(QUERIES, ITEMS, {"i2i": np.array([[-1, 2]])}), "outside the 4 that were given"),
        (lambda: AlignedExamples(QUERIES, ITEMS, {"rank": np.array([[0, 1]])}), "must have 4 columns"),
        (lambda: AlignedExamples(QUERIES, ITEMS, {"relevance": np.array([[0, 1]])}), "needs one score"),
    ],
)
def test_wrong_input_is_told_in_one_sentence(make, sentence):
    with pytest.raises((ConfigError, DataError), match=sentence):
        make()

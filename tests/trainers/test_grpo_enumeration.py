"""The enumeration harness of the CRS sheet: exact expectations of gradients over all groups, so nothing is left to tolerance.

Checks 2, 3, 4 and 12 of its section 6: which estimators are exact, and that stock settings fail where they should.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from grpo_stand_ins import PATHS

from sidtune.trainers.grpo.advantages import beam_advantages, group_advantages, list_credit, set_advantages


class Toy:
    """Two prompts sharing parameters, a trie of 3 x 3 items; the sheet's appendix."""

    def __init__(self, legal_boost: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        features = draw(2, 4)
        self.first = (draw(4, 6) * 0.3).requires_grad_()
        self.second = (draw(4, 3, 6) * 0.3).requires_grad_()
        targets = [4, 7]
        self.rewards = torch.tensor(
            [[1.0 if i == t else 0.3 * (PATHS[i, 0] == PATHS[t, 0]) for i in range(9)] for t in targets],
            dtype=torch.float64,
        )
        boost = torch.zeros(6, dtype=torch.float64)
        boost[:3] = legal_boost
        one = features @ self.first + boost
        two = torch.einsum("pd,dav->pav", features, self.second) + boost.flip(0)
        a, b = torch.tensor(PATHS[:, 0]), torch.tensor(PATHS[:, 1])
        full1, full2 = one.log_softmax(-1), two.log_softmax(-1)
        legal1, legal2 = one[:, :3].log_softmax(-1), two[:, :, 3:].log_softmax(-1)
        self.full = full1[:, a] + full2[:, a, 3 + b]
        self.legal = legal1[:, a] + legal2[:, a, b]
        self.truth = self.gradient((self.legal.exp() * self.rewards).sum() / 2)

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        parts = torch.autograd.grad(value, [self.first, self.second], retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def expected(self, advantages, log_probs: torch.Tensor, size: int = 3) -> torch.Tensor:
        """Exact expectation over all groups of independent samples of the legal policy."""
        groups = torch.tensor(list(itertools.product(range(9), repeat=size)))
        total = torch.zeros((), dtype=torch.float64)
        for prompt in range(2):
            chance = self.legal[prompt].detach().exp()[groups].prod(1)
            credit = advantages(self.rewards[prompt][groups].flatten(), prompt, groups).view(-1, size)
            total = total + (chance * (credit * log_probs[prompt][groups]).sum(1)).sum() / size / 2
        return self.gradient(total)

    def compare(self, found: torch.Tensor) -> tuple[float, float, float]:
        """Cosine, scale and residual of a gradient against the exact one."""
        scale = (found @ self.truth) / (self.truth @ self.truth)
        cosine = torch.cosine_similarity(found, self.truth, dim=0)
        return cosine.item(), scale.item(), ((found - scale * self.truth).norm() / (scale * self.truth).norm()).item()


def estimator(**options):
    return lambda rewards, prompt, groups: group_advantages(rewards, 3, **options)


def test_2_centred_and_leave_one_out_advantages_are_unbiased():
    toy = Toy()
    centred = toy.compare(toy.expected(estimator(baseline="group_mean"), toy.legal))
    assert centred[0] == pytest.approx(1, abs=1e-12) and centred[1] == pytest.approx(2 / 3, abs=1e-12)
    alone = toy.compare(toy.expected(estimator(baseline="leave_one_out"), toy.legal))
    assert alone[0] == pytest.approx(1, abs=1e-12) and alone[1] == pytest.approx(1, abs=1e-12)
    assert alone[2] < 1e-12


def test_3_stock_settings_fail_where_they_should():
    toy = Toy()
    assert toy.full.exp().sum(1).max() < 0.5
    assert toy.compare(toy.expected(estimator(baseline="group_mean"), toy.full))[2] > 0.1
    trained = Toy(legal_boost=10.0)
    assert trained.full.exp().sum(1).min() > 0.999
    assert trained.compare(trained.expected(estimator(baseline="group_mean"), trained.full))[2] < 1e-3
    deviation = toy.compare(toy.expected(estimator(baseline="group_mean", scale="group"), toy.legal))
    assert deviation[2] > 0.01


def test_12_sets_and_beams_in_the_harness():
    """Without replacement: exact. Beams: exact over all leaves, biased over some, worse with equal weights."""
    toy = Toy()
    sets = torch.zeros((), dtype=torch.float64)
    for prompt in range(2):
        p = toy.legal[prompt].detach().exp()
        for order in itertools.permutations(range(9), 3):
            chance = p[order[0]] * p[order[1]] / (1 - p[order[0]]) * p[order[2]] / (1 - p[order[0]] - p[order[1]])
            members = torch.tensor(order)
            credit = set_advantages(toy.rewards[prompt][members], toy.legal[prompt].detach()[members], 3)
            sets = sets + chance * (credit * toy.legal[prompt][members]).sum() / 3 / 2
    assert toy.compare(toy.gradient(sets))[2] < 1e-10
    residuals = {}
    for size in (3, 6, 9):
        total, equal = 0.0, 0.0
        for prompt in range(2):
            members = toy.legal[prompt].detach().topk(size).indices
            log_probs, rewards = toy.legal[prompt][members], toy.rewards[prompt][members]
            total = total + (beam_advantages(rewards, log_probs.detach(), size) * log_probs).sum() / size
            equal = equal + (group_advantages(rewards, size) * log_probs).sum() / size
        residuals[size] = toy.compare(toy.gradient(total))[2], toy.compare(toy.gradient(equal))[2]
    assert residuals[9][0] < 1e-12 and residuals[9][1] > 0.01
    assert residuals[3][0] > 0.01 and residuals[3][1] > 0.05


def test_4_standard_deviation_bias_follows_its_law():
    """E[grad] / grad p for Bernoulli rewards, over the binomial number of hits."""

    def multiplier(size: int, p: float) -> float:
        hits = torch.arange(size + 1)
        groups = (torch.arange(size)[None] < hits[:, None]).double()
        advantages = group_advantages(groups.flatten(), size, baseline="group_mean", scale="group").view(-1, size)
        # d log p(x) / dp is 1 / p for a hit and -1 / (1 - p) for a miss.
        score = groups / p - (1 - groups) / (1 - p)
        each = (advantages * score).mean(1).numpy()
        choose = [math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1) for k in range(size + 1)]
        log_weight = np.array(choose) + np.arange(size + 1) * math.log(p) + np.arange(size, -1, -1) * math.log1p(-p)
        return float(np.exp(log_weight) @ each)

    for p in (0.02, 0.1, 0.5):
        assert multiplier(1024, p) == pytest.approx(1 / math.sqrt(p * (1 - p)), rel=0.02)
        assert multiplier(2, p) == pytest.approx(0.707, abs=1e-3)
    assert multiplier(8, 0.02) == pytest.approx(2.41, abs=0.01)


def test_reasonings_with_list_credit_have_the_exact_gradient():
    """R-GRPO's three credits: three reasonings x nine items, groups of two reasonings, the list holding every item.

    Credit "reasoning" is exact for the reasoning's part; the Rao-Blackwell list adds the items' part; their sum is the gradient of
    the expected reward. Judging a reasoning by one sampled item has the same mean and a larger variance.
    """
    generator = torch.Generator().manual_seed(5)
    reasoning = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
    items = torch.randn(3, 9, generator=generator, dtype=torch.float64).requires_grad_()
    gains = torch.rand(9, generator=generator, dtype=torch.float64).round(decimals=1)
    log_c, log_y = reasoning.log_softmax(0), items.log_softmax(1)
    value = (log_c.exp() * (log_y.exp() @ gains)).sum()
    truth = torch.autograd.grad(value, (reasoning, items), retain_graph=True)
    scores = log_y.detach()
    expected, coefficients = list_credit(gains.expand(3, 9), scores)
    estimate = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(3), repeat=2):
        rows = list(group)
        chance = log_c.detach()[rows].sum().exp()
        advantages = group_advantages(expected[rows], 2, baseline="leave_one_out")
        rows_loss = advantages * log_c[rows] + (coefficients[rows] * log_y[rows]).sum(1)
        estimate = estimate + chance * rows_loss.mean()
    found = torch.autograd.grad(estimate, (reasoning, items), retain_graph=True)
    for mine, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-12, rtol=0)
    # Variance of the reasoning's part at one sample per reasoning, without a baseline: expectation against one sampled item.
    pi_c, pi_y = log_c.detach().exp(), log_y.detach().exp()
    score = torch.eye(3, dtype=torch.float64) - pi_c
    listed = (pi_c[:, None] * (expected[:, None] * score) ** 2).sum()
    sampled = (pi_c[:, None, None] * pi_y[:, :, None] * (gains[None, :, None] * score[:, None]) ** 2).sum()
    assert listed < 0.9 * sampled

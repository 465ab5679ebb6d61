"""Estimators of the policy gradient against enumeration, closed forms and plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from sidtune.trainers.grpo.advantages import (
    beam_advantages,
    decoupled_rewards,
    group_advantages,
    list_credit,
    scale_of,
    set_advantages,
    set_ratios,
    spread,
    tpma_advantages,
)

NAN = float("nan")


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=tolerance, rtol=tolerance)


def test_baselines_and_scales_match_loops():
    random = np.random.default_rng(0)
    rewards = random.normal(size=24)
    groups = rewards.reshape(-1, 4)
    found = group_advantages(torch.tensor(rewards), 4, baseline="leave_one_out", scale="none", snap=0.0)
    alone = [row[i] - np.delete(row, i).mean() for row in groups for i in range(4)]
    close(found, alone)
    close(group_advantages(torch.tensor(rewards), 4, baseline="none", snap=0.0), rewards)
    scaled = group_advantages(torch.tensor(rewards), 4, baseline="group_mean", scale="group", snap=0.0)
    close(scaled, [(r - row.mean()) / (row.std(ddof=1) + 1e-4) for row in groups for r in row], 1e-9)
    batch = group_advantages(torch.tensor(rewards), 4, baseline="group_mean", scale="batch", snap=0.0)
    close(batch, [(r - row.mean()) / (rewards.std(ddof=1) + 1e-4) for row in groups for r in row])
    close(scale_of(torch.tensor(rewards), 4, "group"), np.repeat(groups.std(1, ddof=1) + 1e-4, 4))


def test_rows_that_cannot_be_scored_leave_the_baseline():
    rewards = torch.tensor([1.0, NAN, 0.0, 0.5, NAN, NAN, NAN, 3.0, NAN, NAN, NAN, NAN])
    found = group_advantages(rewards, 4)
    close(found[:4], [1 - 0.25, 0.0, 0 - 0.75, 0.5 - 0.5])
    close(found[4:], torch.zeros(8))
    close(spread(rewards, 4), [1.0, 0.0, 0.0])


def test_equal_rewards_that_do_not_average_exactly_are_snapped():
    for value in (0.1, 0.7, 1 / 3):
        rewards = torch.full((8,), value).double() + torch.tensor([0.0, 1e-9] * 4).double()
        for scale in ("group", "none"):
            assert (group_advantages(rewards, 8, baseline="group_mean", scale=scale) == 0).all()
            assert (group_advantages(rewards, 8, baseline="group_mean", scale=scale, snap=0.0) != 0).all()
    live = group_advantages(torch.tensor([0.7, 0.7, 0.7, 0.7 + 1e-3]), 4)
    assert live.abs().max() > 1e-4


def enumerate_sets(p: np.ndarray, size: int):
    """Every set of `size` with the probability of drawing it without replacement."""
    for members in itertools.combinations(range(len(p)), size):
        total = 0.0
        for order in itertools.permutations(members):
            chance, rest = 1.0, 1.0
            for item in order:
                chance, rest = chance * p[item] / rest, rest - p[item]
            total += chance
        yield list(members), total


@pytest.mark.parametrize(
    ("size", "peaked", "baseline"),
    [(1, 1.0, False), *((n, c, b) for n, c in ((2, 0.5), (3, 1.0), (4, 6.0), (6, 2.0)) for b in (True, False))],
)
def test_the_set_estimator_is_exact(size, peaked, baseline):
    generator = torch.Generator().manual_seed(size)
    logits = (torch.randn(6, generator=generator, dtype=torch.float64) * peaked).requires_grad_()
    rewards = torch.rand(6, generator=generator, dtype=torch.float64)
    log_p = logits.log_softmax(0)
    (truth,) = torch.autograd.grad((log_p.exp() * rewards).sum(), logits, retain_graph=True)
    estimate = torch.zeros(())
    for members, chance in enumerate_sets(log_p.exp().detach().numpy(), size):
        complete = torch.tensor([size == 6])
        advantages = set_advantages(
            rewards[members], log_p[members].detach(), size, complete=complete, baseline=baseline
        )
        estimate = estimate + chance * (advantages * log_p[members]).sum() / size
    (found,) = torch.autograd.grad(estimate, logits)
    assert (found - truth).norm() < 1e-10 * truth.norm()


def test_equal_weights_for_a_set_are_not_exact():
    """What the estimator is for: sampling until distinct and averaging is biased by more than 5 %."""
    generator = torch.Generator().manual_seed(2)
    logits = (2 * torch.randn(6, generator=generator, dtype=torch.float64)).requires_grad_()
    rewards = torch.rand(6, generator=generator, dtype=torch.float64)
    log_p = logits.log_softmax(0)
    (truth,) = torch.autograd.grad((log_p.exp() * rewards).sum(), logits, retain_graph=True)
    estimate = torch.zeros(())
    for members, chance in enumerate_sets(log_p.exp().detach().numpy(), 3):
        estimate = estimate + chance * (group_advantages(rewards[members], 3) * log_p[members]).sum() / 3
    (found,) = torch.autograd.grad(estimate, logits)
    scale = (found @ truth) / (truth @ truth)
    assert (found - scale * truth).norm() > 0.05 * scale.abs() * truth.norm()


def test_ratios_of_large_sets_stay_finite_and_right():
    """R of one draw out of sixteen against its definition in exact arithmetic: order of arrival, summed over subsets."""
    log_p = torch.randn(3, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 5
    log_p = torch.cat([log_p, torch.zeros(3, 1)], 1).log_softmax(1)[:, :16]
    first, second = set_ratios(log_p)
    assert first.isfinite().all() and second.isfinite().all() and (first > 0).all()
    p = log_p[0].exp().tolist()
    rest = 1 - sum(p)
    memory = {0: 1.0}

    def arrives_first(subset: int) -> float:
        if subset not in memory:
            members = [i for i in range(16) if subset >> i & 1]
            total = rest + sum(p[i] for i in members)
            memory[subset] = sum(p[i] / total * arrives_first(subset & ~(1 << i)) for i in members)
        return memory[subset]

    whole = 2**16 - 1
    q = arrives_first(whole)
    expected = [arrives_first(whole & ~(1 << i)) / q for i in range(16)]
    torch.testing.assert_close(first[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    pair = arrives_first(whole & ~3) / arrives_first(whole & ~1)
    assert second[0, 0, 1].item() == pytest.approx(pair, rel=1e-9) and second[0, 0, 0] == 1


def test_missing_members_of_a_set_change_nothing():
    rewards = torch.tensor([1.0, 0.2, 0.4])
    logs = torch.tensor([0.2, 0.3, 0.1]).log()
    alone = set_advantages(rewards, logs, 3)
    padded = set_advantages(torch.cat([rewards, torch.tensor([9.0])]), torch.cat([logs, torch.tensor([-torch.inf])]), 4)
    close(padded[:3] / 4, alone / 3, 1e-9)
    assert padded[3] == 0


def test_beams_over_all_leaves_are_exact_and_equal_weights_are_not():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    rewards = torch.rand(5, generator=generator, dtype=torch.float64)
    log_p = logits.log_softmax(0)
    (truth,) = torch.autograd.grad((log_p.exp() * rewards).sum(), logits, retain_graph=True)
    for baseline in (True, False):
        advantages = beam_advantages(rewards, log_p.detach(), 5, baseline=baseline)
        (found,) = torch.autograd.grad((advantages * log_p).sum() / 5, logits, retain_graph=True)
        close(found, truth)
    equal = group_advantages(rewards, 5, baseline="group_mean")
    (wrong,) = torch.autograd.grad((equal * log_p).sum() / 5, logits)
    cosine = torch.cosine_similarity(wrong, truth, dim=0)
    assert cosine < 0.99
    dead = beam_advantages(torch.tensor([1.0, 0.0, NAN]), torch.tensor([-1.0, -1.0, -torch.inf]), 3)
    close(dead, [3 * 0.5 * 0.5, -3 * 0.5 * 0.5, 0.0])


def test_list_credit_is_the_gradient_of_the_expected_gain():
    scores = torch.tensor([[-0.3, -1.0, -torch.inf], [-2.0, -0.1, -3.0]], dtype=torch.float64, requires_grad=True)
    gains = torch.tensor([[1.0, 0.2, 7.0], [0.0, 1.0, 0.5]])
    expected, coefficients = list_credit(gains, scores.detach())
    live = scores.softmax(1)
    by_hand = (live * gains.where(scores > -torch.inf, 0.0)).sum(1)
    close(expected, by_hand.detach())
    (gradient,) = torch.autograd.grad(by_hand.sum(), scores)
    close(coefficients, gradient.nan_to_num())
    empty, none = list_credit(torch.ones(1, 2), torch.full((1, 2), -torch.inf))
    assert empty == 0 and (none == 0).all()


def test_decoupled_rewards_weigh_components_of_any_variance_alike():
    components = torch.tensor([[0.0, 0.0], [1.0, 1000.0], [0.0, 0.0], [1.0, 1000.0]])
    total = decoupled_rewards(components, torch.tensor([1.0, 1.0]), 4)
    close(total[1] / 2, (1 - 0.5) / (components[:, 0].std() + 1e-4), 1e-3)
    assert decoupled_rewards(torch.tensor([[NAN], [1.0]]), torch.tensor([1.0]), 2)[0].isnan()


def test_tpma_gates_by_a_product_and_uses_the_weights():
    matches = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]]).bool()
    item = torch.tensor([0.1, -0.1, -0.2, 0.2])
    found = tpma_advantages(matches, item, 4, torch.tensor([2.0, 2.0, 1.0]), item_weight=0.5)
    for row in range(4):
        for level, weight in enumerate((2.0, 2.0, 1.0)):
            column = matches[:, level].double() * weight
            alone = column[row] - (column.sum() - column[row]) / 3
            gate = math.prod(matches[row, :level].tolist())
            assert found[row, level].item() == pytest.approx(gate * alone.item() + 0.5 * item[row].item(), abs=1e-7)
    # The row whose first code is wrong gets nothing for its later codes, unlike with a sum of matches.
    close(found[2, 1:], [0.5 * -0.2, 0.5 * -0.2], 1e-7)

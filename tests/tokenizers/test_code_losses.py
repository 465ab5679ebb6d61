"""Gradients and loss terms of learned codes against autograd, loops and closed forms."""

from __future__ import annotations

import pytest
import torch

from sidtune.tokenizers.quantizers.code_losses import contrastive, diversity, rotation_trick, sinkhorn, straight_through


def test_straight_through_is_the_identity_backwards():
    e, q = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    out = straight_through(e, q)
    torch.testing.assert_close(out, q)
    weight = torch.randn(5, 4)
    (out * weight).sum().backward()
    torch.testing.assert_close(e.grad, weight)


def test_rotation_trick_turns_gradients_like_the_rotation_matrix():
    e, q = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 5, dtype=torch.float64)
    out = rotation_trick(e, q)
    torch.testing.assert_close(out, q)
    weight = torch.randn(6, 5, dtype=torch.float64)
    (out * weight).sum().backward()
    for row in range(6):
        a, b = e[row].detach() / e[row].norm().detach(), q[row] / q[row].norm()
        r = (a + b) / (a + b).norm()
        matrix = torch.eye(5, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(b, a)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(5, dtype=torch.float64))  # a rotation
        ratio = q[row].norm() / e[row].norm().detach()
        torch.testing.assert_close(ratio * matrix @ e[row].detach(), q[row])  # that takes e to q
        torch.testing.assert_close(e.grad[row], ratio * matrix.T @ weight[row])


@pytest.mark.parametrize("pair", [("zero", "one"), ("one", "zero"), ("one", "minus")])
def test_rotation_trick_falls_back_where_no_rotation_exists(pair):
    named = {
        "zero": torch.zeros(1, 3),
        "one": torch.tensor([[1.0, 2.0, 3.0]]),
        "minus": -torch.tensor([[1.0, 2.0, 3.0]]),
    }
    e, q = named[pair[0]].clone().requires_grad_(), named[pair[1]]
    out = rotation_trick(e, q)
    torch.testing.assert_close(out, q)
    out.sum().backward()
    torch.testing.assert_close(e.grad, torch.ones(1, 3))


def test_sinkhorn_is_uniform_and_survives_small_temperatures():
    draw = torch.Generator().manual_seed(0)
    distances = torch.rand(64, 8, generator=draw) + torch.arange(8) * 0.3  # code 0 is nearest for most
    assert torch.bincount(distances.argmin(dim=1), minlength=8).max() > 40
    plan = sinkhorn(distances, 0.05, 300)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(dim=0), torch.full((8,), 8.0, dtype=torch.float64), atol=0.05, rtol=0)
    sharp = sinkhorn(distances * 1e6, 0.003, 500)
    assert torch.isfinite(sharp).all() and torch.bincount(sharp.argmax(dim=1), minlength=8).max() <= 14
    # Scaling vectors scale rows and columns only: cross ratios stay those of the kernel.
    scaled = -(2 * (distances - distances.min()) / (distances.max() - distances.min()) - 1).double() / 0.05
    left = plan[0, 0] * plan[1, 1] / (plan[0, 1] * plan[1, 0])
    right = (scaled[0, 0] + scaled[1, 1] - scaled[0, 1] - scaled[1, 0]).exp()
    torch.testing.assert_close(left, right, rtol=1e-4, atol=0)
    assert torch.isfinite(sinkhorn(torch.zeros(4, 2), 0.003, 5)).all()


def test_contrastive_by_loop():
    z, h = torch.randn(5, 3), torch.randn(5, 3)
    expected = sum(torch.logsumexp(z[i] @ h.T, 0) - z[i] @ h[i] for i in range(5)) / 5
    torch.testing.assert_close(contrastive(z, h), expected)


def test_diversity_draws_every_other_code_of_the_cluster_and_no_code_outside():
    book = torch.randn(7, 3)
    clusters = torch.tensor([0, 1, 0, 1, 0, 2, 0])
    draw = torch.Generator().manual_seed(0)
    # One code a batch: each loss is one of the closed forms of its cluster.
    for code, others in [(0, [2, 4, 6]), (4, [0, 2, 6]), (1, [3])]:
        logits = torch.tensor([float("-inf") if j == code else float(book[code] @ book[j]) for j in range(7)])
        forms = torch.stack([torch.logsumexp(logits, 0) - logits[j] for j in others])
        found = torch.stack([diversity(torch.tensor([code]), book, clusters, draw) for _ in range(60)])
        nearest = (found[:, None] - forms).abs().min(dim=1)
        assert nearest.values.max() < 1e-5
        assert set(nearest.indices.tolist()) == set(range(len(others)))


def test_diversity_leaves_lone_codes_out_with_finite_gradients():
    book = torch.randn(4, 3, requires_grad=True)
    draw = torch.Generator().manual_seed(0)
    alone = diversity(torch.tensor([3, 3]), book, torch.tensor([0, 0, 0, 1]), draw)
    assert float(alone.detach()) == 0
    mixed = diversity(torch.tensor([3, 0]), book, torch.tensor([0, 0, 2, 1]), draw)
    pair = diversity(torch.tensor([0]), book, torch.tensor([0, 0, 2, 1]), draw)
    assert float(mixed.detach()) == pytest.approx(float(pair.detach()))
    (alone + mixed + diversity(torch.tensor([0]), book[:1], torch.tensor([0]), draw)).backward()
    assert torch.isfinite(book.grad).all()

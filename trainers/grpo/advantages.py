"""Credit of a group of rollouts as pure tensor functions: baselines, scales, and what each kind of rollout needs to be
unbiased.

Every function returns advantages whose mean over the rows of a group, times the gradient of the rows'
log-probabilities, is the policy gradient (what TRL's loss does with them). Rewards are float64 throughout: with
float32, equal rewards such as 0.7 leave a rounding error that a division by a standard deviation of zero turns into a
full step (`specs/crs_debiased_grpo.md` 4, row 4).

Sources: GRPO and its biases (sheet 4, rows 2-4, 12, 16-18), Kool, van Hoof and Welling 2020 for sets drawn without
replacement, OneSearch-V2's TPMA (with a gate of our own, see `tpma_advantages`). The
quadrature of the set probabilities is our own: in arrival times instead of the Gumbel threshold, so that it holds for
any size of set and any probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASELINES = ("group_mean", "leave_one_out", "none")
SCALES = ("group", "batch", "none")
_EPSILON = 1e-4  # TRL's
_NODES = 256


def group_advantages(
    rewards: Tensor, group_size: int, *, baseline: str = "leave_one_out", scale: str = "none", snap: float = 1e-6
) -> Tensor:
    """Advantages of independent samples, rows of a group next to each other.

    Args:
        rewards: (N,) with N a multiple of `group_size`; NaN = cannot be scored: leaves the baseline and gets 0.
        group_size: G.
        baseline: "group_mean" (own reward included: the gradient shrinks by (G - 1) / G), "leave_one_out" (exact),
            "none".
        scale: "group" or "batch" divide by that standard deviation + 1e-4 as GRPO does; "none".
        snap: a group whose rewards differ by less is all zero; 0 switches that off. Without a baseline equal rewards are
            advantages all the same, and nothing is snapped.

    Returns:
        (N,) float64.
    """
    grouped = rewards.double().view(-1, group_size)
    known = ~grouped.isnan()
    count = known.sum(1, keepdim=True).double()  # a ratio of integers would be float32
    values = grouped.where(known, 0.0)
    centred = values
    if baseline != "none":
        centred = values - values.sum(1, keepdim=True) / count.clamp(min=1)
    if baseline == "leave_one_out":
        centred = centred * (count / (count - 1).clamp(min=1)) * (count > 1)
    centred = centred.where(known, 0.0) / scale_of(rewards, group_size, scale).view(-1, group_size)
    if baseline != "none":
        centred = centred.masked_fill(spread(rewards, group_size)[:, None] < snap, 0.0)
    return centred.flatten()


def scale_of(rewards: Tensor, group_size: int, scale: str) -> Tensor:
    """(N,) what `group_advantages` divides each row by; ones for "none"."""
    grouped = rewards.double().view(-1, group_size)
    if scale == "none":
        return torch.ones_like(grouped).flatten()
    deviation = _std(grouped, ~grouped.isnan(), 1 if scale == "group" else None) + _EPSILON
    return deviation.expand_as(grouped).flatten()


def spread(rewards: Tensor, group_size: int) -> Tensor:
    """(N / G,) largest minus smallest reward of each group; 0 where none can be scored."""
    grouped = rewards.double().view(-1, group_size)
    high = grouped.nan_to_num(nan=float("-inf")).amax(1)
    low = grouped.nan_to_num(nan=float("inf")).amin(1)
    return (high - low).nan_to_num(nan=0.0, neginf=0.0).clamp(min=0.0)


def _std(values: Tensor, known: Tensor, dim: int | None) -> Tensor:
    """Standard deviation (n - 1) over the known values; 0 where there are fewer than two."""
    dims = (0, 1) if dim is None else (dim,)
    count = known.sum(dims, keepdim=True)
    mean = values.where(known, 0.0).sum(dims, keepdim=True) / count.clamp(min=1)
    square = ((values - mean).square().where(known, 0.0)).sum(dims, keepdim=True)
    return (square / (count - 1).clamp(min=1)).sqrt()


def decoupled_rewards(components: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """GDPO: every reward is centred and scaled within its group before the weighted sum. Brings the standard-deviation
    bias back.

    Args:
        components: (N, n) rewards, NaN where one does not apply.
        weights: (n,).
    """
    scaled = [group_advantages(c, group_size, baseline="group_mean", scale="group", snap=0.0) for c in components.T]
    total = torch.stack(scaled, dim=1) @ weights.double().to(components.device)
    return total.masked_fill(components.isnan().all(1), torch.nan)


def list_credit(gains: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Rao-Blackwell credit of a list: the expected gain over the list, and each item's share of its gradient.

    With w = softmax(scores) the gradient of the expected gain is sum_k w_k (g_k - expected) grad log p(y_k): exact when
    the list holds every leaf, else that of the distribution cut to the list (sheet 2.7, credit R+list).

    Args:
        gains: (R, K); values at dead places are ignored. scores: (R, K) log-probabilities, -inf at dead places.

    Returns:
        (R,) expected gain, 0 for an empty list, and (R, K) coefficients of grad log p(y_k).
    """
    weights = _weights(scores)
    gains = gains.double().where(scores > float("-inf"), 0.0)
    expected = (weights * gains).sum(1)
    return expected, weights * (gains - expected[:, None])


def beam_advantages(rewards: Tensor, scores: Tensor, group_size: int, *, baseline: bool = True) -> Tensor:
    """Advantages of the beams of one search, self-normalised by their probabilities, which are also the baseline's
    weights.

    Exact when the beams hold every leaf; otherwise biased towards what the beam keeps (sheet 4, row 12: 0.4-43 %,
    against 27-61 % for equal weights).

    Args:
        rewards: (N,), NaN = cannot be scored. scores: (N,) log-probabilities, -inf for a dead beam.
    """
    scores = scores.double().masked_fill(rewards.isnan(), float("-inf")).view(-1, group_size)
    weights = _weights(scores)
    values = rewards.double().nan_to_num(nan=0.0).view(-1, group_size)
    centre = (weights * values).sum(1, keepdim=True) if baseline else 0.0
    return (group_size * weights * (values - centre)).flatten()


def _weights(scores: Tensor) -> Tensor:
    """Softmax over the last axis; all zero where everything is -inf."""
    return scores.double().softmax(-1).nan_to_num(nan=0.0)


def set_advantages(
    rewards: Tensor, log_probs: Tensor, group_size: int, *, complete: Tensor | None = None, baseline: bool = True
) -> Tensor:
    """Unbiased advantages of a set drawn without replacement (Kool et al. 2020).

    The estimate of the gradient is sum_{s in S} p(s) R(S, s) grad log p(s) (f(s) - sum_{s' in S} p(s') R^{D-s}(S, s')
    f(s')).

    Args:
        rewards: (N,) f; log_probs: (N,) log p of each element under the policy it was drawn from; -inf (or a NaN
            reward) = no
            element: the set is smaller.
        group_size: k; rows of one set stand together.
        complete: (N / k,) bool, sets that hold every leaf there is; then R is 1.
        baseline: subtract the built-in baseline; it is exact for sets of at least two.

    Returns:
        (N,) float64: k times the coefficients, since the loss averages over the k rows.
    """
    logs = log_probs.double().masked_fill(rewards.isnan(), float("-inf")).view(-1, group_size)
    values = rewards.double().nan_to_num(nan=0.0).view(-1, group_size)
    first, second = set_ratios(logs, complete)
    probabilities = logs.exp()
    centre = (probabilities[:, None, :] * second * values[:, None, :]).sum(2) if baseline else 0.0
    return (group_size * probabilities * first * (values - centre)).flatten()


def set_ratios(log_probs: Tensor, complete: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Leave-one-out ratios of sets drawn without replacement.

    Let every element arrive after an exponential time of rate p. The set is drawn exactly when its elements arrive
    before all others, whose first arrives at rate p_c = 1 - p(S): Q(A) = integral of p_c exp(-p_c t) prod_{a in A} (1 -
    exp(-p_a t)) dt. Then R(S, s) = Q(S - s) / Q(S) and R^{D-s}(S, s') = Q(S - s - s') / Q(S - s). In x = log t the
    integrand is analytic in a strip and falls off on both sides, so the trapezoid rule converges geometrically; sums
    are taken in logarithms.

    Args:
        log_probs: (B, k) float64, -inf = no element.
        complete: (B,) bool, sets that hold every leaf; their ratios are 1.

    Returns:
        (B, k) R(S, s) and (B, k, k) R^{D-s}(S, s'), whose diagonal is 1; anything where there is no element.
    """
    alive = log_probs > float("-inf")
    p = log_probs.exp()
    rest = (1 - p.sum(1)).clamp(min=1e-12)
    width = log_probs.shape[1]
    # The largest term lies between t = 1 / p_c and (k + 1) / p_c; e^-40 of it is left out on either side.
    low, high = -40.0, torch.tensor(60.0 * (width + 1)).log().item()
    x = torch.linspace(low, high, _NODES, dtype=p.dtype, device=p.device) - rest.log()[:, None]
    t = x.exp()
    arrived = (-torch.expm1(-p[:, :, None] * t[:, None, :])).clamp(min=1e-320).log()
    arrived = arrived.where(alive[:, :, None], 0.0)
    density = rest.log()[:, None] - rest[:, None] * t + x
    everything = density + arrived.sum(1)
    q_set = everything.logsumexp(-1)
    without_one = everything[:, None] - arrived
    q_one = without_one.logsumexp(-1)
    q_two = (without_one[:, :, None] - arrived[:, None]).logsumexp(-1)
    first = (q_one - q_set[:, None]).exp()
    second = (q_two - q_one[:, :, None]).exp()
    if complete is not None:
        first = first.masked_fill(complete[:, None], 1.0)
        second = second.masked_fill(complete[:, None, None], 1.0)
    diagonal = torch.eye(width, dtype=torch.bool, device=p.device)
    return first, second.masked_fill(diagonal, 1.0)


def tpma_advantages(
    matches: Tensor,
    item: Tensor,
    group_size: int,
    weights: Tensor,
    *,
    item_weight: float = 1.0,
    baseline: str = "leave_one_out",
    scale: str = "none",
    snap: float = 1e-6,
) -> Tensor:
    """One advantage per code: position l is judged by its own match, as long as all codes before it matched.

    The gate is a departure from OneSearch-V2: a product, so that a wrong code closes every later position. The paper's gate is
    the share of codes before l that matched, which a wrong code only lowers (`specs/onesearch.md`, TPMA).

    Args:
        matches: (N, L) bool, whether code l is the target's (each code alone, not the prefix).
        item: (N,) advantage of the whole item, added to every position with `item_weight`.
        weights: (L,) reward of a match at each position; the figure of OneSearch-V2 has (2, 2, 2, 1, 1).
        baseline, scale, snap: as in `group_advantages`, per position.

    Returns:
        (N, L) float64.
    """
    rewards = matches.double() * weights.double()
    columns = [group_advantages(r, group_size, baseline=baseline, scale=scale, snap=snap) for r in rewards.T]
    gate = torch.cat([matches.new_ones(len(matches), 1), matches[:, :-1]], dim=1).cumprod(1)
    return torch.stack(columns, dim=1) * gate + item_weight * item.double()[:, None]

"""Position bias by EM on the position-based click model: per-group attractions with a prior, or a regression on features.

    E step, for an impression without a click:
        P(looked at) = theta (1 - a) / (1 - theta a),   P(attractive) = a (1 - theta) / (1 - theta a)
    M step:
        theta_k = mean P(looked at) over the impressions at k
        a_g     = mean P(attractive) with a Beta(m s, (1 - m) s) prior, or the logistic regression of P(attractive) on features of
                  g (Wang et al. 2018, "regression EM")

Every group has its own parameter, so with few impressions per group the maximum is biased, and the prior pulls towards the naive
click rates: prefer `estimate_by_interventions` there (on the default ShopWorld, 15 impressions per group, it is off by 0.04 to
0.10 where this is off by 0.22 to 0.40). The regression needs no group to have moved, but is only as right as its features: where
they leave out what the ranker knows, examination takes the blame. Convergence is sped up by squared extrapolation (SQUAREM,
Varadhan and Roland 2008), safeguarded by the log-likelihood. Differs from the cited works in that; our choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from sidtune.core.errors import ConfigError, DataError
from sidtune.models.position_bias.interventions import (
    Cells,
    PositionBias,
    PositionLog,
    as_bias,
    bootstrap,
    need_clicks,
    refuse_unlinked,
)

_EDGE = 1e-6
_FAR = 13.0


def estimate_by_em(
    log: PositionLog,
    features: Any = None,
    *,
    prior_strength: float = 10.0,
    ridge: float = 1e-3,
    max_steps: int = 200,
    tolerance: float = 1e-5,
    samples: int = 0,
    seed: int = 0,
) -> PositionBias:
    """Examination by EM; see the top of the file.

    Args:
        log: impressions. Without features its groups must have moved between positions.
        features: (n, F) finite numbers per impression, without a constant, or None for one attraction per group. With
            features the groups of the log are not used.
        prior_strength: s, pseudo-impressions of the prior of a group's attraction; at least 0. Not used with features.
        ridge: penalty of the regression's weights, on standardised features; above 0.
        max_steps: most extrapolated steps; each takes three passes over the log.
        tolerance: stop when no examination changes by more.
        samples, seed: bootstrap over clusters for standard errors, started at the estimate; 0 gives none.

    Raises:
        DataError: the log or the features do not identify the ratios, or there is no click.
        ConfigError: an option out of range.
    """
    if prior_strength < 0 or ridge <= 0 or max_steps < 1 or tolerance <= 0:
        raise ConfigError(
            f"prior_strength >= 0, ridge > 0, max_steps >= 1 and tolerance > 0 must hold, got {prior_strength}, {ridge}, "
            f"{max_steps} and {tolerance}."
        )
    design = None
    if features is not None:
        design, number = _design(log, features)
        log = PositionLog(log.positions, log.place, log.click, number, log.cluster)
    cells, cell = Cells.of(log)
    need_clicks(cells)
    if design is None:
        refuse_unlinked(log, cells)
        attraction = _per_group(cells, prior_strength)
    else:
        attraction = _regression(design, ridge)
    theta, state = _fit(cells, _first_theta(cells), attraction, attraction.start, max_steps, tolerance)

    def again(resampled: Cells) -> np.ndarray:
        return _scaled(_fit(resampled, theta, attraction, state, max_steps, tolerance)[0])

    errors = bootstrap(log, cells, cell, again, samples, seed)
    return as_bias(log, _scaled(theta), errors, "em" if features is None else "em with regression")


def _scaled(theta: np.ndarray) -> np.ndarray:
    return theta / theta.max()


def _first_theta(cells: Cells) -> np.ndarray:
    """Click rates by position, the largest set to 0.9: the naive answer, where EM starts."""
    shown = np.bincount(cells.place, cells.shown, cells.places)
    rate = np.bincount(cells.place, cells.clicked, cells.places) / np.maximum(shown, 1.0)
    return np.clip(0.9 * rate / rate.max(), 0.01, 0.99)


def _design(log: PositionLog, features: Any) -> tuple[np.ndarray, np.ndarray]:
    """Distinct standardised feature rows with a constant (D, F + 1), and the row of each impression."""
    table = np.asarray(features, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or len(table) != len(log) or not table.shape[1] or not np.isfinite(table).all():
        raise DataError(
            f"Features must be finite numbers of shape ({len(log)}, F), one row per impression, got shape {table.shape}."
        )
    distinct, number = np.unique(table, axis=0, return_inverse=True)
    number = number.ravel()
    spread = table.std(axis=0)
    if (spread == 0).any():
        raise DataError("A feature has the same value in every impression and explains nothing; leave it out.")
    design = np.column_stack([(distinct - table.mean(axis=0)) / spread, np.ones(len(distinct))])
    _check_rank(log, design, number)
    return design, number


def _check_rank(log: PositionLog, design: np.ndarray, number: np.ndarray) -> None:
    """To first order log P(click) is a position effect plus a feature effect; both must be separable up to one constant."""
    places, width = len(log.positions), design.shape[1]
    seen = np.unique(log.place.astype(np.int64) * len(design) + number)
    place, row = np.divmod(seen, len(design))
    cross = np.zeros((places, width))
    np.add.at(cross, place, design[row])
    diagonal = np.diag(np.bincount(place, minlength=places).astype(np.float64))
    gram = np.block([[diagonal, cross], [cross.T, design[row].T @ design[row]]])
    scale = 1.0 / np.sqrt(np.maximum(np.diag(gram), 1e-12))
    if np.linalg.matrix_rank(gram * scale[:, None] * scale, tol=1e-9, hermitian=True) < places + width - 1:
        raise DataError(
            "Position bias is not identified: the features tell the position exactly (or each other), so examination and "
            "attraction cannot be told apart; leave out features that follow the position."
        )


@dataclass(frozen=True)
class Attraction:
    """A model of the attractions a_g.

    Attributes:
        start: its first state.
        of: state → (G,) attractions.
        update: (state, expected attractive impressions (G,), impressions (G,)) → the state of the M step.
        penalty: state → what the log-likelihood loses by the prior.
    """

    start: np.ndarray
    of: Callable[[np.ndarray], np.ndarray]
    update: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    penalty: Callable[[np.ndarray], float]


def _per_group(cells: Cells, strength: float) -> Attraction:
    """State (G,): the logits of the attractions. The prior's mean fixes the scale, which examination alone does not."""
    mean = float(np.clip(cells.clicked.sum() / (cells.shown @ _first_theta(cells)[cells.place]), _EDGE, 0.5))

    def update(state: np.ndarray, found: np.ndarray, total: np.ndarray) -> np.ndarray:
        return _logit((found + strength * mean) / np.maximum(total + strength, _EDGE))

    def penalty(state: np.ndarray) -> float:
        a = expit(state)
        return -strength * float((mean * np.log(a) + (1 - mean) * np.log1p(-a)).sum())

    return Attraction(np.full(cells.groups, float(_logit(mean))), expit, update, penalty)


def _regression(design: np.ndarray, ridge: float) -> Attraction:
    """State (F + 1,): weights of the logistic regression, the constant last."""
    weight = np.append(np.full(design.shape[1] - 1, ridge), 1e-9)

    def update(state: np.ndarray, found: np.ndarray, total: np.ndarray) -> np.ndarray:
        for _ in range(3):
            a = expit(design @ state)
            gradient = design.T @ (found - total * a) - weight * state
            information = (design * (total * a * (1 - a))[:, None]).T @ design + np.diag(weight)
            state = state + np.clip(np.linalg.solve(information, gradient), -3.0, 3.0)
        return state

    start = np.zeros(design.shape[1])
    start[-1] = -2.0
    return Attraction(start, lambda state: expit(design @ state), update, lambda state: 0.5 * float(weight @ state**2))


def _fit(
    cells: Cells, theta: np.ndarray, attraction: Attraction, state: np.ndarray, max_steps: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """SQUAREM on (logits of examination, state) until no examination moves."""
    x, places = np.concatenate([_logit(theta), state]), cells.places

    def em(x: np.ndarray) -> np.ndarray:
        t = expit(x[:places])[cells.place]
        a = attraction.of(x[places:])[cells.group]
        missed, unseen = cells.shown - cells.clicked, 1.0 - t * a
        looked = np.bincount(cells.place, cells.clicked + missed * t * (1 - a) / unseen, places)
        found = np.bincount(cells.group, cells.clicked + missed * a * (1 - t) / unseen, cells.groups)
        shown = np.bincount(cells.place, cells.shown, places)
        total = np.bincount(cells.group, cells.shown, cells.groups)
        # A position or group that a resample left out keeps its value.
        new = np.where(shown > 0, _logit(looked / np.maximum(shown, _EDGE)), x[:places])
        return np.concatenate([new, attraction.update(x[places:], found, total)])

    def value(x: np.ndarray) -> float:
        p = expit(x[:places])[cells.place] * attraction.of(x[places:])[cells.group]
        return float(
            (cells.clicked * np.log(p) + (cells.shown - cells.clicked) * np.log1p(-p)).sum()
        ) - attraction.penalty(x[places:])

    for _ in range(max_steps):
        one = em(x)
        two = em(one)
        r, v = one - x, two - 2 * one + x
        length = max(1.0, np.linalg.norm(r) / max(np.linalg.norm(v), 1e-300))
        far = em(np.clip(x + 2 * length * r + length**2 * v, -_FAR, _FAR))
        new = far if np.isfinite(far).all() and value(far) >= value(two) else two
        moved = np.abs(expit(new[:places]) - expit(x[:places])).max()
        x = new
        if moved < tolerance:
            break
    return expit(x[:places]), x[places:]


def _logit(p: np.ndarray | float) -> np.ndarray:
    p = np.clip(p, _EDGE, 1 - _EDGE)
    return np.log(p / (1 - p))

"""Who looks where: the chance that each place of a list is clicked, in closed form. Own design; sheet `specs/market.md` 3.6.

With the examination x_k of the place and the attraction a_k of what stands there:

*Position reader*: P(click at k) = x_k a_k (1 − φ)^m with m clicks before, independent otherwise.
*Cascade reader*: reads from the top, e_0 = x_0, goes on with the chance ρ_k = x_{k+1} / x_k; after a click only with the chance
1 − η, after an order times 1 − η_o:  e_{k+1} = e_k ρ_k (1 − a_k (η + (1 − η) η_o O_k)).

φ is the fatigue of clicking. With it the state is the number of clicks so far, and the chance is a sum over it: O(K²).
"""

from __future__ import annotations

import numpy as np


def click_chances(
    attraction: np.ndarray,
    order: np.ndarray,
    examination: np.ndarray,
    *,
    cascade: float = 0.0,
    stop_after_click: float = 0.0,
    stop_after_order: float = 0.0,
    fatigue: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """P(click) and P(looked at) of each place, (n, K) each, over the two kinds of readers.

    Args:
        attraction: (n, K) P(click | looked at), 0 at empty places. order: (n, K) P(order | click).
        examination: (K,) x, falling. cascade: share of cascade readers.
        stop_after_click, stop_after_order, fatigue: η, η_o and φ.

    >>> a, o, x = np.array([[0.5, 0.5]]), np.zeros((1, 2)), np.array([1.0, 0.5])
    >>> click_chances(a, o, x)[0].tolist(), click_chances(a, o, x, cascade=1.0, stop_after_click=1.0)[0].tolist()
    ([[0.5, 0.25]], [[0.5, 0.125]])
    """
    x = examination[: attraction.shape[1]]
    go_on = np.append(x[1:] / x[:-1], 0.0)
    click, looked = np.zeros(attraction.shape), np.zeros(attraction.shape)
    if cascade < 1.0:
        part = _read(attraction, x, np.ones(len(x)), np.ones(attraction.shape), fatigue, independent=True)
        click, looked = click + (1.0 - cascade) * part[0], looked + (1.0 - cascade) * part[1]
    if cascade > 0.0:
        after = (1.0 - stop_after_click) * (1.0 - stop_after_order * order)
        part = _read(attraction, x, go_on, after, fatigue, independent=False)
        click, looked = click + cascade * part[0], looked + cascade * part[1]
    return click, looked


def _read(
    attraction: np.ndarray, x: np.ndarray, go_on: np.ndarray, after: np.ndarray, fatigue: float, independent: bool
) -> tuple[np.ndarray, np.ndarray]:
    """`after` (n, K): the chance to go on after a click, beside `go_on` (K,). An independent reader looks at every place anew."""
    count, places = attraction.shape
    states = places if fatigue > 0.0 else 1
    left = (1.0 - fatigue) ** np.arange(states)
    here = np.zeros((count, states))
    here[:, 0] = 1.0 if independent else x[0]
    click, looked = np.zeros(attraction.shape), np.zeros(attraction.shape)
    for k in range(places):
        own = attraction[:, k : k + 1] * left
        seen = here * x[k] if independent else here
        clicked = seen * own
        click[:, k], looked[:, k] = clicked.sum(axis=1), seen.sum(axis=1)
        moved = clicked * after[:, k : k + 1]
        here = here - clicked
        if states > 1:
            here[:, 1:] += moved[:, :-1]
            here[:, -1] += moved[:, -1]
        else:
            here = here + moved
        here = here * go_on[k]
    return click, looked


def sampled_clicks(
    attraction: np.ndarray,
    order: np.ndarray,
    examination: np.ndarray,
    kinds: np.ndarray,
    look: np.ndarray,
    stop: np.ndarray,
    attract: np.ndarray,
    *,
    stop_after_click: float = 0.0,
    stop_after_order: float = 0.0,
    fatigue: float = 0.0,
) -> np.ndarray:
    """(n, K) bool clicks by given coins.

    Args:
        order: (n, K) bool, whether a click would become an order.
        kinds: (n,) bool, who reads as a cascade. look, stop: (n, K) coins of the places. attract: (n, K) coins of the items.
    """
    count, places = attraction.shape
    x = examination[:places]
    click, clicks = np.zeros(attraction.shape, bool), np.zeros(count)
    going = np.where(kinds, look[:, 0] < x[0], True)
    for k in range(places):
        seen = np.where(kinds, going, look[:, k] < x[k])
        click[:, k] = seen & (attract[:, k] < attraction[:, k] * (1.0 - fatigue) ** clicks)
        clicks += click[:, k]
        chance = np.full(count, x[k + 1] / x[k] if k + 1 < places else 0.0)
        chance = np.where(click[:, k], chance * (1.0 - stop_after_click), chance)
        chance = np.where(click[:, k] & order[:, k], chance * (1.0 - stop_after_order), chance)
        going = going & (stop[:, k] < chance)
    return click

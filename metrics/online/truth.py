"""What lists earn in truth, beside what the log says of them, in a simulated shop. Own design; sheet `specs/market.md` 7.

A logged metric counts what a biased page happened to show and people happened to click; here every list is shown to every request,
also to those without feedback, and its exact expectations are taken. For tables and reports only: nothing that trains or chooses
may import this module, which a test forbids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from sidtune.data_builders.shop_world.market import Market
from sidtune.data_builders.shop_world.world import ShopWorld

IDEAL = "ideal"
EARNED = ("click", "order", "value")


def truth(
    world: ShopWorld,
    rows: np.ndarray,
    lists: Mapping[str, np.ndarray],
    k: int = 10,
    logged: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Exact means over requests, JSON-ready.

    Args:
        rows: (n,) request rows of the shop. lists: system → (n, K) item rows, −1 for an empty place.
        k: places that are shown. logged: a metric of the log for some of the systems.

    Returns:
        `requests`, `k`, and `systems` → mean clicks, orders and value (clicks and orders as each user weighs them) of a list and
        its `regret`, the clicks by which the ideal list is better; `ideal` is among them. With `logged` also `kendall_tau`, the
        rank correlation of the logged metric and the true clicks over these systems (None for fewer than two).
    """
    market = Market(world)
    shown = {IDEAL: market.ideal(rows, k)} | {name: np.asarray(one)[:, :k] for name, one in lists.items()}
    earned = {name: market.serve(rows, one).expected for name, one in shown.items()}
    means = {name: {v: float(one[v].sum(axis=1).mean()) for v in EARNED} for name, one in earned.items()}
    for one in means.values():
        one["regret"] = means[IDEAL]["click"] - one["click"]
    found: dict[str, Any] = {"requests": len(rows), "k": k, "systems": means}
    both = [name for name in logged or {} if name in means]
    if logged is not None:
        tau = (
            kendalltau([logged[n] for n in both], [means[n]["click"] for n in both]).statistic
            if len(both) > 1
            else None
        )
        found["kendall_tau"] = None if tau is None or np.isnan(tau) else float(tau)
    return found


def truth_lines(found: Mapping[str, Any], metric: str) -> list[str]:
    """The truth as lines of text, best list first."""
    systems = sorted(found["systems"].items(), key=lambda one: -one[1]["click"])
    told = "; ".join(
        f"{name} {one['click']:.3f} clicks, {one['order']:.3f} orders, regret {one['regret']:.3f}"
        for name, one in systems
    )
    lines = [f"In truth, over {found['requests']:,} requests, the first {found['k']} places earn: {told}."]
    if found.get("kendall_tau") is not None:
        lines.append(
            f"Rank correlation of {metric} in the log and true clicks over the systems: {found['kendall_tau']:+.2f}."
        )
    return lines

"""What each dial of the market is worth to who knows of it: his list against the best list of one who does not know.

    python benchmarks/market_dials.py [--quick] [--json FILE --readme FILE]

Exact, without sampling or training: both lists are served to the same requests, and gains are means over seeds. The blind one knows
all but the phenomenon, at this strength of the dial (`specs/market.md` 3.0): tastes averaged over departments; values left out
averaged over what may stand there; items by their worth alone where neighbours matter; one weight of clicks and orders for
everyone, the best of ten in hindsight; scores as they are said.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sidtune.data_builders.shop_world import words
from sidtune.data_builders.shop_world.blanks import BLANKABLE, left_out
from sidtune.data_builders.shop_world.logging_policy import best
from sidtune.data_builders.shop_world.market import Market
from sidtune.data_builders.shop_world.requests import HOME, PLAIN
from sidtune.data_builders.shop_world.world import ShopWorld
from sidtune.metrics.report.readme_table import publish

K, REDRAWS = 10, 24
SIZE = {"n_items": 1000, "n_users": 500, "n_requests": 8000}
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 50.0)  # of an order, in clicks


def department_tastes(market: Market, rows: np.ndarray) -> np.ndarray:
    """Lists by each user's mean taste, departments weighted by interest."""
    world = market.world
    own, leaf = world.users.by_department, np.exp(world.users.interest)
    if own is None:
        return market.ideal(rows, K)
    parts = [leaf[:, :, world.catalogue.leaf_department == d].sum(axis=2) for d in range(world.config.n_departments)]
    share = np.stack(parts, axis=2) / leaf.sum(axis=2)[:, :, None]
    taste = world.users.taste.copy()
    taste[:, :, world.config.n_brands :] = (own * share[..., None]).sum(axis=2)
    blind = ShopWorld(world.config)
    blind.users = dataclasses.replace(world.users, taste=taste, by_department=None)
    return Market(blind).ideal(rows, K)


def blanks(market: Market, rows: np.ndarray) -> np.ndarray:
    """Lists by the mean attraction over values drawn for those left out, brands from items of the department."""
    world, blank, draw, total = market.world, left_out(market.world.config), np.random.default_rng(0), 0.0
    config, catalogue = world.config, world.catalogue
    for _ in range(REDRAWS if blank.any() else 1):
        mixed = draw.permutation(config.n_items)
        inside = np.empty_like(mixed)
        inside[np.argsort(catalogue.department, kind="stable")] = mixed[
            np.argsort(catalogue.department[mixed], kind="stable")
        ]
        guess = {}
        for name, out in zip(BLANKABLE, blank.T, strict=True):
            values = getattr(catalogue, name)
            guess[name] = np.where(out, values[inside if name in ("brand", "material") else mixed], values)
        reader = ShopWorld(config)
        reader.catalogue = dataclasses.replace(catalogue, **guess)
        colours = config.n_brands + guess["colour"]
        styles = config.n_brands + len(words.COLOURS) + guess["style"]
        reader._column_of = np.stack([guess["brand"], colours, styles])
        total = total + reader.attraction(rows)
    return best(total, K)


def by_worth(market: Market, rows: np.ndarray) -> np.ndarray:
    return best(market.worth(rows, "click"), K)


def one_weight(market: Market, rows: np.ndarray) -> np.ndarray:
    """Lists by clicks + w orders, w the best of `WEIGHTS` for all users together."""
    clicks, orders = market.worth(rows, "click"), market.worth(rows, "order")
    lists = [best(clicks + weight * orders, K) for weight in WEIGHTS]
    return max(lists, key=lambda one: market.total(rows, one, "value").sum())


def by_scores(market: Market, rows: np.ndarray) -> np.ndarray:
    items = np.broadcast_to(np.arange(market.world.config.n_items), (len(rows), market.world.config.n_items))
    return best(market.scores(rows, items), K)


@dataclasses.dataclass(frozen=True)
class Case:
    """A dial at some strengths, the dials held beside it, who does not know, and what is counted on which requests."""

    dial: str
    levels: tuple[float, ...]
    blind: Callable[[Market, np.ndarray], np.ndarray]
    value: str = "click"
    kind: int = PLAIN
    beside: dict[str, float] = dataclasses.field(default_factory=dict)


CASES = (
    Case("taste_by_department", (0.25, 0.5, 1.0), department_tastes),
    Case("missing_attributes", (0.25, 0.5, 1.0), blanks),
    Case("satiation", (0.3, 0.6, 0.9), by_worth, kind=HOME),
    Case("interaction", (0.4, 0.8, 1.0), by_worth, kind=HOME),
    Case("value_spread", (0.25, 0.5, 1.0), one_weight, value="value", beside={"clickbait": 2.0}),
    Case("score_distortion", (0.25, 0.5, 1.0), by_scores, kind=HOME),
)


def gain(case: Case, level: float, seed: int, most: int) -> float:
    """By how much the list of who knows is better, relative."""
    dials = {**case.beside, case.dial: level}
    market = Market(ShopWorld.from_options(seed=seed, phenomena=dials, **SIZE))
    rows = np.flatnonzero(market.world.requests.kind == case.kind)[:most]
    lists = market.ideal(rows, K, case.value), case.blind(market, rows)
    earned = [market.total(rows, one, case.value).mean() for one in lists]
    return float(earned[0] / earned[1] - 1.0)


def markdown(record: dict[str, Any]) -> str:
    """GitHub table: a dial a row, what knowing it is worth at 0 and at rising strengths."""
    lines = ["| dial | at 0 | rising strength |", "|---|---:|---|"]
    for row in record["rows"]:
        rising = ", ".join(
            f"{level:g}: {100 * one['mean']:+.1f} ± {100 * one['sd']:.1f} %"
            for level, one in zip(row["levels"][1:], row["gains"][1:], strict=True)
        )
        lines.append(f"| `{row['dial']}` | {100 * row['gains'][0]['mean']:+.1f} % | {rising} |")
    seeds = ", ".join(str(seed) for seed in record["seeds"])
    return "\n".join(lines) + (
        f"\n\nExact gain of who knows over who does not, first {K} places, {record['requests']} requests, "
        f"mean ± standard deviation over seeds {seeds}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 40 requests")
    parser.add_argument("--json", default=None)
    parser.add_argument("--readme", type=Path, default=None)
    options = parser.parse_args()
    seeds, most = ((0,), 40) if options.quick else ((0, 1, 2), 200)
    rows = []
    for case in CASES:
        levels = (0.0, *case.levels)
        found = [[gain(case, level, seed, most) for seed in seeds] for level in levels]
        gains = [{"mean": float(np.mean(one)), "sd": float(np.std(one, ddof=len(one) > 1))} for one in found]
        rows.append({"dial": case.dial, "levels": levels, "gains": gains})
        print(
            f"{case.dial}: " + ", ".join(f"{x:g} {100 * g['mean']:+.2f} %" for x, g in zip(levels, gains, strict=True))
        )
    record = {"rows": rows, "seeds": list(seeds), "requests": most}
    config = {"size": SIZE, "cases": [[case.dial, case.levels, case.value, case.kind, case.beside] for case in CASES]}
    publish(
        record, markdown(record), options.json, [] if options.readme is None else [str(options.readme)], config=config
    )


if __name__ == "__main__":
    main()

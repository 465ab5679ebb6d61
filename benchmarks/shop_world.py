"""ShopWorld against a plain Python-loop generator of the same model, and the reference rankers of the default world.

    python benchmarks/shop_world.py [--quick] [--json FILE]

The loop generator is a second implementation from the equations in `data_builders/shop_world/world.py`, request by request
and item by item, fed with the same random numbers; its requests, pages and feedback must equal those of `ShopWorld`
before any time is reported. The tests use it as their oracle too. `reference_rankers` gives the yardsticks that a model
trained on ShopWorld is measured with.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sidtune.data_builders.shop_world import words
from sidtune.data_builders.shop_world.catalogue import N_COLOURS, N_STYLES
from sidtune.data_builders.shop_world.config import ShopWorldConfig
from sidtune.data_builders.shop_world.logging_policy import LOG_CHUNK, best, log_draws
from sidtune.data_builders.shop_world.requests import (
    ASKED_SORT,
    ATTRIBUTE,
    ATTRIBUTE_ONLY,
    BRAND,
    BROWSE,
    DEPARTMENT,
    DEVICE,
    HOME,
    HOURS,
    PLACE,
    kind_weights,
    request_draws,
)
from sidtune.data_builders.shop_world.world import ShopWorld

DAY = 86_400


def choose(weights: list[float], draw: float) -> int:
    """The first number whose cumulative weight exceeds draw x total."""
    total = sum(weights)
    running = 0.0
    for number, weight in enumerate(weights):
        running += weight
        if draw * total < running:
            return number
    return len(weights) - 1


def logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def softmax_weights(logits: list[float]) -> list[float]:
    top = max(logits)
    return [math.exp(x - top) for x in logits]


def loop_requests(world: ShopWorld) -> list[dict[str, Any]]:
    """The requests of the world, one at a time; `world` gives only its catalogue, its users and its config."""
    config, users = world.config, world.users
    draws = request_draws(config)
    times = []
    for user in range(config.n_users):
        for _ in range(int(users.requests[user])):
            n = len(times)
            start = float(users.start[user])
            day = min(int(config.days * (start + (1.0 - start) * draws.day[n])), config.days - 1)
            hour = choose(HOURS.tolist(), draws.hour[n])
            times.append((config.start_time + day * DAY + hour * 3600 + int(draws.second[n] * 3600), user))
    times.sort()
    return [_loop_request(world, draws, n, moment, user) for n, (moment, user) in enumerate(times)]


def _loop_request(world: ShopWorld, draws: Any, n: int, moment: int, user: int) -> dict[str, Any]:
    config, catalogue, users = world.config, world.catalogue, world.users
    period = (moment - config.start_time) // (DAY * config.drift_days)
    daypart = moment % DAY // 21_600
    weekend = int(time.gmtime(moment).tm_wday >= 5)
    place = choose(PLACE[weekend][daypart].tolist(), draws.place[n])
    device = choose(DEVICE[place].tolist(), draws.device[n])
    kind = choose(kind_weights(config).tolist(), draws.kind[n])
    wish = []
    for leaf in range(config.n_leaves):
        department = int(catalogue.leaf_department[leaf])
        shift = users.place_shift[place, department] + users.daypart_shift[daypart, department]
        wish.append(float(users.interest[user, period, leaf] + shift))
    leaf = choose(softmax_weights(wish), draws.leaf[n])
    department = int(catalogue.leaf_department[leaf])
    taste = (users.taste[user, period] * config.query_taste).tolist()
    asked = brand = -1
    if kind in (ATTRIBUTE, ATTRIBUTE_ONLY):
        sort = choose(ASKED_SORT.tolist(), draws.sort[n])
        colours = taste[config.n_brands : config.n_brands + N_COLOURS]
        styles = taste[config.n_brands + N_COLOURS : config.n_brands + N_COLOURS + N_STYLES]
        if sort == 0:
            asked = choose(softmax_weights(colours), draws.value[n])
        elif sort == 1:
            asked = N_COLOURS + choose(softmax_weights(styles), draws.value[n])
        else:
            materials = words.DEPARTMENTS[department].materials
            name = materials[int(draws.value[n] * len(materials))]
            asked = N_COLOURS + N_STYLES + words.MATERIALS.index(name)
    if kind == BRAND:
        here = [b for b in range(config.n_brands) if department in catalogue.brand_departments[b]]
        brand = here[choose(softmax_weights([taste[b] for b in here]), draws.value[n])]
    scope = ("leaf", leaf)
    if kind in (DEPARTMENT, BROWSE):
        scope = ("department", department)
    elif kind in (ATTRIBUTE_ONLY, HOME):
        scope = ("none", -1)
    return {
        "user": user, "time": moment, "period": period, "place": place, "daypart": daypart, "device": device,
        "kind": kind, "leaf": leaf, "asked": asked, "brand": brand, "scope": scope,
        "noun": int(draws.noun[n] * 3), "order": int(draws.order[n] * 3),
    }  # fmt: skip


def relation(world: ShopWorld, request: dict[str, Any], item: int) -> int:
    """0 inside the request's scope, 1 same group, 2 same department, 3 other."""
    catalogue = world.catalogue
    leaf = int(catalogue.leaf[item])
    sort, number = request["scope"]
    if sort == "none":
        return 0
    if sort == "department":
        return 0 if catalogue.leaf_department[leaf] == number else 3
    if leaf == number:
        return 0
    if catalogue.leaf_group[leaf] == catalogue.leaf_group[number]:
        return 1
    return 2 if catalogue.leaf_department[leaf] == catalogue.leaf_department[number] else 3


def asked_and_had(world: ShopWorld, request: dict[str, Any], item: int) -> tuple[bool | None, bool | None]:
    """Whether the item has the asked value and the asked brand; None where none is asked."""
    c = world.catalogue
    have = (c.colour[item], N_COLOURS + c.style[item], N_COLOURS + N_STYLES + c.material[item])
    value = None if request["asked"] < 0 else request["asked"] in have
    brand = None if request["brand"] < 0 else bool(request["brand"] == c.brand[item])
    return value, brand


def context_shift(world: ShopWorld, request: dict[str, Any], item: int) -> float:
    department = world.catalogue.leaf_department[world.catalogue.leaf[item]]
    users = world.users
    return float(users.place_shift[request["place"], department] + users.daypart_shift[request["daypart"], department])


def loop_ranking(world: ShopWorld, request: dict[str, Any]) -> list[int]:
    """The production ranker's order of all items on sale."""
    config, catalogue = world.config, world.catalogue
    scored = []
    for item in range(config.n_items):
        if catalogue.launch_period[item] > request["period"]:
            continue
        score = config.ranker_category * (1.0, 0.6, 0.4, 0.0)[relation(world, request, item)]
        score -= config.ranker_popularity * math.log1p(catalogue.popularity_rank[item])
        score += config.ranker_attribute * sum(had is True for had in asked_and_had(world, request, item))
        if request["kind"] == HOME:
            score += config.ranker_context * context_shift(world, request, item)
        scored.append((-score, item))
    return [item for _, item in sorted(scored)]


def loop_taste(world: ShopWorld, request: dict[str, Any], item: int) -> float:
    """T of the model: brand, colour and style affinity less the price term."""
    config, c = world.config, world.catalogue
    taste = world.users.taste[request["user"], request["period"]]
    likes = taste[c.brand[item]] + taste[config.n_brands + c.colour[item]]
    likes += taste[config.n_brands + N_COLOURS + c.style[item]]
    return float(likes - config.price_taste * min((c.price_level[item] - taste[-1]) ** 2, 9.0))


def loop_attraction(world: ShopWorld, request: dict[str, Any], item: int) -> float:
    """A(request, item), step 3 of the model."""
    config, c = world.config, world.catalogue
    if c.launch_period[item] > request["period"]:
        return 0.0
    logit = config.click_bias + loop_taste(world, request, item) + config.quality * c.quality[item]
    logit += config.context * context_shift(world, request, item)
    penalties = (0.0, config.group_penalty, config.department_penalty, config.other_penalty)
    logit -= penalties[relation(world, request, item)]
    value, brand = asked_and_had(world, request, item)
    logit -= config.attribute_penalty * (value is False) + config.brand_penalty * (brand is False)
    if request["scope"][0] != "leaf":
        wish = world.users.interest[request["user"], request["period"], c.leaf[item]]
        logit += config.interest * min(max(wish, -3.0), 3.0)
    return logistic(logit)


def loop_page(world: ShopWorld, request: dict[str, Any], keys: np.ndarray) -> list[int]:
    """The shown items by position: each tier takes its ranks with the smallest keys, smallest first."""
    config = world.config
    explored = [(s + 1) * config.page_size // config.exploration_slots - 1 for s in range(config.exploration_slots)]
    ranked = [k for k in range(config.page_size) if k not in explored]
    n_tiers = min(config.ranked_tiers, len(ranked))
    factor = config.recommendation_oversampling if request["kind"] >= HOME else config.search_oversampling
    tiers, used = [], 0
    for tier in range(n_tiers):
        size = len(ranked) // n_tiers + (tier < len(ranked) % n_tiers)
        tiers.append((ranked[used : used + size], math.ceil(round(size * factor, 9))))
        used += size
    tiers.append((explored, config.exploration_pool if explored else 0))
    order = loop_ranking(world, request)
    page = [-1] * config.page_size
    first = 0
    for positions, width in tiers:
        drawn = sorted(range(first, first + width), key=lambda rank: keys[rank])
        for position, rank in zip(positions, drawn, strict=False):
            page[position] = order[rank]
        first += width
    return page


def loop_feedback(world: ShopWorld, request: dict[str, Any], page: list[int], draws: Any, n: int) -> list[tuple]:
    """(item, click, like, order, dwell) by position; like -1 and dwell None where null."""
    config, c = world.config, world.catalogue
    rows = []
    for position, item in enumerate(page):
        taste = loop_taste(world, request, item)
        seen = (1.0 + position) ** -config.examination_decay
        click = draws.click[n, position] < seen * loop_attraction(world, request, item)
        like = click and draws.like[n, position] < logistic(config.like_bias + config.like_taste * taste)
        buys = config.order_bias + config.order_taste * taste + config.order_quality * c.quality[item]
        buys += config.order_laptop * (words.DEVICES[request["device"]] == "laptop")
        buys -= config.order_price * c.price_level[item]
        order = click and draws.order[n, position] < logistic(buys)
        log_dwell = config.dwell_log_mean + config.dwell_taste * taste + config.dwell_sigma * draws.dwell[n, position]
        known = draws.like_known[n] >= config.like_unknown_share
        rows.append((item, int(click), int(like) if known else -1, int(order), math.exp(log_dwell) if click else None))
    return rows


def loop_log(world: ShopWorld, requests: list[dict[str, Any]], pool: int) -> list[list[tuple]]:
    """Pages and feedback of all requests, one at a time."""
    out = []
    for first in range(0, len(requests), LOG_CHUNK):
        part = requests[first : first + LOG_CHUNK]
        draws = log_draws(world.config, first // LOG_CHUNK, len(part), pool)
        for n, request in enumerate(part):
            out.append(loop_feedback(world, request, loop_page(world, request, draws.keys[n]), draws, n))
    return out


def equal(world: ShopWorld, requests: list[dict[str, Any]], log: list[list[tuple]]) -> bool:
    """Whether the loop's requests, pages and feedback are those of the world (dwell to 1e-5 relative)."""
    for name in (
        "user",
        "time",
        "period",
        "place",
        "daypart",
        "device",
        "kind",
        "leaf",
        "asked",
        "brand",
        "noun",
        "order",
    ):
        if getattr(world.requests, name).tolist() != [request[name] for request in requests]:
            return False
    for column, name in enumerate(("item", "click", "like", "order")):
        if getattr(world.log, name).tolist() != [[row[column] for row in page] for page in log]:
            return False
    dwell = np.array([[np.nan if row[4] is None else row[4] for row in page] for page in log])
    return bool(np.allclose(world.log.dwell, dwell, rtol=1e-5, equal_nan=True))


def ndcg_of_clicks(world: ShopWorld, rows: np.ndarray, ranking: np.ndarray) -> np.ndarray:
    """(n,) NDCG of item rows (n, k) with the logged clicks of each request as binary gains; every row needs a click."""
    clicked = np.zeros((len(rows), world.config.n_items), dtype=bool)
    at, position = np.nonzero(world.log.click[rows])
    clicked[at, world.log.item[rows[at], position]] = True
    discount = 1.0 / np.log2(2.0 + np.arange(ranking.shape[1]))
    gain = (np.take_along_axis(clicked, ranking, axis=1) * discount).sum(axis=1)
    return gain / np.cumsum(discount)[np.minimum(clicked.sum(axis=1), ranking.shape[1]) - 1]


def past_clicks(world: ShopWorld, until: int) -> np.ndarray:
    """(scopes, N) logged clicks on each item in the requests before row `until`, by scope of the request."""
    counts = np.zeros((len(world.catalogue.relation), world.config.n_items))
    at, position = np.nonzero(world.log.click[:until])
    np.add.at(counts, (world.requests.scope[at], world.log.item[at, position]), 1.0)
    return counts


def taste_lifts(world: ShopWorld, rows: np.ndarray, until: int) -> np.ndarray:
    """(n, N) log of how much more than expected each user clicked an item's brand, colour, style and price before."""
    config, c, n = world.config, world.catalogue, world.config.n_requests
    price = np.digitize(c.price_level, [-1.0, -0.43, 0.43, 1.0])
    starts = np.cumsum([0, config.n_brands, N_COLOURS, N_STYLES])
    columns = [first + values for first, values in zip(starts, (c.brand, c.colour, c.style, price), strict=True)]
    expected_click = np.broadcast_to(world.log.click[:until].mean(axis=0), world.log.click.shape)
    seen = []
    order = np.lexsort((np.arange(n), world.requests.user))
    first = np.searchsorted(world.requests.user[order], world.requests.user[order])
    for weight in (world.log.click, expected_click):
        table = np.zeros((n, starts[-1] + 5))
        for column in columns:
            np.add.at(table, (np.arange(n)[:, None], column[world.log.item]), weight)
        sums = np.concatenate([np.zeros((1, table.shape[1])), np.cumsum(table[order], axis=0)])
        before = np.empty_like(table)
        before[order] = sums[:-1] - sums[first]
        seen.append(before[rows])
    lift = np.log((seen[0] + 1.0) / (seen[1] + 1.0))
    return sum(lift[:, column] for column in columns)


def reference_rankers(world: ShopWorld, rows: np.ndarray, until: int) -> dict[str, np.ndarray]:
    """Name → (n, 10) item rows, from the log alone (and the asked words) to the truth."""
    c = world.catalogue
    scope = world.requests.scope[rows]
    clicks = past_clicks(world, until)
    popularity = clicks.sum(axis=0)
    inside = c.relation[scope][:, c.leaf] == 0
    asked, brand = world.requests.asked[rows, None], world.requests.brand[rows, None]
    missing = ((asked >= 0) & ~(c.values[None] == asked[:, :, None]).any(axis=2)).astype(np.int64)
    missing += (brand >= 0) & (c.brand[None] != brand)
    no_taste = np.log(clicks[scope] + 1e-3 * popularity + 1e-9) + np.log(0.2) * missing
    exposure = world.examined_exposure(rows)
    return {
        "popularity": best(np.broadcast_to(popularity, (len(rows), len(popularity))), 10),
        "popularity in the true category": best(np.where(inside, popularity, popularity * 1e-6), 10),
        "clicks for this scope and asked words": best(no_taste, 10),
        "the same + user's past brand, colour, style, price": best(no_taste + taste_lifts(world, rows, until), 10),
        "production page (expected)": best(exposure, 10),
        "oracle without taste": best(exposure * world.mean_attraction(rows, 32), 10),
        "ideal (true attraction, no exposure)": world.ideal_ranking(rows, 10),
        "oracle": world.oracle_ranking(rows, 10),
    }


def reference_table(world: ShopWorld, last_share: float = 0.1) -> dict[str, dict[str, float]]:
    """NDCG@10 on the logged clicks of the last requests, of searches and of recommendations, for each ranker."""
    n = world.config.n_requests
    until = int(n * (1.0 - last_share))
    rows = np.arange(until, n)[world.log.click[until:].any(axis=1)]
    searches = ~world.requests.is_recommendation[rows]
    table = {}
    for name, ranking in reference_rankers(world, rows, until).items():
        value = ndcg_of_clicks(world, rows, ranking)
        table[name] = {
            "all": float(value.mean()),
            "search": float(value[searches].mean()),
            "recommendation": float(value[~searches].mean()),
        }
    return table


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def generate(config: ShopWorldConfig) -> ShopWorld:
    world = ShopWorld(config)
    _ = world.log
    return world


def against_the_loop(n_requests: int) -> dict[str, Any]:
    """Both generators on one world; the loop is given the catalogue and the users, which ShopWorld makes as well."""
    config = ShopWorldConfig(n_requests=n_requests, n_users=max(1, n_requests // 40))
    generate(config)
    ours, world = seconds_of(lambda: generate(config))

    def loop() -> tuple[list, list]:
        requests = loop_requests(world)
        return requests, loop_log(world, requests, world.ranker.order.shape[1])

    baseline, (requests, log) = seconds_of(loop)
    if not equal(world, requests, log):
        raise SystemExit("The loop generator and ShopWorld disagree; no time is reported.")
    return {
        "name": f"{n_requests} requests, {config.n_items} items",
        "baseline": "plain Python loop of the same model",
        "ours_s": ours,
        "baseline_s": baseline,
        "ratio": baseline / ours,
        "equal": True,
        "rows_per_s": n_requests / ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, one seed")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    rows = [against_the_loop(n) for n in ((500,) if arguments.quick else (500, 4000))]
    ours, world = seconds_of(lambda: generate(ShopWorldConfig(n_requests=100_000)))
    tables_s, _ = seconds_of(world.to_tables)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    whole = {
        "name": "100000 requests: world and log, then tables", "baseline": None, "ours_s": ours, "baseline_s": None,
        "ratio": None, "equal": None, "rows_per_s": 100_000 / ours, "tables_s": tables_s, "peak_mib": round(peak),
    }  # fmt: skip
    for row in rows:
        print(f"{row['name']}: {row['ours_s']:.3f} s, loop {row['baseline_s']:.2f} s, ratio {row['ratio']:.0f}")
    print(f"{whole['name']}: {ours:.2f} s + {tables_s:.2f} s, peak memory {whole['peak_mib']} MiB")
    del world
    tables = [reference_table(generate(ShopWorldConfig(seed=s))) for s in range(1 if arguments.quick else 3)]
    mean = {name: {k: float(np.mean([t[name][k] for t in tables])) for k in tables[0][name]} for name in tables[0]}
    print(f"\nNDCG@10 on logged clicks, last 10 % of requests, {len(tables)} seed(s)")
    for name, values in mean.items():
        print(f"  {name:58s}" + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
    if arguments.json:
        machine = {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version()}
        result = {"machine": machine, "rows": [*rows, whole], "reference_ndcg10": mean}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

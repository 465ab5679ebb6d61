"""Gains of logged requests against a plain loop; on the simulated shop the corrected reward finds the true order of preference."""

import random

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import kendalltau

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.shop_world.world import ShopWorld, ShopWorldConfig
from sidtune.data_builders.tables.schema import table_from_rows
from sidtune.models.position_bias.interventions import PositionBias, PositionLog, estimate_by_interventions
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.trainers.grpo.examples import logged_gains
from sidtune.trainers.grpo.options import GRPOOptions
from sidtune.trainers.rewards.batch import RewardBatch, build_rewards
from sidtune.trainers.rewards.gains import GainsConfig, LeafFacts, exposure_gains, shown_rates
from sidtune.trainers.rewards.lists import list_gains

pytestmark = pytest.mark.medium

LABELS = {"order": 4.0, "like": 2.0, "click": 1.0}
BIAS = PositionBias(
    np.arange(8), (1.0 + np.arange(8)) ** -1.0, np.full(8, np.nan), np.ones(8, np.int64), "interventions"
)


def catalogue(n=12, with_counts=True):
    rows = [
        {
            "item_id": f"i{k}",
            "category": ["home", "lamps" if k % 2 else "chairs"] if k else None,
            **({"exposures": 10 * k, "clicks": k, "orders": k // 2} if with_counts else {}),
        }
        for k in range(n)
    ]
    items = table_from_rows("items", rows)
    # Two items share the leaf (1, 1); item i0 has no semantic ID.
    codes = np.array([(k // 4, k % 4) for k in range(1, n)])
    codes[-1] = codes[4]
    sids = SemanticIds([f"i{k}" for k in range(1, n)], codes, [4, 4])
    return items, sids, LeafFacts.of(items, sids)


def random_requests(seed=0, n=300, items=12):
    rng = random.Random(seed)
    rows = []
    for r in range(n):
        candidates = [
            {
                "item_id": f"i{rng.randrange(items)}",
                "position": rng.choice([k, k, k, None]),
                "click": rng.choice([0, 0, 1, None]),
                "like": rng.choice([0, 1, None]),
                "order": rng.choice([0, 0, 0, 1, None]),
            }
            for k in range(rng.randrange(8))
        ]
        query = rng.choice(["lamp", "chair", "sofa"])
        rows.append({"request_id": str(r), "user_id": "u", "time": r, "query": query, "candidates": candidates})
    return rows, table_from_rows("requests", rows)


@pytest.mark.parametrize("normalise", ["none", "request"])
def test_gains_equal_a_plain_loop(normalise):
    rows, requests = random_requests()
    _, sids, facts = catalogue()
    config = GainsConfig(labels=LABELS, exposed=0.1, floor=0.3, normalise=normalise, popularity_alpha=0.5)
    found = exposure_gains(requests, facts, BIAS, config)
    leaf_of = {i: int(leaf) for i, leaf in zip(sids.item_ids, facts.leaf_of_item, strict=True)}
    counts = np.zeros(len(facts.leaf_codes))
    for item, leaf in leaf_of.items():
        counts[leaf] += 10 * int(item[1:])
    share = (counts + 1) / (counts.sum() + len(counts))
    weight_of = np.minimum((len(counts) * share) ** -0.5, 10.0)
    totals = {"positive": 0, "shown_without_success": 0, "unknown_feedback": 0}
    for r, row in enumerate(rows):
        known = []
        for c in row["candidates"]:
            hits = [LABELS[name] for name in LABELS if c[name] == 1]
            if not hits and c["click"] != 0 and any(c[name] is None for name in LABELS):
                totals["unknown_feedback"] += 1
                continue
            theta = 1.0 if c["position"] is None else 1.0 / (1 + c["position"])
            known.append((c["item_id"], max(hits) if hits else None, 1.0 / max(theta, 0.3)))
        mean = sum(w for *_, w in known) / len(known) if known and normalise == "request" else 1.0
        wanted: dict[int, float] = {}
        for item, gain, weight in known:
            if item in leaf_of:
                totals["positive" if gain else "shown_without_success"] += 1
                value = 0.1 if gain is None else gain * weight / mean * weight_of[leaf_of[item]]
                wanted[leaf_of[item]] = max(wanted.get(leaf_of[item], 0.0), value)
        part = slice(found.targets.offsets[r], found.targets.offsets[r + 1])
        got = dict(zip(found.targets.leaves[part].tolist(), found.targets.gains[part].tolist(), strict=True))
        assert got == pytest.approx(wanted)
    assert {name: found.counts[name] for name in totals} == totals
    columns = found.columns()
    assert len(columns["target_leaves"]) == len(rows) and set(columns) == {"target_leaves", "target_gains"}


def test_unknown_and_unshown_are_no_negatives():
    def candidate(item, click, **more):
        return {"item_id": item, "position": 0, "click": click, **more}

    rows = [
        {"candidates": [candidate("i1", 1), candidate("i2", 0), candidate("i3", None), candidate("i4", None, order=1)]},
        {"candidates": [candidate("i3", None)]},
    ]
    rows = [{"request_id": str(n), "user_id": "u", "time": n, **row} for n, row in enumerate(rows)]
    _, _, facts = catalogue()
    found = exposure_gains(table_from_rows("requests", rows), facts, BIAS)
    leaf = dict(zip(facts.item_ids.to_pylist(), facts.leaf_of_item.tolist(), strict=True))
    assert found.targets.offsets.tolist() == [0, 3, 3]
    assert dict(zip(found.targets.leaves.tolist(), found.targets.gains.tolist(), strict=True)) == {
        leaf["i1"]: 1.0,
        leaf["i2"]: 0.0,
        leaf["i4"]: 1.0,
    }
    lists = np.array([[leaf["i5"], leaf["i1"]], [leaf["i2"], leaf["i1"]]])
    batch = RewardBatch(
        lists=lists,
        scores=np.zeros((2, 2), np.float32),
        targets=found.targets.take([0, 0]),
        leaf_codes=facts.leaf_codes,
    )
    plain = build_rewards({"list_dcg": None})(batch)[:, 0]
    low = 1 / np.log2(3)
    np.testing.assert_allclose(plain, [low, low])
    # A request where something was shown in vain counts as 0, one where nothing is known does not count.
    only = exposure_gains(
        table_from_rows("requests", [{**rows[0], "candidates": [candidate("i2", 0)]}, rows[1]]), facts
    )
    value = build_rewards({"list_dcg": None})(RewardBatch(lists, batch.scores, only.targets, facts.leaf_codes))[:, 0]
    assert value[0] == 0.0 and np.isnan(value[1])


def test_facts_of_leaves():
    items, sids, facts = catalogue()
    shared = facts.leaf_of_item[sids.item_ids.index("i11")]
    assert facts.leaf_of_item[sids.item_ids.index("i5")] == shared
    np.testing.assert_array_equal(facts.leaf_codes[facts.leaf_of_item], sids.codes)
    assert facts.popularity_of_leaf[shared] == 160
    chairs = facts.leaf_of_item[sids.item_ids.index("i2")]
    assert facts.leaves_of(pa.array(["i0", "i2", None, "nothing"])).tolist() == [-1, chairs, -1, -1]
    _, _, bare = catalogue(with_counts=False)
    assert bare.popularity_of_leaf is None
    _, requests = random_requests(n=3)
    with pytest.raises(ConfigError, match="popularity needs counts"):
        exposure_gains(requests, bare, config=GainsConfig(popularity_alpha=1.0))
    with pytest.raises(DataError, match="not in the items table"):
        LeafFacts.of(items.slice(0, 5), sids)


def test_wrong_options_are_refused():
    _, _, facts = catalogue()
    _, requests = random_requests(n=3)
    for options, words in (
        ({"labels": {"clik": 1.0}}, "did you mean 'click'"),
        ({"labels": {}}, "gains"),
        ({"labels": {"click": -1}}, "gains"),
        ({"floor": 0.0}, "floor"),
        ({"popularity_alpha": -1.0}, "popularity_alpha"),
    ):
        with pytest.raises(ConfigError, match=words):
            GainsConfig(**options)
    with pytest.raises(DataError, match="candidates"):
        exposure_gains(requests, facts, shown=np.ones(1000))


def test_shown_rates_equal_a_plain_count():
    rows, requests = random_requests(seed=4)
    wanted = []
    for row in rows:
        same = [{c["item_id"] for c in other["candidates"]} for other in rows if other["query"] == row["query"]]
        wanted += [sum(c["item_id"] in page for page in same) / len(same) for c in row["candidates"]]
    np.testing.assert_allclose(shown_rates(requests), wanted)


# Few leaves and steep positions, so that every item is seen often and naive rewards are far off.
SHOP = {
    "n_items": 240,
    "n_users": 300,
    "n_requests": 80_000,
    "n_departments": 2,
    "leaves_per_department": 2,
    "launch_share": 0.3,
    "exploration_slots": 4,
    "exploration_pool": 20,
    "attribute_query_share": 0.0,
    "brand_query_share": 0.0,
    "department_query_share": 0.0,
    "attribute_only_share": 0.0,
    "recommendation_share": 0.0,
    "examination_decay": 1.0,
}


def order_agreement(seed: int) -> dict[str, float]:
    """Kendall's tau between the mean reward of putting an item on top and the true attraction, per way of making gains."""
    world = ShopWorld(ShopWorldConfig(seed=seed, **SHOP))
    tables = world.to_tables()
    n = SHOP["n_items"]
    sids = SemanticIds(
        tables.items["item_id"].to_pylist(), np.stack([np.arange(n) // 16, np.arange(n) % 16], 1), [15, 16]
    )
    facts = LeafFacts.of(tables.items, sids)
    bias = estimate_by_interventions(PositionLog.of_requests(tables.requests))
    assert np.abs(bias.examination - world.examination).max() < 0.05
    config = GainsConfig(labels={"click": 1.0}, floor=0.01)
    ways = {"naive": {}, "position": {"bias": bias}, "both": {"bias": bias, "shown": shown_rates(tables.requests)}}
    found = {name: exposure_gains(tables.requests, facts, config=config, **way).targets for name, way in ways.items()}
    taus = {name: [] for name in ways}
    for scope in np.unique(world.requests.scope):
        rows = np.flatnonzero(world.requests.scope == scope)
        true = world.attraction(rows[:: max(1, len(rows) // 3000)]).mean(axis=0)
        shown = np.bincount(world.log.item[rows].ravel(), minlength=n) / len(rows)
        items = np.flatnonzero((shown > 0.02) & (world.catalogue.launch_period == 0))
        for name, targets in found.items():
            taus[name].append(kendalltau(true[items], mean_reward(targets, rows, items, facts))[0])
    return {name: float(np.mean(values)) for name, values in taus.items()}


def mean_reward(targets, rows, items, facts):
    total = np.zeros(len(items))
    for part in np.array_split(rows, max(1, len(rows) // 5000)):
        lists = np.tile(items, (len(part), 1))
        batch = RewardBatch(lists, np.zeros(lists.shape, np.float32), targets.take(part), facts.leaf_codes)
        total += list_gains(batch).sum(axis=0)
    # The list of one leaf is the direct rollout; its reward is that leaf's gain.
    one = RewardBatch(lists[:, :1], batch.scores[:, :1], batch.targets, facts.leaf_codes)
    np.testing.assert_allclose(build_rewards({"list_dcg": None})(one)[:, 0], list_gains(batch)[:, 0])
    return total / len(rows)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_corrected_reward_finds_the_true_order(seed):
    tau = order_agreement(seed)
    assert tau["naive"] < 0.6 < 0.7 < tau["both"] and tau["both"] > tau["naive"] + 0.2
    assert tau["naive"] + 0.02 < tau["position"] < tau["both"]


def click_model(seed: int, items: int = 12, queries: int = 3, count: int = 9000):
    """A log that no simulator of ours wrote: (requests, number of each query, attraction (queries, items)).

    A ranker with an own taste puts four of twelve items on a page, some hardly ever; clicks are examination times attraction.
    """
    rng = np.random.default_rng(seed)
    attraction, taste = rng.uniform(0.05, 0.6, (queries, items)), rng.normal(0, 1.2, (queries, items))
    asked = rng.integers(0, queries, count)
    pages = np.argsort(-(taste[asked] + rng.gumbel(size=(count, items))), axis=1)[:, :4]
    looked = rng.random(pages.shape) < np.array([1.0, 0.6, 0.35, 0.2])
    clicks = looked & (rng.random(pages.shape) < attraction[asked[:, None], pages])
    rows = [
        {"request_id": str(r), "user_id": "u", "time": r, "query": f"query {asked[r]}"}
        | {"candidates": [{"item_id": f"i{i}", "position": k, "click": int(clicks[r, k])} for k, i in enumerate(page)]}
        for r, page in enumerate(pages)
    ]
    return table_from_rows("requests", rows), asked, attraction


@pytest.mark.parametrize("seed", [0, 1])
def test_what_grpo_makes_of_a_log_recovers_the_attraction_of_an_independent_click_model(seed):
    requests, asked, attraction = click_model(seed)
    n = attraction.shape[1]
    ids = [f"i{k}" for k in range(n)]
    facts = LeafFacts.of(
        table_from_rows("items", [{"item_id": one} for one in ids]),
        SemanticIds(ids, np.stack([np.arange(n) // 4, np.arange(n) % 4], 1), [3, 4]),
    )

    def error(**options):
        made = logged_gains(requests, facts, GRPOOptions(gains={"floor": 0.001}, **options), requests, requests)
        owner = np.repeat(np.arange(len(asked)), np.diff(made.targets.offsets))
        total = np.zeros_like(attraction)
        np.add.at(total, (asked[owner], made.targets.leaves), made.targets.gains)
        found = total / np.bincount(asked)[:, None]  # not shown is worth nothing in a request, as for GRPO
        return float(np.abs(found - attraction).mean())

    raw, position, both = (
        error(),
        error(position_bias="interventions", exposure=False),
        error(position_bias="interventions"),
    )
    assert both < 0.04 < 0.08 < position < raw - 0.05
    half = requests.filter(pa.array(asked != 0))
    some = logged_gains(half, facts, GRPOOptions(exposure=True), requests, requests)
    whole = logged_gains(requests, facts, GRPOOptions(exposure=True), requests, requests)
    np.testing.assert_array_equal(some.targets.gains, whole.targets.take(np.flatnonzero(asked != 0)).gains)


def test_a_reward_that_divides_the_correction_out_again_is_named(caplog):
    GRPOOptions(position_bias="interventions", rewards={"list_dcg": 1.0, "list_ndcg": 0})
    assert not caplog.text
    GRPOOptions(position_bias="interventions", rewards={"mine": {"reward": "list_ndcg"}})
    assert "list_ndcg divides by the best list" in caplog.text and "use list_dcg" in caplog.text

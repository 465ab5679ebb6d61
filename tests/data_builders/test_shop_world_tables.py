"""ShopWorld as its users meet it: text of the catalogue, queries, tables, request ids, refused input."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.shop_world import words
from sidtune.data_builders.shop_world.catalogue import VALUES, leaf_nouns
from sidtune.data_builders.shop_world.config import config_from_options
from sidtune.data_builders.shop_world.world import ShopWorld, ShopWorldConfig, read
from sidtune.data_builders.tables.schema import SCHEMAS
from sidtune.data_builders.tables.validate import validate_tables

TINY = {
    "n_items": 150,
    "n_users": 10,
    "n_requests": 240,
    "n_departments": 3,
    "leaves_per_department": 4,
    "brands_per_department": 4,
    "page_size": 8,
    "exploration_slots": 2,
    "exploration_pool": 20,
    "launch_share": 0.3,
    "attribute_only_share": 0.1,
    "brand_query_share": 0.2,
}
SMALL = {**TINY, "n_requests": 20_000, "n_users": 200, "seed": 3}


@pytest.fixture(scope="module")
def tiny() -> ShopWorld:
    return ShopWorld.from_options(**TINY)


@pytest.fixture(scope="module")
def small() -> ShopWorld:
    return ShopWorld.from_options(**SMALL)


# ---------------------------------------------------------------- catalogue text


def test_every_noun_names_one_leaf() -> None:
    config = ShopWorldConfig()
    nouns = [noun for group in leaf_nouns(config) for noun in group]
    assert len(nouns) == len(set(nouns)) == 3 * 64
    others = {*VALUES, *(b.lower() for b in words.BRANDS), *(m.lower() for m in words.MODELS)}
    others |= {name for d in words.DEPARTMENTS for name in d.names}
    assert not others & set(nouns)
    assert len(set(words.BRANDS)) == 64 and len(set(words.MODELS)) == len(words.MODELS)
    assert len(set(VALUES)) == len(VALUES) and not {m.lower() for m in words.MODELS} & {*VALUES}
    for d in words.DEPARTMENTS:
        assert len(d.leaves) == 8 and len(d.materials) == 4


def test_item_text_tells_category_brand_and_attributes() -> None:
    world = ShopWorld()
    items = world.to_tables().items.to_pylist()
    canonical = {nouns[0]: n for n, nouns in enumerate(leaf_nouns(world.config))}
    of_noun = {noun: n for n, nouns in enumerate(leaf_nouns(world.config)) for noun in nouns}

    def finder(names: object) -> re.Pattern[str]:
        longest_first = sorted(names, key=len, reverse=True)
        return re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, longest_first))})(?![\w-])", re.IGNORECASE)

    patterns = {id(names): finder(names) for names in (canonical, of_noun, words.BRANDS, VALUES)}

    def found(text: str, names: object) -> set[str]:
        spelled = {name.lower(): name for name in names}
        return {spelled[match.lower()] for match in patterns[id(names)].findall(text)}

    for row, item in enumerate(items):
        both = f"{item['title']} {item['description']}"
        leaf = int(world.catalogue.leaf[row])
        assert {canonical[c] for c in found(item["description"], canonical)} == {leaf}
        assert {of_noun[c] for c in found(item["title"], of_noun)} == {leaf}
        assert found(both, words.BRANDS) == {item["brand"]}
        stated = {a["name"]: a["value"] for a in item["attributes"]}
        assert found(both, VALUES) == {stated["colour"], stated["style"], stated["material"]}
        assert f"size {stated['size']}" in both
        assert item["category"][2] in canonical and item["category"][0] in both and item["category"][1] in both
        phrase = words.PRICE_PHRASES[
            int(np.searchsorted([-0.43, 0.43], world.catalogue.price_level[row], side="right"))
        ]
        assert phrase in both
    titles = [item["title"] for item in items]
    assert len(set(titles)) > 0.95 * len(titles)
    prices = np.array([item["price"] for item in items])
    assert prices.min() > 0 and np.isfinite(prices).all()


def test_queries_say_the_scope(small: ShopWorld) -> None:
    r = small.requests
    queries = small.to_tables().requests["query"].to_pylist()
    nouns = leaf_nouns(small.config)
    for n in range(3000):
        kind, query = int(r.kind[n]), queries[n]
        if kind >= 5:
            assert query is None
            continue
        if kind <= 2:
            assert nouns[r.leaf[n]][r.noun[n]] in query
        if kind in (1, 4):
            assert VALUES[r.asked[n]] in query
        if kind == 2:
            assert words.BRANDS[r.brand[n]] in query
            assert small.catalogue.leaf_department[r.leaf[n]] in small.catalogue.brand_departments[r.brand[n]]
        if kind == 3:
            assert query in words.DEPARTMENTS[small.catalogue.leaf_department[r.leaf[n]]].names
    asked = [q for q, k in zip(queries, r.kind, strict=True) if k == 1]
    assert len({re.sub(r"[^ ,]+", "x", q) for q in asked}) > 2, "word order varies"


def test_popular_items_are_the_better_ones() -> None:
    c = ShopWorld().catalogue
    assert sorted(c.popularity_rank) == list(range(2000))
    assert np.corrcoef(-c.popularity_rank, c.quality)[0, 1] > 0.3


def test_demand_falls_with_the_rank_of_a_leaf_and_activity_with_the_floor() -> None:
    """`query_zipf` is the slope of what is wanted; `activity_floor` the least that an early user asks."""
    options = {"n_items": 600, "n_users": 400, "n_requests": 40_000, "department_interest": 0.0, "leaf_interest": 0.0}
    plain, steep = (ShopWorld.from_options(query_zipf=z, context_shift=0.0, **options) for z in (0.0, 1.5))
    assert (np.argsort(plain.catalogue.leaf_weight) == np.argsort(steep.catalogue.leaf_weight)).all()
    wanted = np.sort(np.bincount(steep.requests.leaf, minlength=64))[::-1][:20]
    slope = np.polyfit(np.log(1 + np.arange(20)), np.log(wanted), 1)[0]
    assert abs(slope + 1.5) < 0.1
    low = ShopWorld.from_options(activity_floor=0.1, **options).users
    early = low.start == 0
    assert low.requests[early].min() >= 10 and low.requests.sum() == 40_000
    assert np.log(low.requests[early]).std() > 1.3 * np.log(plain.users.requests[early]).std()
    same = config_from_options({"zipf_exponent": 1.2})  # of older data; read by nothing, then as now
    assert same == ShopWorldConfig()


# ---------------------------------------------------------------- tables


def test_tables_fit_the_schema_and_the_log(tiny: ShopWorld) -> None:
    tables = tiny.to_tables()
    for name in SCHEMAS:
        assert getattr(tables, name).schema.equals(SCHEMAS[name].arrow_schema), name
        getattr(tables, name).validate(full=True)
    assert tables.split_of_request is None and tables.notes
    items, requests = tables.items.to_pylist(), tables.requests.to_pylist()
    ids = [item["item_id"] for item in items]
    assert ids == sorted(ids) and ids[12] == "i00012" and len(set(ids)) == tiny.config.n_items
    assert tables.users["user_id"][7].as_py() == "u00007" and requests[123]["request_id"] == "r0000123"
    assert all(items[3][name] is None for name in ("exposures", "clicks", "orders", "image"))
    events = []
    for n, request in enumerate(requests):
        context = {pair["name"]: pair["value"] for pair in request["context"]}
        assert set(context) - {"department"} == {"place", "device", "daypart", "page"}
        assert ("department" in context) == (context["page"] == "browse")
        assert (request["query"] is None) == (context["page"] != "search") == bool(tiny.requests.is_recommendation[n])
        assert request["user_id"] == f"u{tiny.requests.user[n]:05d}" and request["time"] == tiny.requests.time[n]
        assert [c["position"] for c in request["candidates"]] == list(range(tiny.config.page_size))
        for c in request["candidates"]:
            position = c["position"]
            assert c["item_id"] == ids[tiny.log.item[n, position]] and c["click"] == tiny.log.click[n, position]
            assert c["order"] == tiny.log.order[n, position]
            assert c["like"] == (None if tiny.log.like[n, position] < 0 else tiny.log.like[n, position])
            assert (c["dwell"] is None) == (c["click"] == 0)
            for action in ("click", "like", "order"):
                if c[action]:
                    event = {"user_id": request["user_id"], "item_id": c["item_id"], "time": request["time"]}
                    query = {"query": request["query"], "request_id": request["request_id"]}
                    events.append({**event, "action": action, **query})
    assert tables.events.to_pylist() == events
    assert {event["action"] for event in events} == {"click", "like", "order"}


def test_tables_pass_the_validator(tiny: ShopWorld) -> None:
    assert validate_tables(tiny.to_tables()) == []


def test_equal_configs_give_equal_tables() -> None:
    first, second = read(**TINY), read("ignored", **TINY)
    for name in SCHEMAS:
        assert getattr(first, name).equals(getattr(second, name)), name
    other = read(**{**TINY, "seed": 1})
    for name in SCHEMAS:
        assert not getattr(first, name).equals(getattr(other, name)), name


def test_asking_for_truth_changes_nothing() -> None:
    plain, asked = ShopWorld.from_options(**TINY), ShopWorld.from_options(**TINY)
    asked.click_probability([3, 4])
    asked.oracle_ranking([5], 3)
    assert plain.to_tables().requests.equals(asked.to_tables().requests)


def test_request_rows(tiny: ShopWorld) -> None:
    ids = tiny.to_tables().requests["request_id"]
    assert np.array_equal(tiny.request_rows(ids), np.arange(tiny.config.n_requests))
    assert tiny.request_rows(["r0000007", "r0000001"]).tolist() == [7, 1]
    assert tiny.request_rows(pa.array(["r0000239"])).tolist() == [239]
    assert tiny.request_rows([]).tolist() == []
    for wrong in ("r0000240", "r7", "x"):
        with pytest.raises(DataError, match=f"'{wrong}' is not one of the 240 requests"):
            tiny.request_rows(["r0000001", wrong])


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_item": 10}, "unknown key 'n_item' .did you mean 'n_items'"),
        ({"n_items": "many"}, "'n_items' must be an integer"),
        ({"n_items": 10}, "10 items cannot fill 64 leaf categories"),
        ({"n_items": 0}, "n_items must be at least 1"),
        ({"n_items": 70}, "only .* items are on sale at the start"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"click_bias": float("nan")}, "'click_bias' must be a finite number"),
        ({"click_bias": 1e9}, "click_bias must be at most 100"),
        ({"launch_share": 1.5}, "launch_share must be at most 1"),
        ({"brand_query_share": 0.9, "attribute_query_share": 0.2}, "must add up to at most 1"),
        ({"search_oversampling": 0.5}, "search_oversampling must be at least 1"),
        ({"examination_decay": -0.1}, "examination_decay must be at least 0"),
        ({"n_departments": 9}, "n_departments must be at most 8"),
        ({"brands_per_department": 3}, "'brands_per_department' must be even"),
        ({"brands_per_department": 40}, "at most 64 brands"),
        ({"exploration_slots": 20}, "must be below 'page_size'"),
        ({"exploration_pool": 2}, "at least 'exploration_slots'"),
        ({"n_users": 900_000, "days": 3000}, "would not fit in memory"),
        ({"n_requests": 10**8}, "n_requests must be at most"),
    ],
)
def test_wrong_options_end_in_one_sentence(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(**options)
    assert "\n" not in str(caught.value) and str(caught.value).rstrip(")").endswith((".", "?"))


def test_wrong_rows_are_refused(tiny: ShopWorld) -> None:
    for rows in ([-1], [240], [0.5], [[1, 2]], np.ones(240, dtype=bool)):
        with pytest.raises(DataError, match="Request rows must be a flat list of whole numbers"):
            tiny.click_probability(rows)
    assert tiny.click_probability([]).shape == (0, tiny.config.n_items)
    assert tiny.oracle_ranking([], 3).shape == (0, 3)
    for k in (0, 151):
        with pytest.raises(DataError, match="k between 1 and 150"):
            tiny.oracle_ranking([0], k)
    for items in (np.array([[150]]), np.array([[-1]]), np.array([0]), np.array([[0.0]]), np.zeros((3, 2), dtype=int)):
        with pytest.raises(DataError, match="Item rows must be whole numbers"):
            tiny.attraction_of([0], items)

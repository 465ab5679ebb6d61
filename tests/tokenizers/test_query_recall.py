"""Query-to-item recall through codes against an enumeration of all orders of tied items, and pairs against plain loops."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pyarrow as pa
import pytest

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.mining.query_pairs import distinct_queries, query_item_pairs
from sidtune.data_builders.shop_world.config import ShopWorldConfig
from sidtune.data_builders.shop_world.world import ShopWorld
from sidtune.data_builders.tables.schema import table_from_rows
from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansConfig
from sidtune.tokenizers.sids.query_recall import query_item_recall, query_targets


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def hit_by_orders(similarity: list[float], target: int, k: int) -> float:
    """Share of the orders of equally near items (all enumerated) that put the target among the first k."""
    value = round(similarity[target], 5)
    before = sum(round(s, 5) > value for s in similarity)
    tied = [n for n, s in enumerate(similarity) if round(s, 5) == value]
    orders = list(permutations(tied))
    return sum(before + order.index(target) < k for order in orders) / len(orders)


@pytest.fixture(scope="module")
def coded() -> tuple[np.ndarray, np.ndarray, ResidualKMeans, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    items, queries = draw.normal(size=(40, 6)).astype(np.float32), draw.normal(size=(9, 6)).astype(np.float32)
    both = np.concatenate([queries, items])
    quantizer = ResidualKMeans(ResidualKMeansConfig((6, 3))).fit(both)
    rows = draw.integers(0, 9, 25)
    return queries, items, quantizer, rows, draw.integers(0, 40, 25)


def test_recall_equals_the_enumeration_of_all_orders(coded):
    queries, items, quantizer, rows, targets = coded
    ks = (1, 3, 10, 40, 99)
    made = query_item_recall(queries, items, quantizer, targets, ks, query_rows=rows)
    places, codes = quantizer.decode(quantizer.encode(items)), quantizer.decode(quantizer.encode(queries))
    for k in ks:
        by_code = [
            hit_by_orders([cosine(codes[q], place) for place in places], t, k)
            for q, t in zip(rows, targets, strict=True)
        ]
        by_vector = [
            hit_by_orders([cosine(queries[q], item) for item in items], t, k)
            for q, t in zip(rows, targets, strict=True)
        ]
        assert made.recall[k] == pytest.approx(np.mean(by_code), abs=1e-9)
        assert made.vector_recall[k] == pytest.approx(np.mean(by_vector), abs=1e-9)
    assert made.recall[99] == 1.0 and made.chance[10] == 0.25 and made.chance[99] == 1.0
    assert len({tuple(code) for code in quantizer.encode(items).tolist()}) < 40  # some items do share a code


def test_prefix_shares_equal_plain_loops(coded):
    queries, items, quantizer, rows, targets = coded
    made = query_item_recall(queries, items, quantizer, targets, query_rows=rows)
    asked, codes = quantizer.encode(queries).tolist(), quantizer.encode(items).tolist()
    for level in (1, 2):
        same = [asked[q][:level] == codes[t][:level] for q, t in zip(rows, targets, strict=True)]
        chance = [np.mean([asked[q][:level] == code[:level] for code in codes]) for q in rows]
        assert made.prefix_share[level - 1] == pytest.approx(np.mean(same))
        assert made.prefix_chance[level - 1] == pytest.approx(np.mean(chance))
    assert made.to_dict()["requests"] == 25 and "recall@10" in made.to_markdown()


def test_queries_that_are_their_items_are_found_and_given_codes_are_used(coded):
    _, items, quantizer, *_ = coded
    codes = quantizer.encode(items)
    suffixed = np.concatenate([codes, np.arange(40)[:, None]], axis=1)
    made = query_item_recall(items, items, quantizer, np.arange(40), (40,), item_codes=suffixed)
    assert made.prefix_share == [1.0, 1.0] and made.vector_recall[40] == 1.0
    swapped = codes[::-1].copy()
    moved = query_item_recall(items, items, quantizer, np.arange(40), (5,), item_codes=swapped, query_codes=codes)
    assert moved.prefix_share[0] == pytest.approx(np.mean(codes[:, 0] == swapped[:, 0]))


def test_wrong_arrays_are_refused_in_one_sentence(coded):
    queries, items, quantizer, rows, targets = coded
    with pytest.raises(ConfigError, match="ks must be"):
        query_item_recall(queries, items, quantizer, targets, (0,), query_rows=rows)
    with pytest.raises(DataError, match="no query with a clicked item"):
        query_item_recall(queries, items, quantizer, targets[:0], query_rows=rows[:0])
    with pytest.raises(DataError, match="one length"):
        query_item_recall(queries, items, quantizer, targets)
    with pytest.raises(DataError, match="lies outside 0..39"):
        query_item_recall(queries, items, quantizer, targets + 30, query_rows=rows)
    with pytest.raises(DataError, match="item_codes must be codes of shape"):
        query_item_recall(
            queries, items, quantizer, targets, query_rows=rows, item_codes=np.zeros((3, 2), dtype=np.int32)
        )


def test_pairs_of_a_shop_equal_plain_loops():
    tables = ShopWorld(ShopWorldConfig(n_items=200, n_users=40, n_requests=300, seed=1)).to_tables()
    requests, ids = tables.requests, tables.items["item_id"].to_pylist()[:100]
    expected = [
        (row["query"], candidate["item_id"])
        for row in requests.to_pylist()
        if row["query"]
        for candidate in row["candidates"]
        if (candidate["click"] or 0) > 0 or (candidate["order"] or 0) > 0
    ]
    asked, wanted = query_item_pairs(requests)
    assert list(zip(asked.to_pylist(), wanted.to_pylist(), strict=True)) == expected and len(expected) > 50
    queries, rows, targets = query_targets(requests, ids)
    assert [(queries[q], ids[t]) for q, t in zip(rows, targets, strict=True)] == [
        pair for pair in expected if pair[1] in ids
    ]
    assert len(set(queries)) == len(queries)


def test_odd_rows_of_requests_are_read_without_surprise():
    rows = [
        {"request_id": "r1", "user_id": "u", "time": 1, "query": "  red \n\u00a0shoe ", "candidates": None},
        {
            "request_id": "r2",
            "user_id": "u",
            "time": 2,
            "query": "red shoe",
            "candidates": [
                {"item_id": "a", "position": 0, "click": None, "like": 1, "order": None},
                {"item_id": "b", "position": 1, "click": 0, "like": None, "order": 1},
            ],
        },
        {"request_id": "r3", "user_id": "u", "time": 3, "query": None, "candidates": [{"item_id": "a", "click": 1}]},
        {"request_id": "r4", "user_id": "u", "time": 4, "query": "   ", "candidates": [{"item_id": "a", "click": 1}]},
    ]
    requests = table_from_rows("requests", rows)
    assert distinct_queries(requests) == ["red shoe"]
    assert [column.to_pylist() for column in query_item_pairs(requests)] == [["red shoe"], ["b"]]
    assert [len(part) for part in query_targets(requests.slice(0, 0), ["a"])] == [0, 0, 0]
    chunks = pa.concat_tables([requests.slice(0, 1), requests.slice(1, 1), requests.slice(2)])
    assert query_item_pairs(chunks)[1].to_pylist() == ["b"]

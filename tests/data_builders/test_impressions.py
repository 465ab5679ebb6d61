"""Impressions against plain loops over the tables; null stays unknown for every reader; nothing of the future."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest
from reader_sources import SOURCES, read, unknown
from tiny_pipeline import SHOP

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.ragged import Ragged
from sidtune.data_builders.impressions.build import LABELS, impressions_of
from sidtune.data_builders.impressions.features import Feature
from sidtune.data_builders.impressions.table import Impressions
from sidtune.data_builders.post_ranking.impression_lists import lists_of
from sidtune.data_builders.tables.history import STRENGTH
from sidtune.data_builders.tables.store import DataFolder, load_folder
from sidtune.recipes.steps import build_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("impressions") / "data"
    build_data.main(build_data.Arguments(str(folder), options=SHOP))
    return load_folder(folder)


@pytest.fixture(scope="module")
def impressions(data):
    return impressions_of(data, "valid", history=7)


def flat(data, split):
    return [
        (r, k, c) for r, row in enumerate(data.requests[split].to_pylist()) for k, c in enumerate(row["candidates"])
    ]


def test_rows_are_the_candidates_of_the_requests(data, impressions):
    rows, requests = flat(data, "valid"), data.requests["valid"].to_pylist()
    batch = impressions.batch(np.arange(len(impressions)))
    assert len(rows) == len(impressions) > 300
    items, users = impressions.item_ids.to_pylist(), impressions.user_ids.to_pylist()
    for n, (request, _, candidate) in enumerate(rows):
        assert items[batch["item_row"][n]] == candidate["item_id"]
        assert users[batch["user_row"][n]] == requests[request]["user_id"] and batch["request"][n] == request
        assert batch["position"][n] == candidate["position"]
        for name in impressions.labels:
            assert batch[f"label_{name}_mask"][n] == (candidate[name] is not None)
            assert batch[f"label_{name}"][n] == pytest.approx(candidate[name] or 0.0)
    assert {"click", "like", "order"} <= set(impressions.labels) <= set(LABELS)
    assert not all(batch["label_like_mask"])  # the shop leaves some likes unknown


def test_features_are_what_a_loop_over_the_tables_says(data, impressions):
    rows, requests = flat(data, "valid"), data.requests["valid"].to_pylist()
    log = [(r, c) for split in data.requests.values() for r in split.to_pylist() for c in r["candidates"]]
    items = {row["item_id"]: row for row in data.items.to_pylist()}
    users = {row["user_id"]: row for row in data.users.to_pylist()}
    chosen = np.random.default_rng(0).choice(len(rows), 40, replace=False)
    batch = impressions.batch(chosen)
    numeric = {one.name: n for n, one in enumerate(impressions.of_kind("numeric"))}
    coded = list(enumerate(impressions.of_kind("categorical")))
    for n, (request, _, candidate) in enumerate(rows[row] for row in chosen):
        asked, item = requests[request], items[candidate["item_id"]]
        before = [c for r, c in log if r["time"] < asked["time"] and c["item_id"] == item["item_id"]]
        wanted = {
            "price": math.log1p(item["price"]),
            "past_exposures": math.log1p(len(before)),
            "past_clicks": math.log1p(sum(c["click"] == 1 for c in before)),
        }
        for name, value in wanted.items():
            assert batch["numeric"][n, numeric[name]] == pytest.approx(value, rel=1e-6)
        texts = {"item": item["item_id"], "user": asked["user_id"], "brand": item["brand"]}
        texts |= {f"category_{k + 1}": "\x1f".join(item["category"][: k + 1]) for k in range(len(item["category"]))}
        texts |= {f"profile_{p['name']}": p["value"] for p in users[asked["user_id"]]["profile"] or []}
        texts |= {f"context_{p['name']}": p["value"] for p in asked["context"] or []}
        for place, one in coded:
            code = int(batch["categorical"][n, place])
            names = one.values or {"item": impressions.item_ids, "user": impressions.user_ids}[one.name].to_pylist()
            assert (names[code - 1] if code else None) == texts.get(one.name)
    assert {one.name for _, one in coded} > {"item", "user", "brand", "category_1", "category_2"}


def test_histories_stand_once_for_a_request_and_are_earlier(data, impressions):
    requests, events = data.requests["valid"].to_pylist(), data.events.to_pylist()
    batch = impressions.batch(np.arange(len(impressions)))
    assert len(batch["history"]) == len(requests) and batch["history"].shape[1] <= 7
    items = impressions.item_ids.to_pylist()
    for r, asked in enumerate(requests):
        mine = [e for e in events if e["user_id"] == asked["user_id"] and e["time"] < asked["time"]]
        mine = sorted(mine, key=lambda e: (e["time"], STRENGTH.get(e["action"], 3)))[-7:]
        found = [items[row] for row in batch["history"][r][batch["history_mask"][r]]]
        assert found == [e["item_id"] for e in mine] and (batch["history"][r][len(mine) :] == 0).all()


def test_the_future_changes_nothing(data, impressions):
    """All that happens from the last third of the valid requests on is taken away: earlier rows stay as they are."""
    times = np.sort(data.requests["valid"]["time"].to_numpy())
    cut = int(times[2 * len(times) // 3])
    past = {n: t.filter(pa.array(t["time"].to_numpy() < cut)) for n, t in data.requests.items()}
    less = dataclasses.replace(
        data, events=data.events.filter(pa.array(data.events["time"].to_numpy() < cut)), requests=past
    )
    few = impressions_of(less, "valid", history=7)
    kept = impressions.take(np.flatnonzero(impressions.time < cut))
    assert few.request_ids.equals(kept.request_ids) and 0 < len(few) < len(impressions)
    one, other = few.batch(np.arange(len(few))), kept.batch(np.arange(len(few)))
    for name in one.keys() - {"categorical"}:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("name", SOURCES)
def test_null_feedback_of_every_reader_is_unknown(name, tmp_path):
    tables = read(name, unknown(name, tmp_path / "in"))
    data = DataFolder(tables.items, tables.users, tables.events, {"train": tables.requests})
    found = impressions_of(data, "train")
    batch = found.batch(np.arange(len(found)))
    given = [c for row in tables.requests.to_pylist() for c in row["candidates"]]
    for label in LABELS:
        known = [c[label] is not None for c in given]
        assert (label in found.labels) == any(known)
        if any(known):
            assert batch[f"label_{label}_mask"].tolist() == known


def test_batches_hold_every_row_once_in_any_order(impressions):
    seen = list(impressions.batches(64, seed=3))
    assert [len(one["item_row"]) for one in seen[:-1]] == [64] * (len(seen) - 1)
    assert sorted(np.concatenate([one["item_row"] for one in seen])) == sorted(impressions.item_row)
    plain = next(impressions.batches(64))
    assert (plain["item_row"] == impressions.item_row[:64]).all()
    assert any(
        (a["item_row"] != b["item_row"]).any()
        for a, b in zip(seen, impressions.batches(64), strict=True)
        if len(a["item_row"]) == 64
    )
    none = impressions.batch(np.zeros(0, np.int64))
    assert len(none["item_row"]) == 0 and none["numeric"].shape == (0, len(impressions.of_kind("numeric")))


def small(**changes) -> Impressions:
    """Two requests, three impressions, two items, one user; every kind of feature."""
    features = (
        Feature("price", "numeric", "item"),
        Feature("age", "numeric", "user"),
        Feature("colour", "categorical", "item", 3),
        Feature("place", "categorical", "user", 2),
        Feature("tags", "multi_categorical", "item", 4, most=2),
        Feature("vector", "vector", "item", 2),
        Feature("sid", "sid", "item", levels=(3, 2)),
        Feature("past", "sequence", "request", 2),
        Feature("words", "text", "user"),
    )
    columns = {
        "price": np.array([1.0, np.nan], np.float32),
        "age": np.array([30.0], np.float32),
        "colour": np.array([2, -1], np.int32),
        "place": np.array([1], np.int32),
        "tags": Ragged(np.array([0, 3, 3]), np.array([1, 2, 3])),
        "vector": np.array([[1.0, 2.0], [np.nan, 0.0]], np.float32),
        "sid": np.array([[2, 1], [-1, -1]], np.int32),
        "past": Ragged(np.array([0, 1, 3]), np.array([1, 0, 1])),
        "words": pa.array(["hat"]),
    }
    values = {
        "request_ids": pa.array(["a", "b"]), "user_ids": pa.array(["u"]), "item_ids": pa.array(["x", "y"]),
        "user_row": np.array([0, -1]), "time": np.array([5, 6]), "offsets": np.array([0, 2, 3]),
        "item_row": np.array([0, 1, 0]), "position": np.array([0, 1, -1], np.int32),
        "propensity": np.array([1.0, 0.5, np.nan], np.float32), "labels": {"click": np.array([1.0, np.nan, 0.0], np.float32)},
        "features": features, "columns": columns,
    }  # fmt: skip
    return Impressions(**{**values, **changes})


def test_every_kind_is_padded_and_masked():
    batch = small().batch(np.array([0, 1, 2]))
    assert batch["numeric"].tolist() == [[1, 30], [0, 30], [1, 0]]
    assert batch["numeric_mask"].tolist() == [[True, True], [False, True], [True, False]]
    assert batch["categorical"].tolist() == [[3, 2], [0, 2], [3, 0]]  # codes + 1; the third has no user
    assert batch["tags"].tolist() == [[2, 3], [0, 0], [2, 3]] and batch["tags_mask"].sum() == 4
    assert batch["vector"].tolist() == [[1, 2], [0, 0], [1, 2]] and batch["vector_mask"].tolist() == [True, False, True]
    assert batch["sid"].tolist() == [[2, 1], [0, 0], [2, 1]] and batch["sid_mask"].tolist() == [True, False, True]
    assert batch["past"].tolist() == [[1, 0], [0, 1]] and batch["past_mask"].tolist() == [[True, False], [True, True]]
    assert batch["request"].tolist() == [0, 0, 1] and batch["label_click_mask"].tolist() == [True, False, True]
    back = small().take(np.array([1, 0]))
    assert back.request_ids.to_pylist() == ["b", "a"] and back.item_row.tolist() == [0, 0, 1]
    assert back.columns["past"].rows.tolist() == [0, 1, 1] and back.offsets.tolist() == [0, 1, 3]
    again = small().batch(np.array([2, 0]))
    np.testing.assert_array_equal(again["past"], [[1, 0], [0, 1]])
    assert again["request"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"item_row": np.array([0, 2, 0])}, "outside the 2 items"),
        ({"user_row": np.array([0, 3])}, "outside the 1 users"),
        ({"position": np.array([0, 1], np.int32)}, "3 rows of impressions but position has 2"),
        ({"labels": {"click": np.zeros(2)}}, r"labels\['click'\] has 2"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(DataError, match=words):
        small(**changes)


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("price", np.array([1.0, np.inf], np.float32), "infinite"),
        ("colour", np.array([3, 0], np.int32), "outside its"),
        ("vector", np.zeros((2, 3), np.float32), "rows of shape"),
        ("past", np.zeros(2), "no sequence feature"),
        ("tags", Ragged(np.array([0, 1, 1]), np.array([4])), "outside its"),
    ],
)
def test_columns_that_do_not_fit_are_refused(name, column, words):
    with pytest.raises(DataError, match=words):
        small(columns={**small().columns, name: column})


def test_wrong_features_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'numeric'"):
        Feature("a", "numerik", "item")
    with pytest.raises(ConfigError, match="levels if it is a sid"):
        Feature("a", "sid", "item")
    with pytest.raises(ConfigError, match="3 codes but 1 names"):
        Feature("a", "categorical", "item", 3, values=("x",))


def test_post_ranking_lists_are_a_view(data, impressions):
    table = lists_of(impressions, "valid")
    rows, requests = flat(data, "valid"), data.requests["valid"].to_pylist()
    assert len(table) == len(requests) and table.requests["query"].to_pylist() == [r["query"] for r in requests]
    assert table.candidate_rows.tolist() == impressions.item_row.tolist()
    clicks = [np.nan if c["click"] is None else c["click"] for _, _, c in rows]
    np.testing.assert_array_equal(table.relevance, np.array(clicks, np.float32))
    batch = table.batch(np.arange(5))
    whole = impressions.batch(np.arange(int(impressions.offsets[5])))
    exposures = [n for n, one in enumerate(impressions.of_kind("numeric")) if one.name == "past_exposures"][0]
    np.testing.assert_allclose(
        batch.item_fields["past_exposures"][batch.item_mask][:, 0], whole["numeric"][:, exposures]
    )
    category = next(one for one in impressions.features if one.name == "category_1")
    codes = impressions.columns["category_1"][batch.item_rows[batch.item_mask]]
    np.testing.assert_array_equal(batch.item_fields["category_1"][batch.item_mask], np.eye(category.size)[codes])
    past = batch.history_rows[batch.history_mask]
    assert past.tolist() == impressions.columns["history"].rows[: len(past)].tolist()
    with pytest.raises(DataError, match="did you mean 'click'"):
        lists_of(impressions, label="clik")

"""Vectors of the log: against a dense calculation by hand, and by what they are for (items of one taste lie together)."""

import numpy as np
import pyarrow as pa
import pytest

from sidtune.core.errors import DataError
from sidtune.data_builders.tables.schema import table_from_columns
from sidtune.tokenizers.encoders.base import load_encoder, make_encoder

USERS, ITEMS = 60, 24


@pytest.fixture(scope="module")
def log() -> pa.Table:
    """Users of three tastes, each for a third of the items, with some noise, repeats and other actions."""
    random = np.random.default_rng(0)
    users = random.integers(0, USERS, 900)
    items = np.where(
        random.random(900) < 0.8,
        random.integers(0, ITEMS // 3, 900) * 3 + users % 3,
        random.integers(0, ITEMS - 1, 900),
    )
    columns = {
        "user_id": [f"u{n}" for n in users],
        "item_id": [f"i{n}" for n in items],
        "time": np.arange(900),
        "action": random.choice(["click", "order", "dwell"], 900).tolist(),
    }
    return table_from_columns("events", columns, 900)


def fitted(log: pa.Table, **options):
    encoder = make_encoder("collaborative", options)
    encoder.use_log(log)
    return encoder.fit([])


def by_hand(log: pa.Table, ids: list[str], dims: int) -> np.ndarray:
    """Inner products of the vectors, from dense matrices and loops."""
    taken = {(e["user_id"], e["item_id"]) for e in log.to_pylist() if e["action"] in ("click", "like", "order")}
    shared = np.zeros((len(ids), len(ids)))
    for user in {user for user, _ in taken}:
        mine = [row for row, item in enumerate(ids) if (user, item) in taken]
        for a in mine:
            for b in mine:
                shared[a, b] += a != b
    with np.errstate(divide="ignore"):
        weights = np.maximum(0, np.log(shared * shared.sum() / np.outer(shared.sum(0), shared.sum(1))))
    left, sizes, _ = np.linalg.svd(weights)
    vectors = left[:, :dims] * np.sqrt(sizes[:dims])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def test_vectors_are_those_of_the_formula(log):
    ids = sorted(set(log.filter(pa.compute.not_equal(log["action"], "dwell"))["item_id"].to_pylist()))
    vectors = fitted(log, dims=5, iterations=40).encode([""] * len(ids), ids)
    assert vectors.shape == (len(ids), 5) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors @ vectors.T, by_hand(log, ids, 5), atol=2e-3)


def test_items_of_one_taste_lie_together(log):
    ids = [f"i{n}" for n in range(ITEMS - 1)]
    vectors = fitted(log, dims=3).encode([""] * len(ids), ids)
    near = vectors @ vectors.T
    same = np.equal.outer(np.arange(len(ids)) % 3, np.arange(len(ids)) % 3)
    assert near[same].mean() > near[~same].mean() + 0.5


def test_only_the_latest_items_of_a_user_count(log):
    few = fitted(log, max_items=2)
    latest = {}
    for event in sorted((e for e in log.to_pylist() if e["action"] != "dwell"), key=lambda e: -e["time"]):
        latest.setdefault(event["user_id"], []).append(event["item_id"])
    pairs = {frozenset(items[:2]) for items in latest.values() if len(set(items[:2])) == 2}
    assert set(few._rows) == set().union(*pairs)


def test_unknown_items_share_one_vector_and_are_counted_after_a_round_trip_too(log, tmp_path):
    encoder = fitted(log)
    asked = ["i1", "never seen", "i2", "nor this"]
    vectors = encoder.encode([""] * 4, asked)
    assert encoder.empty_texts == 2 and np.array_equal(vectors[1], vectors[3])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    encoder.save_pretrained(tmp_path / "encoder")
    assert np.array_equal(load_encoder(tmp_path / "encoder").encode([""] * 4, asked), vectors)


def test_what_cannot_be_learned_is_said(log):
    with pytest.raises(DataError, match="call use_log"):
        make_encoder("collaborative").fit(["a"])
    with pytest.raises(DataError, match="No user took two items by order"):
        fitted(log.slice(0, 1), actions=["order"])
    with pytest.raises(DataError, match="needs the item id"):
        fitted(log).encode(["a"])

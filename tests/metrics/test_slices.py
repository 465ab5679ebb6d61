"""Slices against a loop in plain Python, and the rule that training counts see training data only."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from sidtune.core.errors import DataError
from sidtune.data_builders.tables.schema import table_from_columns, table_from_rows
from sidtune.metrics.baselines.tables import item_rows, popularity_order, training_events
from sidtune.metrics.ranking import Relevance
from sidtune.metrics.statistics.bootstrap import bootstrap_interval
from sidtune.metrics.statistics.slices import (
    build_slices,
    history_slices,
    normalise_queries,
    popularity_groups,
    popularity_slices,
    query_slices,
    slice_rows,
)


def table(name: str, **columns) -> pa.Table:
    return table_from_columns(name, columns, len(next(iter(columns.values()))))


def folder(kind: str = "global_time") -> SimpleNamespace:
    """Three users; train requests until time 20, valid at 30, test from 40."""
    events = [
        # user, item, time, request
        ("u1", "a", 5, None),
        ("u1", "b", 10, "r1"),
        ("u2", "a", 15, "r2"),
        ("u2", "a", 29, None),
        ("u1", "c", 30, "v1"),
        ("u3", "c", 35, "r9"),
        ("u2", "b", 40, "t1"),
        ("u3", "d", 45, None),
    ]
    rows = [dict(zip(("user_id", "item_id", "time", "request_id"), row, strict=True)) for row in events]

    def requests(*entries):
        return table_from_rows(
            "requests", [dict(zip(("request_id", "user_id", "time", "query"), e, strict=True)) for e in entries]
        )

    return SimpleNamespace(
        items=table("items", item_id=["a", "b", "c", "d"]),
        events=table_from_rows("events", rows),
        requests={
            "train": requests(("r1", "u1", 10, "Red  Shoe"), ("r2", "u2", 15, None), ("r9", "u3", 20, "red shoe")),
            "valid": requests(("v1", "u1", 30, "x")),
            "test": requests(("t1", "u2", 40, "RED shoe")),
        },
        meta={"split": {"kind": kind, "train_until": 30 if kind == "global_time" else None}},
    )


def test_training_events_of_a_global_time_split_end_before_the_cut():
    assert training_events(folder())["time"].to_pylist() == [5, 10, 15, 29]


def test_training_events_of_leave_one_out_end_before_the_user_s_own_held_out_requests():
    # v1 cuts u1 at 30, t1 cuts u2 at 40, u3 has no held-out request and keeps all.
    assert training_events(folder("leave_one_out"))["time"].to_pylist() == [5, 10, 15, 29, 35, 45]


def test_no_training_event_is_an_error_and_no_held_out_request_keeps_everything():
    data = folder()
    data.events = data.events.slice(6)
    with pytest.raises(DataError, match="No event lies before"):
        training_events(data)
    data = folder()
    data.requests = {"train": data.requests["train"]}
    assert training_events(data).num_rows == 8


def test_item_rows_and_popularity_order():
    items = table("items", item_id=["b", "a", "c"])
    assert item_rows(["a", "c", "a"], items, "x").tolist() == [1, 2, 1]
    for ids in (["a", "zz"], ["a", None]):
        with pytest.raises(DataError, match="1 item ids of the log are not in the catalogue"):
            item_rows(ids, items, "the log")
    assert popularity_order(np.array([1, 1, 5]), items).tolist() == [2, 1, 0]


def test_popularity_groups_by_mass_above():
    #         50 of 100 -> 0 above; 30 -> 50 % above; 10, 10 -> 80 % above both; 0 -> unseen
    assert popularity_groups([50, 30, 10, 10, 0]).tolist() == [0, 1, 1, 1, 3]
    assert popularity_groups([90, 5, 5, 0]).tolist() == [0, 2, 2, 3]
    assert popularity_groups([7, 7, 7]).tolist() == [0, 0, 0]
    assert popularity_groups([0, 0]).tolist() == [3, 3]
    rng = np.random.default_rng(0)
    counts = rng.zipf(1.5, size=300) - 1
    shuffle = rng.permutation(300)
    assert (popularity_groups(counts)[shuffle] == popularity_groups(counts[shuffle])).all()
    expected = [
        3
        if c == 0
        else int((counts[counts > c].sum() / counts.sum()) >= 0.5) + int(counts[counts > c].sum() / counts.sum() >= 0.9)
        for c in counts
    ]
    assert popularity_groups(counts).tolist() == expected
    assert set(expected) == {0, 1, 2, 3}


def test_a_request_belongs_to_its_most_clicked_relevant_item():
    relevance = Relevance.from_lists([[4, 0], [3], [4], [], [1, 3]])
    masks = popularity_slices([180, 5, 5, 5, 0], relevance)
    assert masks["popularity/head"].tolist() == [True, False, False, False, False]
    assert masks["popularity/tail"].tolist() == [False, True, False, False, True]
    assert masks["popularity/unseen"].tolist() == [False, False, True, False, False]
    assert sum(mask.astype(int) for mask in masks.values()).tolist() == [1, 1, 1, 0, 1]


def test_query_slices_equal_a_counter():
    rng = np.random.default_rng(2)
    words = ["Red Shoe", "red  shoe ", "ＲＥＤ shoe", "blue", "green", "手机", "手机 ", "", "   ", None]
    train = [words[n] for n in rng.choice(10, size=60, p=[0.2, 0.1, 0.1, 0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1])]
    asked = [*words, "RED SHOE", "never"]

    def plain(query):
        import unicodedata

        return " ".join(unicodedata.normalize("NFKC", query).lower().split()) if query else ""

    counts = Counter(plain(q) for q in train)
    masks = query_slices(train, pa.chunked_array([asked[:3], asked[3:]]))
    for place, query in enumerate(asked):
        text = plain(query)
        seen = counts[text]
        name = "none" if not text else "unseen" if not seen else "rare" if seen < 10 else "frequent"
        assert [n for n, mask in masks.items() if mask[place]] == [f"query/{name}"], query
    assert all(mask.any() for mask in masks.values())
    assert normalise_queries([" ", None]).null_count == 2


def test_history_slices():
    masks = history_slices(np.array([0, 1, 4, 5, 19, 20, 500]))
    assert {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()} == {
        "history/0": [0],
        "history/1-4": [1, 2],
        "history/5-19": [3, 4],
        "history/20+": [5, 6],
    }
    with pytest.raises(DataError, match="must be counts"):
        history_slices(np.array([1.5]))


def test_build_slices_reads_the_folder():
    data = folder()
    masks = build_slices(data, data.requests["test"], Relevance.from_lists([[1]]), np.array([3]))
    assert [name for name, mask in masks.items() if mask[0]] == ["popularity/torso", "query/rare", "history/1-4"]
    with pytest.raises(DataError, match="'popularity/head' has 2 rows for 1 requests"):
        build_slices(data, data.requests["test"], Relevance.from_lists([[1], [0]]), np.array([3]))


def test_slice_rows():
    rng = np.random.default_rng(1)
    values = rng.random(40)
    values[7] = np.nan
    users = [None if n % 13 == 0 else f"u{n % 9}" for n in range(40)]
    masks = {"half": np.arange(40) < 20, "one": np.arange(40) == 3, "none": np.zeros(40, bool)}
    everything, half, one, none = slice_rows(values, masks, clusters=users, seed=4)
    kept = [n for n in range(20) if n != 7]
    expected = bootstrap_interval(values[kept], seed=4, clusters=[users[n] for n in kept])
    assert (half.low, half.high, half.requests) == (expected.low, expected.high, 19)
    assert half.mean == pytest.approx(np.nanmean(values[:20])) and half.share == 19 / 39
    assert (one.mean, one.low, one.high, one.requests) == (values[3], None, None, 1)
    assert (none.mean, none.low, none.requests) == (None, None, 0)
    assert everything.name == "all" and everything.requests == 39
    with pytest.raises(DataError, match="'x' has 3 rows for 40 values"):
        slice_rows(values, {"x": np.ones(3, bool)})

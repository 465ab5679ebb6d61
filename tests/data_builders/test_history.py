"""History and splits against brute force: what a request may see, and that nothing of the future is ever in it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.tables.history import ACTIONS, FOREVER, History, Ragged, TimeCut, assert_before
from sidtune.data_builders.tables.schema import Tables, table_from_columns, table_from_rows
from sidtune.data_builders.tables.splits import (
    SplitConfig,
    apply_split,
    assert_no_leak,
    global_time_split,
    item_statistics,
    leave_one_out,
    next_item_requests,
    tie_events,
    training_cut,
)

STRENGTH = {"order": 0, "like": 1, "click": 2}


def events_table(rows: list[tuple]) -> pa.Table:
    names = ("user_id", "time", "action", "item_id")
    return table_from_rows("events", [dict(zip(names, row, strict=False)) for row in rows])


def brute(rows: list[tuple], user: str, time: int, max_len: int | None, actions: tuple | None) -> list[int]:
    mine = [
        (row[1], STRENGTH.get(row[2], 3), number)
        for number, row in enumerate(rows)
        if row[0] == user and row[1] < time and (actions is None or row[2] in actions)
    ]
    found = [number for _, _, number in sorted(mine)]
    return found if max_len is None else found[len(found) - min(max_len, len(found)) :]


event = st.tuples(
    st.sampled_from("abcd"), st.integers(-3, 6) | st.sampled_from([10**12, -(10**12)]), st.sampled_from(ACTIONS)
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(event, max_size=25),
    asked=st.lists(st.tuples(st.sampled_from("abcde"), st.integers(-5, 8) | st.just(10**13)), max_size=8),
    max_len=st.none() | st.integers(0, 4),
    actions=st.none() | st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=3, unique=True).map(tuple),
)
def test_history_equals_brute_force(rows, asked, max_len, actions):
    history = History(events_table(rows), actions)
    found = history.before([u for u, _ in asked], np.array([t for _, t in asked], dtype=np.int64), max_len)
    assert found.offsets.dtype == found.rows.dtype == np.int64
    assert len(found) == len(asked) and found.offsets[-1] == len(found.rows)
    for n, (user, time) in enumerate(asked):
        assert found[n].tolist() == brute(rows, user, time, max_len, actions)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(event, max_size=25), until=st.none() | st.integers(-2, 7))
def test_whole_history_of_users(rows, until):
    history = History(events_table(rows))
    users = list(dict.fromkeys(row[0] for row in rows))
    assert history.user_ids.to_pylist() == users
    found = history.of_users(until)
    for n, user in enumerate(users):
        assert found[n].tolist() == brute(rows, user, 10**15 if until is None else until, None, None)
    assert found.lengths.tolist() == [len(found[n]) for n in range(len(users))]


def test_whole_history_with_a_cut_per_user():
    rows = [("a", t, "click") for t in range(5)] + [("b", t, "click") for t in range(5)]
    cut = TimeCut(FOREVER, pa.array(["b"]), np.array([2]))
    found = History(events_table(rows)).of_users(cut, ["b", "a", "nobody"], max_len=3)
    assert [found[n].tolist() for n in range(3)] == [[5, 6], [2, 3, 4], []]


def test_the_guard_sees_a_leak():
    rows = [("a", 1, "click"), ("a", 5, "click")]
    times = np.array([1, 5])
    assert_before(Ragged(np.array([0, 1]), np.array([0])), times, np.array([2]))
    for asked in (1, 5):
        with pytest.raises(DataError, match="leaks the future: event 1 at time 5 is listed before time"):
            assert_before(Ragged(np.array([0, 0, 2]), np.array([0, 1])), times, np.array([0, asked + (asked == 1)]))
    history = History(events_table(rows))
    history._rows = history._rows[::-1].copy()  # a defect in the order must not pass
    with pytest.raises(DataError, match="leaks the future"):
        history.before(["a"], np.array([3]))


def test_history_refuses_what_it_cannot_order():
    good = events_table([("a", 1, "click")])
    with pytest.raises(ConfigError, match="no action 'clicks': did you mean 'click'"):
        History(good, ("clicks",))
    for column in ("user_id", "time", "action"):
        bad = good.set_column(
            good.schema.get_field_index(column), good.schema.field(column), pa.nulls(1, good.schema.field(column).type)
        )
        with pytest.raises(DataError, match=f"1 rows without '{column}'"):
            History(bad)
    history = History(good)
    with pytest.raises(DataError, match="one integer time for each of 2 users, got times of shape"):
        history.before(["a", "b"], np.array([1]))
    with pytest.raises(DataError, match="type float64"):
        history.before(["a"], np.array([1.5]))
    with pytest.raises(ConfigError, match="max_len of a history must be 0 or more, got -1"):
        history.before(["a"], np.array([1]), max_len=-1)
    assert len(History(good.slice(0, 0)).before(["a"], np.array([3])).rows) == 0
    assert len(history.before([], np.array([], dtype=np.int64))) == 0


def test_history_of_a_sliced_and_chunked_table():
    rows = [("a", t % 7, "click") for t in range(30)] + [("b", 2, "order")]
    whole = pa.concat_tables([events_table([("z", 0, "view")]), events_table(rows[:11]), events_table(rows[11:])])
    found = History(whole.slice(1)).before(["a", "b"], np.array([4, 3]))
    assert found[0].tolist() == brute(rows, "a", 4, None, None)
    assert found[1].tolist() == [30]


# -- splits ---------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    times=st.lists(st.integers(0, 12), min_size=1, max_size=40),
    valid=st.sampled_from([0.0, 0.1, 0.3]),
    test=st.sampled_from([0.1, 0.25]),
)
def test_global_split_is_ordered_and_close_to_the_shares(times, valid, test):
    times = np.array(times)
    try:
        names, train_until, valid_until = global_time_split(times, SplitConfig(valid_share=valid, test_share=test))
    except DataError as error:
        # Only ties or too few requests can leave nothing to train on.
        assert "leaves no train request" in str(error)
        first = np.sort(times)[min(len(times) - 1, round(len(times) * (1 - test - valid)))]
        assert first == times.min()
        return
    assert names.tolist() == ["train" if t < train_until else "valid" if t < valid_until else "test" for t in times]
    assert (names == "train").any() and (names == "test").any()
    assert (names == "valid").any() or valid == 0 or train_until == valid_until
    most = np.bincount(times).max()
    assert abs((names == "test").sum() - test * len(times)) <= most + 1


def test_explicit_moments_and_their_mistakes():
    times = np.arange(10)
    names, first, second = global_time_split(times, SplitConfig(train_until=4, valid_until=7))
    assert (first, second) == (4, 7) and [(names == part).sum() for part in ("train", "valid", "test")] == [4, 3, 3]
    assert not (global_time_split(times, SplitConfig(train_until=4))[0] == "valid").any()
    with pytest.raises(ConfigError, match="valid_until needs train_until"):
        global_time_split(times, SplitConfig(valid_until=3))
    with pytest.raises(ConfigError, match="valid_until \\(2\\) lies before train_until \\(5\\)"):
        global_time_split(times, SplitConfig(train_until=5, valid_until=2))
    with pytest.raises(ConfigError, match="their sum below 1"):
        SplitConfig(valid_share=0.5, test_share=0.5)
    with pytest.raises(DataError, match="leaves no test request among times 0 to 9"):
        global_time_split(times, SplitConfig(train_until=20))
    with pytest.raises(DataError, match="no requests to split"):
        global_time_split(np.array([], dtype=np.int64), SplitConfig())


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.sampled_from(ACTIONS)), max_size=20))
def test_leave_one_out_equals_brute_force(rows):
    names = leave_one_out(events_table(rows), min_rows=3)
    for user in {row[0] for row in rows}:
        order = sorted((r[1], STRENGTH.get(r[2], 3), n) for n, r in enumerate(rows) if r[0] == user)
        mine = [n for _, _, n in order]
        if len(mine) < 3:
            assert all(names[n] == "train" for n in mine)
            continue
        assert names[mine[-1]] == "test" and names[mine[-2]] == "valid"
        for n in mine[:-2]:
            assert names[n] == ("train" if rows[n][1] < rows[mine[-2]][1] else "")
    with pytest.raises(ConfigError, match="min_rows"):
        SplitConfig(min_rows=1)


def shop(requests: list[tuple], events: list[tuple] = ()) -> Tables:
    """requests: (id, user, time, [(item, labels)]); events: (user, item, time, action, request_id)."""
    rows = [
        {
            "request_id": i,
            "user_id": u,
            "time": t,
            "candidates": [{"item_id": item, **labels} for item, labels in shown],
        }
        for i, u, t, shown in requests
    ]
    names = ("user_id", "item_id", "time", "action", "request_id")
    return Tables(
        items=table_from_rows("items", [{"item_id": name} for name in "xyz"]),
        users=table_from_rows("users", [{"user_id": name} for name in "ab"]),
        requests=table_from_rows("requests", rows),
        events=table_from_rows("events", [dict(zip(names, row, strict=True)) for row in events]),
    )


def test_apply_split_proves_that_nothing_leaks():
    many = [(f"r{t}", "ab"[t % 2], t, [("x", {"click": 1})]) for t in range(20)]
    tables, split = apply_split(shop(many))
    assert split == {"kind": "global_time", "train_until": 16, "valid_until": 18}
    assert [tables.split_of_request.count(part) for part in ("train", "valid", "test")] == [16, 2, 2]
    early = dataclasses.replace(tables, events=shop([], [("b", "x", 3, "click", "r19")]).events)
    with pytest.raises(DataError, match="1 events of held-out requests lie in the training time, the first is row 0"):
        assert_no_leak(early, split)
    late = dataclasses.replace(tables, split_of_request=["train"] * 20)
    with pytest.raises(
        DataError, match="4 train requests are not before the held-out ones, the first is request 'r16'"
    ):
        assert_no_leak(late, split)
    wrong = dataclasses.replace(tables, split_of_request=["train"] * 16 + ["test"] + ["valid"] * 3)
    with pytest.raises(DataError, match="a test request lies at 16, before 18"):
        assert_no_leak(wrong, split)
    with pytest.raises(ConfigError, match="no split named 'globaltime': did you mean 'global_time'"):
        apply_split(shop(many), "globaltime")
    with pytest.raises(DataError, match="prescribes no split"):
        apply_split(shop(many), "source")
    with pytest.raises(DataError, match="The requests have 1 rows without 'user_id'"):
        apply_split(shop([("r", None, 1, []), *many]))


def test_an_action_after_the_cut_is_no_part_of_a_train_request():
    """A late order of a train request stays in the log, without its request; tied to it, it is a leak."""
    many = [(f"r{t}", "ab"[t % 2], t, [("x", {"click": 1})]) for t in range(20)]
    events = [("a", "x", 2, "click", "r2"), ("a", "y", 16, "order", "r2"), ("b", "z", 19, "click", "r19")]
    made, split = apply_split(shop(many, events))
    assert split["train_until"] == 16 and made.events["request_id"].to_pylist() == ["r2", None, "r19"]
    assert made.counts["events_after_the_cut_untied_from_train_requests"] == 1
    tied = dataclasses.replace(made, events=shop([], events).events)
    with pytest.raises(DataError, match="1 events of train requests lie after the training time, the first is row 1"):
        assert_no_leak(tied, split)
    own_cut, split = apply_split(
        shop(many, [("a", "x", 17, "order", "r2"), ("b", "x", 17, "order", "r3")]), "leave_one_out"
    )
    assert split["train_until"] is None and own_cut.events["request_id"].to_pylist() == [None, None]


def test_the_default_split_is_the_prescribed_one_and_no_clock_is_made_up():
    requests = [(f"r{t}", "ab"[t % 2], t, []) for t in range(10)]
    plain = shop(requests)
    names = ["train"] * 7 + ["valid"] + ["test"] * 2
    given = dataclasses.replace(plain, split_of_request=names)
    assert apply_split(plain)[1]["kind"] == "global_time"
    made, split = apply_split(given)
    assert (made.split_of_request, split["kind"]) == (names, "source")
    made, split = apply_split(given, valid_share=0.2)
    assert split["kind"] == "global_time", "a share asks for a split by time"
    assert made.notes == ["The split that the source prescribes is not used; requests are split by 'global_time'."]
    assert apply_split(given, min_rows=3)[1]["kind"] == "leave_one_out"
    timeless = dataclasses.replace(given, clock=False)
    assert apply_split(timeless)[1]["kind"] == "source"
    for options in ({"kind": "global_time"}, {"test_share": 0.3}, {"train_until": 4}):
        with pytest.raises(ConfigError, match="no clock, they order the actions of one user only"):
            apply_split(timeless, **options)
    with pytest.raises(ConfigError, match="no clock"):
        apply_split(dataclasses.replace(plain, clock=False))
    with pytest.raises(ConfigError, match="The split 'source' takes no 'valid_share'"):
        apply_split(given, "source", valid_share=0.2)


def test_prescribed_splits_get_bounds_only_where_time_separates_them():
    requests = [("r1", "a", 1, []), ("r2", "a", 5, []), ("r3", "b", 7, []), ("r4", "b", 9, [])]
    tables = dataclasses.replace(shop(requests), split_of_request=["train", "valid", "valid", "test"])
    assert apply_split(tables, "source")[1] == {"kind": "source", "train_until": 2, "valid_until": 8}
    tables = dataclasses.replace(shop(requests), split_of_request=["train", "test", "train", "test"])
    made, split = apply_split(tables, "source")
    assert split == {"kind": "source", "train_until": None, "valid_until": None}
    cut = training_cut(made.requests, np.array(made.split_of_request), split)
    assert cut.of(["a", "b", "c"]).tolist() == [5, 9, FOREVER]
    tables = dataclasses.replace(shop(requests), split_of_request=["test", "train", "train", "test"])
    with pytest.raises(DataError, match="request 'r2' at time 5 with the cut at 1"):
        apply_split(tables, "source")
    tables = dataclasses.replace(shop(requests), split_of_request=["train", "trian", "test", "test"])
    with pytest.raises(DataError, match="'trian' of a request is unknown \\(did you mean 'train'"):
        apply_split(tables, "source")


def test_leave_one_out_on_requests_drops_ties():
    requests = [("r1", "a", 1, []), ("r2", "a", 5, []), ("r3", "a", 5, []), ("r4", "a", 6, []), ("r5", "b", 1, [])]
    tables, split = apply_split(shop(requests), "leave_one_out")
    assert tables.requests["request_id"].to_pylist() == ["r1", "r3", "r4", "r5"]
    assert tables.split_of_request == ["train", "valid", "test", "train"]
    assert tables.counts == {"requests_tied_with_the_split_dropped": 1} and split["train_until"] is None


def test_next_item_requests_have_a_past_and_tie_their_event():
    rows = [
        ("a", 1, "click", "x"),
        ("a", 1, "order", "y"),
        ("a", 2, "cart", "x"),
        ("a", 3, "like", "z"),
        ("b", 0, "click", "x"),
    ]
    events = events_table(rows)
    requests, made_from = next_item_requests(events)
    assert made_from.tolist() == [3] and requests.to_pylist() == [
        {
            "request_id": "next-3",
            "user_id": "a",
            "time": 3,
            "query": None,
            "context": None,
            "candidates": [{"item_id": "z", "position": None, "click": None, "like": 1, "order": None, "dwell": None}],
        }
    ]
    assert tie_events(events, made_from, requests["request_id"])["request_id"].to_pylist() == [None] * 3 + [
        "next-3",
        None,
    ]


def counts(items: pa.Table) -> dict[str, list]:
    return {name: items[name].to_pylist() for name in ("exposures", "clicks", "orders")}


def test_item_statistics_see_the_past_only():
    shown = [("x", {"click": 1, "order": 0}), ("y", {"click": 0, "order": 0})]
    tables = shop(
        [("r1", "a", 1, shown), ("r2", "b", 2, shown), ("r3", "a", 3, [("z", {"click": 1, "order": 1})])],
        [("a", "x", 1, "click", "r1"), ("a", "y", 2, "order", None), ("b", "z", 9, "click", None)],
    )
    parts = (tables.items, tables.requests, tables.events)
    assert counts(item_statistics(*parts, 3)) == {"exposures": [2, 2, 0], "clicks": [2, 0, 0], "orders": [0, 0, 0]}
    assert counts(item_statistics(*parts, None))["orders"] == [0, 0, 1]
    assert counts(item_statistics(*parts, 3, "events")) == {
        "exposures": [None] * 3,
        "clicks": [1, 0, 0],
        "orders": [0, 1, 0],
    }
    cut = TimeCut(FOREVER, pa.array(["a"]), np.array([1]))
    assert counts(item_statistics(*parts, cut))["exposures"] == [1, 1, 0]
    with pytest.raises(ConfigError, match="source must be"):
        item_statistics(*parts, 3, "log")


def test_item_statistics_of_logs_without_impressions_are_unknown_not_zero():
    tables = shop([("r1", "a", 1, [("x", {"order": 1})])], [("a", "x", 0, "order", None), ("a", "x", 1, "order", "r1")])
    found = counts(item_statistics(tables.items, tables.requests, tables.events, 5))
    assert found == {"exposures": [None] * 3, "clicks": [None] * 3, "orders": [2, 0, 0]}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_item_statistics_equal_brute_force(data):
    label = st.none() | st.sampled_from([0, 1])
    shown = st.lists(
        st.tuples(st.sampled_from("xyz"), st.fixed_dictionaries({"click": label, "order": label})), max_size=3
    )
    raw = data.draw(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 6), shown), min_size=1, max_size=8))
    until = data.draw(st.integers(0, 7))
    tables = shop([(f"r{n}", *row) for n, row in enumerate(raw)])
    found = counts(item_statistics(tables.items, tables.requests, tables.events, until, "requests"))
    past = [candidate for _, time, row in raw if time < until for candidate in row]
    assert found["exposures"] == [sum(item == name for item, _ in past) for name in "xyz"]
    for column, label_name in (("clicks", "click"), ("orders", "order")):
        known = any(labels[label_name] is not None for _, labels in past)
        expected = [sum(item == name and labels[label_name] == 1 for item, labels in past) for name in "xyz"]
        assert found[column] == (expected if known else [None] * 3)


def test_statistics_of_a_table_with_columns(tmp_path):
    items = table_from_columns("items", {"item_id": ["x"], "orders": [99]}, 1)
    made = item_statistics(items, shop([]).requests, shop([]).events, None)
    assert made["orders"].to_pylist() == [None], "old counts never survive"
    assert made.schema.equals(items.schema)

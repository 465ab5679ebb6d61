"""Baselines against brute force: Counter, dense numpy and the BM25 formula written out."""

import json
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.tables.schema import table_from_columns, table_from_rows
from sidtune.metrics.baselines import base as baselines
from sidtune.metrics.baselines import item_knn
from sidtune.metrics.baselines.base import BaselineRequests, Popularity
from sidtune.metrics.baselines.bm25 import BM25, item_text, tokenise
from sidtune.metrics.baselines.item_knn import ItemKNN
from sidtune.metrics.ranking import Relevance, evaluate_ranking
from sidtune.metrics.registry import BASELINES

WORDS = ["red", "blue", "green", "shoe", "boot", "sock", "lace", "wool", "silk", "手机", "手機殼", "مرحبا", "हिन्दी"]


def catalogue(count: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    ids = [f"i{n:03d}" for n in rng.permutation(count)]
    titles = [" ".join(rng.choice(WORDS, size=rng.integers(0, 7))) for _ in range(count)]
    return table_from_columns("items", {"item_id": ids, "title": titles}, count)


def log(items: pa.Table, count: int, seed: int = 1, users: int = 25) -> pa.Table:
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(items.num_rows, 0.3))
    columns = {
        "user_id": [f"u{n}" for n in rng.integers(0, users, count)],
        "item_id": [items["item_id"][int(n)].as_py() for n in rng.choice(items.num_rows, size=count, p=share)],
        "time": np.sort(rng.integers(0, 1000, count)),
        "action": rng.choice(["click", "order"], size=count, p=[0.8, 0.2]).tolist(),
    }
    return table_from_columns("events", columns, count)


def asks(items: int, count: int, seed: int = 2) -> BaselineRequests:
    rng = np.random.default_rng(seed)
    history = [rng.integers(0, items, size=rng.integers(0, 6)).tolist() for _ in range(count)]
    queries = [
        None if rng.random() < 0.4 else " ".join(rng.choice([*WORDS, "zzz"], size=rng.integers(0, 4)))
        for _ in range(count)
    ]
    return BaselineRequests(queries, Relevance.from_lists(history))


def history_of(requests: BaselineRequests, place: int) -> list[int]:
    offsets = requests.history.offsets
    return requests.history.rows[offsets[place] : offsets[place + 1]].tolist()


def slow_order(scores, counts, ids, banned, k):
    """Positive scores first, then popularity, then item id; -1 at the end."""
    rows = [n for n in range(len(ids)) if n not in banned]
    rows.sort(key=lambda n: (-max(scores[n], 0.0), -counts[n], ids[n]))
    return (rows + [-1] * k)[:k]


@pytest.mark.parametrize("exclude", [False, True])
def test_popularity_equals_a_counter(exclude):
    items, requests = catalogue(30), asks(30, 40)
    events = log(items, 200)
    ids, counts = items["item_id"].to_pylist(), Counter(events["item_id"].to_pylist())
    got = Popularity(exclude_seen=exclude).fit(items, events).rank(requests, 12)
    for place in range(40):
        banned = set(history_of(requests, place)) if exclude else set()
        assert got[place].tolist() == slow_order([0] * 30, [counts[i] for i in ids], ids, banned, 12)


@pytest.fixture(params=["sparse", "dense"])
def path(request, monkeypatch):
    """Both ways to find the best k."""
    monkeypatch.setattr(baselines, "_DENSE", 2.0 if request.param == "sparse" else -1.0)


@pytest.mark.parametrize("neighbours", [None, 4])
@pytest.mark.parametrize("exclude", [False, True])
def test_item_knn_equals_dense_numpy(neighbours, exclude, path, monkeypatch):
    monkeypatch.setattr(baselines, "_BLOCK", 200)  # several chunks
    monkeypatch.setattr(item_knn, "_BLOCK", 200)
    items, requests = catalogue(40, 3), asks(40, 60, 4)
    events = log(items, 300, 5)
    ids = items["item_id"].to_pylist()
    seen = np.zeros((25, 40))
    for user, item in zip(events["user_id"].to_pylist(), events["item_id"].to_pylist(), strict=True):
        seen[int(user[1:]), ids.index(item)] = 1
    together = seen.T @ seen
    norm = np.sqrt(np.diag(together))
    similar = together / (np.outer(norm, norm) + 3.0)
    np.fill_diagonal(similar, 0)
    counts = [Counter(events["item_id"].to_pylist())[i] for i in ids]
    if neighbours:
        for row in range(40):
            kept = slow_order(similar[row], counts, ids, set(), neighbours)
            similar[row, [n for n in range(40) if n not in kept]] = 0
    got = ItemKNN(neighbours, shrinkage=3.0, exclude_seen=exclude).fit(items, events).rank(requests, 15)
    for place in range(60):
        history = sorted(set(history_of(requests, place)))
        scores = similar[history].sum(axis=0).round(12)
        banned = set(history) if exclude else set()
        slow = slow_order(scores, counts, ids, banned, 15)
        # Sums in another order may differ in the last bit, so scores are compared, and the items of the fill.
        np.testing.assert_allclose(scores[got[place]], scores[slow], atol=1e-12)
        assert [n for n in got[place] if scores[n] == 0] == [n for n in slow if scores[n] == 0]
        assert len(set(got[place].tolist()) - banned) == 15


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("name", list(BASELINES))
def test_shares_are_the_scores_over_their_sum(name, exclude, monkeypatch):
    """Against the scores of the baseline, row by row; a request without one shares by popularity."""
    monkeypatch.setattr(baselines, "_BLOCK", 200)  # several chunks
    items, requests = catalogue(40, 3), asks(40, 60, 4)
    fitted = BASELINES.get(name)(exclude_seen=exclude).fit(items, log(items, 90, 5))
    scores, own_ban = fitted._scores(requests.queries, requests.history)
    slow, bare = np.zeros((60, 40)), 0
    for place in range(60):
        row = np.zeros(40) if scores is None else scores[[place]].toarray()[0]
        banned = np.zeros(40, dtype=bool) if own_ban is None else own_ban[[place]].toarray()[0] != 0
        if exclude:
            banned = np.isin(np.arange(40), history_of(requests, place))
        row = np.where(banned, 0, row)
        if row.sum() == 0:
            bare += 1
            row = np.where(banned, 0, fitted.counts)
        slow[place] = row / row.sum()
    assert bare == 60 if name == "popularity" else 0 < bare < 60
    everything = np.tile(np.arange(40), (60, 1))
    np.testing.assert_allclose(fitted.shares(requests, everything), slow, atol=1e-12)
    some = np.random.default_rng(0).integers(-1, 40, (60, 7))
    expected = np.where(some >= 0, np.take_along_axis(slow, np.maximum(some, 0), axis=1), 0)
    np.testing.assert_allclose(fitted.shares(requests, some), expected, atol=1e-12)
    assert fitted.numbers == (np.count_nonzero(fitted.similarity.toarray()) if name == "item_knn" else 0)


def bm25_by_hand(documents: list[list[str]], query: list[str], k1: float, b: float) -> np.ndarray:
    mean = sum(map(len, documents)) / len(documents)
    scores = np.zeros(len(documents))
    for term in query:
        having = sum(term in document for document in documents)
        idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
        for place, document in enumerate(documents):
            tf = document.count(term)
            scores[place] += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean)) if tf else 0.0
    return scores


@pytest.mark.parametrize("options", [{}, {"k1": 0.9, "b": 0.4}])
def test_bm25_equals_the_formula(options, path, monkeypatch):
    monkeypatch.setattr(baselines, "_BLOCK", 300)
    items, requests = catalogue(35, 6), asks(35, 80, 7)
    events = log(items, 150, 8)
    ids = items["item_id"].to_pylist()
    documents = [tokenise(title) for title in items["title"].to_pylist()]
    counts = [Counter(events["item_id"].to_pylist())[i] for i in ids]
    got = BM25(**options).fit(items, events).rank(requests, 35)
    scored = 0
    for place, query in enumerate(requests.queries):
        words, banned = tokenise(query or ""), set()
        if not (query or "").strip():
            last = set(history_of(requests, place)[-1:])
            words = [word for item in last for word in documents[item]]
            banned = last
        scores = bm25_by_hand(documents, words, options.get("k1", 1.5), options.get("b", 0.75)).round(12)
        slow = [n for n in slow_order(scores, counts, ids, banned, 35) if n >= 0]
        ranked = [n for n in got[place].tolist() if n >= 0]
        assert sorted(ranked) == sorted(slow)
        np.testing.assert_allclose(scores[ranked], scores[slow], atol=1e-9)
        assert [n for n in ranked if scores[n] == 0] == [n for n in slow if scores[n] == 0]
        scored += scores.max() > 0
    assert scored > 40


def test_bm25_scores_equal_the_library():
    import bm25s

    items = catalogue(30, 9)
    documents = [tokenise(title) for title in items["title"].to_pylist()]
    library = bm25s.BM25(method="lucene", dtype="float64")
    library.index(documents, show_progress=False)
    ours = BM25(fields=["title"]).fit(items, log(items, 20))
    query = "red red 手机 shoe"
    scores, _ = ours._scores([query], Relevance.from_lists([[]]))
    np.testing.assert_allclose(scores.toarray()[0], library.get_scores(tokenise(query)), atol=1e-12)


def test_bm25_ties_break_by_popularity_then_id_and_unknown_words_fall_back_to_popularity(path):
    items = table_from_columns("items", {"item_id": ["d", "c", "b", "a"], "title": ["red", "red", "red", "blue"]}, 4)
    events = table_from_columns("events", {"item_id": ["c", "a", "a"]}, 3)
    requests = BaselineRequests(["RED", "unknown", "", "  "], Relevance.from_lists([[3], [3], [], []]))
    got = BM25().fit(items, events).rank(requests, 4)
    assert got.tolist() == [[1, 2, 0, 3], [3, 1, 2, 0], [3, 1, 2, 0], [3, 1, 2, 0]]


def test_seen_items_are_excluded_only_where_users_do_not_repeat():
    items = catalogue(300)
    ids = items["item_id"].to_pylist()
    pairs = [(f"u{n % 5}", ids[n], n) for n in range(200)] + [
        ("u0", ids[0], 0)
    ]  # the last: a second action, same moment
    table = {"user_id": [p[0] for p in pairs], "item_id": [p[1] for p in pairs], "time": [p[2] for p in pairs]}
    once = table_from_columns("events", table, len(pairs))
    assert baselines.repeat_share(once) == 0.0 and Popularity().fit(items, once).excludes is True
    again = pa.concat_tables([once, once.slice(0, 3).set_column(2, once.schema.field("time"), [[900, 901, 902]])])
    assert baselines.repeat_share(again) == 3 / 203 and Popularity().fit(items, again).excludes is False
    requests = BaselineRequests([None], Relevance.from_lists([[0, 1]]))
    for name in BASELINES:
        cls = BASELINES.get(name)
        assert not {0, 1} & set(cls().fit(items, once).rank(requests, 298)[0].tolist())
        kept = cls(exclude_seen=False).fit(items, once).rank(requests, 300)
        clicked = {1, -1} if name == "bm25" else {-1}  # the text of the item clicked last finds itself first
        assert {*kept[0].tolist()} - clicked == {*range(300)} - clicked
    anonymous = table_from_columns("events", {"item_id": ids[:9]}, 9)
    assert Popularity().fit(items, anonymous).excludes is False


def test_lists_are_full_or_the_catalogue_is_used_up(path):
    items = catalogue(5)
    events = log(items, 20)
    requests = BaselineRequests(["red"], Relevance.from_lists([[0, 1, 1]]))
    for name in BASELINES:
        got = BASELINES.get(name)(exclude_seen=True).fit(items, events).rank(requests, 7)
        assert sorted(got[0].tolist()) == [-1, -1, -1, -1, 2, 3, 4] and got[0, 3] == -1


@pytest.mark.parametrize("name", list(BASELINES))
def test_ranking_does_not_depend_on_row_order_or_chunks(name, path, monkeypatch):
    items, events = catalogue(40, 10), log(catalogue(40, 10), 250, 11)
    requests = asks(40, 50, 12)
    first = BASELINES.get(name)().fit(items, events).rank(requests, 9)
    monkeypatch.setattr(baselines, "_BLOCK", 40)
    monkeypatch.setattr(item_knn, "_BLOCK", 40)
    shuffled = events.take(pa.array(np.random.default_rng(0).permutation(250)))
    assert (BASELINES.get(name)().fit(items, shuffled).rank(requests, 9) == first).all()


def test_item_text_and_tokens():
    items = table_from_rows(
        "items",
        [
            {
                "item_id": "a",
                "title": "Red Shoe",
                "brand": None,
                "category": ["Shoes", "Sport"],
                "attributes": [{"name": "size", "value": "42"}, {"name": "x", "value": None}],
                "description": "",
            },
            {"item_id": "b"},
        ],
    )
    assert item_text(items) == ["Red Shoe\nShoes Sport\n42 ", ""]
    assert tokenise("Ｒed-Shoe_x 42, Straße Café") == ["red", "shoe", "x", "42", "strasse", "café"]
    assert tokenise("华为手机壳 iPhone15手机 机") == ["华为", "为手", "手机", "机壳", "iphone15", "手机", "机"]
    assert tokenise("हिन्दी مُحَمَّد") == ["हिन्दी", "مُحَمَّد"]
    assert tokenise("コーヒー・豆") == ["コー", "ーヒ", "ヒー", "豆"]
    assert tokenise("<b>—!? \u200b") == ["b"] and tokenise("") == []


def test_history_of_events_becomes_item_rows():
    items = table_from_columns("items", {"item_id": ["a", "b"]}, 2)
    events = table_from_columns("events", {"item_id": ["b", "x", "a"]}, 3)
    requests = BaselineRequests.from_events(
        pa.chunked_array([["q", None]]), Relevance.from_lists([[2, 0], [0]]), events, items
    )
    assert requests.history.rows.tolist() == [0, 1, 1] and requests.queries == ["q", None]
    with pytest.raises(DataError, match="1 item ids of the history"):
        BaselineRequests.from_events([None], Relevance.from_lists([[1]]), events, items)
    nothing = BaselineRequests.from_events([None], Relevance.from_lists([[]]), events, items)
    assert Popularity().fit(items, events.slice(0, 1)).rank(nothing, 2).tolist() == [[1, 0]]


def test_empty_texts_and_no_events():
    items = table_from_columns("items", {"item_id": ["b", "a"]}, 2)
    events = table_from_columns("events", {"item_id": []}, 0)
    requests = BaselineRequests(["red", None], Relevance.from_lists([[], [0]]))
    for name in BASELINES:
        got = BASELINES.get(name)().fit(items, events).rank(requests, 2)
        assert got[0].tolist() == [1, 0] and got[1, 0] == 1
    assert Popularity().fit(items, events).rank(BaselineRequests([], Relevance.from_lists([])), 2).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Popularity().rank(BaselineRequests([], Relevance.from_lists([])), 1), "not fitted"),
        (lambda: Popularity().fit(catalogue(0), log(catalogue(3), 3)), "catalogue is empty"),
        (lambda: Popularity().fit(catalogue(2), log(catalogue(30), 99)), "not in the catalogue"),
        (lambda: ItemKNN(neighbours=0), "neighbours of item_knn"),
        (lambda: ItemKNN(shrinkage=-1), "shrinkage"),
        (lambda: BM25(b=2), "b between 0 and 1"),
        (lambda: BM25(fields=["tilte"]), "fields of bm25"),
        (lambda: BM25().fit(pa.table({"item_id": ["a"]}), log(catalogue(1), 0)), "no column 'title'"),
        (lambda: Popularity().fit(catalogue(3), log(catalogue(3), 3)).rank(asks(3, 2), 0), "k must be"),
        (lambda: Popularity().fit(catalogue(3), log(catalogue(3), 3)).rank(asks(30, 9), 1), "outside 0 to 2"),
        (lambda: Popularity().shares(asks(3, 1), np.zeros((1, 1), dtype=int)), "not fitted"),
        (
            lambda: Popularity().fit(catalogue(3), log(catalogue(3), 3)).shares(asks(3, 2), np.full((2, 4), 3)),
            r"2 rows of items below 3, got the shape \(2, 4\) and the item 3",
        ),
        (
            lambda: (
                Popularity()
                .fit(catalogue(3), log(catalogue(3), 3))
                .rank(BaselineRequests([None], Relevance.from_lists([])), 1)
            ),
            "needs 2 offsets",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises((DataError, ConfigError), match=message):
        call()


def test_bm25_finds_items_of_a_real_catalogue_by_their_title(real_data):
    raw = json.loads((real_data / "amazon_office" / "Office_Products.item.json").read_text("utf-8"))
    raw = {item: entry for item, entry in list(raw.items())[:1500] if len(tokenise(entry["title"])) > 3}
    columns = {"item_id": list(raw), "title": [entry["title"] for entry in raw.values()]}
    items = table_from_columns("items", columns, len(raw))
    events = table_from_columns("events", {"item_id": list(raw)[:9]}, 9)
    requests = BaselineRequests(columns["title"], Relevance.from_lists([[]] * len(raw)))
    found = BM25(b=1.0).fit(items, events).rank(requests, 5)
    targets = Relevance.from_lists([[row] for row in range(len(raw))])
    assert evaluate_ranking(found, targets, ks=[5], metrics=["hr"]).means()["hr@5"] > 0.97


def test_item_knn_beats_popularity_on_real_sequences(real_data):
    raw = json.loads((real_data / "instruments" / "Instruments.inter.json").read_text("utf-8"))
    sequences = list(raw.values())[:6000]
    count = max(max(one) for one in sequences) + 1
    items = table_from_columns("items", {"item_id": [str(n) for n in range(count)]}, count)
    pairs = [(str(user), str(item)) for user, one in enumerate(sequences) for item in one[:-2]]
    columns = {"user_id": [p[0] for p in pairs], "item_id": [p[1] for p in pairs], "time": list(range(len(pairs)))}
    events = table_from_columns("events", columns, len(pairs))
    requests = BaselineRequests([None] * 6000, Relevance.from_lists([one[:-1] for one in sequences]))
    targets = Relevance.from_lists([one[-1:] for one in sequences])
    scores = {}
    for name in ("popularity", "item_knn"):
        found = BASELINES.get(name)().fit(items, events).rank(requests, 10)
        scores[name] = evaluate_ranking(found, targets, ks=[10], metrics=["ndcg"]).means()["ndcg@10"]
    assert scores["item_knn"] > 2 * scores["popularity"] > 0.01

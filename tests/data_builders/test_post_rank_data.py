"""Post-ranking data: the table and its batches, MovieLens readers and segments (no leak), passage lists, texts."""

import dataclasses
import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from post_rank_sources import dat, rating_rows, recbole, toy_table

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.post_ranking.columns import REQUEST_SCHEMA
from sidtune.data_builders.post_ranking.movielens_segments import PSEUDO_QUERIES, SegmentConfig, movielens_segments
from sidtune.data_builders.post_ranking.passage_lists import PassageFiles, passage_lists
from sidtune.data_builders.post_ranking.schema import PostRankField, PostRankTable
from sidtune.data_builders.post_ranking.store import load_post_rank, save_post_rank
from sidtune.data_builders.post_ranking.targets import target_order
from sidtune.data_builders.post_ranking.text import field_texts, render_request, request_of, table_from_requests
from sidtune.data_builders.post_ranking.text_hashing import hashed_bag
from sidtune.data_builders.post_ranking.upstream_ranker import GLOBAL_PRIOR, PastMeans, fold_in
from sidtune.data_builders.readers.movielens import read, read_ratings
from sidtune.metrics.list_ranking import ListMetrics, evaluate_lists

CONFIG = SegmentConfig(width=4, d_q=6, history=7, upstream_share=0.3)


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    return read_ratings(recbole(tmp_path_factory.mktemp("ml") / "r", rating_rows()))


@pytest.fixture(scope="module")
def table(ratings):
    return movielens_segments(ratings, CONFIG)


def test_target_order_of_the_sheet_and_its_metrics():
    order = target_order(np.array([3.0, 5.0, 4.0, 5.0, 1.0]))
    assert "".join("ABCDE"[n] for n in order) == "BDCAE"
    found = evaluate_lists(order[None], [[3, 5, 4, 5, 1]], settings=ListMetrics((1, 3, 5), ("ndcg",)))
    assert all(value[0] == 1.0 for value in found.per_request.values())


def test_target_order_puts_unknown_and_pads_last_and_draws_ties_when_asked():
    relevance = np.array([[np.nan, 1.0, 2.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    mask = np.array([[True, True, True, False], [True, True, True, True]])
    assert target_order(relevance, mask).tolist() == [[2, 1, 0, 3], [0, 1, 2, 3]]
    drawn = {tuple(target_order(relevance[1], ties="random", seed=seed).tolist()) for seed in range(40)}
    assert len(drawn) > 10
    for values in itertools.product((1.0, 2.0), repeat=4):  # a random tie never breaks the order of the relevance
        order = target_order(np.array(values), ties="random", seed=3)
        assert (np.diff(np.array(values)[order]) <= 0).all()
    with pytest.raises(ConfigError, match="incoming"):
        target_order(relevance, ties="other")
    with pytest.raises(DataError, match="shape"):
        target_order(relevance, mask[:1])


def test_both_layouts_give_the_same_ratings(tmp_path, ratings):
    other = read_ratings(dat(tmp_path / "d", rating_rows()))
    for name in ("user", "item", "rating", "time", "user_ids", "item_ids", "titles", "years", "genres", "genders"):
        np.testing.assert_array_equal(
            np.array(getattr(other, name), dtype=object), np.array(getattr(ratings, name), dtype=object), err_msg=name
        )
    assert other.titles[0] == 'Film "1"' and other.years[0] == 1951
    assert set(other.ages) == {"under 18", "18-24", "25-34", "35-44"} and set(other.occupations) == {"writer"}


def test_the_reader_gives_the_suites_tables(tmp_path):
    rows = [(1, 2, 5, 30), (1, 1, 3, 10), (2, 1, 4, 20), (1, 1, 1, 99)]
    tables = read(str(recbole(tmp_path / "r", rows, movies=3, users=2)))
    assert tables.events["action"].to_pylist() == ["click", "like", "like"]
    assert tables.events["user_id"].to_pylist() == ["1", "2", "1"] and tables.counts["repeated_ratings"] == 1
    assert tables.requests.num_rows == 1  # only the second rating of user 1 has a past
    assert tables.requests["candidates"][0].as_py()[0]["like"] == 1
    assert tables.items["attributes"][0].as_py()[-1] == {"name": "year", "value": "1951"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "x.inter").unlink(), "no file"),
        (lambda f: (f / "x.inter").write_text("user:token\titem_id:token\n1\t2\n"), "no column 'user_id'"),
        (lambda f: (f / "x.inter").write_text("user_id\titem_id\trating\ttimestamp\n1\t2\tgood\t3\n"), "no number"),
        (lambda f: (f / "x.inter").write_text("user_id\titem_id\trating\ttimestamp\n1\t2\t\t3\n"), "empty or infinite"),
        (lambda f: (f / "x.inter").write_text("user_id\titem_id\trating\ttimestamp\n1\t2\n"), "damaged"),
        (lambda f: (f / "x.inter").write_text("user_id\titem_id\trating\ttimestamp\n"), "no ratings"),
        (lambda f: (f / "x.item").write_text("item_id\tmovie_title\n1\ta\n1\tb\n"), "twice"),
    ],
)
def test_damaged_movielens_files_are_refused_in_a_sentence(tmp_path, change, says):
    folder = recbole(tmp_path / "r", [(1, 2, 5, 30)], movies=3, users=2)
    change(folder)
    with pytest.raises(DataError, match=says):
        read_ratings(folder)


def test_unknown_options_of_the_reader_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="layout"):
        read_ratings(tmp_path, "csv")
    with pytest.raises(ConfigError, match="like_from"):
        read(str(tmp_path), like_form=3)


def segments_by_hand(ratings, size, cut):
    """Plain Python: (user, movies in time order, start time) of each segment at or after the cut."""
    found = []
    for user in range(len(ratings.user_ids)):
        rows = sorted(np.flatnonzero(ratings.user == user).tolist(), key=lambda n: (ratings.time[n], n))
        for first in range(0, len(rows) - size + 1, size):
            part = rows[first : first + size]
            if ratings.time[part[0]] >= cut:
                found.append((user, part, [n for n in rows if ratings.time[n] < ratings.time[part[0]]]))
    return found


def test_segments_histories_and_statistics_equal_a_plain_count(ratings, table):
    cut = np.sort(ratings.time)[int(0.3 * len(ratings.time))]
    expected = segments_by_hand(ratings, 5, cut)
    assert len(table) == len(expected) > 20
    batch = table.batch(np.arange(len(table)))
    for row, (user, part, past) in enumerate(expected):
        start = ratings.time[part[0]]
        assert table.user_rows[row] == user
        assert sorted(batch.item_rows[row].tolist()) == sorted(ratings.item[part].tolist())
        assert batch.history_rows[row][batch.history_mask[row]].tolist() == ratings.item[past][-7:].tolist()
        stars = {int(ratings.item[n]): ratings.rating[n] for n in part}
        assert batch.relevance[row].tolist() == [stars[item] for item in batch.item_rows[row].tolist()]
        earlier = ratings.time < start
        overall = (ratings.rating[earlier].sum() + GLOBAL_PRIOR) / (earlier.sum() + 1)
        for place, item in enumerate(batch.item_rows[row].tolist()):
            own = ratings.rating[earlier & (ratings.item == item)]
            expected_mean = (own.sum() + CONFIG.shrink * overall) / (len(own) + CONFIG.shrink)
            np.testing.assert_allclose(
                batch.item_fields["past"][row, place, :2], [expected_mean, np.log1p(len(own))], rtol=1e-5
            )
        if past:
            own = ratings.rating[past]
            np.testing.assert_allclose(batch.user_fields["past"][row], [own.mean(), np.log1p(len(past))], rtol=1e-5)
            kept = batch.history_fields["stars"][row][batch.history_mask[row]]
            assert (kept.argmax(axis=1) + 1).tolist() == own[-7:].tolist()
        assert batch.user_present["past"][row] == bool(past)
    assert not batch.item_present["stars"].any()


def test_the_incoming_order_is_the_upstream_score(table):
    scores = table.batch(np.arange(len(table))).init_score
    assert (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_allclose(scores, table.batch(np.arange(len(table))).item_fields["past"][..., 2])


def test_the_split_of_each_user_is_chronological(table):
    names = np.array(table.requests["split"].to_pylist())
    assert set(names) == {"train", "valid", "test"}
    for user in np.unique(table.user_rows):
        own = names[table.user_rows == user].tolist()
        assert own == sorted(own, key=["train", "valid", "test"].index)
        assert own.count("test") == (1 if len(own) >= 3 else 0)


def test_no_feature_of_a_segment_depends_on_a_later_rating(ratings, table):
    """Check 16: flipping any rating changes nothing of a segment that begins at or before it, but its own label."""
    segments = segments_by_hand(ratings, 5, np.sort(ratings.time)[int(0.3 * len(ratings.time))])
    start = np.array([ratings.time[part[0]] for _, part, _ in segments])
    batch = table.batch(np.arange(len(table)))
    rng, seen_change = np.random.default_rng(0), 0
    for changed in rng.choice(len(ratings.rating), 25, replace=False):
        stars = ratings.rating.copy()
        stars[changed] = 6 - stars[changed] if stars[changed] != 3 else 1
        other = movielens_segments(dataclasses.replace(ratings, rating=stars), CONFIG)
        after = other.batch(np.arange(len(other)))
        early = start <= ratings.time[changed]
        for part in ("query", "item_rows", "init_score", "history_rows", "item_mask"):
            np.testing.assert_array_equal(getattr(batch, part)[early], getattr(after, part)[early], err_msg=part)
        for part in ("user_fields", "item_fields", "history_fields", "item_present", "user_present"):
            for name, value in getattr(batch, part).items():
                np.testing.assert_array_equal(value[early], getattr(after, part)[name][early], err_msg=f"{part} {name}")
        late = ~early
        seen_change += int((batch.item_fields["past"][late] != after.item_fields["past"][late]).any())
    assert seen_change > 10  # the guard is not empty: later segments do see the change


def test_past_means_and_fold_in_equal_direct_solutions():
    rng = np.random.default_rng(1)
    features, residual = rng.normal(size=(12, 3)), rng.normal(size=12)
    starts, ends = np.array([0, 0, 5, 5, 5]), np.array([0, 5, 5, 9, 12])
    found = fold_in(features, residual, starts, ends, ridge=2.0)
    for row, (a, b) in enumerate(zip(starts, ends, strict=True)):
        x = features[a:b]
        np.testing.assert_allclose(
            found[row], np.linalg.solve(2 * np.eye(3) + x.T @ x, x.T @ residual[a:b]), atol=1e-12
        )
    means = PastMeans(np.array([0, 0, 1]), np.array([5.0, 1.0, 3.0]), np.array([10, 20, 20]), shrink=1.0)
    mean, count = means.before(np.array([0, 0, 0, 1]), np.array([10, 20, 21, 21]))
    assert count.tolist() == [0, 1, 2, 1]
    overall = np.array([3.5, (5 + 3.5) / 2, (9 + 3.5) / 4, (9 + 3.5) / 4])
    np.testing.assert_allclose(mean, ([0, 5, 6, 3] + overall) / (count + 1))


def test_segments_are_a_function_of_their_seed(ratings, table):
    again = movielens_segments(ratings, CONFIG)
    assert again.requests.equals(table.requests)
    other = movielens_segments(ratings, dataclasses.replace(CONFIG, seed=1))
    assert other.requests["query"] != table.requests["query"]
    assert set(table.requests["query"].to_pylist()) <= set(PSEUDO_QUERIES)
    with pytest.raises(DataError, match="lower upstream_share or size"):
        movielens_segments(ratings, dataclasses.replace(CONFIG, size=100))
    with pytest.raises(ConfigError):
        SegmentConfig(test_share=0.9, valid_share=0.2)


def test_batches_pad_mask_and_gather_what_the_requests_say():
    relevance = np.array([[1.0, 2.0, 3.0], [4.0, np.nan, np.nan]])
    features = np.arange(12, dtype=float).reshape(2, 3, 2)
    features[0, 1] = np.nan
    table = toy_table(relevance, features, np.eye(2), ["train", "test"], scores=relevance)
    batch = table.batch([1, 0])
    assert batch.item_mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.item_rows.tolist() == [[3, -1, -1], [0, 1, 2]]
    assert batch.item_present["x"].tolist() == [[True, False, False], [True, False, True]]
    assert batch.item_fields["x"][1].tolist() == [[0, 1], [0, 0], [4, 5]] and batch.item_fields["x"][0, 0, 0] == 6
    assert np.isnan(batch.relevance[0]).tolist() == [False, True, True]
    assert batch.query.tolist() == [[0, 1], [1, 0]] and batch.history_mask.shape == (2, 0)
    moved = batch.reordered(np.array([[0, 1, 2], [2, 0, 1]]))
    assert moved.item_rows[1].tolist() == [2, 0, 1] and moved.relevance[1].tolist() == [3, 1, 2]
    assert moved.init_rank.tolist() == batch.init_rank.tolist() and moved.item_fields["x"][1, 0].tolist() == [4, 5]
    with pytest.raises(DataError, match="pads"):
        batch.reordered(np.array([[1, 0, 2], [0, 1, 2]]))
    with pytest.raises(DataError, match="permutation"):
        batch.reordered(np.array([[0, 0, 2], [0, 1, 2]]))
    for rows in ([], [2], [-1]):
        with pytest.raises(DataError, match="rows"):
            table.batch(rows)


def test_statistics_are_those_of_the_given_requests_only(table):
    rows = table.rows_of("train")
    mean, spread = table.statistics(rows)["item", "past"]
    values = table.batch(rows).item_fields["past"].reshape(-1, 3)
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(spread, values.std(axis=0), rtol=1e-4)
    assert not np.allclose(mean, table.statistics(table.rows_of("test"))["item", "past"][0])


def wrong(table, **change):
    parts = {one.name: getattr(table, one.name) for one in dataclasses.fields(table)} | change
    return PostRankTable(**parts)


def test_a_table_that_does_not_fit_is_refused(table):
    toy = toy_table(np.array([[1.0, 2.0]]), np.zeros((1, 2, 2)), np.eye(1), ["train"])
    with pytest.raises(DataError, match="'item/x' must have shape"):
        wrong(toy, matrices={**toy.matrices, "item/x": np.zeros((3, 2))})
    with pytest.raises(DataError, match="'query'"):
        wrong(toy, matrices={"item/x": toy.matrices["item/x"]})
    with pytest.raises(DataError, match="REQUEST_SCHEMA"):
        wrong(toy, requests=toy.requests.drop_columns(["history"]))
    row = toy.requests.to_pylist()[0]
    for change, says in (
        ({"candidates": []}, "no candidates"),
        ({"candidates": [row["candidates"][0]] * 2}, "twice"),
        ({"candidates": [{**row["candidates"][0], "item_row": 7}]}, "outside"),
        ({"query_row": 4}, "outside"),
    ):
        with pytest.raises(DataError, match=says):
            wrong(toy, requests=pa.Table.from_pylist([row | change], schema=REQUEST_SCHEMA))
    for change in ({"kind": "number"}, {"side": "shop"}, {"dim": 0}, {"labels": ("a",)}):
        with pytest.raises(ConfigError):
            PostRankField(**({"name": "f", "kind": "numeric", "side": "item", "dim": 2} | change))


def test_a_table_survives_the_disk(table, tmp_path):
    save_post_rank(table, tmp_path)
    back = load_post_rank(tmp_path)
    assert back.requests.equals(table.requests) and back.fields == table.fields and back.notes == table.notes
    assert list(back.item_texts) == list(table.item_texts) and back.user_ids == table.user_ids
    one, two = table.batch([3, 1]), back.batch([3, 1])
    for name, value in one.item_fields.items():
        np.testing.assert_array_equal(value, two.item_fields[name])
    (tmp_path / "matrices" / "query.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="no complete post-ranking table"):
        load_post_rank(tmp_path)


def test_a_request_says_in_words_what_its_fields_hold(table):
    row = int(table.rows_of("test")[0])
    request = request_of(table, row, max_history=2)
    text = render_request(request)
    assert text.startswith(f"Query: {request.query}\nUser: age: ") and text.count("\nHistory: title: Film") == 2
    for letter, item in zip("01234", request.item_ids, strict=True):
        assert f'\n{letter}: title: Film "{item}"; genres: ' in text
    assert "vector" not in text and "; stars: " in text
    pairs = dict(request.user_text)
    assert pairs["mean rating"] == f"{request.user['past'][0]:.1f}"
    field = PostRankField("g", "categorical", "item", 3, ("a", "b", "c"))
    assert field_texts([field], {"g": np.array([1.0, 0.0, 1.0])}) == [("g", "a, c")]
    assert field_texts([field], {"g": np.zeros(3)}) == [] == field_texts([field], {"g": None})


def test_requests_of_a_table_make_a_table_with_the_same_batches(table):
    rows = [0, 5, 9]
    made = table_from_requests([request_of(table, row) for row in rows], table.fields, table.d_q)
    one, two = table.batch(rows), made.batch([0, 1, 2])
    for part in ("query", "relevance", "init_score", "item_mask", "history_mask"):
        np.testing.assert_array_equal(getattr(one, part), getattr(two, part), err_msg=part)
    for part in ("item_fields", "user_fields", "history_fields", "item_present", "history_present"):
        for name, value in getattr(one, part).items():
            np.testing.assert_array_equal(value, getattr(two, part)[name], err_msg=f"{part} {name}")
    short = dataclasses.replace(request_of(table, 0), relevance=np.zeros(2))
    with pytest.raises(DataError, match="2 relevances"):
        table_from_requests([short], table.fields, table.d_q)


def passage_files(folder):
    docs = [{"_id": f"d{n}", "title": f"T{n}", "text": f"about word{n}"} for n in range(4)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "queries.tsv").write_text("q1\tword1 please\nq2\tword2\n")
    (folder / "run.trec").write_text("q2 Q0 d0 1 2.5 bm25\nq2 Q0 d2 2 3.5 bm25\nq1 Q0 d1 1 9 bm25\nq1 Q0 d3 2 1 bm25\n")
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq2\td0\t-1\n")
    return PassageFiles(
        folder / "queries.tsv", folder / "corpus.jsonl", folder / "run.trec", folder / "qrels.tsv", width=32
    )


def test_passage_lists_hold_the_run_in_order_of_score(tmp_path):
    table = passage_lists(passage_files(tmp_path))
    batch = table.batch([0, 1])
    ids = [[table.item_ids[item] for item in row] for row in batch.item_rows.tolist()]
    assert ids == [["d2", "d0"], ["d1", "d3"]]
    assert batch.relevance.tolist() == [[0, 0], [2, 0]] and batch.init_score.tolist() == [[3.5, 2.5], [9, 1]]
    assert table.notes == ["2 candidates are unjudged; their relevance is zero."]
    assert (batch.query[1] @ batch.item_fields["passage"][1, 0]) > (batch.query[1] @ batch.item_fields["passage"][1, 1])
    request = request_of(table, 1)
    assert request.query == "word1 please" and request.item_texts[0][:2] == [("title", "T1"), ("text", "about word1")]
    files = dataclasses.replace(passage_files(tmp_path), top=1, unjudged="unknown")
    short = passage_lists(files).batch([0, 1])
    assert short.item_mask.shape == (2, 1) and np.isnan(short.relevance[0, 0]) and short.relevance[1, 0] == 2
    np.testing.assert_array_equal(short.item_fields["passage"], batch.item_fields["passage"][:, :1])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("run.trec", "q1 d9 1\n", "passage 'd9'"),
        ("run.trec", "q9 d1 1\n", "query 'q9'"),
        ("run.trec", "q1 d1 high\n", "no number"),
        ("run.trec", "q1 d1\n", "2 fields in line 1"),
        ("run.trec", "q1 d1 1\nq1 d1 2\n", "twice"),
        ("run.trec", "", "empty"),
        ("corpus.jsonl", '{"_id": "d1"}\n', "line 1 no JSON object"),
        ("queries.tsv", "q1 no tab\n", "no tab"),
        ("queries.tsv", "q1\ta\nq1\tb\n", "again in line 2"),
    ],
)
def test_damaged_passage_files_are_refused_in_a_sentence(tmp_path, name, text, says):
    files = passage_files(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        passage_lists(files)


def test_hashed_words_are_unit_vectors_and_know_shared_words():
    made = hashed_bag(["Red shoe", "shoe, RED", "blue hat", "", None], 64)
    np.testing.assert_allclose(np.linalg.norm(made[:3], axis=1), 1.0, rtol=1e-6)
    assert np.array_equal(made[0], made[1]) and made[0] @ made[2] < 0.5
    assert not made[3].any() and np.isnan(made[4]).all()


def test_ml_100k(real_data):
    folder = real_data / "ml-100k"
    ratings = read_ratings(folder)
    lines = (folder / "ml-100k.inter").read_text().splitlines()[1:]
    assert len(ratings.user) == len(lines) == 100_000 and len(ratings.item_ids) == 1682
    user, item, stars, time = lines[777].split("\t")
    at = (ratings.user[777], ratings.item[777])
    assert (ratings.user_ids[at[0]], ratings.item_ids[at[1]]) == (user, item)
    assert (ratings.rating[777], ratings.time[777]) == (float(stars), int(float(time)))
    table = movielens_segments(ratings)
    test = table.batch(table.rows_of("test"))
    settings = ListMetrics((5,), ("ndcg",))
    ours = evaluate_lists(test.init_rank, test.relevance, settings=settings).means()["ndcg@5"]
    reverse = evaluate_lists(test.init_rank[:, ::-1], test.relevance, settings=settings).means()["ndcg@5"]
    assert len(table) > 10_000 and ours > reverse + 0.05

"""Ranking metrics against a slow textbook loop and scikit-learn, their checks, and the evaluate modules."""

import math
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from sidtune.core.errors import ConfigError, DataError
from sidtune.metrics import hf, ranking
from sidtune.metrics.ranking import DEFAULT_METRICS, Relevance, evaluate_ranking
from sidtune.metrics.registry import BASELINES, METRICS

pytestmark = pytest.mark.medium


def textbook(name: str, row: list[int], gain_of: dict[int, float], k: int) -> float:
    """One request, one metric, by the definitions in any textbook."""
    relevant = {item for item, gain in gain_of.items() if gain > 0}
    top = row[:k]
    hits = [item in relevant for item in top]
    if name == "hr":
        return float(any(hits))
    if name == "recall":
        return sum(hits) / len(relevant)
    if name == "precision":
        return sum(hits) / k
    if name == "mrr":
        return next((1 / rank for rank, hit in enumerate(hits, 1) if hit), 0.0)
    if name == "map":
        total = sum(sum(hits[:rank]) / rank for rank, hit in enumerate(hits, 1) if hit)
        return total / min(k, len(relevant))
    dcg = sum(gain_of.get(item, 0.0) / math.log2(rank + 1) for rank, item in enumerate(top, 1))
    best = sorted(gain_of.values(), reverse=True)[:k]
    return dcg / sum(gain / math.log2(rank + 1) for rank, gain in enumerate(best, 1))


@st.composite
def problems(draw, graded: bool):
    """Rankings with empty places and relevance lists of uneven length."""
    items, places = draw(st.integers(2, 25)), draw(st.integers(1, 12))
    rows, lists, gains = [], [], []
    for _ in range(draw(st.integers(1, 6))):
        order = draw(st.permutations(range(items)))[:places]
        empty = draw(st.lists(st.booleans(), min_size=places, max_size=places))
        row = [item if not gone else -1 for item, gone in zip(order, empty, strict=False)]
        rows.append(row + [-1] * (places - len(row)))
        relevant = draw(st.lists(st.integers(0, items - 1), min_size=1, max_size=items, unique=True))
        lists.append(relevant)
        one = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=len(relevant), max_size=len(relevant)))
        gains.append([1.0, *one[1:]] if graded else [1.0] * len(relevant))
    return rows, lists, gains, draw(st.integers(1, places))


@settings(max_examples=150, deadline=None)
@given(st.one_of(problems(False), problems(True)))
def test_every_metric_equals_the_textbook(problem):
    rows, lists, gains, k = problem
    result = evaluate_ranking(np.array(rows), Relevance.from_lists(lists, gains), ks=[k])
    for name in DEFAULT_METRICS:
        expected = [
            textbook(name, row, dict(zip(r, g, strict=True)), k) for row, r, g in zip(rows, lists, gains, strict=True)
        ]
        np.testing.assert_allclose(result.per_request[f"{name}@{k}"], expected, atol=1e-12, err_msg=name)


def test_block_size_changes_nothing(monkeypatch):
    rng = np.random.default_rng(4)
    rows = np.stack([rng.permutation(12)[:5] for _ in range(30)])
    lists = [rng.choice(12, size=rng.integers(1, 6), replace=False).tolist() for _ in range(30)]
    relevance = Relevance.from_lists(lists, [rng.random(len(one)).tolist() for one in lists])
    whole = evaluate_ranking(rows, relevance, ks=[3, 5])
    monkeypatch.setattr(ranking, "_BLOCK", 1)
    pieces = evaluate_ranking(rows, relevance, ks=[3, 5])
    assert all((whole.per_request[name] == pieces.per_request[name]).all() for name in whole.per_request)


def test_ndcg_equals_sklearn():
    rng = np.random.default_rng(1)
    requests, items, k = 200, 30, 7
    scores = rng.permuted(np.tile(np.arange(items, dtype=float), (requests, 1)), axis=1)
    truth = rng.choice([0.0, 1.0, 2.0, 5.0], size=(requests, items), p=[0.8, 0.1, 0.06, 0.04])
    truth[truth.sum(axis=1) == 0, 0] = 1.0
    lists = [np.flatnonzero(row).tolist() for row in truth]
    relevance = Relevance.from_lists(lists, [truth[n][one].tolist() for n, one in enumerate(lists)])
    ours = evaluate_ranking(np.argsort(-scores, axis=1), relevance, ks=[k], metrics=["ndcg"])
    assert ours.means()[f"ndcg@{k}"] == pytest.approx(ndcg_score(truth, scores, k=k), abs=1e-12)


def test_perfect_worst_and_known_values():
    relevance = Relevance.from_lists([[4, 7, 9], [2]])
    perfect = evaluate_ranking(np.array([[9, 4, 7, 1], [2, 0, 1, 3]]), relevance, ks=[3, 4])
    for name in ("hr", "recall", "ndcg", "mrr", "map"):
        assert perfect.means()[f"{name}@3"] == 1.0 and perfect.means()[f"{name}@4"] == 1.0
    worst = evaluate_ranking(np.array([[0, 1, 2], [-1, -1, -1]]), relevance, ks=[3])
    assert set(worst.means().values()) == {0.0}
    # An empty place keeps its rank: the hit stays at rank 2.
    gap = evaluate_ranking(np.array([[-1, 5]]), Relevance.from_lists([[5]]), ks=[2], metrics=["mrr", "ndcg"])
    assert gap.means() == {"mrr@2": 0.5, "ndcg@2": pytest.approx(1 / math.log2(3))}


def test_excluded_requests_are_counted_and_left_out():
    predictions, relevance = np.array([[1, 2], [3, 4], [2, 1]]), Relevance.from_lists([[1], [], [1]])
    with pytest.raises(DataError, match="1 requests have no relevant item .the first is number 1."):
        evaluate_ranking(predictions, relevance, ks=[2])
    result = evaluate_ranking(predictions, relevance, ks=[2], empty="exclude")
    assert result.excluded == 1 and np.isnan(result.per_request["mrr@2"][1])
    assert result.means()["mrr@2"] == pytest.approx(0.75)
    assert result.values("mrr@2").tolist() == [1.0, 0.5]
    assert result.means(np.array([True, True, False]))["mrr@2"] == 1.0
    with pytest.raises(DataError, match="No request is left"):
        result.means(np.array([False, True, False]))
    with pytest.raises(ConfigError, match="mrr@3"):
        result.values("mrr@3")


ONE = Relevance.from_lists([[1]])


@pytest.mark.parametrize(
    ("predictions", "relevance", "options", "message"),
    [
        ([[1, 1]], ONE, {}, "more than once .the first is row 0."),
        ([[1, -2]], ONE, {}, "item row -2"),
        ([[1.0, 2.0]], ONE, {}, "integer item rows"),
        ([1, 2], ONE, {}, "integer item rows"),
        ([[1, 2], [1, 2]], ONE, {}, "2 prediction rows but relevance for 1"),
        ([[1, 2]], Relevance.from_lists([[1, 1]]), {}, "names an item twice"),
        ([[1, 2]], Relevance.from_lists([[-1]]), {}, "item row -1"),
        ([[1, 2]], Relevance(np.array([0, 2]), np.array([1])), {}, "must rise from 0 to 1"),
        ([[1, 2]], Relevance(np.array([0, 1]), np.array([1]), np.array([np.nan])), {}, "Gains must be finite"),
        ([[1, 2]], ONE, {"ks": [3]}, "2 places, but a metric at 3"),
        ([[1, 2]], ONE, {"ks": [0]}, "positive integers"),
        ([[1, 2]], ONE, {"ks": []}, "positive integers"),
        ([[1, 2]], ONE, {"ks": [True]}, "positive integers"),
        ([[1, 2]], ONE, {"metrics": ["ndgc"]}, "did you mean 'ndcg'"),
        ([[1, 2]], ONE, {"empty": "drop"}, "'refuse' or 'exclude'"),
    ],
)
def test_bad_input_is_one_sentence(predictions, relevance, options, message):
    with pytest.raises((DataError, ConfigError), match=message):
        evaluate_ranking(np.array(predictions), relevance, **{"ks": [2], **options})


@pytest.mark.parametrize(
    ("predictions", "relevance", "options", "message"),
    [
        (None, ONE, {}, "integer item rows, got shape"),
        ([["a", "b"]], ONE, {}, "integer item rows, got shape"),
        ([["a"], ["b", "c"]], ONE, {}, "Predictions must be a list of item row numbers for each request, got"),
        ([[1, 2]], None, {}, "Relevant items must be a list of item row numbers for each request, got None"),
        ([[1, 2]], {"r": [1]}, {}, "Relevant items must be a list"),
        ([[1, 2]], [["a"]], {}, "Relevant items must be a list"),
        ([[1, 2]], [1], {}, "Relevant items must be a list"),
        ([[1, 2]], [[1.5]], {}, "Relevant items must be a list"),
        ([[1, 2]], Relevance(None, None), {}, "relevance for 0 requests"),
        ([[1, 2]], Relevance(np.array([0, 1]), np.array([1]), ["x"]), {}, "Gains must be finite numbers"),
        ([[1, 2]], ONE, {"ks": 2}, "ks must be a list of positive integers such as .*got 2"),
        ([[1, 2]], ONE, {"ks": None}, "ks must be a list"),
        ([[1, 2]], ONE, {"metrics": "ndcg"}, "metrics must be a list of names such as .*got 'ndcg'"),
        ([[1, 2]], ONE, {"metrics": []}, "metrics must be a list"),
    ],
)
def test_a_wrong_type_is_one_sentence(predictions, relevance, options, message):
    with pytest.raises((DataError, ConfigError), match=message):
        evaluate_ranking(predictions, relevance, **{"ks": [2], **options})


def test_lists_are_taken_as_they_come():
    wanted = evaluate_ranking(np.array([[3, 1, -1], [2, 0, 4]]), Relevance.from_lists([[1], [4, 2]]), ks=[3]).means()
    assert evaluate_ranking([[3, 1], (2, 0, 4)], [[1], [4, 2]], ks=(3,)).means() == wanted


def test_two_empty_places_are_no_repeat_and_no_requests_are_an_error():
    assert evaluate_ranking(np.array([[1, -1, -1]]), ONE, ks=[3]).means()["hr@3"] == 1.0
    none = evaluate_ranking(np.zeros((0, 3), dtype=int), Relevance.from_lists([]), ks=[3])
    with pytest.raises(DataError, match="No request is left"):
        none.means()


def test_gains_of_another_shape_are_refused():
    with pytest.raises(DataError, match="one gain for each"):
        Relevance.from_lists([[1, 2]], [[1.0]])


def test_every_registered_name_loads():
    for registry in (METRICS, BASELINES):
        assert all(callable(registry.get(name)) for name in registry)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    # One folder for the whole module: Python keeps the package of dynamic modules it imported first.
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        yield


@pytest.mark.parametrize("name", ["hr", "recall", "ndcg", "mrr", "map"])
def test_evaluate_module_equals_the_ranking_function(name, caches):
    rng = np.random.default_rng(3)
    rows = np.stack([rng.permutation(15)[:6] for _ in range(40)])
    lists = [rng.choice(15, size=rng.integers(1, 4), replace=False).tolist() for _ in range(40)]
    expected = evaluate_ranking(rows, Relevance.from_lists(lists), ks=[5], metrics=[name]).means()
    module = hf.load_metric(name)
    for start in (0, 20):
        module.add_batch(
            predictions=[[f"é|{item}" for item in row] for row in rows[start : start + 20]],
            references=[[f"é|{item}" for item in one] for one in lists[start : start + 20]],
        )
    assert module.compute(k=5) == pytest.approx(expected)


def test_evaluate_module_pads_short_lists_and_refuses_bad_ones(caches):
    module = hf.load_metric("sid_mrr")
    assert module.compute(predictions=[["a"], [], ["b", "a"]], references=[["a"], ["z"], ["a"]], k=10) == {
        "mrr@10": 0.5
    }
    with pytest.raises(DataError, match="more than once"):
        module.compute(predictions=[["a", "a"]], references=[["a"]])
    with pytest.raises(ConfigError, match="did you mean 'sid_ndcg'"):
        hf.load_metric("ndgc")
    with pytest.raises(ConfigError, match="positive integer"):
        hf.score_ids("mrr", [["a"]], [["a"]], k=0)


def test_modules_load_by_path_offline_without_leaving_files_beside_them(tmp_path):
    folder = Path(hf.module_path("ndcg"))
    before = sorted(p for p in folder.parent.rglob("*"))
    code = (
        "import sys, evaluate\n"
        "module = evaluate.load(sys.argv[1])\n"
        "print(module.compute(predictions=[['x', 'y']], references=[['y']], k=2))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert "'ndcg@2': 0.63" in done.stdout, done.stderr
    assert sorted(p for p in folder.parent.rglob("*")) == before

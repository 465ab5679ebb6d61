"""The comparison of LLM4PR with rivals and its own ablations reads a run of the step and adds to it."""

import pytest
from post_rank_sources import rating_rows, recbole
from post_rank_stand_ins import tiny_training

from sidtune.benchmarks import post_rank_rivals
from sidtune.core.config import build
from sidtune.core.folders import read_json
from sidtune.metrics.list_ranking import BEST, RANDOM
from sidtune.recipes.llm4pr import post_rank

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the step with two seeds, and what the comparison made of it."""
    folder = tmp_path_factory.mktemp("rivals")
    segments = {"upstream_share": 0.3, "width": 4, "d_q": 6}
    source = {"kind": "movielens", "path": str(recbole(folder / "r", rating_rows())), "segments": segments}
    values = {"source": source, "training": {**tiny_training(2)[1], "query": "personal"}, "metrics": {"ks": [3, 5]}}
    values |= {"output_dir": str(folder / "run"), "methods": ["greedy"], "seeds": [0, 1], "samples": 100}
    post_rank.main(build(post_rank.Arguments, values, "test"))
    (folder / "README.md").write_text("a\n<!-- results -->\n<!-- /results -->\nb\n")
    words = ["--run", folder / "run", "--output", folder / "more", "--readme", folder / "README.md"]
    words += ["--rivals", "mlp", "prs", "--reranker", '{"epochs": 1}', "--steps_in_words", 1, "--cost_requests", 2]
    return folder, [str(word) for word in words]


@pytest.mark.slow
def test_rivals_and_ablations_stand_beside_the_run_and_change_none_of_its_numbers(run, monkeypatch):
    folder, words = run
    made = post_rank_rivals.main(words)
    rows = {row["name"]: row for row in made["systems"]}
    ablations = list(post_rank_rivals.ABLATIONS)
    assert list(rows) == ["initial", "mlp", "prs", "llm4pr", *ablations, RANDOM, BEST]
    before = read_json(folder / "run" / "metrics.json")
    for row in before["systems"]:
        assert {m: e["value"] for m, e in row["metrics"].items()} == {
            m: e["value"] for m, e in rows[row["name"]]["metrics"].items()
        }
        assert before["each_seed"].get(row["name"]) == made["each_seed"].get(row["name"])
    assert set(made["against"]) == {"initial", "mlp", "prs", *ablations}
    assert "adaptation" in made["told"]["no_aux"][0] and "adaptation" not in made["told"]["ptpr"][0]
    assert "aux_loss" not in made["told"]["no_aux"][0]["post_rank"]
    assert made["told"]["ptpr"][0]["post_rank"]["steps"] == 1
    text = (folder / "README.md").read_text()
    assert text.startswith("a\n") and text.endswith("b\n") and "| ptpr |" in text and "prompt tokens" in text
    # A finished ablation is not trained again.
    monkeypatch.setattr(post_rank, "train_system", lambda *given: pytest.fail("it was trained"))
    again = post_rank_rivals.main(words)
    assert again["systems"] == made["systems"] and again["against"] == made["against"]


def test_an_ablation_changes_only_what_it_names():
    names = {"no_qia": ["adapter"], "no_qia_query": ["adapter"], "no_adaptation": ["adaptation"], "no_aux": ["aux"]}
    names |= {"query_alone": ["query"], "ptpr": ["words", "query"]}  # text has no query vector
    assert {name: [*changes] for name, changes in post_rank_rivals.ABLATIONS.items()} == names

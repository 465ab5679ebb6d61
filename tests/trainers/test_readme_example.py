"""The Python examples of the trainers' README run as they stand there, and the catalogue they make is that of the parts."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_pipeline import SHOP, TINY

from sidtune.core.errors import DataError
from sidtune.data_builders.tables.store import load_folder
from sidtune.decoding.trie import SidTrie
from sidtune.recipes.steps import build_data, init_model, learn_sids
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import Vocabulary
from sidtune.trainers.grpo.rollout_rewards import SidCatalogue
from sidtune.trainers.rewards.gains import LeafFacts


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    place = tmp_path_factory.mktemp("readme")
    runs = place / "runs" / "shop"
    build_data.main(build_data.Arguments(str(runs / "data"), options=SHOP))
    few = {"encoder": {"dims": 16}, "quantizer": {"level_sizes": [8, 8, 8]}}
    learn_sids.main(learn_sids.Arguments(str(runs / "data"), str(runs / "sids"), **few))
    options = {"scratch": TINY, "text_vocab_size": 512}
    init_model.main(init_model.Arguments(str(runs / "data"), str(runs / "sids"), str(runs / "model"), **options))
    return place


def test_the_examples_of_the_readme_train(shop, repo_root, monkeypatch):
    """In their order; the last one begins with what the one before has made."""
    monkeypatch.chdir(shop)
    text = (repo_root / "trainers" / "README.md").read_text("utf-8")
    examples = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert len(examples) == 4 and all(len(code.strip().splitlines()) <= 12 for code in examples)
    names: dict = {}
    cpu = 'max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no",'
    for code in examples:
        exec(code.replace("max_steps=2,", cpu), names)
    assert names["catalogue"].trie.num_leaves > 100


def test_the_example_of_the_models_runs(shop, repo_root, monkeypatch):
    monkeypatch.chdir(shop)
    code = (repo_root / "models" / "README.md").read_text("utf-8").split("```python\n")[1].partition("```")[0]
    names: dict = {}
    exec(code, names)
    assert all(vector.grad.abs().sum() > 0 for vector in names["vectors"].values())


def test_a_catalogue_is_that_of_its_parts(shop):
    runs = shop / "runs" / "shop"
    sids, vocabulary = SemanticIds.from_pretrained(runs / "sids" / "sids"), Vocabulary.from_pretrained(runs / "model")
    facts = LeafFacts.of(load_folder(runs / "data").items, sids)
    found = SidCatalogue.from_semantic_ids(sids, vocabulary, facts)
    assert (found.trie.codes == SidTrie.from_semantic_ids(sids).codes).all()
    assert np.array_equal(found.sid_token_ids, vocabulary.sid_token_ids)
    assert found.popularity_of_leaf is facts.popularity_of_leaf
    assert SidCatalogue.from_semantic_ids(sids, vocabulary).popularity_of_leaf is None
    with pytest.raises(DataError, match="do not belong together"):
        SidCatalogue.from_semantic_ids(sids.replaced(codes=sids.codes[::-1]), vocabulary)

"""The Python examples of the trainers' README run as they stand there, and the catalogue they make is that of the parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_pipeline import SHOP, TINY
from trl import SFTConfig

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.tables.store import load_folder
from sidtune.decoding.retrieval.evaluator import Evaluator
from sidtune.decoding.retrieval.loading import prompts_of
from sidtune.decoding.retrieval.model_folder import ModelFolder
from sidtune.decoding.retrieval.retriever import SidRetriever
from sidtune.decoding.trie import SidTrie
from sidtune.recipes.steps import build_data, init_model, learn_sids
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import Vocabulary
from sidtune.trainers.common.evaluation import EvaluateItems
from sidtune.trainers.grpo.rollout_rewards import SidCatalogue
from sidtune.trainers.rewards.gains import LeafFacts
from sidtune.trainers.sft.trainer import SidSFTTrainer


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
    assert len(examples) == 5 and all(len(code.strip().splitlines()) <= 12 for code in examples)
    names: dict = {}
    cpu = 'max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no",'
    for code in examples:
        exec(code.replace("max_steps=2,", cpu), names)
    assert names["catalogue"].trie.num_leaves > 100
    logs = [one for one in names["trainer"].state.log_history if "items_ndcg@10" in one]
    assert [one["step"] for one in logs] == [1, 2] and all(0 <= one["items_recall@10"] <= 1 for one in logs)


def test_the_example_of_the_impressions_runs(shop, repo_root, monkeypatch):
    monkeypatch.chdir(shop)
    text = (repo_root / "data_builders" / "README.md").read_text("utf-8")
    names: dict = {}
    for part in ("## Impressions", "## The market"):
        exec(text.partition(part)[2].split("```python\n")[1].partition("```")[0], names)
    assert len(names["batch"]["label_click"]) == 1024 and names["lists"].shape == (100, 10)


def test_the_example_of_the_tokenizers_gives_the_folder_of_the_step(shop, repo_root, monkeypatch, tmp_path):
    monkeypatch.chdir(shop)
    code = (repo_root / "tokenizers" / "README.md").read_text("utf-8").split("```python\n")[1].partition("```")[0]
    names: dict = {}
    exec(code, names)
    step, learned = shop / "runs" / "shop" / "sids", shop / "runs" / "shop" / "learned"
    files = sorted(file.relative_to(learned) for file in learned.rglob("*") if file.is_file())
    assert {"sids", "encoder", "quantizer"} <= {file.parts[0] for file in files} and len(files) > 6
    assert all((step / file).read_bytes() == (learned / file).read_bytes() for file in files)


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


def test_evaluation_on_the_way_measures_the_model_and_changes_nothing(shop, tmp_path):
    folder, data = str(shop / "runs" / "shop" / "model"), load_folder(shop / "runs" / "shop" / "data")
    rows = [{"prompt": f"query: lamp {n}\nitem:", "completion": f" <a_{n % 8}><b_0><c_1>"} for n in range(32)]
    evaluator = Evaluator(data, split="valid", max_requests=15, ks=(5, 10), num_beams=10)
    ends, logs = [], []
    for every in (None, 2):
        quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "learning_rate": 1e-2}
        args = SFTConfig(str(tmp_path / str(every)), max_steps=3, per_device_train_batch_size=8, **quiet)
        trainer = SidSFTTrainer(folder, args, Dataset.from_list(rows))
        if every:
            trainer.add_callback(EvaluateItems(trainer, evaluator, folder, every=every))
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        logs.append([one for one in trainer.state.log_history if "items_ndcg@10" in one])
    assert torch.equal(*ends) and logs[0] == [] and [one["step"] for one in logs[1]] == [2, 3]
    assert trainer.model.training
    # By hand: the lists of the retriever, and NDCG of each from its definition.
    opened = ModelFolder.open(folder, None, data)
    parts = (opened.tokenizer, opened.vocabulary, opened.sids, opened.serializer, opened.settings)
    retriever = SidRetriever(trainer.model, *parts)
    lists, _ = retriever.rank(prompts_of(retriever, data, evaluator.requests), 10, 10)
    wanted = []
    for row in range(15):
        relevant = set(evaluator.relevance.rows[slice(*evaluator.relevance.offsets[row : row + 2])].tolist())
        gain = sum(1 / np.log2(k + 2) for k, item in enumerate(lists[row].tolist()) if item in relevant)
        wanted.append(gain / sum(1 / np.log2(k + 2) for k in range(min(10, len(relevant)))))
    assert logs[1][-1]["items_ndcg@10"] == pytest.approx(np.mean(wanted), abs=1e-9)
    with pytest.raises(ConfigError, match="metrics among"):
        EvaluateItems(trainer, evaluator, folder, metrics=["ndcg@7"])

"""Runs, models and bundles that the flat rooms wrote (commit faf94e2) load after the move, and say what they said.

`support/saved_before_the_move.zip` was written with that tree: the steps of `pipeline.yaml`, every quantizer, encoders,
next-item networks (`next_item.yaml`), and what they answered then.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from sidtune import PostRanker, SidRetriever, load_model
from sidtune.core.config import parse
from sidtune.core.pipeline import RunArguments, is_done, resolve
from sidtune.decoding.retrieval.loading import load_retriever
from sidtune.recipes.next_item import train
from sidtune.recipes.steps import report
from sidtune.tokenizers.encoders.base import load_encoder
from sidtune.tokenizers.quantizers.base import load_quantizer
from sidtune.tokenizers.registry import QUANTIZERS


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with zipfile.ZipFile(Path(__file__).parents[1] / "support" / "saved_before_the_move.zip") as archive:
        archive.extractall(folder)
    return folder


def test_every_finished_step_counts_as_done(saved):
    """Script names of old pipelines are understood, and configs and fingerprints compare as before."""
    values = yaml.safe_load((saved / "pipeline.yaml").read_text("utf-8"))
    steps = resolve(RunArguments(steps=values["steps"], output_dir=str(saved / "run")))
    assert [(step.name, is_done(step)) for step in steps] == [(step["name"], True) for step in values["steps"]]


def test_the_bundle_answers_as_it_did(saved):
    answers = json.loads((saved / "answers.json").read_text("utf-8"))
    for retriever in (
        SidRetriever.from_pretrained(saved / "run" / "bundle"),
        load_retriever(saved / "run" / "grpo", saved / "run" / "sids"),
    ):
        for query, expected in answers.items():
            hits = retriever.search(query=query, k=5)
            assert [hit.item_id for hit in hits] == [item for item, _ in expected]
            assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_every_stage_is_a_model(saved):
    for stage in ("stage_1_align", "stage_2_personalise", "stage_3_adapt"):
        assert sum(weight.numel() for weight in load_model(saved / "run" / "sft" / stage).parameters()) > 1000


def test_quantizers_and_encoders_say_the_same(saved, monkeypatch):
    monkeypatch.chdir(saved)  # an encoder names the folder of its model
    data = load_file(saved / "quantizers.safetensors")
    cases = sorted(path.name for path in (saved / "quantizers").iterdir())
    made = {name: load_quantizer(saved / "quantizers" / name) for name in cases}
    assert {type(quantizer) for quantizer in made.values()} == {QUANTIZERS.get(name) for name in QUANTIZERS}
    for name, quantizer in made.items():
        np.testing.assert_array_equal(quantizer.encode(data["vectors"]), data[f"codes/{name}"])
    vectors, texts = load_file(saved / "encoders.safetensors"), json.loads((saved / "texts.json").read_text("utf-8"))
    for name in ("tfidf_svd", "transformers"):
        encoder = load_encoder(saved / "encoders" / name)
        np.testing.assert_allclose(encoder.encode(texts), vectors[name], atol=1e-5)


def test_the_post_ranker_loads(saved):
    assert PostRanker.from_pretrained(saved / "run" / "post_rank" / "seed_0" / "llm4pr" / "model") is not None


def test_the_report_is_made_from_old_folders(saved, tmp_path):
    folders = {
        name: str(saved / "run" / name.removesuffix("_dir"))
        for name in ("data_dir", "sids_dir", "eval_dir", "grpo_dir")
    }
    report.main(report.Arguments(**folders, model_dir=str(saved / "run" / "sft"), output_dir=str(tmp_path / "report")))
    assert (tmp_path / "report" / "report.html").stat().st_size > 50_000


def test_finished_next_item_models_are_kept(saved, monkeypatch):
    """The same command trains nothing and writes the same figures."""
    monkeypatch.chdir(saved)
    before = json.loads((saved / "next_item" / "results.json").read_text("utf-8"))
    stamps = {p: p.stat().st_mtime_ns for p in (saved / "next_item").rglob("*.safetensors")}
    train.main(parse(train.Arguments, ["--config", "next_item.yaml"]))
    after = json.loads((saved / "next_item" / "results.json").read_text("utf-8"))
    assert after["systems"] == before["systems"] and len(after["systems"]) == 8
    assert stamps == {p: p.stat().st_mtime_ns for p in (saved / "next_item").rglob("*.safetensors")}

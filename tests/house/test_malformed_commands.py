"""Malformed input through the commands a person types: one clear sentence on stderr, exit code 2, nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from commands import refused
from data_folders import sound_rows, write_jsonl, write_parquet
from malformed_tables import CONTENTS, FILES, TYPES
from tiny_pipeline import TINY, pipeline, run_in_process

from sidtune.core.config import parse
from sidtune.recipes.steps import build_data, evaluate, init_model, learn_sids, publish, report, sft

pytestmark = pytest.mark.medium

SPLIT = ["--split.kind", "global_time", "--split.test_share", "0.2"]


@pytest.mark.parametrize("name", [*CONTENTS, *TYPES])
def test_bad_tables_end_build_data(name, tmp_path, capsys):
    change, place, fix = (CONTENTS | TYPES)[name]
    source = write_jsonl(tmp_path / "in", change(sound_rows()))
    text = refused(
        build_data,
        ["--reader", "sidtune", "--path", source, "--output_dir", tmp_path / "out", *SPLIT],
        capsys,
        tmp_path,
    )
    assert place in text and fix in text


@pytest.mark.parametrize("name", FILES)
def test_bad_files_end_build_data(name, tmp_path, capsys):
    kind, damage, place, fix = FILES[name]
    source = (write_jsonl if kind == "jsonl" else write_parquet)(tmp_path / "in", sound_rows())
    damage(source)
    text = refused(
        build_data,
        ["--reader", "sidtune", "--path", source, "--output_dir", tmp_path / "out", *SPLIT],
        capsys,
        tmp_path,
    )
    assert place in text and fix in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--reader", "amazon_sids"], "did you mean 'amazon_sid'?"),
        (["--options.n_itmes", "10"], "did you mean 'n_items'?"),
        (["--options.n_items", "many"], "n_items"),
        (["--options.n_items", "-3"], "n_items"),
        (["--split.kind", "random"], "random"),
        (["--split.test_share", "2"], "test_share"),
        (["--split.tset_share", "0.1"], "did you mean 'test_share'?"),
        (["--reader", "letter", "--path", "/nowhere/at/all"], "does not exist"),
        (["--reader", "letter", "--path", "$NO_SUCH_VARIABLE/x"], "environment variable that is not set"),
        (["--redaer", "letter"], "did you mean 'reader'?"),
    ],
)
def test_bad_options_of_build_data(options, words, tmp_path, capsys):
    text = refused(build_data, ["--output_dir", tmp_path / "out", *options], capsys, tmp_path)
    assert words in text, text


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Data, SIDs and start model of the tiny pipeline."""
    return run_in_process(pipeline(), tmp_path_factory.mktemp("shop"), until="model")


def inputs(folder: Path, *names: str) -> list[str]:
    where = {"data_dir": "data", "sids_dir": "sids", "model_dir": "model", "eval_dir": "eval"}
    return [word for name in names for word in (f"--{name}", str(folder / where[name]))]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--encoder.name", "tfidf"], "did you mean 'tfidf_svd'?"),
        (["--encoder.dimz", "3"], "did you mean 'dims'?"),
        (["--encoder.dims", "0"], "dims"),
        (["--quantizer.name", "residual_kmean"], "residual_kmeans"),
        (["--quantizer.level_sizes", "[]"], "level"),
        (["--quantizer.level_sizes", "[8, -1]"], "level"),
        (["--data_dir", "nothing/here"], "does not exist"),
    ],
)
def test_bad_options_of_learn_sids(shop, options, words, tmp_path, capsys):
    text = refused(
        learn_sids, [*inputs(shop, "data_dir"), "--output_dir", tmp_path / "out", *options], capsys, tmp_path
    )
    assert words in text, text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--init", "codebok"], "codebook"),
        (["--scratch", json.dumps({**TINY, "hiden_size": 3})], "did you mean 'hidden_size'?"),
        (["--scratch", json.dumps({"model_type": "qwen99"})], "model_type"),
        (["--scratch", json.dumps({**TINY, "hidden_size": "wide"})], "hidden_size"),
        (["--base", "/nowhere/at/all"], "does not exist"),
        (["--text_vocab_size", "12"], "vocab"),
        (["--pad_to_multiple_of", "0"], "pad_to_multiple_of"),
        (["--sids_dir", "nothing/here"], "nothing/here"),
    ],
)
def test_bad_options_of_init_model(shop, options, words, tmp_path, capsys):
    argv = [*inputs(shop, "data_dir", "sids_dir"), "--scratch", json.dumps(TINY), "--text_vocab_size", "512"]
    text = refused(init_model, [*argv, "--output_dir", tmp_path / "out", *options], capsys, tmp_path)
    assert words in text, text


STAGE = {"name": "one", "tasks": {"item_to_sid": {}}, "args": {"max_steps": 1}}


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "stage"),
        ([{**STAGE, "tasks": {}}], "names no tasks"),
        ([{**STAGE, "tasks": {"item_to_sids": {}}}], "did you mean 'item_to_sid'?"),
        ([{**STAGE, "train": "everything"}], "'rows', 'lora', 'all'"),
        ([{**STAGE, "args": {"lr": 1}}], "unknown key 'lr'"),
        ([{**STAGE, "args": {"learning_rate": "fast"}}], "learning_rate"),
        ([{**STAGE, "tasks": {"item_to_sid": {"weight": 0}}}], "weight must be a number above 0"),
        ([{**STAGE, "tasks": {"item_to_sid": {"limt": 4}}}], "did you mean 'limit'?"),
        ([STAGE, STAGE], "is taken"),
        ([{**STAGE, "max_length": -1}], "max_length"),
        ([{**STAGE, "name": "Has Spaces"}], "lower-case"),
    ],
)
def test_bad_stages(shop, stages, words, tmp_path, capsys):
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump({"stages": stages}), "utf-8")
    argv = ["--config", file, *inputs(shop, "data_dir", "sids_dir", "model_dir"), "--output_dir", tmp_path / "out"]
    text = refused(sft, argv, capsys, tmp_path)
    assert words in text, text


def test_a_broken_template_names_file_and_line(shop, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "turn.jinja").write_text("{{ qeury }}", "utf-8")
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump({"stages": [STAGE], "templates": str(tmp_path / "mine")}), "utf-8")
    argv = ["--config", file, *inputs(shop, "data_dir", "sids_dir", "model_dir"), "--output_dir", tmp_path / "out"]
    text = refused(sft, argv, capsys, tmp_path)
    assert "turn.jinja" in text and "did you mean 'query'?" in text and "line 1" in text


def test_models_and_sids_that_do_not_belong_together(shop, tmp_path, capsys):
    other = tmp_path / "other"
    argv = [
        *inputs(shop, "data_dir"),
        "--output_dir",
        other,
        "--quantizer.level_sizes",
        "[4, 4]",
        "--encoder.dims",
        "8",
    ]
    learn_sids.main(parse(learn_sids.Arguments, [str(word) for word in argv]))
    words = ["--sids_dir", other, "--output_dir", tmp_path / "out", "--num_beams", "10", "--ks", "[10]"]
    text = refused(evaluate, [*inputs(shop, "data_dir", "model_dir"), *words], capsys, tmp_path)
    assert "[8, 8, 8]" in text and "[4, 4]" in text and str(shop / "model") in text and str(other) in text


def test_damaged_model_folders(shop, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(shop / "model", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    argv = [*inputs(shop, "data_dir", "sids_dir"), "--model_dir", model, "--output_dir", tmp_path / "out"]
    assert str(model) in refused(evaluate, argv, capsys, tmp_path)
    (model / "sid_vocabulary.json").write_text("{", "utf-8")
    assert "sid_vocabulary.json" in refused(evaluate, argv, capsys, tmp_path)
    (model / "config.json").unlink()
    assert "holds no model" in refused(evaluate, argv, capsys, tmp_path)


def test_missing_earlier_steps_are_named(shop, tmp_path, capsys):
    argv = [
        *inputs(shop, "data_dir", "sids_dir", "model_dir"),
        "--eval_dir",
        tmp_path / "eval",
        "--output_dir",
        tmp_path / "out",
    ]
    assert "does not exist" in refused(report, argv, capsys, tmp_path)
    assert "does not exist" in refused(publish, argv, capsys, tmp_path)
    assert "hub_model_id is missing" in refused(publish, [*argv, "--push_to_hub", "true"], capsys, tmp_path)

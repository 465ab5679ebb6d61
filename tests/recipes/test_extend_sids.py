"""The commands: learn_sids with a treatment of collisions, extend_sids on what it wrote, and everything it must refuse."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from commands import refused
from safetensors.numpy import load_file, save_file
from tiny_pipeline import SHOP, TINY

from sidtune.core import pipeline as run
from sidtune.core.config import parse
from sidtune.core.errors import ConfigError
from sidtune.core.folders import fingerprint, read_json
from sidtune.data_builders.tables.store import load_folder
from sidtune.decoding.retrieval.loading import load_retriever
from sidtune.decoding.trie import SidTrie
from sidtune.recipes.steps import build_data, extend_sids, init_model, learn_sids
from sidtune.tokenizers.encoders.base import load_encoder
from sidtune.tokenizers.quantizers.base import load_quantizer
from sidtune.tokenizers.sids.learned import texts_of
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

LEARN = {"encoder": {"dims": 16}, "quantizer": {"level_sizes": [8, 8, 8]}}


def learn(data: Path, output: Path, **options) -> Path:
    learn_sids.main(learn_sids.Arguments(str(data), str(output), **{**LEARN, **options}))
    return output


def extend(sids: Path, data: Path, output: Path, **options) -> Path:
    extend_sids.main(extend_sids.Arguments(str(sids), str(data), str(output), **options))
    return output


def only(source: Path, target: Path, rows: np.ndarray) -> Path:
    """The data folder with some of its items, in the order of `rows`."""
    shutil.copytree(source, target)
    pq.write_table(load_folder(source).items.take(rows), target / "items.parquet")
    return target


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Data of 150 items, SIDs of 120 of them, the others as a folder of their own, and the extended SIDs."""
    folder = tmp_path_factory.mktemp("shop")
    build_data.main(build_data.Arguments(str(folder / "data"), options=SHOP))
    learn(folder / "data", folder / "sids", learn_share=0.8)
    known = set(SemanticIds.from_pretrained(folder / "sids" / "sids").item_ids)
    ids = load_folder(folder / "data").items["item_id"].to_pylist()
    only(folder / "data", folder / "new", np.array([row for row, i in enumerate(ids) if i not in known]))
    extend(folder / "sids", folder / "data", folder / "extended", existing="skip")
    return folder


def test_the_extended_folder_is_the_catalogue_under_the_frozen_codebooks(shop):
    before = SemanticIds.from_pretrained(shop / "sids" / "sids")
    after = SemanticIds.from_pretrained(shop / "extended" / "sids")
    items = load_folder(shop / "data").items
    assert len(before) == 120 and after.item_ids == items["item_id"].to_pylist()
    encoder, quantizer = load_encoder(shop / "sids" / "encoder"), load_quantizer(shop / "sids" / "quantizer")
    vectors = encoder.encode(texts_of(items), after.item_ids)
    np.testing.assert_array_equal(after.codes, quantizer.encode(vectors))
    np.testing.assert_allclose(load_file(shop / "extended" / "vectors.safetensors")["vectors"], vectors, atol=1e-6)
    assert {i: after.text(i) for i in before.item_ids} == before.texts() and after.tokens() == before.tokens()
    for name in ("encoder", "quantizer"):
        assert fingerprint(shop / "sids" / name) == fingerprint(shop / "extended" / name)
    batch = load_file(shop / "extended" / "batches.safetensors")["batch"]
    assert batch.tolist() == [int(i not in before) for i in after.item_ids]
    trie, whole = SidTrie.from_pretrained(shop / "extended" / "trie"), SidTrie.from_semantic_ids(after)
    assert (trie.codes == whole.codes).all() and trie.token_ids is None
    drift, record = read_json(shop / "extended" / "drift.json"), read_json(shop / "extended" / "run.json")
    assert (drift["learned"]["items"], drift["added"]["items"], drift["new_items"]) == (120, 30, 30)
    assert drift["recommendation"] and drift["reference"] == "held_out" and record["metrics"]["drift"] == drift
    assert set(record["inputs"]) == {"sids_dir", "data_dir"}


def test_new_items_alone_are_appended_and_a_second_extension_remembers_what_was_learned(shop, tmp_path):
    first = only(shop / "new", tmp_path / "one", np.arange(10))
    second = only(shop / "new", tmp_path / "two", np.arange(10, 30))
    extend(shop / "sids", first, tmp_path / "a")
    extend(tmp_path / "a", second, tmp_path / "b")
    whole = SemanticIds.from_pretrained(shop / "extended" / "sids")
    made = SemanticIds.from_pretrained(tmp_path / "b" / "sids")
    assert made.texts() == whole.texts() and made.item_ids != whole.item_ids
    assert made.item_ids[:120] == SemanticIds.from_pretrained(shop / "sids" / "sids").item_ids
    assert np.bincount(load_file(tmp_path / "b" / "batches.safetensors")["batch"]).tolist() == [120, 10, 20]
    drift, other = read_json(tmp_path / "b" / "drift.json"), read_json(shop / "extended" / "drift.json")
    assert (drift["learned"]["items"], drift["added"]["items"], drift["new_items"]) == (120, 30, 20)
    assert drift["held_out_mse"] == other["held_out_mse"] > drift["learned"]["mse"]  # of the learned items alone
    assert drift["reference"] == "held_out" and drift["added"]["icr"] == other["added"]["icr"]
    without = extend(tmp_path / "a", second, tmp_path / "c", held_out_share=0.0)
    assert read_json(without / "drift.json")["reference"] == "learned"


@pytest.mark.parametrize(
    "spec", [{"name": "suffix", "size": 40}, {"name": "next_nearest"}, {"name": "capacity", "capacity": 2}]
)
def test_new_items_are_treated_as_the_old_ones_were(shop, tmp_path, spec):
    learn(shop / "data", tmp_path / "sids", learn_share=0.8, collisions=spec, quantizer={"level_sizes": [4, 4, 8]})
    record = read_json(tmp_path / "sids" / "collisions.json")
    assert record["method"] == spec and record["cost"]["method"] == spec["name"] and record["compared"] == []
    extend(tmp_path / "sids", shop / "new", tmp_path / "extended", held_out_share=0.0)
    before, after = (SemanticIds.from_pretrained(tmp_path / name / "sids") for name in ("sids", "extended"))
    np.testing.assert_array_equal(after.codes[:120], before.codes)
    assert read_json(tmp_path / "extended" / "collisions.json")["method"].items() >= spec.items()
    plain = extend(tmp_path / "sids", shop / "new", tmp_path / "plain", held_out_share=0.0, collisions={"name": "expand"}) \
        if spec["name"] != "suffix" else None  # fmt: skip
    if plain is None:
        assert after.collisions().codes == 150 and after.level_sizes == (4, 4, 8, 40)
    else:
        assert after.collisions().codes > SemanticIds.from_pretrained(plain / "sids").collisions().codes


def test_learn_sids_measures_every_treatment_and_takes_suffix_as_a_short_form(shop, tmp_path, capsys):
    learn(shop / "data", tmp_path / "a", suffix=True, compare_collisions=True)
    learn(shop / "data", tmp_path / "b", collisions={"name": "suffix"})
    learn(shop / "data", tmp_path / "c")
    a, b, c = (SemanticIds.from_pretrained(tmp_path / name / "sids") for name in "abc")
    assert (
        a.texts() == b.texts()
        and a.suffix_level
        and c.texts() == {i: t.rsplit("<", 1)[0] for i, t in a.texts().items()}
    )
    record = read_json(tmp_path / "a" / "collisions.json")
    assert [record["cost"]["method"], *(cost["method"] for cost in record["compared"])] == [
        "suffix", "expand", "next_nearest", "capacity",
    ]  # fmt: skip
    assert "| next_nearest |" in capsys.readouterr().out
    assert len(read_json(tmp_path / "a" / "quality.json")["levels"]) == 4
    with pytest.raises(ConfigError, match="not both"):
        learn(shop / "data", tmp_path / "d", suffix=True, collisions={"name": "expand"})
    with pytest.raises(ConfigError, match="learn_share"):
        learn(shop / "data", tmp_path / "d", learn_share=0.0)


def test_a_model_of_the_old_sids_finds_new_items_without_a_change(shop, tmp_path):
    options = {"scratch": TINY, "text_vocab_size": 400}
    init_model.main(init_model.Arguments(str(shop / "data"), str(shop / "sids"), str(tmp_path / "model"), **options))
    before = fingerprint(tmp_path / "model")
    extend(shop / "sids", shop / "new", tmp_path / "bound", model_dir=str(tmp_path / "model"), held_out_share=0.0)
    retriever = load_retriever(tmp_path / "model", tmp_path / "bound")
    trie = SidTrie.from_pretrained(tmp_path / "bound" / "trie")
    assert trie.token_ids.tolist() == retriever.vocabulary.sid_token_ids.tolist()
    beams = retriever.beams([["query: lamp\n"]], retriever.trie.num_leaves, 1)
    found = set(map(tuple, retriever.trie.leaf_codes(beams.leaves[0]).tolist()))
    assert found == set(map(tuple, retriever.sids.codes.tolist())) and len(retriever.sids) == 150
    assert fingerprint(tmp_path / "model") == before
    other = learn(shop / "data", tmp_path / "other", quantizer={"level_sizes": [4, 4]}, learn_share=0.8)
    with pytest.raises(Exception, match=r"vocabulary has levels of \[8, 8, 8\] codes, the semantic IDs of \[4, 4\]"):
        extend(other, shop / "new", tmp_path / "x", model_dir=str(tmp_path / "model"))


def words_of(shop: Path, tmp_path: Path, **paths: Path) -> list[str]:
    chosen = {"sids_dir": shop / "sids", "data_dir": shop / "new", "output_dir": tmp_path / "out", **paths}
    return [word for name, path in chosen.items() for word in (f"--{name}", str(path))]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data_dir": "data"}, "120 of 150 items in"),
        ({"data_dir": "nothing"}, "does not exist"),
        ({"sids_dir": "nothing"}, "does not exist"),
        ({"sids_dir": "data"}, "does not exist"),
        ({"output_dir": "sids"}, "output_dir is sids_dir"),
        (["--existing", "replace"], "'refuse', 'skip'"),
        (["--encoder.dims", "8"], "leave 'encoder' out"),
        (["--encoder", "{name: precomputed, path: x.npy}"], "trained on vectors of the encoder 'tfidf_svd'"),
        (["--collisions.name", "sufix"], "did you mean 'suffix'?"),
        (["--collisions.name", "suffix"], "a model was trained on"),
        (["--collisions", "{name: capacity, capasity: 2}"], "did you mean 'capacity'?"),
        (["--limits.max_icr_dropp", "0.1"], "did you mean 'max_icr_drop'?"),
        (["--limits.max_icr_drop", "-1"], "max_icr_drop must be"),
        (["--held_out_share", "1.0"], "held_out_share"),
        (["--model_dir", "nothing/here"], "nothing/here"),
    ],
)
def test_bad_options_of_extend_sids(shop, options, words, tmp_path, capsys):
    paths = {name: shop / place for name, place in options.items()} if isinstance(options, dict) else {}
    argv = words_of(shop, tmp_path, **paths) + ([] if paths else options)
    assert words in refused(extend_sids, argv, capsys, tmp_path)


def test_another_encoder_or_a_damaged_folder_is_refused(shop, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(shop / "sids", copy)
    encoder = load_encoder(copy / "encoder")
    texts = texts_of(load_folder(shop / "data").items)

    def check(words: str, data: str = "data") -> None:
        argv = words_of(shop, tmp_path, sids_dir=copy, data_dir=shop / data)
        assert words in refused(extend_sids, [*argv, "--existing", "skip"], capsys, tmp_path)

    # Same kind, same width, but fitted on other texts.
    type(encoder)(encoder.config).fit([" ".join(reversed(text.split()[:3])) for text in texts]).save_pretrained(
        copy / "encoder"
    )
    check("another encoder")
    narrow = dataclasses.replace(encoder.config, dims=8)
    type(encoder)(narrow).fit(texts).save_pretrained(copy / "encoder")
    check("8 dimensions, the codebooks were trained on 16")
    check("8 dimensions, but the codebooks were trained on 16", data="new")  # nothing known in it to compare
    shutil.rmtree(copy)
    shutil.copytree(shop / "sids", copy)
    save_file({"vectors": np.zeros((7, 16), np.float32)}, copy / "vectors.safetensors")
    check("not those of its 120 items")
    (copy / "vectors.safetensors").unlink()
    check("vectors.safetensors does not exist")


def test_all_items_known_is_nothing_to_add(shop, tmp_path, capsys):
    argv = words_of(shop, tmp_path, sids_dir=shop / "extended", data_dir=shop / "data")
    assert "nothing to add" in refused(extend_sids, [*argv, "--existing", "skip"], capsys, tmp_path)


def test_sids_of_precomputed_vectors_take_a_file_of_new_ones(shop, tmp_path, capsys):
    draw = np.random.default_rng(0)
    ids = load_folder(shop / "data").items["item_id"].to_pylist()
    vectors = draw.normal(size=(150, 5)).astype(np.float32)

    def write(name: str, rows: list[int], values: np.ndarray = vectors) -> dict:
        np.save(tmp_path / f"{name}.npy", values[rows])
        (tmp_path / f"{name}.txt").write_text("\n".join(ids[row] for row in rows), "utf-8")
        paths = {"path": str(tmp_path / f"{name}.npy"), "ids_path": str(tmp_path / f"{name}.txt")}
        return {"name": "precomputed", "align": "ids", **paths}

    first = write("first", list(range(150)))
    sids = learn(shop / "data", tmp_path / "sids", encoder=first, learn_share=0.8)
    known = SemanticIds.from_pretrained(sids / "sids")
    new = [row for row, item_id in enumerate(ids) if item_id not in known]
    old = [row for row, item_id in enumerate(ids) if item_id in known]
    options = {"existing": "skip", "held_out_share": 0.0}
    made = extend(sids, shop / "data", tmp_path / "a", encoder=write("new", new), **options)
    after = SemanticIds.from_pretrained(made / "sids")
    np.testing.assert_array_equal(after.codes, load_quantizer(sids / "quantizer").encode(vectors))
    extend(sids, shop / "data", tmp_path / "b", encoder=write("some", new + old[:20]), **options)

    argv = [*words_of(shop, tmp_path, sids_dir=sids, data_dir=shop / "data"), "--existing", "skip"]
    wrong = write("wrong", new + old[:20], vectors @ np.linalg.qr(draw.normal(size=(5, 5)))[0].astype(np.float32))
    assert "20 of 20 items" in refused(extend_sids, [*argv, "--encoder", yaml.safe_dump(wrong)], capsys, tmp_path)
    short = write("short", new[1:])
    assert f"no precomputed vector (first: '{ids[new[0]]}')" in refused(
        extend_sids, [*argv, "--encoder", yaml.safe_dump(short)], capsys, tmp_path
    )
    assert "'normalize' out" in refused(
        extend_sids, [*argv, "--encoder", yaml.safe_dump({**first, "normalize": True})], capsys, tmp_path
    )


def test_the_quickstart_example_is_a_valid_pipeline(repo_root, tmp_path):
    file = repo_root / "recipes" / "quickstart" / "extend_sids.yaml"
    values = yaml.safe_load(file.read_text("utf-8")) | {"output_dir": str(tmp_path)}
    steps = run.resolve(run.RunArguments(**values, root=str(file.parent)))
    assert [step.module.rpartition(".")[2] for step in steps] == ["build_data", "learn_sids", "extend_sids"]
    assert steps[2].config.existing == "skip" and steps[1].config.learn_share == 0.8
    words = run.launch_command(steps[2].script, {"num_processes": 8}, [])
    assert "accelerate.commands.launch" not in words
    assert (
        parse(extend_sids.Arguments, ["--sids_dir", "a", "--data_dir", "b", "--output_dir", "c"]).existing == "refuse"
    )

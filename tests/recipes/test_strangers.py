"""What does not belong together is refused by every step that joins it; a model folder is complete by itself."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_pipeline import SHOP, pipeline, run_in_process

from sidtune import SidRetriever
from sidtune.core.errors import DataError
from sidtune.core.folders import read_json, write_json
from sidtune.data_builders.tables.store import load_folder
from sidtune.decoding.retrieval.loading import ModelFolder, final_model, load_retriever, prompts_of
from sidtune.decoding.serving.generator_source import GeneratorSource
from sidtune.recipes.crs import reason, trajectories
from sidtune.recipes.steps import (
    build_data,
    evaluate,
    export_engine,
    extend_sids,
    grpo,
    init_model,
    learn_sids,
    publish,
    report,
    retrieve,
    serve,
    sft,
)  # fmt: skip
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import Vocabulary

pytestmark = pytest.mark.medium

ALONE = {"num_beams": 10, "ks": [5, 10], "samples": 100, "baselines": ["popularity"], "max_requests": 10}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Data to evaluation; `codes` are SIDs learned again, `sizes` SIDs of other levels, `items` and `more` other shops."""
    values, folder = pipeline(), tmp_path_factory.mktemp("strangers")
    steps = {step["name"]: step for step in values["steps"]}
    steps["sft"]["args"] |= {"templates": "compact", "prompt_max_history": 3, "max_chars": {"query": 9}}
    for stage in steps["sft"]["args"]["stages"]:
        stage["args"]["max_steps"] = 2
    steps["eval"]["args"] |= {"max_requests": 30}
    run_in_process(values, folder, until="eval")
    encoder, quantizer = (steps["sids"]["args"][name] for name in ("encoder", "quantizer"))
    for name, options in (("codes", {"seed": 9}), ("sizes", {"quantizer": {**quantizer, "level_sizes": [8, 8]}})):
        learn_sids.main(
            learn_sids.Arguments(
                str(folder / "data"), str(folder / name), **{"encoder": encoder, "quantizer": quantizer, **options}
            )
        )
    for name, options in (("items", {"seed": 5}), ("more", {"n_items": 170})):
        made = build_data.Arguments(output_dir=str(folder / name), reader="shop_world", options={**SHOP, **options})
        build_data.main(made)
    return folder


def evaluated(data_dir, sids_dir, model_dir, output_dir):
    evaluate.main(evaluate.Arguments(data_dir, sids_dir, model_dir, output_dir, **ALONE))


def compared(data_dir, sids_dir, model_dir, output_dir):
    evaluate.main(evaluate.Arguments(data_dir, sids_dir, model_dir, output_dir, start_dir=model_dir, **ALONE))


def published(data_dir, sids_dir, model_dir, output_dir):
    eval_dir = str(Path(model_dir).parent / "eval")
    publish.main(publish.Arguments(data_dir, sids_dir, model_dir, eval_dir, output_dir))


def reported(data_dir, sids_dir, model_dir, output_dir):
    eval_dir = str(Path(model_dir).parent / "eval")
    report.main(report.Arguments(data_dir, sids_dir, model_dir, eval_dir, output_dir))


def served(data_dir, sids_dir, model_dir, output_dir):
    serve.make_server(serve.Arguments(model_dir, sids_dir))


def retrieved(data_dir, sids_dir, model_dir, output_dir):
    retrieve.main(retrieve.Arguments(model_dir, output_dir, data_dir=data_dir, sids_dir=sids_dir, max_requests=5))


def generated(data_dir, sids_dir, model_dir, output_dir):
    GeneratorSource(data_dir, sids_dir, model_dir, train=4, valid=0, test=4).load(Path(output_dir))


def exported(data_dir, sids_dir, model_dir, output_dir):
    export_engine.main(export_engine.Arguments(sids_dir, model_dir, output_dir))


def rewarded(data_dir, sids_dir, model_dir, output_dir):
    folders = {"data_dir": data_dir, "sids_dir": sids_dir, "model_dir": model_dir, "output_dir": output_dir}
    grpo.main(grpo.Arguments(**folders, args={"max_steps": 1, "num_generations": 2}))


def fine_tuned(data_dir, sids_dir, model_dir, output_dir):
    stage = {"name": "p", "tasks": {"whole_history": {}}, "max_length": 128, "args": {"max_steps": 1}}
    sft.main(sft.Arguments(data_dir, sids_dir, str(final_model(model_dir)), output_dir, [stage]))


def based(data_dir, sids_dir, model_dir, output_dir):
    init_model.main(init_model.Arguments(data_dir, sids_dir, output_dir, base=str(final_model(model_dir))))


def reasoned(data_dir, sids_dir, model_dir, output_dir):
    reason.main(reason.Arguments(data_dir, sids_dir, model_dir, output_dir, reasoning=False, max_requests=5))


def explained(data_dir, sids_dir, model_dir, output_dir):
    trajectories.main(trajectories.Arguments(data_dir, sids_dir, model_dir, output_dir))


def extended(data_dir, sids_dir, model_dir, output_dir):
    more = str(Path(data_dir).parent / "more")
    extend_sids.main(extend_sids.Arguments(sids_dir, more, output_dir, existing="skip", model_dir=model_dir))


OF_SIDS = [
    evaluated, compared, published, served, retrieved, generated, exported, rewarded, fine_tuned, based, reasoned, explained,
    extended,
]  # fmt: skip
OF_ITEMS = [evaluated, published, retrieved, generated, rewarded, fine_tuned, based, reasoned, explained]


def refused(step, shop: Path, tmp_path: Path, words: str = "do not belong together", **other: str) -> str:
    names = {"data": "data", "sids": "sids", "sft": "sft", **other}
    with pytest.raises(DataError, match=words) as caught:
        step(*(str(shop / names[name]) for name in ("data", "sids", "sft")), str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/[!.]*"))
    return str(caught.value)


@pytest.mark.parametrize("sids", ["codes", "sizes"])
@pytest.mark.parametrize("step", OF_SIDS, ids=lambda step: step.__name__)
def test_other_semantic_ids_are_refused(step, sids, shop, tmp_path):
    said = refused(step, shop, tmp_path, sids=sids)
    assert str(shop / "sft" / "stage_2_personalise") in said and str(shop / sids) in said


@pytest.mark.parametrize("data", ["items", "small"])
@pytest.mark.parametrize("step", OF_ITEMS, ids=lambda step: step.__name__)
def test_other_items_are_refused(step, data, shop, tmp_path):
    if data == "small" and not (shop / data).exists():
        made = build_data.Arguments(output_dir=str(shop / data), reader="shop_world", options={**SHOP, "n_items": 140})
        build_data.main(made)
    said = refused(step, shop, tmp_path, data=data)
    assert str(shop / "sids") in said and str(shop / data) in said


@pytest.mark.parametrize("step", [evaluated, served, exported], ids=lambda step: step.__name__)
def test_a_vocabulary_of_another_model_is_refused(step, shop, tmp_path):
    """The file of a model of other codes, and a folder whose own semantic IDs were exchanged."""
    shutil.copytree(final_model(shop / "sft"), tmp_path / "model")
    codes = SemanticIds.from_pretrained(shop / "codes" / "sids").fingerprint()
    own = Vocabulary.from_pretrained(tmp_path / "model")
    dataclasses.replace(own, sids_fingerprint=codes).save_pretrained(tmp_path / "model")
    said = refused(step, shop, tmp_path, sft=str(tmp_path / "model"))
    assert str(tmp_path / "model") in said


@pytest.mark.parametrize("step", [published, reported], ids=lambda step: step.__name__)
def test_measurements_of_another_model_are_refused(step, shop, tmp_path):
    shutil.copytree(shop / "sft", tmp_path / "sft")
    shutil.copytree(shop / "eval", tmp_path / "eval")
    (tmp_path / "sft" / "stage_2_personalise" / "note.txt").write_text("another")
    said = refused(step, shop, tmp_path, "do not belong together", sft=str(tmp_path / "sft"))
    assert str(tmp_path / "eval") in said and str(tmp_path / "sft") in said


def test_predictions_of_other_data_are_refused(shop, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(shop / "eval", folder)
    record = read_json(folder / "run.json")
    record["inputs"]["data_dir"]["sha256"] = "0"
    write_json(folder / "run.json", record)
    folders = (str(shop / name) for name in ("data", "sids", "sft"))
    arguments = evaluate.Arguments(*folders, str(tmp_path / "out"), compare_to={"other": str(folder)}, **ALONE)
    with pytest.raises(DataError, match="made from another data_dir") as caught:
        evaluate.main(arguments)
    assert str(folder) in str(caught.value) and str(shop / "data") in str(caught.value)


def rankings(retriever: SidRetriever, shop: Path) -> tuple[list, np.ndarray]:
    data = load_folder(shop / "data")
    prompts = prompts_of(retriever, data, data.requests["test"].slice(0, 12))
    return prompts, retriever.rank(prompts, 5)[0]


def test_a_copied_stage_answers_as_in_its_place(shop, tmp_path):
    """With other templates and limits than the defaults, in another folder, and without a folder of SIDs."""
    for stage in ("stage_1_align", "stage_2_personalise"):
        shutil.copytree(shop / "sft" / stage, tmp_path / stage)
        first = rankings(load_retriever(shop / "sft" / stage, shop / "sids"), shop)
        moved = load_retriever(tmp_path / stage)
        prompts, ranked = rankings(moved, shop)
        assert prompts == first[0] and (ranked == first[1]).all()
        assert moved.settings.max_history == 3 and moved.settings.max_length == 256
        assert SidRetriever.from_pretrained(tmp_path / stage, "cpu").search("cup", k=3)


PARTS = [
    "sid_vocabulary.json", "serializer.json", "templates", "templates/turn.jinja", "sids", "sids/codes.safetensors",
    "model.safetensors", "config.json",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("with_sids", [False, True])
def test_a_missing_part_is_named(part, with_sids, shop, tmp_path):
    folder = tmp_path / "sft" / "model"
    shutil.copytree(final_model(shop / "sft"), folder)
    for name in ("serializer.json", "run.json"):  # what lies above a folder is no part of it
        if (shop / "sft" / name).exists():
            shutil.copy(shop / "sft" / name, tmp_path / "sft" / name)
    gone = folder / part
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(DataError, match=part.replace(".", r"\.")) as caught:
        ModelFolder.open(folder, shop / "sids" if with_sids else None)
    assert str(folder) in str(caught.value) and ("run the step" in str(caught.value) or "again" in str(caught.value))


def test_a_folder_of_before_is_read_with_the_prompts_above_it(shop, tmp_path):
    """Stages used to share the settings of the folder of `sft`; elsewhere there is no default for them."""
    shutil.copytree(shop / "sft", tmp_path / "sft")
    stage = final_model(tmp_path / "sft")
    for name in ("serializer.json", "templates"):
        shutil.move(stage / name, tmp_path / "sft" / name)
    shutil.rmtree(stage / "sids")
    old = read_json(stage / "sid_vocabulary.json")
    del old["sids_fingerprint"]
    write_json(stage / "sid_vocabulary.json", old)
    opened = ModelFolder.open(tmp_path / "sft", shop / "sids")
    assert opened.settings == ModelFolder.open(shop / "sft").settings and opened.vocabulary.sids_fingerprint is None
    assert opened.serializer.sources == ModelFolder.open(shop / "sft").serializer.sources
    ModelFolder.open(tmp_path / "sft", shop / "codes")  # of the same sizes: nothing tells them apart
    shutil.copytree(stage, tmp_path / "alone" / stage.name)
    with pytest.raises(DataError, match=r"lacks serializer\.json"):
        ModelFolder.open(tmp_path / "alone" / stage.name, shop / "sids")


def test_items_added_with_frozen_codebooks_keep_the_model(shop, tmp_path):
    """Twice extended SIDs, in any order of rows, belong to the model of the first ones; the first ones do not to their model."""
    sids = SemanticIds.from_pretrained(shop / "sids" / "sids")
    vocabulary = Vocabulary.from_pretrained(final_model(shop / "sft"))
    more = sids.extended(["x"], sids.codes[:1]).extended(["a", "y"], sids.codes[3:5])
    mixed = more.replaced(np.random.default_rng(0).permutation(len(more)))
    mixed.save_pretrained(tmp_path / "sids")
    loaded = SemanticIds.from_pretrained(tmp_path / "sids")
    assert loaded.fingerprint() == more.fingerprint() != sids.fingerprint()
    vocabulary.check(sids=loaded)
    assert ModelFolder.open(shop / "sft", tmp_path).sids.item_ids == mixed.item_ids
    with pytest.raises(DataError, match="do not belong together"):
        vocabulary.of(loaded).check(sids=sids)
    codes = copy.copy(sids.codes[:2])[::-1]
    if (codes[0] != codes[1]).any():  # two items that exchange their codes are another catalogue
        swapped = sids.replaced(codes=np.concatenate([codes, sids.codes[2:]]))
        with pytest.raises(DataError, match="do not belong together"):
            vocabulary.check(sids=swapped)


def test_a_file_of_another_folder_beside_the_codes_is_refused(shop, tmp_path):
    shutil.copytree(shop / "sids" / "sids", tmp_path / "sids")
    shutil.copy(shop / "codes" / "sids" / "codes.safetensors", tmp_path / "sids" / "codes.safetensors")
    with pytest.raises(DataError, match="do not belong together"):
        SemanticIds.from_pretrained(tmp_path / "sids")


def test_edited_titles_are_no_strangers(shop):
    """A catalogue changes a little between two steps; another shop with the same ids changes all."""
    sids, items = SemanticIds.from_pretrained(shop / "sids" / "sids"), load_folder(shop / "data").items
    rows = items.to_pylist()
    for row in rows[: len(rows) // 3]:
        row["title"] = json.dumps(row["title"])
    sids.check_items(type(items).from_pylist(rows, items.schema), whole=True)
    for row in rows:
        row["title"] = json.dumps(row["title"])
    with pytest.raises(DataError, match="most of their titles are others"):
        sids.check_items(type(items).from_pylist(rows, items.schema))
    with pytest.raises(DataError, match="another order"):
        sids.check_items(items.take(np.arange(len(rows))[::-1]), whole=True)
    sids.check_items(items.take(np.arange(len(rows))[::-1]))

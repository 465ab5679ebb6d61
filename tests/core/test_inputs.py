"""A step is done only while everything that its options name has the content it read, and its own files have their sizes.

The oracle is the file itself: each case changes one path by a byte, with its old time and size, and takes the change back.
"""

import importlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_folders import sound_rows
from safetensors.numpy import load_file

from sidtune.core.config import as_dict, build
from sidtune.core.errors import DataError
from sidtune.core.folders import inputs_of, read_json, write_folder, write_json, write_run
from sidtune.core.pipeline import Step, is_done
from sidtune.core.scripts import find_script
from sidtune.data_builders.registry import READERS

ROW = {"data_dir": "data", "sids_dir": "sids", "model_dir": "model"}
SOURCE = {"kind": "table", "path": "lists"}
STAGE = {"name": "p", "tasks": {"whole_history": {}}, "max_length": 256}
REASON = {"name": "p", "tasks": {"reason_to_sid": {"options": {"file": "some.jsonl"}}}, "max_length": 256}
HUB = {"reader": "hub", "path": "data"}
# (script, options, dotted option, what it names)
OPTIONS = [
    ("build_data", {"reader": "sidtune", "path": "data"}, "path", "folder"),
    ("build_data", {**HUB, "options": {"items": {"path": "second"}}}, "options.items.path", "folder"),
    ("build_data", {**HUB, "options": {"items": {"path": "some.jsonl"}}}, "options.items.path", "file"),
    ("build_data", {**HUB, "options": {"items": {"data_files": "../some.jsonl"}}}, "options.items.data_files", "file"),
    ("build_data", {**HUB, "options": {"items": {"data_files": "{root}/so*.jsonl"}}}, "options.items.data_files", "file"),
    ("build_data", {**HUB, "path": "json", "options": {"items": {"data_files": "some.jsonl"}}}, "options.items.data_files", "file"),
    ("learn_sids", {"encoder": {"name": "precomputed", "path": "v.npy"}}, "encoder.path", "file"),
    (
        "learn_sids", {"encoder": {"name": "precomputed", "path": "v.npy", "align": "ids", "ids_path": "ids.txt"}},
        "encoder.ids_path", "file",
    ),
    ("learn_sids", {"encoder": {"name": "transformers", "model": "my-encoder"}}, "encoder.model", "folder"),
    ("learn_sids", {"encoder": {"name": "sentence_transformers", "model": "./enc"}}, "encoder.model", "folder"),
    ("learn_sids", {"encoder": {"name": "keyword_fusion", "pool": "words.tsv"}}, "encoder.pool", "file"),
    (
        "learn_sids", {"encoder": {"name": "keyword_fusion", "base": {"name": "transformers", "model": "enc"}}},
        "encoder.base.model", "folder",
    ),
    ("learn_sids", {"encoder_dir": "enc"}, "encoder_dir", "folder"),
    ("learn_sids", {"quantizer": {"name": "rq_vae", "collaborative_path": "v.npy"}}, "quantizer.collaborative_path", "file"),
    ("extend_sids", {"encoder": {"name": "precomputed", "path": "v.npy"}}, "encoder.path", "file"),
    ("extend_sids", {"model_dir": "model"}, "model_dir", "folder"),
    ("init_model", {"base": "Qwen/Qwen3-0.6B"}, "base", "folder"),
    ("init_model", {"base": "qwen"}, "base", "folder"),
    ("init_model", {"templates": "mine"}, "templates", "folder"),
    ("align_encoder", {"backbone": "enc"}, "backbone", "folder"),
    ("align_encoder", {"relevance": {"file": "some.jsonl"}}, "relevance.file", "file"),
    ("sft", {"stages": [STAGE], "templates": "mine"}, "templates", "folder"),
    ("sft", {"stages": [REASON]}, "stages.0.tasks.reason_to_sid.options.file", "file"),
    ("grpo", {"position_bias": "bias"}, "position_bias", "folder"),
    ("grpo", {"hard_set": "hard.parquet"}, "hard_set", "file"),
    ("evaluate", {"start_dir": "start"}, "start_dir", "folder"),
    ("evaluate", {"compare_to": {"old": "evaluated"}}, "compare_to.old", "folder"),
    ("retrieve", {"requests": "asked.jsonl"}, "requests", "file"),
    ("retrieve", {"requests": "asked"}, "requests", "folder"),
    ("retrieve", {"requests": "asked.jsonl", "in_stock": "stock"}, "in_stock", "file"),
    ("report", {"eval_dir": "evaluated", "grpo_dir": "tuned"}, "grpo_dir", "folder"),
    ("publish", {"eval_dir": "evaluated"}, "eval_dir", "folder"),
    ("post_rank", {"source": SOURCE, "training": {"train": "all", "adaptation_trains": "all"}}, "source.path", "folder"),
    ("post_rank", {"source": SOURCE, "training": {"backbone": "qwen"}}, "training.backbone", "folder"),
    ("trajectories", {"source": "file", "file": "teacher.jsonl"}, "file", "file"),
    ("trajectories", {"source": "sampled", "hard_set": "hard.parquet", "replay": "seeds.jsonl"}, "hard_set", "file"),
    ("trajectories", {"source": "sampled", "hard_set": "hard.parquet", "replay": "seeds.jsonl"}, "replay", "file"),
]  # fmt: skip


def write(path, text="1"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def step_of(root, script, options):
    """A step with these options as a pipeline resolves it; the folders of earlier steps stand there."""
    found = find_script(script)
    module = importlib.import_module(found.module)
    for name in (*ROW.values(), "evaluated", "lists"):
        write(root / name / "file")
    taken = module.Arguments.__dataclass_fields__
    values = {name: value for name, value in ROW.items() if name in taken and taken[name].default not in (None,)}
    return Step(script, found, build(module.Arguments, {**values, **options, "output_dir": "out"}, script), {})


def ended(step, root):
    """Writes what the step would leave."""
    with write_folder(root / "out", step.name) as scratch:
        write(scratch / "result.bin", "12345")
        write_run(scratch, step=step.name, config=as_dict(step.config))


def change(path, text):
    """Other content; size and time stay, as `cp -p` and `tar` leave them."""
    file = next(path.iterdir()) if path.is_dir() else path
    before = file.stat()
    file.write_text(text)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize(("script", "options", "option", "kind"), OPTIONS)
def test_a_step_is_not_done_when_what_an_option_names_changed(tmp_path, monkeypatch, script, options, option, kind):
    monkeypatch.chdir(tmp_path)
    options = json.loads(json.dumps(options).replace("{root}", str(tmp_path)))
    value = options
    for key in option.split("."):
        value = value[int(key) if key.isdigit() else key]
    named = tmp_path / {"../some.jsonl": "some.jsonl", f"{tmp_path}/so*.jsonl": "some.jsonl"}.get(value, value)
    for name in ("v.npy", "ids.txt", "asked.jsonl", "hard.parquet", "seeds.jsonl", "some.jsonl"):
        write(tmp_path / name)
    write(named / ("notes.md" if option == "templates" else "file") if kind == "folder" else named)
    step = step_of(tmp_path, script, options)
    assert option in inputs_of(step.config)
    ended(step, tmp_path)
    assert option in read_json(tmp_path / "out" / "run.json")["inputs"] and is_done(step)
    change(named, "2")
    assert not is_done(step)
    change(named, "1")
    assert is_done(step)
    if kind == "folder":
        write(named / "more")
    else:
        named.unlink()
    assert not is_done(step)


def test_a_step_whose_own_output_is_cut_short_or_gone_is_not_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = step_of(tmp_path, "learn_sids", {})
    for damage in (
        lambda: (tmp_path / "out" / "result.bin").write_text("123"),
        lambda: (tmp_path / "out" / "result.bin").unlink(),
        lambda: (tmp_path / "out" / "run.json").write_text('{"step": "learn'),
        lambda: shutil.rmtree(tmp_path / "out"),
    ):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        ended(step, tmp_path)
        assert is_done(step)
        damage()
        assert not is_done(step)


def test_a_record_of_before_is_believed_about_what_it_does_not_know(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "v.npy")
    step = step_of(tmp_path, "learn_sids", {"encoder": {"name": "precomputed", "path": "v.npy"}})
    ended(step, tmp_path)
    record = read_json(tmp_path / "out" / "run.json")
    del record["files"], record["inputs"]["encoder.path"]
    write_json(tmp_path / "out" / "run.json", record)
    assert is_done(step)
    change(tmp_path / "data", "2")
    assert not is_done(step)


def test_what_exists_only_now_was_not_read(tmp_path, monkeypatch):
    """A hub id is no path until a folder of that name stands there, which is loaded then."""
    monkeypatch.chdir(tmp_path)
    step = step_of(tmp_path, "init_model", {"base": "Qwen/Qwen3-0.6B"})
    ended(step, tmp_path)
    assert "base" not in read_json(tmp_path / "out" / "run.json")["inputs"] and is_done(step)
    write(tmp_path / "Qwen" / "Qwen3-0.6B" / "config.json")
    assert not is_done(step)


def test_a_word_is_no_path_because_a_folder_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("test", "learned", "greedy", "click", "out", "cache", "README.md"):
        write(tmp_path / name / "file")
    config = {"split": "test", "name": "learned", "methods": ["greedy"], "labels": ["click"], "output_dir": "out"}
    assert inputs_of({**config, "cache_dir": "./cache", "readme": ["README.md"], "n": 3, "none": None}) == {}
    assert inputs_of({"a": [{"model_dir": "test"}]}) == {"a.0.model_dir": "test"}


def test_what_was_read_is_what_stood_there_at_the_start(tmp_path, monkeypatch):
    """A file that changes while the step works leaves the step not done."""
    from sidtune.core.folders import writes

    monkeypatch.chdir(tmp_path)
    step = step_of(tmp_path, "learn_sids", {})

    @writes("learn_sids")
    def main(arguments):
        change(tmp_path / "data", "2")
        ended(step, tmp_path)

    main(step.config)
    assert not is_done(step)
    change(tmp_path / "data", "1")
    assert is_done(step)


def test_a_real_step_sees_other_vectors(tmp_path):
    """Not only in the record: `learn_sids` of vectors that were replaced runs again and reads them."""
    from sidtune.recipes.steps import build_data, learn_sids

    raw, rows = tmp_path / "raw", sound_rows()
    for name in rows:
        write(raw / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows[name]))
    build_data.main(build_data.Arguments(reader="sidtune", path=str(raw), output_dir=str(tmp_path / "data")))
    vectors = np.random.default_rng(0).standard_normal((len(rows["items"]), 4)).astype("f4")
    np.save(tmp_path / "v.npy", vectors)
    arguments = learn_sids.Arguments(
        data_dir=str(tmp_path / "data"), output_dir=str(tmp_path / "sids"),
        encoder={"name": "precomputed", "path": str(tmp_path / "v.npy")},
        quantizer={"name": "residual_kmeans", "level_sizes": [2, 2]},
    )  # fmt: skip
    step = Step("sids", find_script("learn_sids"), arguments, {"data_dir": "data"})
    learn_sids.main(arguments)
    assert is_done(step)
    assert (load_file(tmp_path / "sids" / "vectors.safetensors")["vectors"] == vectors).all()
    np.save(tmp_path / "v.npy", vectors[::-1].copy())
    assert not is_done(step)
    learn_sids.main(arguments)
    assert (load_file(tmp_path / "sids" / "vectors.safetensors")["vectors"] == vectors[::-1]).all() and is_done(step)


@pytest.mark.parametrize("name", ["items.jsonl", "items.jsonl.gz", "elsewhere"])
def test_the_hub_reader_reads_a_file_that_was_replaced_with_its_old_time(tmp_path, name):
    import gzip

    raw = tmp_path / "raw"
    file = tmp_path / "elsewhere.jsonl" if name == "elsewhere" else raw / name
    rows = sound_rows()
    write(raw / "events.jsonl", "".join(json.dumps(row) + "\n" for row in rows["events"]))

    def titles(title):
        text = "".join(json.dumps({"item_id": row["item_id"], "title": title}) + "\n" for row in rows["items"])
        file.write_bytes(gzip.compress(text.encode(), mtime=0) if name.endswith("gz") else text.encode())
        os.utime(file, (1_700_000_000,) * 2)
        options = {"events": {"data_files": "events.jsonl"}, "cache_dir": str(tmp_path / "cache")}
        items = {"data_files": str(file)} if name == "elsewhere" else {"data_files": name}
        tables = READERS.get("hub")(str(raw), items=items, **options)
        return set(tables.items["title"].to_pylist())

    assert titles("an old title") == {"an old title"} and titles("a new title!") == {"a new title!"}
    assert not list(Path(tmp_path / "cache").rglob("*.arrow"))


def test_an_input_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    from sidtune.core import inputs

    write(tmp_path / "in" / "file")
    monkeypatch.setattr(inputs.os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied", path)))
    with pytest.raises(DataError, match="in cannot be read .*denied.*; check"):
        inputs.fingerprint(tmp_path / "in")

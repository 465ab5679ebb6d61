"""Every option does something: another value changes what is written or said, or is refused; none is accepted and ignored."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import io
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_pipeline import SHOP, TINY, pipeline, run_in_process, whole_pipeline

from sidtune.core.config import build, defaults_of
from sidtune.core.errors import SidtuneError
from sidtune.core.folders import fingerprint
from sidtune.core.pipeline import Step
from sidtune.core.scripts import find_script, scripts

pytestmark = pytest.mark.medium

ROOMS = ("core", "data_builders", "tokenizers", "models", "metrics", "decoding", "trainers", "recipes")
KINDS = ("Config", "Settings", "Options", "Arguments", "Limits", "Training", "Source", "System", "Spec", "StepConfig")
CHECKS = ("__post_init__", "check")  # a field that only these read is checked and ignored


def unread_fields(root: Path) -> list[str]:
    """Fields of config dataclasses that no code reads, by attribute or by name, outside of checks."""
    fields, reads = [], Counter()

    def visit(node: ast.AST, checks: bool, file: str) -> None:
        for child in ast.iter_child_nodes(node):
            if (
                isinstance(child, ast.ClassDef)
                and child.name.endswith(KINDS)
                and "dataclass" in ast.unparse(child.decorator_list)
            ):
                lines = [
                    line
                    for line in child.body
                    if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation)
                ]
                fields.extend((line.target.id, f"{file} {child.name}.{line.target.id}") for line in lines)
            if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load) and not checks:
                reads[child.attr] += 1
            if isinstance(child, ast.Constant) and isinstance(child.value, str) and not checks:
                reads[child.value] += 1
            build_of = isinstance(child, ast.FunctionDef) and child.name in CHECKS
            visit(child, checks or build_of, file)

    for file in (file for room in ROOMS for file in (root / room).rglob("*.py")):
        visit(ast.parse(file.read_text("utf-8")), False, file.relative_to(root).as_posix())
    assert len(fields) > 400
    return [place for name, place in fields if not reads[name]]


def test_every_field_of_a_config_is_read_by_more_than_its_check(repo_root):
    # align_encoder makes the config of its thresholds when the options are checked, and uses that.
    assert unread_fields(repo_root) == ["recipes/steps/align_encoder.py Arguments.thresholds"]


def test_a_planted_field_that_nobody_reads_is_found(tmp_path):
    (tmp_path / "core").mkdir()
    lines = "\n".join(f"    f{n}: int" for n in range(401))
    check = "    def __post_init__(self):\n        assert self.lost > 0\n"
    (tmp_path / "core" / "a.py").write_text(
        f"@dataclass\nclass AConfig:\n{lines}\n    lost: int = 1\n{check}" + "\n".join(f"a.f{n}" for n in range(401))
    )
    assert unread_fields(tmp_path) == ["core/a.py AConfig.lost"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Data, SIDs of a part of it, and an evaluated and reported model that learned nothing."""
    values = pipeline()
    values["steps"] = [step for step in values["steps"] if step["name"] != "sft"]
    for step in values["steps"]:
        step["inputs"] = {option: "model" if name == "sft" else name for option, name in step.get("inputs", {}).items()}
    folder = run_in_process(values, tmp_path_factory.mktemp("shop"))
    part = {
        "data_dir": folder / "data",
        "output_dir": folder / "part",
        "learn_share": 0.5,
        "quantizer": {"level_sizes": [4, 4]},
    }
    run("learn_sids", part | {"encoder": {"dims": 8}})
    return folder


def run(name: str, values: dict[str, Any]) -> str:
    """What a script says and what it writes, its `run.json` aside; its sentence where it refuses."""
    module, said = find_script(name).load(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            module.main(
                build(module.Arguments, {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}, name)
            )
    except SidtuneError as error:
        return f"refused: {error}"
    for file in Path(values["output_dir"]).glob("metrics.json"):  # how fast it went
        file.write_text(re.sub(r'"requests_per_second": [^\n]+', "", file.read_text("utf-8")), "utf-8")
    text = re.sub(r"[\d,]+ rows/s", "", said.getvalue().replace(str(values["output_dir"]), ""))
    return fingerprint(values["output_dir"]) + text


# For each script: what it is run with, and another value of each of its options; folders of the shop begin with "@".
DATA, SIDS, MODEL, EVAL = ({f"{name}_dir": f"@{name}"} for name in ("data", "sids", "model", "eval"))
FEW = {"ks": [5], "num_beams": 6, "primary": "ndcg@5", "samples": 100, "max_requests": 20, "baselines": ["popularity"]}
OTHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "build_data": ({"options": SHOP}, {
        "reader": "letter", "path": "nowhere", "options": {**SHOP, "n_items": 151},
        "split": {"test_share": 0.3}, "seed": 1,
    }),
    "learn_sids": (DATA | {"encoder": {"dims": 8}, "quantizer": {"level_sizes": [4, 4]}}, {
        "encoder_dir": "nowhere", "encoder": {"dims": 9}, "quantizer": {"level_sizes": [4, 5]}, "collisions": {"name": "suffix"},
        "suffix": True, "compare_collisions": True, "queries": True, "learn_share": 0.9, "seed": 1,
    }),
    "extend_sids": (DATA | {"sids_dir": "@part", "existing": "skip"}, {
        "existing": "refuse", "encoder": {"path": "nowhere.npy"}, "collisions": {"name": "suffix"}, "held_out_share": 0.0,
        "limits": {"max_empty_share": -1.0}, "model_dir": "@model", "seed": 1,
    }),
    "init_model": (DATA | SIDS | {"scratch": TINY, "text_vocab_size": 320}, {
        "base": "@model", "revision": "x", "scratch": {**TINY, "hidden_size": 48}, "text_vocab_size": 330, "templates": "chatml",
        "extra_tokens": ["<think>"], "init": "mean", "pad_to_multiple_of": 100, "dtype": "bfloat16", "seed": 1,
    }),
    "evaluate": (DATA | SIDS | MODEL | FEW, {
        "start_dir": "@model", "start_name": "x", "split": "valid", "num_beams": 7, "ks": [5, 6], "metrics": ["ndcg"],
        "primary": "hr@5", "labels": ["order"], "baselines": [], "upper_bound": False, "compare_to": {"other": "@eval"},
        "truth_requests": 0, "max_requests": 19, "samples": 101, "level": 0.9, "sample_requests": 3, "seed": 1,
    }),
    "export_engine": (SIDS | MODEL, {"dtype": "float32", "max_sids": 1, "end_token": "never one token"}),
    "publish": (DATA | SIDS | MODEL | EVAL, {
        "push_to_hub": True, "hub_model_id": "me/it", "model_name": "x", "dataset_name": "x", "license": "mit", "command": "x",
    }),
    "report": (DATA | SIDS | MODEL | EVAL, {"grpo_dir": "nowhere", "post_rank_dir": "nowhere", "title": "x", "command": "x"}),
}  # fmt: skip
# How fast it goes, and what only a hub sees.
EXEMPT = {"evaluate": {"batch_size"}, "publish": {"hub_private"}}


@pytest.mark.parametrize("name", OTHER)
def test_another_value_of_an_option_changes_a_file_a_line_or_is_refused(shop, tmp_path, name):
    def placed(values: dict[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps(values).replace('"@', f'"{shop}/'))

    base, others = OTHER[name]
    inputs = {option for option in base if option.endswith("_dir")}
    options = {field.name for field in dataclasses.fields(find_script(name).load().Arguments)}
    assert options - inputs - EXEMPT.get(name, set()) - {"output_dir"} == set(others)
    first = run(name, placed(base) | {"output_dir": tmp_path / "first" / "out"})
    assert not first.startswith("refused"), first
    assert run(name, placed(base) | {"output_dir": tmp_path / "again" / "out"}) == first
    for option, value in others.items():
        found = run(name, placed(base | {option: value}) | {"output_dir": tmp_path / option / "out"})
        assert found != first, f"{option}: {value} is accepted and ignored"


STRANGE = (
    None, {}, [], "x", "", True, 0, -1, 10**30, -0.5, math.nan, {"a": 1}, [1], [{}], [[]], "a\0b", ["x"], "2020-13-45", "\ud800",
)  # fmt: skip


def leaves(values: Any, path: tuple = ()) -> list[tuple]:
    parts = values.items() if isinstance(values, dict) else enumerate(values[:2]) if isinstance(values, list) else ()
    return [one for key, value in parts for one in ((*path, key), *leaves(value, (*path, key)))]


@pytest.mark.parametrize(
    "name", [name for name in scripts() if name not in ("run", "seeds", "ablation", "crs.self_evolve")]
)
def test_a_strange_value_of_any_option_is_taken_or_refused_in_a_sentence(name):
    script = find_script(name)
    module = script.load()
    steps = {find_script(step["script"]).name: step.get("args", {}) for step in whole_pipeline()["steps"]}
    required = {
        field.name: field.name
        for field in dataclasses.fields(module.Arguments)
        if field.name not in defaults_of(module.Arguments)
    }
    folders = {"data_dir": "data", "sids_dir": "sids", "model_dir": "model"}
    given: dict[str, dict] = {
        "next_item.train": {"source": {"path": "x"}, "systems": {"a": {}}}, "retrieve": {"requests": "x"},
        "evaluate": {"start_dir": "start"}, "llm4pr.post_rank": folders,
    }  # fmt: skip
    whole = {**defaults_of(module.Arguments), **required, **steps.get(name, {}), **given.get(name, {})}
    build(module.Arguments, copy.deepcopy(whole), name)
    for path in leaves(whole):
        for value in STRANGE:
            changed = copy.deepcopy(whole)
            place: Any = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = copy.deepcopy(value)
            with contextlib.suppress(SidtuneError):
                made = build(module.Arguments, changed, name)
                if hasattr(module, "preflight"):
                    module.preflight(Step("x", script, made, {}))

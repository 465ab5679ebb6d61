"""Two CPU processes under DDP, ZeRO-2, ZeRO-3 and FSDP2 train like one process at the same global batch.

The tolerances are those of `launching.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from launching import LOSS_TOLERANCE, assert_same_weights, launch, needs_deepspeed, run
from sft_stand_ins import model_folder
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.medium

WORKER = str(Path(__file__).parents[1] / "support" / "sft_worker.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Inputs, and the folders of one process at the same global batch."""
    folder = tmp_path_factory.mktemp("distributed")
    model_folder(folder / "model")
    for name in ("data", "sids"):
        (folder / name).mkdir()
        (folder / name / "content.txt").write_text(name)
    run([WORKER, str(folder), "one", "rows,lora,all", "all"], folder)
    return folder


def curve(folder: Path, key: str = "loss") -> np.ndarray:
    return np.array([h[key] for h in json.loads((folder / "log_history.json").read_text()) if key in h])


def assert_like_one_process(root: Path, one: str, two: str) -> None:
    first, second = root / one, root / two
    assert len(curve(first)) == 10
    for key in ("loss", "target_loss", "loss_text_to_sid", "loss_query_to_text", "eval_target_loss", "grad_norm"):
        np.testing.assert_allclose(
            curve(second, key), curve(first, key), atol=LOSS_TOLERANCE, rtol=LOSS_TOLERANCE, err_msg=key
        )
    for key in ("sid_accuracy_1", "eval_sid_accuracy_2", "learning_rate"):
        np.testing.assert_allclose(curve(second, key), curve(first, key), atol=1e-9, err_msg=key)
    assert_same_weights(first / "model.safetensors", second / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(second)
    record = json.loads((second / "run.json").read_text())["metrics"]
    assert record["launch"]["processes"] == 2 and record["steps"] == 10


def assert_main_process_told_the_error(root: Path, output: str) -> None:
    told = [json.loads((root / f"{output}_failed_{rank}.json").read_text()) for rank in range(2)]
    assert [t["kind"] for t in told] == ["DataError", "SystemExit"]
    assert "nowhere does not exist" in told[0]["text"]


@pytest.mark.parametrize(
    "name",
    [
        "ddp_cpu",
        pytest.param("zero2_cpu", marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("zero3_cpu", marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)
def test_two_processes_train_like_one(root, name):
    launch(name, [WORKER, str(root), name, "rows,lora,all", "all"], root)
    for stage in ("stage_1_rows", "stage_2_lora", "stage_3_all"):
        assert_like_one_process(root, f"one/{stage}", f"{name}/{stage}")
        assert (root / name / stage / "trained").is_dir() == (stage != "stage_3_all")
    assert_like_one_process(root, "one_resumed/stage_1_all", f"{name}_resumed/stage_1_all")
    assert_main_process_told_the_error(root, name)


@pytest.mark.slow
def test_fsdp2_trains_like_one_process(root, repo_root, tmp_path):
    config = yaml.safe_load((repo_root / "accelerate_configs" / "fsdp2.yaml").read_text())
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(config | {"mixed_precision": "no"}))
    launch(tmp_path / "fsdp2.yaml", [WORKER, str(root), "fsdp2", "all", ""], root)
    assert_like_one_process(root, "one_resumed/stage_1_all", "fsdp2/stage_1_all")
    assert_main_process_told_the_error(root, "fsdp2")


def test_every_accelerate_config_opens_with_its_command_and_names_what_it_launches(repo_root):
    files = sorted((repo_root / "accelerate_configs").glob("*.yaml"))
    assert {"cpu", "ddp", "zero2", "zero3", "fsdp2", "multi_node"} <= {file.stem for file in files}
    readme = (repo_root / "accelerate_configs" / "README.md").read_text("utf-8")
    for file in files:
        text = file.read_text("utf-8")
        values = yaml.safe_load(text)
        head = text.split("compute_environment")[0]
        assert text.startswith("#") and f"accelerate launch --config_file accelerate_configs/{file.name}" in head
        assert f"`{file.name}`" in readme
        assert values["mixed_precision"] == ("no" if "cpu" in file.stem else "bf16")
        zero = (values.get("deepspeed_config") or {}).get("zero_stage")
        assert zero == (3 if "zero3" in file.stem else 2 if "zero2" in file.stem or file.stem == "multi_node" else None)

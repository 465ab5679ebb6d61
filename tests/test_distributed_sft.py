"""Two CPU processes under DDP, ZeRO-2, ZeRO-3 and FSDP2 train like one process at the same global batch.

The tolerances: losses of about 4 in fp32 have a spacing of 5e-7, and two processes add the same numbers in another
order, so the curves may differ by a few spacings (5e-6 is ten). Adam divides a gradient by its own size, which makes
the rounding
of a gradient near zero a visible part of one step of that one weight: weights agree to 1e-6 on average, and each to a
twentieth of a step (1e-4 at a learning rate of 2e-3). A wrong order of examples or a wrong average shows at 1e-2.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sft_stand_ins import model_folder
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
LOSS_TOLERANCE, WEIGHT_TOLERANCE, MEAN_TOLERANCE = 5e-6, 1e-4, 1e-6
SECONDS = 240
needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed") or not importlib.util.find_spec("ninja"), reason="deepspeed is missing"
)


def run(command: list[str], folder: Path) -> None:
    """Runs a command in its own process group and ends the whole group if it takes too long."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    )
    # A launcher that is itself under pytest-xdist or accelerate must not pass its own group on.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert process.returncode == 0, (folder / "output.txt").read_text()[-4000:]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(config: Path, root: Path, output: str, kinds: str, resumed: str) -> None:
    worker = Path(__file__).parent / "sft_worker.py"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    run([*command, "--main_process_port", free_port(), str(worker), str(root), output, kinds, resumed], root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Inputs, and the folders of one process at the same global batch."""
    folder = tmp_path_factory.mktemp("distributed")
    model_folder(folder / "model")
    for name in ("data", "sids"):
        (folder / name).mkdir()
        (folder / name / "content.txt").write_text(name)
    worker = Path(__file__).parent / "sft_worker.py"
    run([sys.executable, str(worker), str(folder), "one", "rows,lora,all", "all"], folder)
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
    expected, found = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=WEIGHT_TOLERANCE, rtol=0)
        assert (found[name] - value).abs().mean() < MEAN_TOLERANCE
    AutoModelForCausalLM.from_pretrained(second)
    record = json.loads((second / "run.json").read_text())["metrics"]
    assert record["launch"]["processes"] == 2 and record["steps"] == 10


def assert_main_process_told_the_error(root: Path, output: str) -> None:
    told = [json.loads((root / f"{output}_failed_{rank}.json").read_text()) for rank in range(2)]
    assert [t["kind"] for t in told] == ["DataError", "SystemExit"]
    assert "nowhere does not exist" in told[0]["text"]


@pytest.mark.parametrize(
    "name",
    ["ddp_cpu", pytest.param("zero2_cpu", marks=needs_deepspeed), pytest.param("zero3_cpu", marks=needs_deepspeed)],
)
def test_two_processes_train_like_one(root, repo_root, name):
    launch(repo_root / "accelerate_configs" / f"{name}.yaml", root, name, "rows,lora,all", "all")
    for stage in ("stage_1_rows", "stage_2_lora", "stage_3_all"):
        assert_like_one_process(root, f"one/{stage}", f"{name}/{stage}")
        assert (root / name / stage / "trained").is_dir() == (stage != "stage_3_all")
    assert_like_one_process(root, "one_resumed/stage_1_all", f"{name}_resumed/stage_1_all")
    assert_main_process_told_the_error(root, name)


def test_fsdp2_trains_like_one_process(root, repo_root, tmp_path):
    config = yaml.safe_load((repo_root / "accelerate_configs" / "fsdp2.yaml").read_text())
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(config | {"mixed_precision": "no"}))
    launch(tmp_path / "fsdp2.yaml", root, "fsdp2", "all", "")
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

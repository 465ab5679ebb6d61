"""LLM4PR's two training steps on two processes (DDP, ZeRO-2, ZeRO-3) equal one process, in both LoRA layouts and without."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_distributed_sft import MEAN_TOLERANCE, WEIGHT_TOLERANCE, free_port, needs_deepspeed, run

from sidtune.trainers.post_rank import TRAINED_FILE

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "post_rank_worker.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("post_rank")
    run([sys.executable, str(WORKER), str(folder), "one", "all,A,B"], folder)
    return folder


def losses(folder: Path, key: str) -> list[float]:
    return [entry[key] for entry in json.loads((folder / "log.json").read_text()) if key in entry]


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        ("ddp_cpu", "all,A,B"),
        pytest.param("zero2_cpu", "all", marks=needs_deepspeed),
        pytest.param("zero3_cpu", "all,B", marks=needs_deepspeed),
    ],
)
def test_two_processes_are_like_one(root, repo_root, name, modes):
    config = repo_root / "accelerate_configs" / f"{name}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    for mode in modes.split(","):
        run([*command, "--main_process_port", free_port(), str(WORKER), str(root), name, mode], root)
        one, two = root / f"one_{mode}", root / f"{name}_{mode}"
        for key, count in (("main_loss", 8), ("aux_loss", 4), ("grad_norm", 8)):
            expected = losses(one, key)
            count -= 4 * (mode == "B" and key != "aux_loss")  # trains the second step only
            assert len(expected) == count and np.ptp(expected) > 1e-3
            np.testing.assert_allclose(losses(two, key), expected, atol=5e-6, rtol=5e-6, err_msg=f"{mode} {key}")
        expected, found = load_file(one / TRAINED_FILE), load_file(two / TRAINED_FILE)
        assert found.keys() == expected.keys() and any("qia_item" in key for key in found)
        assert any("lora" in key for key in found) == (mode != "all")
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=WEIGHT_TOLERANCE, rtol=0)
            assert (found[key] - value).abs().mean() < MEAN_TOLERANCE, key

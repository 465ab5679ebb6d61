"""Check 17 of the CRS sheet: two processes, a group on both of them, rewards and advantages as in one; and so are the weights.

Tolerances as in `test_distributed_sft.py`: the same numbers added in another order. Rewards and advantages must be identical.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sft_stand_ins import model_folder
from test_distributed_sft import free_port, needs_deepspeed, run
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "grpo_worker.py"
WEIGHT_TOLERANCE, MEAN_TOLERANCE = 1e-4, 1e-6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The model, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("grpo")
    model_folder(folder / "model")
    run([sys.executable, str(WORKER), str(folder), "one", "rows,lora,all"], folder)
    return folder


def seen(folder: Path) -> dict:
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        ("ddp_cpu", "lora,all"),
        pytest.param("zero2_cpu", "all", marks=needs_deepspeed),
        pytest.param("zero3_cpu", "rows,lora,all", marks=needs_deepspeed),
    ],
)
def test_two_processes_are_like_one(root, repo_root, name, modes):
    config = repo_root / "accelerate_configs" / f"{name}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    command += ["--main_process_port", free_port(), str(WORKER), str(root), name, f"{modes},sampled"]
    run(command, root)
    for mode in modes.split(","):
        first, second = root / f"one_{mode}", root / f"{name}_{mode}"
        one, two = seen(first), seen(second)
        assert len(one["steps"]) == 4
        assert two["steps"] == one["steps"]
        assert any(any(step["advantages"]) for step in one["steps"])
        for key in ("grad_norm", "kl", "reward", "group/zero_variance", "hit/level_1", "entropy", "advantage/abs_mean"):
            values = [[h[key] for h in record["log"] if key in h] for record in (one, two)]
            assert bool(values[0]) == (key != "kl" or mode == "all")
            np.testing.assert_allclose(values[1], values[0], atol=5e-6, rtol=5e-6, err_msg=f"{mode} {key}")
        expected, found = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=WEIGHT_TOLERANCE, rtol=0)
            assert (found[key] - value).abs().mean() < MEAN_TOLERANCE
        AutoModelForCausalLM.from_pretrained(second)
    sampled = [h for h in seen(root / f"{name}_sampled")["log"] if "reward" in h]
    assert all(h["rollout/valid"] == 1 and h["group/distinct_items"] == 4 and h["log_z/sid"] < 0 for h in sampled)
    assert len(sampled) == 4 and max(h["grad_norm"] for h in sampled) > 0
    assert "must lie on one process" in (root / f"{name}_refused.txt").read_text()

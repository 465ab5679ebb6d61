"""Check 17 of the CRS sheet: two processes, a group on both of them, rewards and advantages as in one; and so are the weights.

Tolerances as in `launching.py`: the same numbers added in another order. Rewards and advantages must be identical.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from launching import LOSS_TOLERANCE, assert_same_weights, launch, needs_deepspeed, run
from sft_stand_ins import model_folder
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.medium

WORKER = str(Path(__file__).parents[1] / "support" / "grpo_worker.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The model, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("grpo")
    model_folder(folder / "model")
    run([WORKER, str(folder), "one", "rows,lora,all"], folder)
    return folder


def seen(folder: Path) -> dict:
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        ("ddp_cpu", "lora,all"),
        pytest.param("zero2_cpu", "all", marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("zero3_cpu", "rows,lora,all", marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)
def test_two_processes_are_like_one(root, name, modes):
    launch(name, [WORKER, str(root), name, f"{modes},sampled"], root)
    for mode in modes.split(","):
        first, second = root / f"one_{mode}", root / f"{name}_{mode}"
        one, two = seen(first), seen(second)
        assert len(one["steps"]) == 4
        assert two["steps"] == one["steps"]
        assert any(any(step["advantages"]) for step in one["steps"])
        for key in ("grad_norm", "kl", "reward", "group/zero_variance", "hit/level_1", "entropy", "advantage/abs_mean"):
            values = [[h[key] for h in record["log"] if key in h] for record in (one, two)]
            assert bool(values[0]) == (key != "kl" or mode == "all")
            np.testing.assert_allclose(
                values[1], values[0], atol=LOSS_TOLERANCE, rtol=LOSS_TOLERANCE, err_msg=f"{mode} {key}"
            )
        assert_same_weights(first / "model.safetensors", second / "model.safetensors")
        AutoModelForCausalLM.from_pretrained(second)
    sampled = [h for h in seen(root / f"{name}_sampled")["log"] if "reward" in h]
    assert all(h["rollout/valid"] == 1 and h["group/distinct_items"] == 4 and h["log_z/sid"] < 0 for h in sampled)
    assert len(sampled) == 4 and max(h["grad_norm"] for h in sampled) > 0
    assert "must lie on one process" in (root / f"{name}_refused.txt").read_text()

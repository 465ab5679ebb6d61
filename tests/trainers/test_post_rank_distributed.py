"""LLM4PR's two training steps on two processes (DDP, ZeRO-2, ZeRO-3) equal one process, in both LoRA layouts and without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from launching import LOSS_TOLERANCE, assert_same_weights, launch, needs_deepspeed, run
from safetensors.torch import load_file

from sidtune.trainers.post_ranking.trainer import TRAINED_FILE

pytestmark = pytest.mark.slow
WORKER = str(Path(__file__).parents[1] / "support" / "post_rank_worker.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("post_rank")
    run([WORKER, str(folder), "one", "all,A,B"], folder)
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
def test_two_processes_are_like_one(root, name, modes):
    for mode in modes.split(","):
        launch(name, [WORKER, str(root), name, mode], root)
        one, two = root / f"one_{mode}", root / f"{name}_{mode}"
        for key, count in (("main_loss", 8), ("aux_loss", 4), ("grad_norm", 8)):
            expected = losses(one, key)
            count -= 4 * (mode == "B" and key != "aux_loss")  # trains the second step only
            assert len(expected) == count and np.ptp(expected) > 1e-3
            np.testing.assert_allclose(
                losses(two, key), expected, atol=LOSS_TOLERANCE, rtol=LOSS_TOLERANCE, err_msg=f"{mode} {key}"
            )
        assert_same_weights(one / TRAINED_FILE, two / TRAINED_FILE)
        names = load_file(two / TRAINED_FILE).keys()
        assert any("qia_item" in key for key in names)
        assert any("lora" in key for key in names) == (mode != "all")

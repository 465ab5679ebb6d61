"""Two processes under DDP, ZeRO-2, ZeRO-3 and FSDP2: a step with shared prompts moves the weights as TRL's own does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import free_port, needs_deepspeed, run

pytestmark = pytest.mark.slow
GROUPS = ["ddp,ddp-find-unused,fsdp2", pytest.param("zero2,zero3", marks=needs_deepspeed)]


@pytest.mark.parametrize("wrappers", GROUPS)
def test_shared_prompts_train_like_ordinary_rows(wrappers, tmp_path):
    worker, output = Path(__file__).parents[1] / "support" / "group_worker.py", tmp_path / "moved.pt"
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    run([*command, str(worker), wrappers, str(output)], tmp_path)
    moved = torch.load(output)
    assert set(moved) == {(wrapper, train) for wrapper in wrappers.split(",") for train in ("all", "rows")}
    for case, ways in moved.items():
        for way, truth in (("shared, whole vocabulary", "trl"), ("shared", "alone"), ("shared, passes", "alone")):
            found, true = ways[way], ways[truth]
            assert set(found) == set(true)
            size = max(float(value.abs().max()) for value in true.values())
            assert size > 1e-3
            assert max(float((found[name] - true[name]).abs().max()) for name in true) < 1e-4 * size, (case, way)

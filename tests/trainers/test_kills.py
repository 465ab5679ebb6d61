"""The small form of `benchmarks/kills.py`: each trainer is killed while it writes a checkpoint and while it writes its result."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.medium

TRAINERS = ("sft", "grpo", "post_rank", "next_item", "encoder")


@pytest.mark.slow
def test_killed_trainings_end_in_the_weights_of_whole_ones(repo_root, tmp_path):
    words = [
        sys.executable,
        str(repo_root / "benchmarks" / "kills.py"),
        "--quick",
        "--json",
        str(tmp_path / "kills.json"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "kills.json").read_text())["rows"]
    assert sorted((row["name"], row["phase"]) for row in rows if row["counted"]) == sorted(
        (name, phase) for name in TRAINERS for phase in ("checkpoint", "result")
    )
    assert all(row["equal"] and not row["left"] and row["steps_again"] < row["steps_whole"] for row in rows), rows

"""Starts workers in processes of their own, and compares what several processes made with what one made.

The tolerances: losses of about 4 in fp32 have a spacing of 5e-7, and two processes add the same numbers in another
order, so the curves may differ by a few spacings (5e-6 is ten). Adam divides a gradient by its own size, which makes
the rounding of a gradient near zero a visible part of one step of that one weight: weights agree to 1e-6 on average,
and each to a twentieth of a step (1e-4 at a learning rate of 2e-3). A wrong order of examples or a wrong average shows
at 1e-2.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

LOSS_TOLERANCE, WEIGHT_TOLERANCE, MEAN_TOLERANCE = 5e-6, 1e-4, 1e-6
SECONDS = 240
CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"
needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed") or not importlib.util.find_spec("ninja"), reason="deepspeed is missing"
)


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(command: list[str], folder: Path, seconds: float = SECONDS) -> str:
    """Runs Python with these arguments in its own process group, ends the whole group if it takes too long, and
    returns what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    )
    # A launcher that is itself under pytest-xdist or accelerate must not pass its own group on.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout=seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    printed = (folder / "output.txt").read_text()
    assert process.returncode == 0, printed[-4000:]
    return printed


def launch(config: str | Path, command: list[str], folder: Path, processes: int = 2, seconds: float = SECONDS) -> str:
    """Runs a script, or `-m` and a module, with its arguments under `accelerate launch`; `config` is a file, or the
    name of one in `accelerate_configs`."""
    file = CONFIGS / f"{config}.yaml" if isinstance(config, str) else config
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(processes)]
    return run([*launcher, "--main_process_port", free_port(), *command], folder, seconds)


def assert_same_weights(expected: Path, found: Path) -> None:
    """Two safetensors files hold the same weights, to the tolerances above."""
    first, second = load_file(expected), load_file(found)
    assert second.keys() == first.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, atol=WEIGHT_TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (second[name] - value).abs().mean() < MEAN_TOLERANCE, name

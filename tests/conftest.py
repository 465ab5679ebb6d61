"""Shared fixtures: offline, seeded, quiet. Marks skip what a machine cannot run, and say why."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))

ROOT = Path(__file__).resolve().parent.parent


BEGUN = time.monotonic()


def pytest_runtest_setup(item):
    most = float(os.environ.get("TEST_SECONDS", "inf"))
    if time.monotonic() - BEGUN > most:
        pytest.skip(f"not begun after TEST_SECONDS={most:.0f}")


def pytest_collection_modifyitems(config, items):
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU and this machine has none"))
        if item.get_closest_marker("hub") and os.environ.get("SIDTUNE_HUB_TESTS") != "1":
            item.add_marker(pytest.mark.skip(reason="needs the network; set SIDTUNE_HUB_TESTS=1 to run it"))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets; the test is skipped where it is absent."""
    folder = os.environ.get("SIDTUNE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SIDTUNE_DATA does not name the folder with the real data sets")
    return Path(folder)


@pytest.fixture(autouse=True)
def _seeded():
    import random

    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

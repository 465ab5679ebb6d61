"""Two CPU processes under DDP train next-item networks like one process with the batch of both, and the recipe's folders say so.

Each process holds half the rows of a batch, with another number of targets and another padding, so this fails where a
process averages over its own targets, where a row is read twice or never, or where the averaged weights, the measures or
the FLOPs are those of one process. The tolerances are those of `launching.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from launching import assert_same_weights, launch
from next_item_worlds import chain_folder
from safetensors.numpy import load_file

from sidtune.core.folders import read_json
from sidtune.models.next_item.network import WEIGHT_FILE
from sidtune.recipes.next_item import train as next_item

pytestmark = pytest.mark.slow
USERS, BATCH, EPOCHS = 120, 24, 3
SYSTEMS = {
    "items": {"network": {"ahead": 1}, "fit": {"loss": {"ahead": 0.5, "label_smoothing": 0.1}}},
    "t5": {"network": {"network": "t5", "code_layers": 1, "head_dim": 8, "user_tokens": 16}},
}


def settings(folder: Path, output: Path, processes: int) -> dict:
    args = {"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH // processes, "warmup_steps": 2}
    args |= {"learning_rate": 2e-3, "logging_steps": 1}
    network = {"width": 16, "layers": 1, "heads": 2, "feed_forward": 32, "dropout": 0.0}
    return {
        "source": {"path": str(folder)},
        "output_dir": str(output),
        "seeds": [0],
        "num_beams": 12,
        "systems": SYSTEMS,
        "defaults": {"network": network, "fit": {"average": 0.8, "args": args}},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of one process and of two, and what the two printed."""
    root = tmp_path_factory.mktemp("next_item")
    data = chain_folder(root / "data", users=USERS)
    next_item.main(next_item.Arguments(**settings(data, root / "one", 1)))
    (root / "two.yaml").write_text(json.dumps(settings(data, root / "two", 2)))
    command = ["-m", "sidtune.recipes.next_item.train", "--config", str(root / "two.yaml")]
    return root / "one", root / "two", launch("ddp_cpu", command, root)


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_two_processes_learn_what_one_learns(runs, name):
    one, two = (folder / "seed_0" / name for folder in runs[:2])
    assert_same_weights(one / WEIGHT_FILE, two / WEIGHT_FILE)
    first, second = (read_json(folder / "curve.json") for folder in (one, two))
    assert len(first) == len(second) == EPOCHS
    for a, b in zip(first, second, strict=True):
        # A rank may change places where two items are a rounding apart.
        assert b["eval_ndcg@10"] == pytest.approx(a["eval_ndcg@10"], abs=2 / USERS)
        assert a["step"] == b["step"]
        # Two halves are padded to their own longest rows: never more than the whole, and not half of it.
        assert 0.8 * a["eval_flops"] < b["eval_flops"] <= a["eval_flops"]
    metrics = [read_json(folder / "run.json")["metrics"] for folder in (one, two)]
    assert [m["processes"] for m in metrics] == [1, 2]
    assert metrics[0]["targets"] == metrics[1]["targets"] and metrics[0]["parameters"] == metrics[1]["parameters"]


def test_the_main_process_alone_measures_and_writes(runs):
    one, two, printed = runs
    assert printed.count("| system | recall@5 |") == 1
    assert not list((two / "seed_0").glob(".*"))
    first, second = (read_json(folder / "results.json")["systems"] for folder in (one, two))
    assert list(first) == list(second)
    for name in SYSTEMS:
        for metric, found in second[name]["metrics"].items():
            assert found["mean"] == pytest.approx(first[name]["metrics"][metric]["mean"], abs=2 / USERS), metric
        ranked = [load_file(folder / "seed_0" / "test" / name / "ranked.safetensors")["rows"] for folder in (one, two)]
        assert np.mean(ranked[0] == ranked[1]) > 0.98

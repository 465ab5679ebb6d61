"""Two CPU processes under DDP train the aligned encoder like one process that accumulates their two micro-batches.

Both compute the same micro-batches, halving is exact in binary and a sum of two has one order, so on gloo the weights and
curves differ by nothing. The tolerances of `launching.py` leave room for libraries that add in another order; wrong rows,
a sum in place of a mean, or curves of one process alone show at 1e-2. A run that goes on after a stop repeats the very
numbers of one that was not stopped, dropout included, so there nothing may differ.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from align_worker import STEPS, TINY
from launching import LOSS_TOLERANCE, assert_same_weights, launch, needs_deepspeed, run
from safetensors.torch import load_file

from sidtune.core.errors import ConfigError
from sidtune.core.folders import read_json
from sidtune.recipes.steps import align_encoder, build_data
from sidtune.trainers.contrastive.losses import TERMS
from sidtune.trainers.contrastive.trainer import aligned_args

pytestmark = pytest.mark.slow
WORKER, WEIGHTS = str(Path(__file__).parents[1] / "support" / "align_worker.py"), "model.safetensors"
CURVES = ("loss", "grad_norm", "learning_rate", *(f"{term}_loss" for term in TERMS))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What one process and what two make of the same rows."""
    folder = tmp_path_factory.mktemp("aligned")
    run([WORKER, str(folder), "one", "plain"], folder)
    launch("ddp_cpu", [WORKER, str(folder), "two", "plain,whole,stopped"], folder)
    return folder


def curve(history: list[dict], key: str) -> np.ndarray:
    return np.array([entry[key] for entry in history if key in entry])


def assert_same_curves(expected: list[dict], found: list[dict], steps: int) -> None:
    for key in CURVES:
        values = curve(expected, key)
        assert len(values) == steps and (np.ptp(values) > 1e-3 or key == "learning_rate"), key
        np.testing.assert_allclose(curve(found, key), values, atol=LOSS_TOLERANCE, rtol=LOSS_TOLERANCE, err_msg=key)


def test_two_processes_train_like_one_that_accumulates(root):
    one, two = root / "one_plain", root / "two_plain"
    assert_same_curves(read_json(one / "log.json"), read_json(two / "log.json"), STEPS)
    assert_same_weights(one / WEIGHTS, two / WEIGHTS)
    start, end = (load_file(folder / WEIGHTS) for folder in (root / ".work_two_plain" / "checkpoint-4", two))
    assert max(float((end[name] - start[name]).abs().max()) for name in start) > 1e-4


@pytest.mark.parametrize("name", ["two_stopped", "two_stopped_done"])
def test_a_stopped_run_of_two_processes_ends_in_the_same_weights(root, name):
    whole, again = load_file(root / "two_whole" / WEIGHTS), load_file(root / name / WEIGHTS)
    assert whole.keys() == again.keys()
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []
    first, second = (read_json(root / folder / "log.json") for folder in ("two_whole", name))
    for key in CURVES:
        assert curve(first, key).tolist() == curve(second, key).tolist(), key


def test_the_recipe_under_two_processes_writes_the_folder_of_one(tmp_path):
    data = {"n_items": 200, "n_users": 80, "n_requests": 1500}
    split = {"kind": "global_time", "valid_share": 0.05, "test_share": 0.15}
    build_data.main(build_data.Arguments(output_dir=str(tmp_path / "data"), options=data, split=split))
    args = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 2e-3}
    settings = {
        "data_dir": str(tmp_path / "data"),
        "scratch": {**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "text_vocab_size": 500,
        "max_length": 16,
        "base": {"name": "tfidf_svd", "dims": 16},
        "thresholds": {"q2q": 0.5, "i2i": 0.3, "q2i": 0.2},
        "args": {**args, "disable_tqdm": True},
    }
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "two.yaml").write_text(json.dumps({**settings, "output_dir": str(two)}))
    command = ["-m", "sidtune.recipes.steps.align_encoder", "--config", str(tmp_path / "two.yaml")]
    printed = launch("ddp_cpu", command, tmp_path)
    settings["args"]["gradient_accumulation_steps"] = 2
    align_encoder.main(align_encoder.Arguments(output_dir=str(one), **settings))
    assert printed.count("aligned recall@10") == 1  # the main process alone reports and writes
    assert not list(tmp_path.glob(".*"))
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) for folder in (one, two)]
    assert names[0] == names[1]
    for name in ("tokenizer.json", "modules.json", "1_Pooling/config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = read_json(one / "report.json"), read_json(two / "report.json")
    assert_same_curves(first["curves"], second["curves"], 4)
    assert second["mined"] == first["mined"] and second["encoders"] == first["encoders"]
    for expected, found in zip(first["rows"], second["rows"], strict=True):
        assert found["pairs"] == expected["pairs"] > 40
        assert found["recall"] == pytest.approx(expected["recall"], abs=0.03)  # one pair of a near tie
    assert_same_weights(one / WEIGHTS, two / WEIGHTS)


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("zero3", marks=needs_deepspeed)])
def test_a_launch_that_splits_the_weights_is_refused(monkeypatch, tmp_path, kind):
    if kind == "fsdp":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        # Where there is no accelerator FSDP is refused earlier, and for that reason.
        monkeypatch.setattr("sidtune.trainers.common.args.machine_defaults", lambda: {"use_cpu": True})
    else:
        from transformers.integrations import HfDeepSpeedConfig

        alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
        assert alive.is_zero3()
    with pytest.raises(ConfigError, match="needs whole weights on every process; launch it with ddp or zero2"):
        aligned_args({}, tmp_path)

"""A NaN or an infinity in step k stops any trainer at step k, before the weights move, with the checkpoint before it whole."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import launch, needs_deepspeed
from poisons import POISONS, STEPS, TRAINERS, lists, poison_loss, post_rank, sft
from quantizer_data import clusters
from safetensors.torch import load_file

from sidtune.benchmarks.rivals.rerankers.fitting import RerankerConfig, fit_reranker
from sidtune.core.errors import DataError, SidtuneError
from sidtune.core.finite import check_weights, first_broken, is_finite
from sidtune.core.resume import last_complete_checkpoint
from sidtune.models.position_bias.interventions import PositionLog
from sidtune.tokenizers.quantizers.rq_vae import RqVae, RqVaeConfig
from sidtune.trainers.contrastive.trainer import AlignedExamples

pytestmark = pytest.mark.medium

K = 3


def assert_last_checkpoint_is_good(folder: Path, step: int) -> Path:
    kept = last_complete_checkpoint(folder)
    assert kept.name == f"checkpoint-{step}"
    files = list(kept.glob("*.safetensors"))
    assert files and all(first_broken(load_file(file).items()) is None for file in files)
    state = torch.load(kept / "optimizer.pt", weights_only=True)["state"]
    assert first_broken((f"{n}", v) for one in state.values() for n, v in one.items() if torch.is_tensor(v)) is None
    return kept


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_poisoned_step_stops_every_trainer_there(name, poison, value, tmp_path):
    trainer = TRAINERS[name](tmp_path)
    POISONS[poison](trainer, K, value)
    with pytest.raises(SidtuneError, match=f"{poison}.* of step {K} is not finite.*lower learning_rate") as caught:
        trainer.train()
    kept = assert_last_checkpoint_is_good(tmp_path, K - 1)
    assert f"kept at {kept}, from which the same command goes on" in str(caught.value) and "\n" not in str(caught.value)
    assert trainer.state.global_step == K - 1 and not trainer.args.logging_nan_inf_filter
    broken = first_broken(trainer.model.named_parameters())
    assert (broken is not None) == (poison == "weight")  # a bad loss or gradient has moved no weight
    assert len(list(tmp_path.glob("checkpoint-*"))) >= 1 and not (tmp_path / f"checkpoint-{K}").exists()


@pytest.mark.parametrize("name", TRAINERS)
def test_weights_that_break_in_a_step_reach_no_checkpoint(name, tmp_path):
    """The gradient is finite and the step itself goes wrong: found before the checkpoint of that step."""
    trainer = TRAINERS[name](tmp_path)
    POISONS["weight"](trainer, K, math.nan)
    callback = trainer.callback_handler.callbacks[-1]
    callback.on_optimizer_step, callback.on_step_begin = callback.on_step_begin, lambda *a, **k: None
    with pytest.raises(SidtuneError, match=f"weight '.*' of step {K} is not finite"):
        trainer.train()
    assert_last_checkpoint_is_good(tmp_path, K - 1)


def test_weights_that_break_in_the_last_step_are_told(tmp_path):
    trainer = sft(tmp_path, save_strategy="no")
    POISONS["weight"](trainer, STEPS, math.inf)
    callback = trainer.callback_handler.callbacks[-1]
    callback.on_optimizer_step, callback.on_step_begin = callback.on_step_begin, lambda *a, **k: None
    with pytest.raises(SidtuneError, match=f"of step {STEPS} is not finite.*there is no checkpoint yet"):
        trainer.train()


@pytest.mark.parametrize("micro", [0, 1])
def test_one_bad_micro_batch_of_several_is_enough(tmp_path, micro):
    trainer = sft(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    seen, compute = [], trainer.compute_loss

    def bad(*args, **kwargs):
        seen.append(compute(*args, **kwargs))
        return seen[-1] * (math.nan if len(seen) == 2 * (K - 1) + micro + 1 else 1.0)

    trainer.compute_loss = bad
    with pytest.raises(SidtuneError, match=f"The loss of step {K} is not finite"):
        trainer.train()
    assert len(seen) == 2 * K


def test_a_broken_input_is_named(tmp_path):
    trainer = post_rank(tmp_path)
    collate, calls = trainer.data_collator, []

    def bad(samples):
        made = collate(samples)
        calls.append(made)
        if len(calls) == K:
            made["extra"] = torch.tensor([1.0, math.nan])
        return made

    trainer.data_collator = bad
    forward = trainer.model.forward
    trainer.model.forward = lambda *a, extra=None, **k: (
        forward(*a, **k) if extra is None else SimpleNamespace(**{
            n: torch.zeros((), requires_grad=True) * extra.sum() for n in ("loss", "main_loss", "aux_loss")
        })
    )  # fmt: skip
    with pytest.raises(SidtuneError, match=f"input 'extra' of step {K} is not finite"):
        trainer.train()


def test_fp16_may_answer_an_overflow_by_a_smaller_scale(tmp_path):
    trainer = sft(tmp_path)
    scale = SimpleNamespace(get_scale=lambda: 65536.0)
    trainer.accelerator = SimpleNamespace(mixed_precision="fp16", scaler=scale)
    assert trainer._scale_may_fall()
    scale.get_scale = lambda: 0.5  # it fell and fell, and the gradients still overflow
    assert not trainer._scale_may_fall()
    trainer.accelerator.mixed_precision = "bf16"
    assert not trainer._scale_may_fall()


# -- loops of their own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_a_quantizer_stops_and_its_checkpoint_stays_good(tmp_path, monkeypatch, where, value):
    quantizer = RqVae(RqVaeConfig(level_sizes=(4, 4), batch_size=100, epochs=4, hidden=(8,), latent_dims=4, device="cpu",
                                  checkpoint=str(tmp_path / "kept"), checkpoint_every=1))  # fmt: skip
    seen = []
    build = quantizer._build

    def built(dims):
        module = build(dims)
        losses = module.losses

        def bad(*args):
            found, codes = losses(*args)
            seen.append(1)
            if len(seen) == 4 and where == "loss":
                found = {**found, "reconstruction": found["reconstruction"] * value}
            if len(seen) == 4 and where == "gradients":
                found["reconstruction"].register_hook(lambda gradient: gradient * value)
            return found, codes

        module.losses = bad
        return module

    quantizer._build = built
    with pytest.raises(
        SidtuneError, match=rf"{where} of the rq_vae quantizer of step 4 is not finite.*kept at .*checkpoint-1,"
    ):
        quantizer.fit(clusters(300))
    kept = last_complete_checkpoint(tmp_path / "kept" / "checkpoints")
    assert kept.name == "checkpoint-1" and first_broken(load_file(kept / "state.safetensors").items()) is None
    assert first_broken(quantizer.module.named_parameters()) is None


@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_a_reranker_stops_at_its_step(monkeypatch, where):
    from sidtune.benchmarks.rivals.rerankers.listwise import Reranker

    seen, loss_of = [], Reranker.loss

    def bad(self, batch):
        found = loss_of(self, batch)
        seen.append(1)
        if len(seen) == K and where == "gradients":
            found.register_hook(lambda gradient: gradient * math.inf)
        return found * (math.nan if len(seen) == K and where == "loss" else 1.0)

    monkeypatch.setattr(Reranker, "loss", bad)
    with pytest.raises(SidtuneError, match=f"{where} of the re-ranker 'mlp' of step {K} is not finite"):
        fit_reranker("mlp", lists(), np.arange(20), config=RerankerConfig(batch_size=10))
    assert len(seen) == K


# -- where numbers enter -------------------------------------------------------------------------------------------


def test_inputs_that_are_not_finite_are_refused_where_they_enter():
    features, relevance = np.ones((20, 4, 2)), np.ones((20, 4))
    features[1, 2] = relevance[1, 2] = math.inf
    with pytest.raises(DataError, match="'item/x'.*infinite"):
        lists(features)
    with pytest.raises(DataError, match="relevance.*infinite"):
        lists(relevance=relevance)
    with pytest.raises(DataError, match="position"):
        PositionLog.make([1.0, math.nan], [0, 1], [0, 0])
    with pytest.raises(DataError, match="score"):
        AlignedExamples(["a"], ["b"], {"relevance": np.array([[0, 0]])}, np.array([math.nan]))


def test_weights_are_looked_at_whatever_their_kind():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert is_finite(torch.ones(3, dtype=dtype)) and not is_finite(torch.tensor([1, -math.inf], dtype=dtype))
    assert (
        is_finite(torch.ones(2, dtype=torch.int64))
        and is_finite(torch.ones(0))
        and is_finite(torch.ones(2, device="meta"))
    )
    layer = torch.nn.Linear(2, 2)
    check_weights(layer, "here")
    layer.bias.data[1] = math.nan
    with pytest.raises(DataError, match=r"weights of here hold NaN or infinity \(first in 'bias'\).*no ranking exists"):
        check_weights(layer, "here")


# -- several processes ---------------------------------------------------------------------------------------------

WORKER = Path(__file__)


@pytest.mark.parametrize("kind", ["ddp_cpu", pytest.param("zero2_cpu", marks=[needs_deepspeed, pytest.mark.slow])])
def test_all_processes_stop_together_when_one_meets_a_nan(tmp_path, kind):
    launch(kind, [str(WORKER), str(tmp_path)], tmp_path, seconds=120)
    told = [(tmp_path / f"told_{rank}.txt").read_text() for rank in range(2)]
    assert all(f"of step {K} is not finite" in one and f"checkpoint-{K - 1}" in one for one in told)


def work(root: Path) -> None:
    """Only the second process meets the NaN."""
    from sidtune.core.processes import end_processes

    trainer, rank = sft(root / "run", per_device_train_batch_size=4), os.environ["RANK"]
    if rank == "1":
        poison_loss(trainer, K, math.nan)
    try:
        trainer.train()
    except SidtuneError as error:
        (root / f"told_{rank}.txt").write_text(str(error))
    end_processes()


if __name__ == "__main__":
    import sys

    work(Path(sys.argv[1]))

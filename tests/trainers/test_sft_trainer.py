"""SidSFTTrainer: the loss is the textbook one, the parts add up, the order is fixed, wrong input is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from sft_stand_ins import VOCABULARY, level_token_ids, random_examples, tiny_model, tiny_tokenizer
from torch.nn.functional import log_softmax
from transformers import T5Config, T5ForConditionalGeneration

from sidtune.core.errors import ConfigError, DataError
from sidtune.trainers.common.args import sft_config
from sidtune.trainers.common.batches import EpochSampler, epoch_order, measure
from sidtune.trainers.sft.trainer import SidSFTTrainer, packing_error, score_labelled_only


def config(tmp_path, **values):
    values = {
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "disable_tqdm": True,
    } | values
    return sft_config(values, output_dir=tmp_path, max_length=64, seed=3, evaluate=False, where="test")


def trainer(tmp_path, model=None, examples=None, train="all", **values):
    return SidSFTTrainer(
        model or tiny_model(),
        config(tmp_path, **values),
        random_examples() if examples is None else examples,
        None,
        tiny_tokenizer(),
        train=train,
        level_token_ids=level_token_ids(),
    )


def token_losses(model, ids, labels):
    """Oracle: the losses of the learned tokens of one example, from the logits of the model's own forward pass."""
    with torch.no_grad():
        scores = log_softmax(type(model).forward(model, input_ids=torch.tensor([ids])).logits[0, :-1].double(), dim=-1)
    return [-float(scores[n, label]) for n, label in enumerate(labels[1:]) if label != -100]


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_loss_is_the_mean_over_the_learned_tokens_and_the_parts_add_up(tmp_path, kind):
    examples = random_examples(16)
    model = tiny_model(kind)
    losses = [token_losses(model, e["input_ids"], e["labels"]) for e in examples]
    with torch.no_grad():
        best = {
            n: type(model).forward(model, input_ids=torch.tensor([e["input_ids"]])).logits[0, :-1].argmax(-1).tolist()
            for n, e in enumerate(examples)
        }
    run = trainer(tmp_path, model, examples, per_device_train_batch_size=16, max_steps=1)
    run.train()
    log = run.state.log_history[0]
    flat = [x for row in losses for x in row]
    assert log["loss"] == pytest.approx(np.mean(flat), abs=1e-5)
    assert log["target_loss"] == pytest.approx(np.mean(flat), abs=1e-5)
    for task in set(examples["task"]):
        expected = np.mean([x for row, t in zip(losses, examples["task"], strict=True) if t == task for x in row])
        assert log[f"loss_{task}"] == pytest.approx(expected, abs=1e-5)
    for level, ids in enumerate(level_token_ids(), 1):
        hits = [
            best[n][place] == label
            for n, e in enumerate(examples)
            for place, label in enumerate(e["labels"][1:])
            if label in ids
        ]
        assert log[f"sid_accuracy_{level}"] == pytest.approx(np.mean(hits), abs=1e-9)


def test_measuring_changes_neither_loss_nor_gradients(tmp_path):
    from trl import SFTTrainer

    run = trainer(tmp_path)
    plain = SFTTrainer(
        tiny_model(), args=config(tmp_path), train_dataset=random_examples(), processing_class=tiny_tokenizer()
    )
    batch = run.data_collator([random_examples()[n] for n in range(8)])
    ours = run.compute_loss(run.model, dict(batch))
    theirs = plain.compute_loss(plain.model, {k: v for k, v in batch.items() if k != "task_ids"})
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-5)


def test_cpu_scores_only_learned_positions_and_restores_trl():
    original = trl_utils._use_triton
    with pytest.raises(RuntimeError), score_labelled_only(torch.device("cpu")):
        assert trl_utils._use_triton(torch.device("cpu"))
        raise RuntimeError
    assert trl_utils._use_triton is original


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_loss_and_gradients_of_padded_ones(tmp_path, kind, attention):
    examples = random_examples(9)
    losses, gradients = [], []
    for packing in (False, True):
        model = tiny_model(kind, attention=attention)
        run = trainer(tmp_path, model, examples, packing=packing)
        rows = [run.train_dataset[n] for n in range(len(run.train_dataset))]
        batch = run.data_collator([{k: v for k, v in row.items() if v is not None} for row in rows])
        assert ("position_ids" in batch) == packing
        assert (batch["labels"] != -100).sum() == sum(label != -100 for e in examples for label in e["labels"])
        loss = run.compute_loss(run.model, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in run.model.parameters()])
    assert len(run.train_dataset) < 9
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for padded, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, packed, atol=1e-5, rtol=1e-4)


def test_packing_is_refused_for_a_model_whose_examples_see_each_other(tmp_path):
    model = tiny_model()
    forward = model.model.forward
    # A model that ignores position ids cannot tell where an example begins.
    model.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    assert packing_error(model) > 1e-2
    with pytest.raises(ConfigError, match="see each other"):
        trainer(tmp_path, model, packing=True)
    for strategy in ("wrapped", "bfd_split"):
        with pytest.raises(ConfigError, match="cuts examples apart"):
            trainer(tmp_path, packing=True, packing_strategy=strategy)


def test_packed_training_learns(tmp_path):
    run = trainer(tmp_path, packing=True, max_steps=12, learning_rate=1e-2, per_device_train_batch_size=2)
    run.train()
    losses = [h["loss"] for h in run.state.log_history if "loss" in h]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(("train", "decayed"), [("rows", 0), ("lora", 0), ("all", 1)])
def test_weight_decay_spares_embedding_rows(tmp_path, train, decayed):
    run = trainer(tmp_path, train=train, weight_decay=0.1)
    groups = run.create_optimizer().param_groups
    embedding = run.model.get_input_embeddings().weight
    (group,) = [g for g in groups if any(p is embedding for p in g["params"])]
    assert group["weight_decay"] == 0.1 * decayed


def test_order_of_an_epoch_depends_on_seed_and_epoch_only():
    orders = [tuple(epoch_order(100, 5, epoch)) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(100))
    sampler = EpochSampler(100, 5)
    sampler.set_epoch(1)
    assert tuple(sampler) == orders[1]
    assert tuple(epoch_order(100, 6, 0)) != orders[0]


@pytest.mark.parametrize("rows", [7, 64, 1003])
def test_grouping_by_length_keeps_every_example_and_saves_padding(rows):
    lengths = np.random.default_rng(0).integers(1, 200, rows)
    order = epoch_order(rows, 0, 0, lengths, batch=8)
    assert sorted(order) == list(range(rows))

    def padded(sequence):
        return sum(lengths[sequence[n : n + 8]].max() * len(sequence[n : n + 8]) for n in range(0, rows, 8))

    if rows > 64:
        assert padded(order) < 0.7 * padded(epoch_order(rows, 0, 0))


def test_the_global_batch_is_the_same_for_one_and_for_two_processes():
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    lengths = np.random.default_rng(0).integers(1, 50, 96)
    sampler = EpochSampler(96, 1, lengths, batch=16)
    one = list(BatchSampler(sampler, 16, drop_last=False))
    parts = [list(BatchSamplerShard(BatchSampler(sampler, 8, drop_last=False), 2, rank)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(b) for b in one]


def example(ids, labels=None):
    return Dataset.from_dict({"input_ids": [ids], "labels": [ids if labels is None else labels]})


@pytest.mark.parametrize(
    ("dataset", "error", "words"),
    [
        (Dataset.from_dict({"input_ids": [[1, 2]]}), DataError, "'labels' is missing"),
        (Dataset.from_dict({"input_ids": [], "labels": []}), DataError, "no examples"),
        (example([1, 2, 3], [-100, 2]), DataError, "row 0: 'labels' must be as long"),
        (example([1, 2, 3], [1, -100, -100]), DataError, "teaches nothing"),
        (example([1, VOCABULARY]), DataError, f"token id {VOCABULARY} lies outside"),
        (example([1, 2], [-100, VOCABULARY + 5]), DataError, "a label lies outside"),
        (example([1, 2], [-100, -7]), DataError, "a label lies outside"),
        (example([0.5, 2.0]), DataError, "integers only"),
        (example([2] * 65), ConfigError, "1 examples longer than max_length=64 .the longest has 65 tokens"),
    ],
)
def test_wrong_examples_are_refused_in_one_sentence(tmp_path, dataset, error, words):
    with pytest.raises(error, match=words):
        trainer(tmp_path, examples=dataset)


def test_more_tokens_than_positions_are_refused(tmp_path):
    long = sft_config({}, output_dir=tmp_path, max_length=None, seed=0, evaluate=False, where="test")
    with pytest.raises(ConfigError, match="128 positions"):
        SidSFTTrainer(tiny_model("gpt2"), long, example([2] * 129), None, tiny_tokenizer())


def test_an_encoder_decoder_model_is_refused(tmp_path):
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ConfigError, match="encoder-decoder"):
        trainer(tmp_path, model)


def test_sizes_are_those_of_a_plain_loop():
    examples = random_examples(25, seed=4)
    sizes = measure(examples.select([3, 1, 17, 3]))
    rows = [examples[n] for n in (3, 1, 17, 3)]
    assert sizes.tokens.tolist() == [len(r["input_ids"]) for r in rows]
    assert sizes.targets.tolist() == [sum(x != -100 for x in r["labels"][1:]) for r in rows]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rat": 1e-3}, "did you mean 'learning_rate'"),
        ({"output_dir": "x"}, "cannot be set here"),
        ({"max_length": 5}, "set max_length of the stage"),
        ({"learning_rate": "fast"}, "'learning_rate' must be a number"),
        ({"num_train_epochs": [1]}, "'num_train_epochs' must be a number"),
        ({"bf16": "maybe"}, "'bf16' must be true or false"),
        ({"lr_scheduler_type": "sawtooth"}, "do not go together"),
        ({"eval_strategy": "epoch"}, "names no eval_tasks"),
        ({"gradient_checkpointing": True, "activation_checkpointing": True}, "mean the same"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(tmp_path, values, words):
    with pytest.raises(ConfigError, match=words) as caught:
        sft_config(values, output_dir=tmp_path, max_length=8, seed=0, evaluate=False, where="stage 'a', args")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quick", [True, False])
def test_bf16_auto_asks_the_processor_and_a_slow_one_warns(tmp_path, monkeypatch, caplog, quick):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: quick)
    made = {v: config(tmp_path, bf16=v).bf16 for v in ("auto", True, False)}
    assert made == {"auto": quick, True: True, False: False}
    assert [r.message for r in caplog.records if "emulated" in r.message] == (
        [] if quick else ["test: bf16 is emulated on this processor, several times slower; set it to auto or false."]
    )


def test_one_variable_names_the_tracker_of_every_training(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDTUNE_REPORT_TO", "tensorboard")
    monkeypatch.setattr("sidtune.trainers.common.args.get_available_reporting_integrations", lambda: ["tensorboard"])
    assert config(tmp_path).report_to == ["tensorboard"]
    assert config(tmp_path, report_to="none").report_to == []


def test_arguments_fit_a_machine_without_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    made = sft_config({"learning_rate": "1e-4"}, output_dir=tmp_path, max_length=8, seed=9, evaluate=True, where="x")
    assert made.learning_rate == 1e-4
    assert (made.bf16, made.fp16, made.activation_checkpointing, made.use_cpu) == (False, False, False, True)
    assert made.seed == 9 and made.report_to == [] and made.eval_strategy == "epoch"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP"):
        config(tmp_path)

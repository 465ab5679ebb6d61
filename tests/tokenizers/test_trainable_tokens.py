"""What trains: new rows alone, LoRA and new rows, or everything; under TRL's trainer and by oracle."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from lm_stand_ins import CASES, codebooks, extended, inputs, logits, tiny_model, tiny_sids, tiny_tokenizer
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.vocabulary.extension import Vocabulary, extend_vocabulary
from sidtune.tokenizers.vocabulary.saving import load_model
from sidtune.tokenizers.vocabulary.token_matrices import base_of, vocab_matrices
from sidtune.tokenizers.vocabulary.trainable_tokens import (
    plain_model,
    set_trainable,
    split_matrices,
    trained_rows,
)

pytestmark = pytest.mark.medium

LORA = {"r": 4, "lora_alpha": 8}


def prepared(mode, kind="qwen3", tied=True):
    model, tokenizer, vocabulary = extended(kind, tied)
    return set_trainable(model, vocabulary, mode, LORA if mode == "lora" else None), tokenizer, vocabulary


def snapshot(model) -> dict[str, torch.Tensor]:
    """Base weights by plain name, new rows and LoRA factors left out."""
    named = base_of(model).named_parameters()
    wanted = {n.replace(".base_layer.", "."): p for n, p in named if "lora_" not in n and "sid_rows" not in n}
    return {name: parameter.detach().clone() for name, parameter in wanted.items()}


@pytest.mark.parametrize(("kind", "tied"), CASES)
@pytest.mark.parametrize("mode", ["rows", "lora"])
def test_splitting_changes_no_logit_and_the_gradient_is_the_full_one(kind, tied, mode):
    """Oracle: the gradient of `sid_rows` is the plain model's gradient at the new rows (summed over tied uses)."""
    model, _, vocabulary = extended(kind, tied)
    before = logits(model, vocabulary)
    batch = inputs(model, vocabulary, labels=True)
    model(**batch).loss.backward()
    span = slice(vocabulary.start, vocabulary.stop)
    expected = {m.name: m.parameter.grad[span].clone() for m in vocab_matrices(model) if m.used}
    model.zero_grad()

    trained = set_trainable(model, vocabulary, mode, LORA if mode == "lora" else None)
    assert isinstance(trained, PeftModel) == (mode == "lora")
    assert torch.equal(logits(trained, vocabulary), before)
    trained(**batch).loss.backward()
    assert set(trained_rows(trained)) == set(expected)
    parameters = dict(trained.named_parameters())
    for name, gradient in expected.items():
        found = [p.grad for n, p in parameters.items() if f"{name}.sid_rows" in n and p.requires_grad]
        torch.testing.assert_close(found, [gradient], rtol=1e-4, atol=1e-6)
    others = [n for n, p in parameters.items() if p.requires_grad and "sid_rows" not in n]
    assert all("lora_" in n for n in others) and bool(others) == (mode == "lora")
    merged = plain_model(trained)
    assert torch.equal(logits(merged, vocabulary), before) and not split_matrices(merged)
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
    assert all(p.requires_grad for p in merged.parameters())


def examples(vocabulary: Vocabulary, rows: int = 16) -> Dataset:
    random = np.random.default_rng(0)
    return Dataset.from_dict({"input_ids": random.integers(4, vocabulary.stop, (rows, 12)).tolist()})


def trainer_of(model, tokenizer, vocabulary, folder, **options) -> SFTTrainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "weight_decay": 0.5,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "max_length": 32,
    }
    config = SFTConfig(**{**arguments, **options})
    return SFTTrainer(model=model, args=config, train_dataset=examples(vocabulary), processing_class=tokenizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", ["rows", "lora", "all"])
def test_only_what_should_moves_under_trl(mode, tied, tmp_path):
    model, tokenizer, vocabulary = prepared(mode, tied=tied)
    before, start = snapshot(model), trained_rows(model) if mode != "all" else None
    trainer = trainer_of(model, tokenizer, vocabulary, tmp_path, optim="adamw_torch")
    trainer.train()
    after = snapshot(trainer.model)
    if mode == "all":
        assert all(not torch.equal(after[name], value) for name, value in before.items())
        return
    assert isinstance(trainer.model, PeftModel) == (mode == "lora")
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    for name, rows in trained_rows(trainer.model).items():
        assert (rows != start[name]).any(dim=1).all()
    plain = plain_model(trainer.model)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    new = plain.model.embed_tokens.weight
    base, stop = vocabulary.start, vocabulary.stop
    old = before["model.embed_tokens.weight"]
    assert torch.equal(new[:base], old[:base]) and torch.equal(new[stop:], old[stop:])
    assert not torch.equal(new[base:stop], old[base:stop])


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_norm_and_optimizer_count_new_rows_only(tied, tmp_path):
    model, tokenizer, vocabulary = extended("qwen3", tied)
    batch = torch.tensor(examples(vocabulary, 16)["input_ids"])
    model(input_ids=batch, labels=batch).loss.backward()
    span = slice(vocabulary.start, vocabulary.stop)
    norm = torch.stack([m.parameter.grad[span].norm() for m in vocab_matrices(model)]).norm()
    model.zero_grad()
    trainer = trainer_of(
        set_trainable(model, vocabulary), tokenizer, vocabulary, tmp_path, max_steps=1, per_device_train_batch_size=16
    )
    trainer.train()
    logged = next(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log)
    assert logged == pytest.approx(float(norm), rel=1e-4)
    held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert held == (vocabulary.stop - vocabulary.start) * 32 * (1 if tied else 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", ["rows", "lora"])
def test_a_run_that_was_interrupted_goes_on_the_same(mode, tied, tmp_path):
    def fresh(folder, **options):
        model, tokenizer, vocabulary = extended("qwen3", tied)
        for part in (model, tokenizer, vocabulary):
            part.save_pretrained(tmp_path / "base")
        model = set_trainable(load_model(tmp_path / "base"), vocabulary, mode, LORA if mode == "lora" else None)
        return trainer_of(model, tokenizer, vocabulary, folder, save_strategy="steps", save_steps=2, **options)

    whole = fresh(tmp_path / "a")
    whole.train()
    resumed = fresh(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    vocabulary = extended("qwen3", tied)[2]
    expected = logits(whole.model, vocabulary)
    assert torch.equal(logits(resumed.model, vocabulary), expected)
    stored = load_model(tmp_path / "a" / "checkpoint-4")
    torch.testing.assert_close(logits(stored, vocabulary), expected, rtol=1e-5, atol=1e-5)
    if mode == "lora":  # a peer's complaint: the whole matrix beside every adapter
        assert (tmp_path / "a" / "checkpoint-4" / "adapter_model.safetensors").stat().st_size < 60_000


def test_gradient_checkpointing_gives_the_same_rows(tmp_path):
    found = []
    for on in (False, True):
        model, tokenizer, vocabulary = prepared("rows")
        trainer = trainer_of(model, tokenizer, vocabulary, tmp_path, max_steps=2, gradient_checkpointing=on)
        trainer.train()
        found.append(trained_rows(trainer.model)["model.embed_tokens"])
    torch.testing.assert_close(found[0], found[1])


def test_the_reference_of_a_lora_model_is_the_start(tmp_path):
    """TRL's reference model is the policy with its adapter switched off: it must not see trained rows."""
    model, tokenizer, vocabulary = prepared("lora", tied=False)
    before = logits(model, vocabulary)
    trainer_of(model, tokenizer, vocabulary, tmp_path).train()
    assert not torch.allclose(logits(model, vocabulary), before, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, vocabulary), before)


def _shift_rows(model, by: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sid_rows" in name and "original_module" not in name:
                parameter += by * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_the_state_dict_is_a_plain_model(kind, tied):
    model, _, vocabulary = prepared("rows", kind, tied)
    names = set(extended(kind, tied)[0].state_dict())
    _shift_rows(model, 0.5)
    state = copy.deepcopy(model.state_dict())
    assert set(state) == names
    plain = extended(kind, tied)[0]
    plain.load_state_dict(state)
    assert torch.equal(logits(plain, vocabulary), logits(model, vocabulary))
    other = prepared("rows", kind, tied)[0]
    other.load_state_dict(state)
    assert torch.equal(logits(other, vocabulary), logits(model, vocabulary))
    for name, rows in trained_rows(model).items():
        assert torch.equal(trained_rows(other)[name], rows)


@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_is_independent(tied):
    model, _, vocabulary = prepared("rows", tied=tied)
    before = logits(model, vocabulary)
    twin = copy.deepcopy(model)
    _shift_rows(twin, 0.5)
    assert torch.equal(logits(model, vocabulary), before)
    changed = logits(twin, vocabulary)
    assert not torch.allclose(changed, before, atol=1e-2)
    assert torch.equal(logits(plain_model(twin), vocabulary), changed)
    assert torch.equal(logits(model, vocabulary), before)


@pytest.mark.parametrize("kind", ["qwen3", "t5"])
@pytest.mark.parametrize("mode", ["rows", "lora"])
def test_generation_equals_the_merged_model(kind, mode):
    model, _, vocabulary = prepared(mode, kind)
    _shift_rows(model, 0.7)
    batch = {k: v for k, v in inputs(model, vocabulary).items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    ours = model.eval().generate(**batch, **options)
    assert torch.equal(plain_model(model).eval().generate(**batch, **options), ours)


def test_modes_follow_each_other():
    model, _, vocabulary = extended("qwen3", False)
    model = set_trainable(model, vocabulary, "rows")
    _shift_rows(model, 0.5)
    expected = logits(model, vocabulary)
    model = set_trainable(model, vocabulary, "rows")
    assert torch.equal(logits(model, vocabulary), expected)
    model = set_trainable(model, vocabulary, "all")
    assert torch.equal(logits(model, vocabulary), expected) and not split_matrices(model)
    assert all(p.requires_grad for p in model.parameters())
    adapted = set_trainable(model, vocabulary, "lora", LORA)
    assert torch.equal(logits(adapted, vocabulary), expected)
    again = set_trainable(plain_model(adapted), vocabulary, "lora", LORA)
    assert torch.equal(logits(again, vocabulary), expected)


def test_lora_is_seeded_and_leaves_the_random_state_alone():
    def factors(seed):
        model, _, vocabulary = extended()
        torch.manual_seed(3)
        adapted = set_trainable(model, vocabulary, "lora", LORA, seed=seed)
        return torch.cat([p.flatten() for n, p in adapted.named_parameters() if "lora_A" in n]), torch.rand(2)

    (one, state), (same, _), (other, _) = factors(1), factors(1), factors(2)
    torch.manual_seed(3)
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(state, torch.rand(2))
    (drawn, after), (again, _) = factors(None), factors(None)
    assert torch.equal(drawn, again) and not torch.equal(after, state)


def test_merging_by_peft_itself_does_not_untie_the_model():
    model, _, vocabulary = prepared("lora")
    merged = plain_model(model)
    assert merged.config.tie_word_embeddings and not hasattr(merged, "peft_config")


@pytest.mark.parametrize(
    ("mode", "lora", "words"),
    [
        ("row", None, "did you mean 'rows'"),
        ("rows", {"r": 4}, "need mode 'lora'"),
        ("lora", {"rank": 4}, "unknown key 'rank'"),
        ("lora", {"task_type": "CAUSAL_LM"}, "unknown key 'task_type'"),
        ("lora", {"target_modules": ["q_proj", "lm_head"]}, "'lm_head' in target_modules"),
        ("lora", {"target_modules": ["model.embed_tokens"]}, "'embed_tokens' in target_modules"),
        ("lora", {"modules_to_save": ["embed_tokens"]}, "'embed_tokens' in modules_to_save"),
        ("lora", {"target_modules": ["no_such_layer"]}, "do not fit Qwen3ForCausalLM"),
        ("lora", {"r": 0}, "do not fit Qwen3ForCausalLM"),
    ],
)
def test_bad_options_are_one_sentence_and_leave_a_plain_model(mode, lora, words):
    model, _, vocabulary = extended()
    before = logits(model, vocabulary)
    with pytest.raises(ConfigError, match=words) as caught:
        set_trainable(model, vocabulary, mode, lora)
    assert "\n" not in str(caught.value)
    assert not split_matrices(model) and torch.equal(logits(model, vocabulary), before)


def test_a_model_with_an_adapter_or_of_another_size_is_refused():
    model, _, vocabulary = prepared("lora")
    for mode in ("rows", "lora", "all"):
        with pytest.raises(ConfigError, match="carries an adapter"):
            set_trainable(model, vocabulary, mode)
    with pytest.raises(DataError, match="use the extended model"):
        set_trainable(tiny_model(), vocabulary, "rows")
    with pytest.raises(ConfigError, match="no rows that train"):
        trained_rows(tiny_model())


def test_an_embedding_that_does_more_than_look_up_is_refused():
    model, _, vocabulary = extended()
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(ConfigError, match="mode 'all'"):
        set_trainable(model, vocabulary, "rows")


def test_a_scaled_embedding_keeps_its_scale():
    model, tokenizer = tiny_model("bart"), tiny_tokenizer()
    for module in (model.model.encoder.embed_tokens, model.model.decoder.embed_tokens):
        module.embed_scale = 3.0
    vocabulary = extend_vocabulary(model, tokenizer, tiny_sids(), codebooks=codebooks())
    before = logits(model, vocabulary)
    assert torch.equal(logits(set_trainable(model, vocabulary), vocabulary), before)


def test_an_error_inside_the_head_is_not_hidden():
    """An AttributeError in the property would make torch answer with the stale matrix."""
    model, _, vocabulary = prepared("rows")
    del model.lm_head.__dict__["_rows_span"]
    with pytest.raises(RuntimeError, match="cannot be put together"):
        _ = model.lm_head.weight

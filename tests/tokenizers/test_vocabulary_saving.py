"""Round trips of what was trained: equal logits, small files, and a clear sentence for every wrong or damaged file."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from lm_stand_ins import CASES, codebooks, extended, logits, tiny_model, tiny_sids, tiny_tokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import fingerprint, write_folder
from sidtune.tokenizers.base_models.loading import load_plain
from sidtune.tokenizers.vocabulary.extension import extend_vocabulary
from sidtune.tokenizers.vocabulary.saving import load_model, load_trained, merge_and_save, save_trained
from sidtune.tokenizers.vocabulary.token_matrices import vocab_matrices
from sidtune.tokenizers.vocabulary.trainable_tokens import set_trainable, split_matrices

pytestmark = pytest.mark.medium

LORA = {"r": 4, "lora_alpha": 8}


def changed(model):
    """Moves everything that trains, as an optimizer would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def saved_base(folder, kind="qwen3", tied=True):
    model, tokenizer, vocabulary = extended(kind, tied)
    for part in (model, tokenizer, vocabulary):
        part.save_pretrained(folder)
    return folder


def trained(folder, mode, kind="qwen3", tied=True):
    """`(model, vocabulary, tokenizer)` from a saved base, with changed weights."""
    _, tokenizer, vocabulary = extended(kind, tied)
    model = load_model(saved_base(folder, kind, tied))
    return changed(set_trainable(model, vocabulary, mode, LORA if mode == "lora" else None)), vocabulary, tokenizer


# llama and mt5 keep their matrices where qwen3 and t5 do
@pytest.mark.parametrize(("kind", "tied"), [case for case in CASES if case[0] not in ("llama", "mt5")])
@pytest.mark.parametrize("mode", ["rows", "lora", "all"])
def test_round_trips_keep_the_logits(mode, kind, tied, tmp_path):
    model, vocabulary, tokenizer = trained(tmp_path / "base", mode, kind, tied)
    expected = logits(model, vocabulary)
    assert not torch.allclose(expected, logits(load_model(tmp_path / "base"), vocabulary), atol=1e-2)
    save_trained(model, vocabulary, tokenizer, tmp_path / "out")

    again, its_tokenizer, its_vocabulary = load_trained(tmp_path / "out")
    assert isinstance(again, PeftModel) == (mode == "lora") and not again.training
    assert torch.equal(logits(again, vocabulary), expected)
    assert np.array_equal(its_vocabulary.sid_token_ids, vocabulary.sid_token_ids)
    assert its_tokenizer.encode("pen<a_3><b_1><c_2>") == tokenizer.encode("pen<a_3><b_1><c_2>")
    close = {"rtol": 1e-4, "atol": 1e-4} if mode == "lora" else {"rtol": 0, "atol": 0}
    merged = load_model(tmp_path / "out")
    torch.testing.assert_close(logits(merged, vocabulary), expected, **close)
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied

    merge_and_save(model, vocabulary, tokenizer, tmp_path / "serving")
    family = AutoModelForSeq2SeqLM if merged.config.is_encoder_decoder else AutoModelForCausalLM
    served, report = family.from_pretrained(tmp_path / "serving", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(logits(served, vocabulary), expected, **close)
    assert torch.equal(logits(load_trained(tmp_path / "serving")[0], vocabulary), logits(served, vocabulary))


@pytest.mark.parametrize("tied", [True, False])
def test_peft_alone_loads_the_adapter_with_its_rows(tied, tmp_path):
    """Whoever does not know sidtune must not get the rows of the start silently."""
    model, vocabulary, tokenizer = trained(tmp_path / "base", "lora", tied=tied)
    save_trained(model, vocabulary, tokenizer, tmp_path / "out")
    plain = PeftModel.from_pretrained(load_plain(tmp_path / "base"), tmp_path / "out")
    assert torch.equal(logits(plain, vocabulary), logits(model, vocabulary))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_files_hold_the_new_rows_and_nothing_else(tied, tmp_path):
    model, vocabulary, tokenizer = trained(tmp_path / "base", "rows", tied=tied)
    save_trained(model, vocabulary, tokenizer, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "sid_rows.safetensors")
    names = ["model.embed_tokens"] + ([] if tied else ["lm_head"])
    assert {name: tuple(rows.shape) for name, rows in tensors.items()} == dict.fromkeys(names, (12, 32))
    assert not list((tmp_path / "out").glob("*model*.safetensors"))
    model, vocabulary, tokenizer = trained(tmp_path / "base", "lora", tied=tied)
    save_trained(model, vocabulary, tokenizer, tmp_path / "lora")
    largest = max(tensor.numel() for tensor in load_file(tmp_path / "lora" / "adapter_model.safetensors").values())
    assert largest <= 12 * 32


@pytest.mark.parametrize("mode", ["rows", "lora"])
@pytest.mark.parametrize("spare", [0, 200])
def test_the_original_model_is_enough_as_a_base(mode, spare, tmp_path):
    """The rows file is complete: published beside a public base, it needs no extended copy of that base."""

    def original():
        model = tiny_model("qwen3", False)
        if spare:  # like Qwen3: more rows than tokens, with junk in them
            for matrix in vocab_matrices(model):
                junk = torch.nn.Parameter(torch.cat([matrix.parameter.detach(), torch.full((spare, 32), 9.0)]))
                for module in matrix.modules:
                    module.weight = junk
            model.config.vocab_size = model.vocab_size = 300 + spare
            model.model.embed_tokens.num_embeddings = model.lm_head.out_features = 300 + spare
        return model

    original().save_pretrained(tmp_path / "public")
    model, tokenizer = load_plain(tmp_path / "public"), tiny_tokenizer()
    vocabulary = extend_vocabulary(model, tokenizer, tiny_sids(), codebooks=codebooks())
    model = changed(set_trainable(model, vocabulary, mode, LORA if mode == "lora" else None))
    save_trained(model, vocabulary, tokenizer, tmp_path / "out")
    loaded = load_trained(tmp_path / "out")[0]
    torch.testing.assert_close(logits(loaded, vocabulary), logits(model, vocabulary), rtol=1e-5, atol=1e-5)
    given = load_trained(tmp_path / "out", base_model=original())[0]
    assert torch.equal(logits(given, vocabulary), logits(loaded, vocabulary))


def test_stages_chain_by_reference(tmp_path):
    """Rows on a base, LoRA on those rows, LoRA again: each folder is small and finds the one before."""
    model, vocabulary, tokenizer = trained(tmp_path / "base", "rows")
    save_trained(model, vocabulary, tokenizer, tmp_path / "run" / "stage1")
    for number in (2, 3):
        model = load_model(tmp_path / "run" / f"stage{number - 1}")
        model = changed(set_trainable(model, vocabulary, "lora", LORA))
        with write_folder(tmp_path / "run" / f"stage{number}") as scratch:
            save_trained(model, vocabulary, tokenizer, scratch)
    expected = logits(model, vocabulary)
    record = json.loads((tmp_path / "run" / "stage3" / "trained.json").read_text())
    assert record["base_model"] == "../stage2"
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = logits(load_model(tmp_path / "moved" / "stage3"), vocabulary)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)
    shutil.rmtree(tmp_path / "moved" / "stage1")
    with pytest.raises(DataError, match="base model.*does not exist"):
        load_model(tmp_path / "moved" / "stage3")


def test_another_dtype_of_the_base_is_recognised_as_the_same(tmp_path):
    model, vocabulary, tokenizer = trained(tmp_path / "base", "lora")
    save_trained(model, vocabulary, tokenizer, tmp_path / "out")
    for dtype in ("bfloat16", "float16"):
        assert load_trained(tmp_path / "out", dtype=dtype)[0].dtype == getattr(torch, dtype)
    half = load_model(tmp_path / "base", dtype="bfloat16")
    half = changed(set_trainable(half, vocabulary, "rows"))
    save_trained(half, vocabulary, tokenizer, tmp_path / "half")
    assert torch.isfinite(logits(load_trained(tmp_path / "half", dtype="float16")[0], vocabulary)).all()
    assert torch.isfinite(logits(load_trained(tmp_path / "half")[0], vocabulary)).all()


def test_a_slightly_different_base_is_refused(tmp_path):
    model, vocabulary, tokenizer = trained(tmp_path / "base", "rows")
    save_trained(model, vocabulary, tokenizer, tmp_path / "out")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        other = load_model(tmp_path / "base")
        with torch.no_grad():
            other.get_parameter(name).mul_(1.001)
        with pytest.raises(DataError, match=f"another base model: the weight '{name}'"):
            load_trained(tmp_path / "out", base_model=other)
    for wrong in (tiny_model("gpt2"), tiny_model("qwen3", False), tiny_model("t5")):
        with pytest.raises(DataError, match="another base|no new rows"):
            load_trained(tmp_path / "out", base_model=wrong)


def _truncate(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-40])


def _rewrite(folder, name, change, keep_sum=False):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    if keep_sum:
        record = json.loads((folder / "trained.json").read_text())
        record["sha256"] = fingerprint(folder / name)
        (folder / "trained.json").write_text(json.dumps(record))


ROW = "model.embed_tokens"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f, n, k: _truncate(f, n), "is damaged"),
        (lambda f, n, k: (f / n).unlink(), "does not exist, but trained.json names it"),
        (lambda f, n, k: _rewrite(f, n, lambda t: t.update({k: t[k] + 1})), "is not the one"),
        (
            lambda f, n, k: _rewrite(f, n, lambda t: t.update({k: t[k][:5].clone()}), True),
            r"expected 12 new rows.*\(5, 32",
        ),
        (lambda f, n, k: _rewrite(f, n, lambda t: t.pop(k), True), "got none"),
        (lambda f, n, k: _rewrite(f, n, lambda t: t.update({k: t[k] * np.nan}), True), "NaN or infinity"),
        (lambda f, n, k: _rewrite(f, n, lambda t: t.update({k: t[k][:, :9].clone()}), True), "no new rows that fit"),
        (lambda f, n, k: (f / "trained.json").write_text("{}"), "trained.json is damaged"),
        (lambda f, n, k: (f / "trained.json").write_text("{"), "not readable JSON"),
        (lambda f, n, k: (f / "sid_vocabulary.json").unlink(), "sid_vocabulary.json does not exist"),
        (lambda f, n, k: (f / "tokenizer.json").unlink() or (f / "tokenizer_config.json").unlink(), "no tokenizer"),
        (lambda f, n, k: tiny_tokenizer().save_pretrained(f), "does not hold the SID tokens"),
        (lambda f, n, k: shutil.rmtree(f.parent / "base"), "base model.*does not exist"),
    ],
)
@pytest.mark.parametrize("mode", ["rows", "lora"])
def test_damaged_folders_are_one_sentence(mode, damage, words, tmp_path):
    model, vocabulary, tokenizer = trained(tmp_path / "base", mode)
    save_trained(model, vocabulary, tokenizer, tmp_path / "out")
    file, key = "sid_rows.safetensors", ROW
    if mode == "lora":
        file, key = "adapter_model.safetensors", f"base_model.model.{ROW}.token_adapter.trainable_tokens_delta"
    damage(tmp_path / "out", file, key)
    with pytest.raises(DataError, match=words) as caught:
        load_trained(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_an_adapter_that_does_not_fit_is_one_sentence(tmp_path):
    model, vocabulary, tokenizer = trained(tmp_path / "base", "lora")
    save_trained(model, vocabulary, tokenizer, tmp_path / "out")

    def drop(tensors):
        del tensors[next(key for key in tensors if "lora_A" in key)]

    _rewrite(tmp_path / "out", "adapter_model.safetensors", drop, True)
    with pytest.raises(DataError, match="does not fit its base"):
        load_trained(tmp_path / "out")
    (tmp_path / "out" / "adapter_config.json").write_text("{")
    with pytest.raises(DataError, match="adapter config.*damaged"):
        load_trained(tmp_path / "out")


def test_saving_refuses_what_could_not_be_loaded(tmp_path):
    model, tokenizer, vocabulary = extended()
    rows = set_trainable(model, vocabulary, "rows")
    with pytest.raises(ConfigError, match="never saved"):
        save_trained(rows, vocabulary, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_trained(rows, vocabulary, tokenizer, tmp_path / "out", base_model="someone/model")
    assert json.loads((tmp_path / "out" / "trained.json").read_text())["base_model"] == "someone/model"
    saved_base(tmp_path / "base")
    with pytest.raises(ConfigError, match="holds a full model"):
        save_trained(rows, vocabulary, tokenizer, tmp_path / "base", base_model="someone/model")
    save_trained(rows, vocabulary, tokenizer, tmp_path / "none", base_model="x", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_saving_leaves_the_model_in_training(tmp_path):
    model, vocabulary, tokenizer = trained(tmp_path / "base", "lora", tied=False)
    before = logits(model, vocabulary)
    save_trained(model, vocabulary, tokenizer, tmp_path / "out")
    assert len(split_matrices(model)) == 2 and torch.equal(logits(model, vocabulary), before)
    assert model.peft_config["default"].modules_to_save == ["sid_rows"]
    save_trained(changed(model), vocabulary, tokenizer, tmp_path / "out")
    assert torch.equal(logits(load_trained(tmp_path / "out")[0], vocabulary), logits(model, vocabulary))


def test_load_model_takes_foreign_adapters_and_says_what_is_wrong(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = saved_base(tmp_path / "base")
    _, _, vocabulary = extended()
    model = changed(get_peft_model(load_model(base), LoraConfig(r=2, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(load_model(tmp_path / "adapter"), vocabulary), logits(model, vocabulary))
    with pytest.raises(ConfigError, match="not made by set_trainable"):
        save_trained(model, vocabulary, tiny_tokenizer(), tmp_path / "x")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(DataError, match="does not exist"):
        load_model(tmp_path / "adapter")
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError):
            load_model(place)
    with pytest.raises(DataError, match="does not exist"):
        load_trained(tmp_path / "none")


def test_weights_of_a_sharded_run_are_not_taken_for_a_model(tmp_path):
    """A ZeRO-3 checkpoint holds the stale matrix beside the trained rows."""
    base = saved_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({**weights, "model.embed_tokens.sid_rows.weight": torch.zeros(12, 32)}, base / "model.safetensors")
    with pytest.raises(DataError, match="unmerged SID rows"):
        load_model(base)

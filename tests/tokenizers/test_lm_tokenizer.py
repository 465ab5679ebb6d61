"""Byte-level BPE from scratch and models made from a config."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_stand_ins import CASES, TITLES, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.base_models.from_scratch import build_model, train_lm_tokenizer


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40))
def test_every_text_survives_encoding(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text


def test_the_same_texts_give_the_same_tokenizer():
    texts = [f"{title} {n}" for title in TITLES for n in range(20)]
    first, second = (train_lm_tokenizer(iter(texts), 400) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 400
    assert train_lm_tokenizer(texts[:1], 4000).vocab_size < 400  # fewer pairs than asked for


def test_merges_learn_the_catalogue():
    tokenizer = train_lm_tokenizer(["heavy duty stapler"] * 5, 320)
    assert len(tokenizer("heavy duty stapler")["input_ids"]) == 3
    assert tokenizer("heavy")["input_ids"] + tokenizer(" duty")["input_ids"] == tokenizer("heavy duty")["input_ids"]


def test_special_tokens_and_chat():
    chat = tiny_tokenizer()
    assert (chat.pad_token, chat.eos_token, chat.bos_token) == ("<|pad|>", "<|im_end|>", None)
    assert chat.encode("<|im_start|>") == [chat.convert_tokens_to_ids("<|im_start|>")]
    text = chat.apply_chat_template([{"role": "user", "content": "pen"}], add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\npen<|im_end|>\n<|im_start|>assistant\n"
    plain = train_lm_tokenizer(TITLES, 300, chat_tokens=False)
    assert plain.eos_token == "<|endoftext|>" and "<|im_start|>" not in plain.get_vocab()
    assert plain.chat_template is None


def test_saved_and_loaded_tokenizer_is_the_same(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TITLES, "a  b\n c", "<|im_start|>user", "日本 🖊"]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.eos_token_id == tokenizer.eos_token_id and loaded.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("texts", "size", "error", "words"),
    [
        (["a"], 259, ConfigError, "at least 260"),
        ([], 300, DataError, "no text"),
        (["", ""], 300, DataError, "no text"),
        (["a", None], 300, DataError, "number 1.*NoneType"),
        (["a", "\ud800"], 300, DataError, "surrogate"),
    ],
)
def test_bad_training_input_is_one_sentence(texts, size, error, words):
    with pytest.raises(error, match=words):
        train_lm_tokenizer(texts, size)


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_models_fit_the_tokenizer(kind, tied):
    tokenizer, model = tiny_tokenizer(), tiny_model(kind, tied)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.shape[0] == head.shape[0] == len(tokenizer) == model.config.vocab_size
    assert (embedding is head) == tied
    assert model.config.pad_token_id == tokenizer.pad_token_id and model.config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([tokenizer("blue pen")["input_ids"]])
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.max() < len(tokenizer)


def test_models_are_seeded_and_leave_the_random_state_alone():
    tokenizer = tiny_tokenizer()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = build_model({"hidden_size": 32}, tokenizer, seed=1)
    assert torch.equal(torch.rand(3), expected)
    two, other = (build_model({"hidden_size": 32}, tokenizer, seed=seed) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.dtype == torch.float32 and one.config.model_type == "qwen3"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen33"}, "model_type 'qwen33'.*did you mean"),
        ({"model_type": None}, "model_type 'None'"),
        ({"hiden_size": 32}, "did you mean 'hidden_size'"),
        ({"vocab_size": 10}, "'vocab_size' comes from the tokenizer"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"model_type": "bert-generation-x"}, "no model_type"),
        ({"model_type": "vit"}, "makes no model"),
        ({"num_attention_heads": 0}, "qwen3"),
    ],
)
def test_bad_model_configs_are_one_sentence(config, words):
    with pytest.raises(ConfigError, match=words) as caught:
        build_model(config, tiny_tokenizer())
    assert "\n" not in str(caught.value)

"""Tiny models, a word-level tokenizer and random examples for the tests of the trainers."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

WORDS = 60
LEVELS = (("<a_0>", "<a_1>", "<a_2>"), ("<b_0>", "<b_1>", "<b_2>"))
VOCABULARY = WORDS + 2 + 6


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *(f"w{n}" for n in range(WORDS)), *LEVELS[0], *LEVELS[1]]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def level_token_ids() -> list[list[int]]:
    return [[WORDS + 2 + 3 * level + n for n in range(3)] for level in range(2)]


def tiny_model(kind: str = "qwen3", seed: int = 0, attention: str = "sdpa"):
    """A random model of about 30 000 parameters, fp32, without dropout."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=128,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.2,
            attn_implementation=attention,
        )
        return GPT2LMHeadModel(config)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        attn_implementation=attention,
    )
    return Qwen3ForCausalLM(config)


def random_examples(rows: int = 48, seed: int = 1, longest: int = 24) -> Dataset:
    """Examples of two tasks: words, then a SID of two tokens that follows from the first word."""
    random = np.random.default_rng(seed)
    sids = level_token_ids()
    made = {"input_ids": [], "labels": [], "task": []}
    for row in range(rows):
        words = (2 + random.integers(0, WORDS, random.integers(3, longest - 2))).tolist()
        sid = [sids[0][words[0] % 3], sids[1][words[0] // 3 % 3]]
        learned = words[-1:] if row % 3 == 0 else []
        made["input_ids"].append(words + sid)
        made["labels"].append([-100] * (len(words) - len(learned)) + learned + sid)
        made["task"].append("text_to_sid" if row % 3 else "query_to_text")
    return Dataset.from_dict(made)


def model_folder(folder, kind: str = "qwen3", seed: int = 0):
    """Writes a tiny model with tokenizer and SID vocabulary, as `init_model` would."""
    from sidtune.tokenizers.vocabulary.extension import Vocabulary

    tiny_model(kind, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    Vocabulary((3, 3), np.arange(WORDS + 2, VOCABULARY), WORDS + 2, VOCABULARY).save_pretrained(folder)
    return folder


def task_examples(stage, split: str, model) -> dict[str, Dataset]:
    """A `build_examples` of two random tasks."""
    mixes = stage.tasks if split == "train" else stage.eval_tasks
    examples = random_examples(48, seed=1 if split == "train" else 2)
    return {task: examples.filter(lambda e, task=task: e["task"] == task) for task in mixes}

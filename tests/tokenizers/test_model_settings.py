"""What a base brings or a trainer leaves in a model's configs: reset where it is opened and saved, so nothing cuts a legal SID."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from sft_stand_ins import VOCABULARY, WORDS, model_folder, random_examples, task_examples, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from sidtune.core.errors import DataError
from sidtune.decoding.beam_search import sid_beam_search
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.base_models.from_scratch import build_model
from sidtune.tokenizers.base_models.loading import hub_id, load_plain
from sidtune.tokenizers.base_models.settings import RESET, clean_settings
from sidtune.tokenizers.vocabulary.extension import Vocabulary
from sidtune.tokenizers.vocabulary.saving import load_model, save_trained
from sidtune.trainers.common.args import sft_config
from sidtune.trainers.sft.trainer import SidSFTTrainer

pytestmark = pytest.mark.medium

SID = WORDS + 2  # the first SID token
# As bases ship them; each cuts or re-weighs SIDs, or cannot be saved, or points outside the vocabulary.
FOREIGN = {
    "temperature without do_sample": {"temperature": 0.9, "top_p": 0.6},
    "top_k of a chat model": {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 0.7},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
    "beams": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    "beam settings without beams": {"early_stopping": True, "length_penalty": 2.0},
    "several sequences without beams": {"num_return_sequences": 3},
    "diversity": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2},
    "forced tokens": {"forced_bos_token_id": 0, "forced_eos_token_id": 1},
    "bad words": {"bad_words_ids": [[SID], [SID + 4]]},
    "suppressed": {"suppress_tokens": [SID, SID + 1], "begin_suppress_tokens": [SID + 2]},
    "bias": {"sequence_bias": [[[SID], -10.0]]},
    "lengths": {"max_length": 8, "min_length": 4, "max_new_tokens": 1, "min_new_tokens": 9},
    "a time limit": {"max_time": 0.001},
    "decay": {"exponential_decay_length_penalty": [2, 1.5]},
    "outputs": {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True},
    "what transformers refuses to read": {
        "max_new_tokens": 0,
        "early_stopping": "always",
        "cache_implementation": "none",
    },
    "no cache": {"use_cache": False},
    "eos outside": {"eos_token_id": [VOCABULARY + 7, 1]},
    "eos and pad outside": {"eos_token_id": 99_999, "pad_token_id": -1},
    "eos that is a SID": {"eos_token_id": SID + 1, "pad_token_id": SID},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("start") / "model")


def copied(start, to, generation=None, **config):
    """The start model with other settings beside its weights."""
    to.mkdir()
    for file in start.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    if generation is not None:
        (to / "generation_config.json").write_text(json.dumps(generation))
    values = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(values | config))
    return to


def saved_settings(folder):
    return {
        k: v
        for k, v in json.loads((folder / "generation_config.json").read_text()).items()
        if k != "transformers_version"
    }


def parts(folder):
    return Vocabulary.from_pretrained(folder), tiny_tokenizer()


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_foreign_generation_settings_neither_stop_saving_nor_reach_the_saved_model(start, tmp_path, foreign, caplog):
    folder = copied(start, tmp_path / "base", foreign)
    with caplog.at_level(logging.INFO, "sidtune"):
        save_trained(load_model(folder), *parts(start), tmp_path / "saved")
    assert saved_settings(tmp_path / "saved") == {"eos_token_id": found(foreign), "pad_token_id": 0}
    told = " ".join(record.getMessage() for record in caplog.records)
    assert all(f"{name}=" in told for name, value in foreign.items() if value is not False or name == "use_cache"), told
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 9, SID]])
    assert torch.equal(again(ids).logits, AutoModelForCausalLM.from_pretrained(start)(ids).logits)


def found(foreign):
    given = foreign.get("eos_token_id", 1)
    return [1] if isinstance(given, list) else 1


def test_the_model_that_is_trained_can_be_saved_by_transformers_too(start, tmp_path):
    load_plain(copied(start, tmp_path / "base", FOREIGN["temperature without do_sample"])).save_pretrained(
        tmp_path / "saved"
    )


def test_settings_that_do_nothing_are_not_told(start, caplog):
    model = load_model(start)
    with caplog.at_level(logging.INFO, "sidtune"):
        assert clean_settings(model, tiny_tokenizer(), range(SID, VOCABULARY)) == [] and not caplog.records


def test_every_setting_of_the_table_is_reset(start):
    model = load_model(start)
    for name, harmless in RESET.items():
        setattr(model.generation_config, name, "changed" if isinstance(harmless[0], str) else 12345)
        setattr(model.config, name, 12345)  # transformers refuses to save a config that holds one
    told = " ".join(clean_settings(model))
    assert all(f"{name}=" in told for name in RESET)
    fresh = GenerationConfig()
    for name, harmless in RESET.items():
        assert getattr(model.generation_config, name, None) == getattr(fresh, name, None)
        assert getattr(model.config, name) in (None, *harmless)


LEFT = {"use_cache": False, "output_hidden_states": True, "output_attentions": True}


def test_what_a_trainer_left_in_the_config_is_reset_and_the_dtype_is_that_of_the_weights(start, tmp_path):
    folder = copied(start, tmp_path / "base", dtype="bfloat16", **LEFT)
    model = load_model(folder)
    assert model.config.use_cache and not model.config.output_hidden_states and not model.config.output_attentions
    model.config.use_cache = False  # a trainer does so again
    save_trained(model, *parts(start), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config.get("use_cache", True) and not config.get("output_attentions", False)
    assert config["dtype"] == "float32" and next(load_model(tmp_path / "saved").parameters()).dtype == torch.float32


def test_weights_that_are_no_numbers_are_refused_at_opening(start, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(start)
    model.model.norm.weight.data[3] = torch.nan
    folder = copied(start, tmp_path / "broken")
    model.save_pretrained(folder)
    for open_it in (load_plain, load_model):
        with pytest.raises(DataError, match=r"broken hold NaN or infinity \(first in 'model.norm.weight'\)"):
            open_it(folder)


@pytest.mark.parametrize(
    ("base", "expected"),
    [("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("gpt2", "gpt2"), ("/models/base", None), ("../base", None), (None, None)],
)
def test_only_a_name_on_the_hub_is_published_as_the_base(base, expected):
    assert hub_id(base) == expected


def test_a_folder_that_looks_like_a_hub_id_is_none(tmp_path, monkeypatch):
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/base") is None


# -- mixtures of experts -------------------------------------------------------------------------------------------

EXPERTS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("train", ["all", "rows", "lora"])
def test_a_mixture_of_experts_decodes_after_sft(kind, train, tmp_path):
    """TRL asks for router outputs while it trains; left in the config, they break every pass with a cache."""
    from sidtune.trainers.sft.stages import run_stages

    if (kind, train) == ("mixtral", "lora"):
        pytest.skip("one mixture with LoRA is enough")
    made = build_model({"model_type": kind, **EXPERTS, **MIXTURES[kind]}, tiny_tokenizer())
    folder = model_folder(tmp_path / "model")
    made.save_pretrained(folder)
    for name in ("data", "sids"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content.txt").write_text(name)
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True, "learning_rate": 0.01}
    stage = {"name": "one", "tasks": {"text_to_sid": None}, "max_length": 64, "train": train, "args": args}
    stage |= {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}} if train == "lora" else {}
    (done,) = run_stages(
        [stage], folder, tmp_path / "data", tmp_path / "sids", tmp_path / "sft", build_examples=task_examples
    )
    config = AutoConfig.from_pretrained(done)
    assert not config.output_router_logits and config.use_cache
    history = json.loads((done / "log_history.json").read_text())
    assert any("aux_loss" in entry for entry in history)  # so the router outputs were on while it trained
    trie = SidTrie.from_codes(np.stack(np.meshgrid(range(3), range(3)), -1).reshape(-1, 2), (3, 3))
    ids, mask = torch.tensor([[4, 9, 12], [5, 6, 7]]), torch.ones(2, 3, dtype=torch.int64)
    for model in (load_model(done), AutoModelForCausalLM.from_pretrained(done)):
        model.eval()
        result = sid_beam_search(model, ids, mask, trie=trie, sid_token_ids=np.arange(SID, VOCABULARY), num_beams=9)
        expected = by_hand(model, ids)
        torch.testing.assert_close(result.scores.sort(dim=1).values, expected.sort(dim=1).values, atol=1e-4, rtol=1e-4)
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert plain.shape[1] > 3


def by_hand(model, ids):
    """(B, 9) log-probabilities over the trie of all two-token SIDs, from whole passes without a cache."""
    first, second = torch.arange(SID, SID + 3), torch.arange(SID + 3, SID + 6)
    scores = []
    with torch.no_grad():
        for row in ids:
            head = model(row[None], use_cache=False).logits[0, -1, first].log_softmax(-1)
            for n, token in enumerate(first):
                tail = model(torch.cat([row, token[None]])[None], use_cache=False).logits[0, -1, second].log_softmax(-1)
                scores.append(head[n] + tail)
    return torch.cat(scores).view(len(ids), 9)


def test_a_model_whose_router_outputs_are_on_in_memory_decodes_too(tmp_path):
    model = build_model({"model_type": "qwen3_moe", **EXPERTS, **MIXTURES["qwen3_moe"]}, tiny_tokenizer())
    config = sft_config({"max_steps": 1, "save_strategy": "no", "disable_tqdm": True}, output_dir=tmp_path, max_length=64,
                        seed=0, evaluate=False, where="test")  # fmt: skip
    SidSFTTrainer(model, config, random_examples(8), None, tiny_tokenizer()).train()
    assert model.config.output_router_logits  # TRL's
    trie = SidTrie.from_codes(np.array([[0, 0], [1, 2], [2, 1]]), (3, 3))
    ids, mask = torch.tensor([[4, 9, 12], [0, 6, 7]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    result = sid_beam_search(model.eval(), ids, mask, trie=trie, sid_token_ids=np.arange(SID, VOCABULARY), num_beams=3)
    assert sorted(result.leaves[0].tolist()) == [0, 1, 2]

"""Folders of the post-ranking model: layouts A and B, whole, adapters alone, and the hub (check 13 of the notes)."""

from __future__ import annotations

import huggingface_hub.constants
import pytest
import torch
from hub_stand_in import hub_stand_in
from lm_stand_ins import tiny_model
from post_rank_stand_ins import D_Q, FIELDS, ranker, requests
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from sidtune.core.errors import ConfigError, DataError
from sidtune.models.post_ranking.files import (
    add_lora,
    merge_post_rank,
    push_post_rank,
    save_adapters,
    save_post_rank,
)
from sidtune.models.post_ranking.model import PostRankForCausalLM
from sidtune.models.post_ranking.processor import PostRankProcessor

pytestmark = pytest.mark.medium

KINDS = ("qwen3", "llama", "gpt2")


def disturbed(model):
    """LoRA starts as zero; this makes it matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def saved_base(kind, folder, **options):
    model, processor = ranker(kind, **options)
    model.language_model.save_pretrained(folder)
    model.config.base_model_name_or_path = str(folder)
    return model, processor


ROUNDS = [(kind, True, layout) for kind in KINDS for layout in ("A", "B", "whole", "adapters")]


@pytest.mark.parametrize(("kind", "tied", "layout"), [*ROUNDS, ("qwen3", False, "whole"), ("qwen3", False, "A")])
def test_round_trip(kind, tied, layout, tmp_path):
    model, processor = saved_base(kind, tmp_path / "base", tied=tied)
    tuned = disturbed(add_lora(model, layout, r=4, alpha=4)) if layout in ("A", "B") else model
    inputs, prompts = processor.from_requests(requests(2)), processor.from_requests(requests(2), answers=False)
    logits, orders = tuned(**inputs).logits, tuned.rank(**prompts).order
    folder = tmp_path / "tuned"
    if layout == "adapters":
        save_adapters(tuned, folder)
        processor.save_pretrained(folder)
    else:
        save_post_rank(tuned, folder, processor)
    loaded = PostRankForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(**inputs).logits, logits) and torch.equal(loaded.rank(**prompts).order, orders)
    again = PostRankProcessor.from_pretrained(folder).from_requests(requests(2))
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    if layout != "whole":
        assert not (folder / "model.safetensors").exists()
        keys = [key for file in folder.glob("*.safetensors") for key in safe_open(file, "pt").keys()]  # noqa: SIM118
        assert keys and not [key for key in keys if "embed" in key or "lm_head" in key or "wte" in key]
        assert all("lora_" in key or "qia_" in key for key in keys)
    if layout in ("A", "B"):
        merged = merge_post_rank(loaded)
        assert isinstance(merged, PostRankForCausalLM) and not [n for n, _ in merged.named_parameters() if "lora" in n]
        torch.testing.assert_close(merged(**inputs).logits, logits, atol=1e-4, rtol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(
            PostRankForCausalLM.from_pretrained(tmp_path / "merged")(**inputs).logits, merged(**inputs).logits
        )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fresh = tiny_model(kind, tied)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in base.state_dict().items())


def test_auto_classes_and_a_reused_folder(tmp_path):
    model, processor = saved_base("qwen3", tmp_path / "base")
    inputs = processor.from_requests(requests(2))
    model.save_pretrained(tmp_path / "a")
    for auto in (AutoModel, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path / "a")
        assert isinstance(loaded, PostRankForCausalLM) and torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    tuned = disturbed(add_lora(model, "B", r=4, alpha=4))
    save_post_rank(tuned, tmp_path / "b")
    merged = merge_post_rank(PostRankForCausalLM.from_pretrained(tmp_path / "b"))
    save_adapters(merged, tmp_path / "b")
    assert not (tmp_path / "b" / "adapter_config.json").exists()
    merged.save_pretrained(tmp_path / "b")
    torch.testing.assert_close(
        PostRankForCausalLM.from_pretrained(tmp_path / "b")(**inputs).logits, merged(**inputs).logits
    )


def test_adapters_stay_float32_around_a_bfloat16_model(tmp_path):
    model, processor = saved_base("qwen3", tmp_path / "base")
    inputs = processor.from_requests(requests(2))
    model.save_pretrained(tmp_path / "whole")
    save_adapters(model, tmp_path / "adapters")
    for name in ("whole", "adapters"):
        half = PostRankForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        assert half.get_input_embeddings().weight.dtype == torch.bfloat16
        assert {p.dtype for p in half.adapter_parameters()} == {torch.float32}
        assert abs(float(half(**inputs).loss) - float(model(**inputs).loss)) < 0.2


@pytest.mark.parametrize("layout", ["A", "B"])
def test_push_and_load_from_the_hub(layout, monkeypatch, tmp_path):
    model, processor = saved_base("qwen3", tmp_path / "base")
    tuned = disturbed(add_lora(model, layout, r=4, alpha=4))
    inputs = processor.from_requests(requests(2))
    with hub_stand_in() as (endpoint, state):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        push = tuned.push_to_hub if layout == "B" else lambda *a, **k: push_post_rank(tuned, *a, **k)
        url = push("tester/ranker", processor, token="hf_test", private=True)
        assert url.startswith(endpoint) and state.private["tester/ranker"] and state.tokens == {"hf_test"}
        named = [name for name, content in state.repos["tester/ranker"].items() if str(tmp_path).encode() in content]
        assert not named  # a folder of this machine is no base for others
        with pytest.raises(DataError, match="names no language model and none was given; pass base="):
            PostRankForCausalLM.from_pretrained("tester/ranker", cache_dir=tmp_path / "cache")
        base = {"base": tmp_path / "base", "cache_dir": tmp_path / "cache"}
        loaded = PostRankForCausalLM.from_pretrained("tester/ranker", **base)
        assert torch.equal(loaded(**inputs).logits, tuned(**inputs).logits)
        with pytest.raises(DataError, match="could not be fetched from the hub .*RepositoryNotFound"):
            PostRankForCausalLM.from_pretrained("tester/none", cache_dir=tmp_path / "cache")
        with pytest.raises(DataError, match="did not accept the upload to 'bad name!'"):
            push("bad name!", token="hf_test")


def test_damaged_folders_end_in_one_sentence(tmp_path):
    model, _ = saved_base("qwen3", tmp_path / "base")
    save_adapters(model, tmp_path / "good")
    with pytest.raises(DataError, match="does not exist"):
        PostRankForCausalLM.from_pretrained(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no config.json"):
        PostRankForCausalLM.from_pretrained(tmp_path / "empty")
    with pytest.raises(DataError, match="does not fit its config"):
        other, _ = ranker(fields=FIELDS[1:])
        save_adapters(other, tmp_path / "other")
        (tmp_path / "other" / "config.json").write_bytes((tmp_path / "good" / "config.json").read_bytes())
        PostRankForCausalLM.from_pretrained(tmp_path / "other")
    (tmp_path / "good" / "qia.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="No post-ranking model can be read from"):
        PostRankForCausalLM.from_pretrained(tmp_path / "good")
    nameless, _ = ranker()
    nameless.config.base_model_name_or_path = None
    save_adapters(nameless, tmp_path / "nameless")
    with pytest.raises(DataError, match="names no language model"):
        PostRankForCausalLM.from_pretrained(tmp_path / "nameless")
    assert PostRankForCausalLM.from_pretrained(tmp_path / "nameless", base=tiny_model("qwen3")).config.d_q == D_Q
    with pytest.raises(ConfigError, match="made for a vocabulary of"):
        PostRankForCausalLM.from_pretrained(tmp_path / "nameless", base=_wider())
    with pytest.raises(DataError, match="No language model can be read from"):
        PostRankForCausalLM.from_pretrained(tmp_path / "nameless", base=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="layout must be"):
        add_lora(model, "C")


def _wider():
    model = tiny_model("qwen3")
    model.resize_token_embeddings(model.config.vocab_size + 3)
    return model

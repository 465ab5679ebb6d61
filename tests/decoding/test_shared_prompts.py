"""The prompt's cache is shared by all beams where the model can do it, and `generate` reaches the same search."""

import logging

import numpy as np
import pytest
import torch
from decoding_oracles import (
    LEVEL_SIZES,
    MODELS,
    VOCABULARY,
    make_model,
    random_codes,
    random_prompts,
    random_token_ids,
    right_padded,
)

from sidtune.core.errors import ConfigError
from sidtune.decoding.beam_search import sid_beam_search
from sidtune.decoding.engine import sharing
from sidtune.decoding.engine.model_steps import ModelSteps
from sidtune.decoding.engine.prompt_cache import CopiedBeams, PackedBeams, SharedEncoder
from sidtune.decoding.engine.search import GenerateCall, Search
from sidtune.decoding.sampling import sid_sample
from sidtune.decoding.trie import SidTrie

pytestmark = pytest.mark.medium

CODES = random_codes(1)
TOKENS = random_token_ids(2)
TRIE = SidTrie.from_codes(CODES, LEVEL_SIZES)
IDS, MASK = random_prompts(3)
LAYOUTS = {
    name: CopiedBeams if "bloom" in name else SharedEncoder if ("bart" in name or "t5" in name) else PackedBeams
    for name in MODELS
}


def steps_of(model, longest=20):
    steps = ModelSteps(model, list(torch.from_numpy(TOKENS).split(LEVEL_SIZES)))
    steps.use(sharing.layout_for(steps, longest))
    return steps


@torch.no_grad()
def three_steps(steps):
    """Logits of all levels while beams multiply, trade places and die, and the cache's layers at the end."""
    seen = []
    encoder = steps.encoder_decoder
    steps.read_prompt(*(right_padded(IDS, MASK) if encoder else (IDS, MASK)))
    for level, parents in enumerate(([[0, 0, 0]] * 4, [[2, 0, 1, 1]] * 2 + [[1, 1, 0, 2]] * 2, [[3, 0]] * 4)):
        parents = torch.tensor(parents)
        tokens = torch.from_numpy(TOKENS)[(torch.arange(parents.numel()) * 3 + level) % len(TOKENS)].view(parents.shape)
        steps.advance(tokens, parents)
        seen.append(steps.logits(level)[0].clone())
    return seen, steps._layout._cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_shared_layout_is_chosen_and_equals_the_copied_one(name, attention):
    model = make_model(name)
    if model.config._attn_implementation == "sdpa":  # some models have the eager one only
        model.set_attn_implementation(attention)
    steps = steps_of(model)
    assert type(steps._layout) is LAYOUTS[name]
    shared, _ = three_steps(steps)
    steps.use(CopiedBeams)
    copied, _ = three_steps(steps)
    for one, other in zip(shared, copied, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=3e-5, rtol=1e-5)
        assert (one - one.flip(1)).abs().max() > 1e-2  # beams differ, so a mix-up would show


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "qwen3-lora"])
@pytest.mark.parametrize("beams", [2, 20])
def test_the_prompt_is_cached_once_whatever_the_beam(name, beams):
    model = make_model(name)
    kept = []

    class Watched(PackedBeams):
        def advance(self, tokens, parents):
            super().advance(tokens, parents)
            kept.append([(layer.keys.shape[0], layer.keys.shape[2]) for layer in self._cache.layers])

    model_steps = steps_of(model)
    model_steps.use(Watched)
    with torch.no_grad():
        model_steps.read_prompt(IDS, MASK)
        for _ in range(2):
            parents = torch.zeros(len(IDS), beams, dtype=torch.int64)
            model_steps.advance(torch.full_like(parents, int(TOKENS[0])), parents)
    rows, columns = len(IDS), IDS.shape[1]
    assert kept == [[(rows, columns + beams * step)] * 2 for step in (1, 2)]


@pytest.mark.parametrize("name", ["bart", "t5", "mt5", "bart-lora"])
def test_the_encoded_prompt_is_cached_once_whatever_the_beam(name):
    _, cache = three_steps(steps_of(make_model(name)))
    for layer in cache.cross_attention_cache.layers:
        assert layer.keys.shape[0] == len(IDS)
    for layer in cache.self_attention_cache.layers:
        assert layer.keys.shape[:3:2] == (len(IDS) * 2, 4)  # start token and three codes of two beams


def test_a_model_that_cannot_share_falls_back_and_says_so_once(caplog):
    model = make_model("bloom-alibi")
    with caplog.at_level(logging.WARNING, logger="sidtune.decoding.engine.sharing"):
        for _ in range(2):
            sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=5)
    assert len(caplog.records) == 1 and "cache is copied" in caplog.records[0].getMessage()


def test_a_window_too_long_to_probe_is_shared_only_where_it_does_not_bite(monkeypatch):
    monkeypatch.setattr(sharing, "_LONGEST_PROBED_WINDOW", 2)
    model = make_model("mistral-all-sliding")
    assert type(steps_of(model, longest=4)._layout) is PackedBeams
    assert type(steps_of(model, longest=5)._layout) is CopiedBeams


def test_a_model_that_ignores_the_mask_is_found_out(monkeypatch):
    """The probe must be able to fail: a model that drops 4-D masks gives other numbers and gets its own copies."""
    model = make_model("llama")
    inner = model.model.forward

    def forgetful(*args, **kwargs):
        mask = kwargs.get("attention_mask")
        return inner(*args, **{**kwargs, "attention_mask": None if mask is not None and mask.ndim == 4 else mask})

    monkeypatch.setattr(model.model, "forward", forgetful)
    assert type(steps_of(model)._layout) is CopiedBeams


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "bart", "t5", "mt5", "qwen3-lora", "bart-lora"])
def test_generate_with_our_search_equals_the_function(name):
    model = make_model(name)
    encoder = model.config.is_encoder_decoder
    ids, mask = right_padded(IDS, MASK) if encoder else (IDS, MASK)
    found = sid_beam_search(model, ids, mask, trie=TRIE, sid_token_ids=TOKENS, num_beams=30)
    batch = {"input_ids": ids, "attention_mask": mask, "custom_generate": sid_beam_search, "trie": TRIE.bind(TOKENS)}
    output = model.generate(**batch, num_beams=30, return_dict_in_generate=True)
    start = torch.full((len(ids), 1), model.config.decoder_start_token_id) if encoder else ids
    sequences = output.sequences.unflatten(0, (-1, 30))
    assert torch.equal(sequences[..., : start.shape[1]], start[:, None].expand(-1, 30, -1))
    offsets = torch.tensor([0, *np.cumsum(LEVEL_SIZES)[:-1]])
    alive = found.leaves >= 0
    expected = torch.from_numpy(TOKENS)[(TRIE.leaf_codes(found.leaves) + offsets).clamp(min=0)]
    assert torch.equal(sequences[..., start.shape[1] :][alive], expected[alive])
    assert (sequences[..., start.shape[1] :][~alive] == model.config.pad_token_id).all() and (~alive).any()
    np.testing.assert_allclose(output.sequences_scores.unflatten(0, (-1, 30)), found.scores, atol=1e-6)
    best = model.generate(**batch, num_beams=4, num_return_sequences=1)
    assert torch.equal(best, sequences[:, 0])


def test_generate_ignores_settings_that_would_cut_legal_tokens():
    """What breaks `generate` with a mask (top-k, top-p, suppressed tokens, beams of the model's own) has no say here."""
    model = make_model("qwen3")
    plain = model.generate(
        input_ids=IDS, attention_mask=MASK, custom_generate=sid_beam_search, trie=TRIE.bind(TOKENS), num_beams=6
    )
    for name, value in {
        "top_k": 1,
        "top_p": 0.1,
        "do_sample": True,
        "suppress_tokens": TOKENS.tolist(),
        "num_beams": 3,
    }.items():
        setattr(model.generation_config, name, value)
    model.generation_config.num_return_sequences = 2
    spoiled = model.generate(
        input_ids=IDS, attention_mask=MASK, custom_generate=sid_beam_search, trie=TRIE.bind(TOKENS), num_beams=6
    )
    assert torch.equal(plain, spoiled)


def test_generate_with_samples_gives_catalogue_items():
    model, trie = make_model("qwen3"), TRIE.bind(TOKENS)
    options = {"input_ids": IDS, "attention_mask": MASK, "custom_generate": sid_sample, "trie": trie, "num_samples": 9}
    sequences = model.generate(**options, generator=torch.Generator().manual_seed(4))
    drawn = sid_sample(model, IDS, MASK, trie=trie, num_samples=9, generator=torch.Generator().manual_seed(4))
    code_of = torch.full((VOCABULARY,), -1)
    code_of[torch.from_numpy(TOKENS)] = torch.cat([torch.arange(size) for size in LEVEL_SIZES])
    nodes = TRIE.find(code_of[sequences[:, IDS.shape[1] :]])
    assert torch.equal(nodes - TRIE.level_starts[-2], drawn.leaves.flatten())


def test_unknown_arguments_and_missing_tokens_are_refused():
    model = make_model("qwen3")
    with pytest.raises(ConfigError, match="did you mean 'max_rows'"):
        sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, max_row=3)
    with pytest.raises(ConfigError, match="mean the same"):
        sid_beam_search(model, IDS, MASK, attention_mask=MASK, trie=TRIE, sid_token_ids=TOKENS)
    with pytest.raises(ConfigError, match="SidTrie.bind"):
        sid_beam_search(model, IDS, MASK, trie=TRIE)
    with pytest.raises(ConfigError, match="num_return_sequences"):
        sid_beam_search(model, IDS, MASK, trie=TRIE.bind(TOKENS), num_beams=2, num_return_sequences=3)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bart", "t5"])
def test_a_memory_budget_splits_the_prompts_and_never_the_beam(name):
    model = make_model(name)
    options = {"trie": TRIE, "sid_token_ids": TOKENS, "num_beams": 9}
    whole, read = sid_beam_search(model, IDS, MASK, **options), []
    search = Search.prepare(model, GenerateCall(IDS, MASK), TRIE, TOKENS, None)
    two = 2 * search.bytes_per_prompt(9)
    for budget, chunks in ((1, [1, 1, 1, 1]), (two, [2, 2]), (10**12, [4])):
        read.append([part.stop - part.start for part in search.chunks(None, 9, budget)])
        assert read[-1] == chunks
        assert torch.equal(sid_beam_search(model, IDS, MASK, **options, memory_budget=budget).leaves, whole.leaves)
    assert search.bytes_per_prompt(90) > search.bytes_per_prompt(9)

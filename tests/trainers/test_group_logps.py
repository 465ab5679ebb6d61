"""Shared prompts give the numbers and the gradients of ordinary rows, for every kind of model, or fall back and say so."""

from __future__ import annotations

import warnings

import decoding_oracles
import lm_stand_ins
import numpy as np
import pytest
import torch
from decoding_oracles import LEVEL_SIZES, random_codes, random_token_ids
from group_oracles import Rows, gradients, oracle, random_rows, relative_error, trl_logps
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.vocabulary.trainable_tokens import set_trainable
from sidtune.trainers.grpo.logps import passes as group_passes
from sidtune.trainers.grpo.logps.group_logps import group_logps
from sidtune.trainers.grpo.logps.packing import pack, read_batch

pytestmark = pytest.mark.medium

_D = decoding_oracles._DECODER
_T = decoding_oracles._TOKENS


def _rows(seed: int = 3, **more) -> Rows:
    return random_rows(seed, random_codes(0), random_token_ids(0), LEVEL_SIZES, **more)


def _plain(name: str, attention: str = "sdpa", **config):
    def build():
        model = decoding_oracles.MODELS[name](**config) if config else decoding_oracles.make_model(name)
        model.set_attn_implementation(attention)
        return model, _rows()

    return build


def _checkpointed():
    model = decoding_oracles.make_model("qwen3")
    model.gradient_checkpointing_enable()
    return model.train(), _rows()


def _trained_rows(kind: str, tied: bool, mode: str):
    def build():
        model, _, vocabulary = lm_stand_ins.extended(kind, tied)
        model = set_trainable(model, vocabulary, mode, seed=1 if mode == "lora" else None)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name or "sid_rows" in name:
                    weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)) * 0.3)
        codes = lm_stand_ins.tiny_sids().codes
        return model, random_rows(1, codes, np.asarray(vocabulary.sid_token_ids), lm_stand_ins.LEVEL_SIZES)

    return build


PACKED = {
    "qwen3": _plain("qwen3"),
    "qwen3-eager": _plain("qwen3", "eager"),
    "qwen3-untied": _plain("qwen3", tie_word_embeddings=False),
    "llama": _plain("llama"),
    "llama-eager": _plain("llama", "eager"),
    "gpt2": lambda: (_quiet(decoding_oracles.make_model("gpt2")), _rows()),
    "qwen3-lora": _plain("qwen3-lora"),
    "qwen3-lora-head": _plain("qwen3-lora-head"),
    "qwen3-checkpointed": _checkpointed,
    "qwen3-sid-rows": _trained_rows("qwen3", True, "rows"),
    "llama-sid-rows-untied": _trained_rows("llama", False, "rows"),
    "gpt2-sid-rows": _trained_rows("gpt2", True, "rows"),
    "qwen3-sid-rows-lora": _trained_rows("qwen3", True, "lora"),
    "cohere-logit-scale": lambda: (
        CohereForCausalLM(CohereConfig(**{**_D, "eos_token_id": 2}, logit_scale=0.3)).eval(),
        _rows(),
    ),
    "gemma2-softcap": lambda: (
        Gemma2ForCausalLM(Gemma2Config(**_D, final_logit_softcapping=2.0, sliding_window=60)).eval(),
        _rows(),
    ),
    "mistral-wide-window": lambda: (MistralForCausalLM(MistralConfig(**_D, sliding_window=17)).eval(), _rows()),
}
FALLBACK = {
    "gemma2-small-window": lambda: (decoding_oracles.make_model("gemma2-softcap-sliding"), _rows()),
    "mistral-window": lambda: (MistralForCausalLM(MistralConfig(**_D, sliding_window=11)).eval(), _rows()),
    "bloom-alibi": lambda: (
        BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.5, **_T)).eval(),
        _rows(),
    ),
    "mamba": lambda: (
        MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **_T)).eval(),
        _rows(),
    ),
}


def _quiet(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _options(rows: Rows) -> dict:
    trie = SidTrie.from_codes(rows.codes, rows.sizes)
    return {"trie": trie, "sid_token_ids": rows.token_ids, "sid_start": torch.tensor(rows.starts)}


def _weights(values: torch.Tensor) -> torch.Tensor:
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(11))


@pytest.fixture(params=sorted(PACKED))
def shared(request):
    torch.manual_seed(7)
    return PACKED[request.param]()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_the_definition_with_gradients(shared, temperature):
    model, rows = shared
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = group_logps(
            model,
            *rows.padded(),
            **_options(rows),
            temperature=temperature,
            compute_entropy=True,
            compute_log_z=True,
        )
    assert out.packed
    truth, entropies, log_z = oracle(model, rows, temperature)
    torch.testing.assert_close(out.log_probs, truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropies, entropies, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.log_z, log_z.detach(), atol=2e-5, rtol=1e-5)
    assert not out.log_z.requires_grad
    weights = _weights(truth)
    assert relative_error(gradients(model, out.log_probs, weights), gradients(model, truth, weights)) < 1e-4


def test_equal_to_trl_with_gradients(shared):
    model, rows = shared
    if any("wpe" in name for name, _ in model.named_parameters()):  # TRL counts padding as positions
        rows = _same_length(rows)
    elif any("lora" in name and "lm_head" in name for name, _ in model.named_parameters()):
        pytest.skip("TRL refuses an adapter on the head")
    out = group_logps(model, *rows.padded(), temperature=1.3, compute_entropy=True)
    truth, entropies = trl_logps(model, rows, 1.3)
    torch.testing.assert_close(out.log_probs, truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropies, entropies, atol=1e-5, rtol=1e-5)
    weights = _weights(truth)
    assert relative_error(gradients(model, out.log_probs, weights), gradients(model, truth, weights)) < 1e-4


def _same_length(rows: Rows) -> Rows:
    length = min(map(len, rows.prompts))
    return Rows([p[:length] for p in rows.prompts], *list(vars(rows).values())[1:])


@pytest.mark.parametrize("name", sorted(FALLBACK))
def test_a_model_that_cannot_share_says_so_once_and_gives_the_same_numbers(name):
    torch.manual_seed(7)
    model, rows = FALLBACK[name]()
    with pytest.warns(UserWarning, match="Prompts are not shared for .*, because"):
        out = group_logps(model, *rows.padded(), **_options(rows), compute_entropy=True, compute_log_z=True)
    assert not out.packed
    truth, entropies, log_z = oracle(model, rows)
    torch.testing.assert_close(out.log_probs, truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropies, entropies, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.log_z, log_z.detach(), atol=1e-5, rtol=1e-5)
    weights = _weights(truth)
    assert relative_error(gradients(model, out.log_probs, weights), gradients(model, truth, weights)) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        group_logps(model, *rows.padded(), **_options(rows))


def test_short_rows_fit_a_window_that_long_ones_do_not():
    model, rows = FALLBACK["mistral-window"]()
    with pytest.warns(UserWarning, match="attention window of 11 tokens"):
        assert not group_logps(model, *rows.padded()).packed
    short = Rows([p[:3] for p in rows.prompts], *list(vars(rows).values())[1:])
    out = group_logps(model, *short.padded(), **_options(short))
    assert out.packed
    torch.testing.assert_close(out.log_probs, oracle(model, short)[0], atol=1e-5, rtol=1e-5)


def test_every_prompt_is_read_once():
    model, _ = PACKED["qwen3"]()
    ids = torch.randint(3, 10, (2, 20)).repeat_interleave(8, dim=0)
    completion = torch.randint(3, 10, (16, 3))
    out = group_logps(model, ids, torch.ones_like(ids), completion, torch.ones_like(completion))
    assert out.tokens == 2 * (20 + 8 * 2)


@pytest.mark.parametrize("limit", [12, 20, 1])
def test_passes_shuffles_and_given_groups_change_nothing(limit):
    model, rows = PACKED["qwen3"]()
    whole = group_logps(model, *rows.padded(), **_options(rows)).log_probs
    split = group_logps(model, *rows.padded(), **_options(rows), max_tokens=limit)
    assert split.packed
    torch.testing.assert_close(split.log_probs, whole, atol=1e-5, rtol=1e-5)
    weights = _weights(whole)
    assert relative_error(gradients(model, split.log_probs, weights), gradients(model, whole, weights)) < 1e-4
    order = torch.randperm(len(rows.prompts)).tolist()
    mixed = rows.permuted(order)
    names = {tuple(p): 40 - n for n, p in enumerate(dict.fromkeys(map(tuple, mixed.prompts)))}
    groups = torch.tensor([names[tuple(p)] for p in mixed.prompts])
    moved = group_logps(model, *mixed.padded(), **_options(mixed), groups=groups).log_probs
    torch.testing.assert_close(moved, whole[order], atol=1e-5, rtol=1e-5)


def test_reading_every_row_on_its_own_agrees():
    model, rows = PACKED["qwen3"]()
    shared, alone = (group_logps(model, *rows.padded(), **_options(rows), share_prompts=s) for s in (True, False))
    assert shared.packed and not alone.packed and shared.tokens < alone.tokens / 1.5
    torch.testing.assert_close(shared.log_probs, alone.log_probs, atol=1e-5, rtol=1e-5)
    chunked = group_logps(model, *rows.padded(), **_options(rows), share_prompts=False, max_tokens=30)
    torch.testing.assert_close(chunked.log_probs, alone.log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("filtered", [False, True])
def test_probabilities_of_all_sids_sum_to_one(filtered):
    """Check 5 of the sheet: over the trie they do, over the whole vocabulary they do not."""
    model, rows = PACKED["qwen3"]()
    trie = SidTrie.from_codes(rows.codes, rows.sizes)
    if filtered:
        keep = torch.rand(trie.num_leaves) < 0.4
        leaves = keep.nonzero().flatten()
        trie = trie.restrict(keep)
    else:
        leaves = torch.arange(trie.num_leaves)
    offsets = torch.tensor([0, *np.cumsum(rows.sizes)[:-1]])
    completion = torch.tensor(rows.token_ids)[trie.leaf_codes(leaves) + offsets]
    ids = torch.tensor([rows.prompts[0]]).repeat(len(completion), 1)
    batch = (ids, torch.ones_like(ids), completion, torch.ones_like(completion))
    start = torch.zeros(len(completion), dtype=torch.int64)
    out = group_logps(model, *batch, trie=trie, sid_token_ids=rows.token_ids, sid_start=start, compute_log_z=True)
    assert abs(out.log_probs.sum(1).exp().sum().item() - 1) < 1e-5
    free = group_logps(model, *batch).log_probs
    assert free.sum(1).exp().sum().item() < 0.5
    torch.testing.assert_close(free, out.log_probs + out.log_z, atol=1e-5, rtol=1e-5)


def test_log_z_of_some_rows_only():
    model, rows = PACKED["qwen3"]()
    out = group_logps(model, *rows.padded(), **_options(rows), compute_log_z=True, log_z_rows=3)
    truth = oracle(model, rows)[2].detach()
    is_sid, chosen = truth != 0, torch.arange(len(truth)) % 4 == 0
    assert out.log_z[is_sid & ~chosen[:, None]].isnan().all()
    known = ~is_sid | chosen[:, None]
    torch.testing.assert_close(out.log_z[known], truth[known], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_tokens_that_nobody_asks_for_are_left_out(share):
    model, rows = PACKED["qwen3"]()
    truth = oracle(model, rows)[0]
    wanted = torch.rand(truth.shape) < 0.5
    out = group_logps(model, *rows.padded(), **_options(rows), scored=wanted, share_prompts=share)
    torch.testing.assert_close(out.log_probs, truth * wanted, atol=1e-5, rtol=1e-5)
    weights = _weights(truth)
    assert relative_error(gradients(model, out.log_probs, weights), gradients(model, truth, weights * wanted)) < 1e-4
    ids, completion = torch.ones(8, 5, dtype=torch.int64), torch.ones(8, 4, dtype=torch.int64)
    first = torch.arange(4).expand(8, -1) < 2
    out = group_logps(model, ids, ids, completion, completion, scored=first, share_prompts=share)
    assert out.tokens == (5 + 8 if share else 8 * 6)


def test_nothing_to_score_still_reaches_every_parameter():
    model, rows = PACKED["qwen3-untied"]()
    prompt, prompt_mask, completion, mask = rows.padded()
    for options in ({}, _options(rows)):
        out = group_logps(model, prompt, prompt_mask, completion, torch.zeros_like(mask), **options)
        assert not out.log_probs.any()
        found = gradients(model, out.log_probs, torch.ones_like(out.log_probs))
        assert set(found) == {name for name, _ in model.named_parameters()}
        assert all(not value.any() for value in found.values())


def test_the_model_is_left_as_it_was():
    model, rows = PACKED["qwen3"]()
    model.train()
    before = torch.get_rng_state()
    group_logps(model, *rows.padded(), **_options(rows))
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and "forward" not in vars(model.lm_head) and "forward" not in vars(model)
    with pytest.raises(ValueError, match="inside"):
        model.model.norm.register_forward_hook(_fail)
        group_logps(model, *rows.padded())
    assert "forward" not in vars(model.lm_head)


def _fail(*_):
    raise ValueError("inside")


def test_gradients_under_bfloat16_are_those_of_trl_up_to_its_rounding():
    model, rows = PACKED["qwen3"]()
    exact = group_logps(model, *rows.padded()).log_probs.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = group_logps(model, *rows.padded(), **_options(rows))
        ours = group_logps(model, *rows.padded()).log_probs
        theirs, _ = trl_logps(model, rows)
        wide = group_logps(model, *rows.padded(), float32_head=True).log_probs
    assert out.packed and out.log_probs.dtype == torch.float32
    rounding = (theirs - exact).abs().max().item()
    assert rounding > 1e-3
    for found in (ours, wide):
        assert (found - exact).abs().max().item() < 2 * rounding
    weights = _weights(exact)
    found, truth = (torch.cat([g.flatten() for g in gradients(model, v, weights).values()]) for v in (ours, theirs))
    assert float(torch.cosine_similarity(found, truth, dim=0)) > 0.995


def test_dropout_is_mentioned_once():
    model = decoding_oracles.make_model("gpt2").train()
    rows = _rows()
    with pytest.warns(UserWarning, match="one dropout mask"):
        group_logps(model, *rows.padded())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        group_logps(model, *rows.padded())


def test_attention_that_takes_no_mask_falls_back():
    """As flash attention does; it cannot run here, so scaled-dot-product attention plays its part."""
    model, rows = PACKED["qwen3"]()
    truth = oracle(model, rows)[0]
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="takes no mask of its own"):
        patch.setattr(group_passes, "_MASKED", ("eager",))
        out = group_logps(model, *rows.padded(), **_options(rows))
    torch.testing.assert_close(out.log_probs, truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda b, o: b.__setitem__(3, b[3].flip(1)), DataError, "ones and then zeros"),
        (lambda b, o: b[1].__setitem__((0, 3), 0), DataError, "side by side"),
        (lambda b, o: b[1].fill_(0), DataError, "at least one token"),
        (lambda b, o: o.update(groups=torch.zeros(12)), DataError, "share their prompt"),
        (lambda b, o: o.update(scored=torch.ones(2, 2)), DataError, "shape of the completions"),
        (lambda b, o: o.update(groups=torch.zeros(3)), DataError, "one number per row"),
        (lambda b, o: o.update(sid_start=torch.zeros(12).long()), DataError, "leaves the trie at level"),
        (lambda b, o: o.update(sid_start=torch.zeros(2).long()), DataError, "one column per row"),
        (lambda b, o: o.update(sid_token_ids=np.arange(3)), DataError, "one integer per code"),
        (lambda b, o: o.update(sid_token_ids=np.arange(15) + 80), DataError, "vocabulary has 90 rows"),
        (lambda b, o: o.pop("trie"), ConfigError, "belong together"),
        (lambda b, o: o.update(temperature=0.0), ConfigError, "above 0"),
        (lambda b, o: o.update(log_z_rows=0), ConfigError, "at least 1"),
        (
            lambda b, o: b.__setitem__(0, b[0].repeat(1, 9)) or b.__setitem__(1, b[1].repeat(1, 9)),
            DataError,
            "side by side",
        ),
    ],
)
def test_bad_input_is_one_clear_sentence(change, error, words):
    model, rows = PACKED["qwen3"]()
    batch, options = [part.clone() for part in rows.padded()], _options(rows)
    if words == "vocabulary has 90 rows":
        options["sid_start"] = torch.full((12,), -1)
    change(batch, options)
    with pytest.raises(error, match=words):
        group_logps(model, *batch, **options)


def test_an_encoder_decoder_and_a_bare_module_are_refused():
    rows = _rows()
    with pytest.raises(ConfigError, match="encoder-decoder"):
        group_logps(decoding_oracles.make_model("t5"), *rows.padded())
    with pytest.raises(ConfigError, match="language model of transformers"):
        group_logps(nn.Linear(2, 2), *rows.padded())


def test_rows_longer_than_the_model_has_positions_are_refused():
    model, rows = PACKED["qwen3"]()
    long = Rows([p * 20 for p in rows.prompts], *list(vars(rows).values())[1:])
    with pytest.raises(DataError, match="but the model has 64"):
        group_logps(model, *long.padded())


def test_a_model_that_ignores_positions_is_found_out():
    """It takes every argument and complains about nothing; only its numbers tell."""
    model, rows = PACKED["llama"]()
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    with pytest.warns(UserWarning, match="packed rows give other log-probabilities"):
        out = group_logps(model, *rows.padded(), **_options(rows))
    torch.testing.assert_close(out.log_probs, oracle(model, rows)[0], atol=1e-5, rtol=1e-5)


def test_a_model_that_changes_only_extreme_logits_is_found_out():
    """The few tokens of the first call would not show it; the ramp does."""
    model, rows = PACKED["llama"]()

    def clamp(module, args, output):
        output.logits = output.logits.clamp(min=-40.0)
        return output

    model.register_forward_hook(clamp)
    assert group_logps(model, *rows.padded()).packed
    assert [ability.way for ability in group_passes._known[model].values()] == [group_passes.LOGITS]
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    truth = oracle(model, rows)[0]
    assert truth.min() < -50
    found = group_logps(model, *rows.padded(), **_options(rows)).log_probs
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-5)


def test_short_prompts_stand_behind_one_another_in_a_row():
    lengths = torch.tensor([20, 9, 8, 11, 7])
    seen = torch.arange(20) >= 20 - lengths[:, None]
    prompts = torch.arange(100).view(5, 20)
    (rows,) = pack(read_batch(prompts, seen, torch.zeros(5, 1), torch.ones(5, 1)), 64)
    assert rows.source.shape == (3, 20)  # 20, 11 + 9, 8 + 7
    assert sorted(rows.source[rows.unit > 0].tolist()) == sorted(
        row * 21 + column for row in range(5) for column in range(20) if seen[row, column]
    )


def test_a_sid_of_legal_codes_that_no_item_has_is_refused():
    model, rows = PACKED["qwen3"]()
    legal = {tuple(row) for row in rows.codes.tolist()}
    codes = next(c for c in np.ndindex(*rows.sizes) if c not in legal and c[:2] in {path[:2] for path in legal})
    sid = rows.token_ids[np.array(codes) + np.cumsum([0, *rows.sizes])[:-1]].tolist()
    bad = Rows([[4, 5]], [sid], [0], rows.codes, rows.token_ids, rows.sizes)
    with pytest.raises(DataError, match="SID of row 0 leaves the trie at level 2"):
        group_logps(model, *bad.padded(), **_options(bad))

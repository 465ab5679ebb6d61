"""sid_beam_search and SidLogitsProcessor against exhaustive scoring, a slow beam search, and `generate`."""

import numpy as np
import pytest
import torch
from decoding_oracles import (
    LEVEL_SIZES,
    MODELS,
    VOCABULARY,
    Oracle,
    make_model,
    prompts_of,
    random_codes,
    random_prompts,
    random_token_ids,
    right_padded,
    sorted_leaves,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.decoding.beam_search import _top_in_order, sid_beam_search
from sidtune.decoding.engine.head import LevelHead
from sidtune.decoding.logits_processor import SidLogitsProcessor
from sidtune.decoding.trie import SidTrie

pytestmark = pytest.mark.medium

CODES = random_codes(1)
TOKENS = random_token_ids(2)
LEAVES = sorted_leaves(CODES)
TRIE = SidTrie.from_codes(CODES, LEVEL_SIZES)
IDS, MASK = random_prompts(3)


def check(output, expected, beams, tolerance=2e-5):
    """`expected`: per prompt, (score, leaf) best first."""
    for row, pairs in enumerate(expected):
        pairs = pairs[:beams]
        assert output.leaves[row, : len(pairs)].tolist() == [leaf for _, leaf in pairs]
        np.testing.assert_allclose(
            output.scores[row, : len(pairs)].numpy(), [s for s, _ in pairs], atol=tolerance, rtol=3e-6
        )
        assert (output.leaves[row, len(pairs) :] == -1).all()
        assert (output.scores[row, len(pairs) :] == float("-inf")).all()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_enough_beams_give_the_exhaustive_ranking(name, renormalize):
    model = make_model(name)
    oracle = Oracle(model, CODES, TOKENS, renormalize)
    expected = [oracle.exhaustive(prompt) for prompt in prompts_of(IDS, MASK)]
    output = sid_beam_search(
        model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=len(LEAVES) + 5, renormalize=renormalize
    )
    assert output.leaves.dtype == torch.int64 and output.scores.dtype == torch.float32
    check(output, expected, len(LEAVES) + 5)
    if renormalize:
        np.testing.assert_allclose(output.scores.exp().sum(dim=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bart", "t5", "gemma2-softcap-sliding", "qwen3-lora-head"])
def test_few_beams_equal_a_plain_beam_search(name, beams):
    model = make_model(name)
    for renormalize in (True, False):
        oracle = Oracle(model, CODES, TOKENS, renormalize)
        expected = [oracle.beam(prompt, beams) for prompt in prompts_of(IDS, MASK)]
        output = sid_beam_search(
            model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=beams, renormalize=renormalize
        )
        check(output, expected, beams)


def test_few_beams_can_miss_the_best_leaf():
    """Keeps the test above honest: on these models the beam search is not simply exhaustive."""
    missed = 0
    for name in ("qwen3", "gpt2", "bart", "t5"):
        oracle = Oracle(make_model(name), CODES, TOKENS, True)
        for prompt in prompts_of(IDS, MASK):
            missed += [leaf for _, leaf in oracle.beam(prompt, 2)] != [
                leaf for _, leaf in oracle.exhaustive(prompt)[:2]
            ]
    assert missed >= 2


def generate(model, beams, renormalize, **constraint):
    prompt = 1 if model.config.is_encoder_decoder else IDS.shape[1]
    ids, mask = right_padded(IDS, MASK) if model.config.is_encoder_decoder else (IDS, MASK)
    result = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=3,
        min_new_tokens=3,
        length_penalty=0.0,
        do_sample=False,
        eos_token_id=None,
        renormalize_logits=renormalize,
        return_dict_in_generate=True,
        output_scores=True,
        **constraint,
    )
    return result.sequences[:, prompt:].unflatten(0, (-1, beams)), result.sequences_scores.unflatten(0, (-1, beams))


def allowed_tokens(model, oracle):
    prompt = 1 if model.config.is_encoder_decoder else IDS.shape[1]
    code_of = {int(t): int(c) for t, c in zip(TOKENS, np.concatenate([np.arange(s) for s in LEVEL_SIZES]), strict=True)}

    def allowed(_, sequence):
        prefix = tuple(code_of[token] for token in sequence[prompt:].tolist())
        return [oracle.token(len(prefix), code) for code in oracle.legal[prefix]]

    return allowed


def tokens_of(leaves):
    offsets = torch.tensor([0, *np.cumsum(LEVEL_SIZES)[:-1]])
    return torch.from_numpy(TOKENS)[TRIE.leaf_codes(leaves) + offsets]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    "name", ["qwen3", "llama", "gpt2", "bart", "t5", "mt5", "qwen3-some-sliding", "qwen3-lora", "bart-lora"]
)
def test_equal_to_generate_with_prefix_function_and_with_our_processor(name, renormalize):
    model = make_model(name)
    oracle = Oracle(model, CODES, TOKENS, renormalize)
    prompt = 1 if model.config.is_encoder_decoder else IDS.shape[1]
    processor = SidLogitsProcessor(TRIE, TOKENS, prompt)
    for beams in (2, 4):
        output = sid_beam_search(
            model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=beams, renormalize=renormalize
        )
        for constraint in (
            {"prefix_allowed_tokens_fn": allowed_tokens(model, oracle)},
            {"logits_processor": [processor]},
        ):
            sequences, scores = generate(model, beams, renormalize, **constraint)
            assert torch.equal(sequences, tokens_of(output.leaves))
            np.testing.assert_allclose(scores, output.scores, atol=1e-5)


def test_processor_with_more_beams_than_leaves_finds_all_leaves():
    codes = np.array([[0, 1, 2], [0, 1, 3], [2, 0, 0]])
    trie, model, beams = SidTrie.from_codes(codes, LEVEL_SIZES), make_model("qwen3"), 6
    output = sid_beam_search(model, IDS, MASK, trie=trie, sid_token_ids=TOKENS, num_beams=beams)
    sequences, scores = generate(model, beams, True, logits_processor=[SidLogitsProcessor(trie, TOKENS, IDS.shape[1])])
    assert not scores.isnan().any()
    offsets = torch.tensor([0, *np.cumsum(LEVEL_SIZES)[:-1]])
    for row in range(len(IDS)):
        live = scores[row] > -1e8
        assert int(live.sum()) == 3
        assert torch.equal(
            sequences[row][live], torch.from_numpy(TOKENS)[trie.leaf_codes(output.leaves[row, :3]) + offsets]
        )
        np.testing.assert_allclose(scores[row][live], output.scores[row, :3], atol=1e-5)


def test_processor_samples_leaves_only_and_can_end_after_the_sid():
    processor = SidLogitsProcessor(TRIE, TOKENS, IDS.shape[1], eos_token_id=2)
    options = {"do_sample": True, "max_new_tokens": 6, "eos_token_id": 2, "pad_token_id": 0, "num_return_sequences": 20}
    out = make_model("qwen3").generate(input_ids=IDS, attention_mask=MASK, logits_processor=[processor], **options)
    new = out[:, IDS.shape[1] :]
    legal = {tuple(row) for row in tokens_of(torch.arange(len(LEAVES))).tolist()}
    assert {tuple(row) for row in new[:, :3].tolist()} <= legal
    assert (new[:, 3] == 2).all() and (new[:, 4:] == 0).all()


def test_processor_masks_by_prefix_and_refuses_more_than_a_sid():
    processor = SidLogitsProcessor(TRIE, TOKENS, 1)
    oracle = Oracle(make_model("qwen3"), CODES, TOKENS, True)
    scores = torch.randn(2, VOCABULARY)
    first = LEAVES[0][0]
    masked = processor(torch.tensor([[5, oracle.token(0, first)], [5, 89]]), scores)
    tokens = [oracle.token(1, code) for code in oracle.legal[(first,)]]
    assert masked[0].isfinite().nonzero().flatten().tolist() == sorted(tokens)
    assert torch.equal(masked[0, tokens], scores[0, tokens])
    assert int(masked[1].isfinite().sum()) == 1, "a dead row keeps one token, so that its softmax is finite"
    with pytest.raises(ConfigError, match="max_new_tokens=3"):
        processor(torch.zeros(2, 4, dtype=torch.int64), scores)


@pytest.mark.parametrize("name", ["qwen3", "bart"])
def test_filtered_search_is_the_exhaustive_ranking_of_the_allowed_leaves(name):
    allowed = np.arange(len(LEAVES)) % 3 == 1
    model = make_model(name)
    oracle = Oracle(model, np.array(LEAVES)[allowed], TOKENS, True)
    numbers = np.flatnonzero(allowed)
    expected = [[(s, int(numbers[leaf])) for s, leaf in oracle.exhaustive(prompt)] for prompt in prompts_of(IDS, MASK)]
    for beams in (len(LEAVES), 3):
        found = sid_beam_search(model, IDS, MASK, trie=TRIE.restrict(allowed), sid_token_ids=TOKENS, num_beams=beams)
        if beams == 3:
            expected = [[(s, int(numbers[leaf])) for s, leaf in oracle.beam(p, 3)] for p in prompts_of(IDS, MASK)]
        check(found, expected, beams)
    nothing = sid_beam_search(
        model, IDS, MASK, trie=TRIE.restrict(np.zeros_like(allowed)), sid_token_ids=TOKENS, num_beams=2
    )
    assert (nothing.leaves == -1).all() and (nothing.scores == float("-inf")).all()


@pytest.mark.parametrize("sizes", [(6,), (1, 1), (3, 1, 2, 4)])
def test_other_depths(sizes):
    codes, tokens = random_codes(5, 12, sizes), random_token_ids(6, sizes)
    model, trie = make_model("qwen3"), SidTrie.from_codes(codes, sizes)
    output = sid_beam_search(model, IDS, MASK, trie=trie, sid_token_ids=tokens, num_beams=trie.num_leaves)
    assert (output.leaves.sort(dim=1).values == torch.arange(trie.num_leaves)).all()
    np.testing.assert_allclose(output.scores.exp().sum(dim=1), 1.0, atol=1e-5)
    best = sid_beam_search(model, IDS, MASK, trie=trie, sid_token_ids=tokens, num_beams=2)
    assert best.leaves.shape == (len(IDS), 2)


def test_equal_scores_are_ordered_by_leaf():
    model = make_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    codes = np.array([[a, b, c] for a in range(4) for b in range(5) for c in range(6)])
    trie = SidTrie.from_codes(codes, LEVEL_SIZES)
    for beams in (1, 3, 7, 50, 120):
        output = sid_beam_search(model, IDS, MASK, trie=trie, sid_token_ids=TOKENS, num_beams=beams)
        prefixes = sorted({row[:2] for row in map(tuple, codes.tolist())})[: min(beams, 20)]
        expected = [leaf for leaf, row in enumerate(sorted_leaves(codes)) if row[:2] in prefixes][:beams]
        assert output.leaves.tolist() == [expected] * len(IDS)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0.0, -1.0, -2.5, float("-inf"), 3.0]), min_size=1, max_size=12), st.data())
def test_selection_is_stable(values, data):
    k = data.draw(st.integers(1, len(values)))
    expected = sorted(np.argsort(-np.array(values), kind="stable")[:k].tolist())
    assert _top_in_order(torch.tensor([values, values[::-1]]), k)[0].tolist() == expected


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bart", "t5"])
def test_padding_chunks_and_neighbours_change_nothing(name):
    model = make_model(name)
    whole = sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=8)
    junk = torch.randint(3, 80, (len(IDS), 5))
    padded = torch.cat([junk, IDS], dim=1), torch.cat([torch.zeros_like(junk), MASK], dim=1)
    others = [sid_beam_search(model, *padded, trie=TRIE, sid_token_ids=TOKENS, num_beams=8)]
    others += [
        sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=8, max_rows=rows)
        for rows in (1, 16, 24)
    ]
    if model.config.is_encoder_decoder:
        others.append(sid_beam_search(model, *right_padded(IDS, MASK), trie=TRIE, sid_token_ids=TOKENS, num_beams=8))
    for other in others:
        assert torch.equal(other.leaves, whole.leaves)
        np.testing.assert_allclose(other.scores, whole.scores, atol=1e-5)
    alone = sid_beam_search(
        model, torch.tensor([prompts_of(IDS, MASK)[1]]), None, trie=TRIE, sid_token_ids=TOKENS, num_beams=8
    )
    assert torch.equal(alone.leaves[0], whole.leaves[1])


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bart", "t5", "t5-v1.1"])
def test_level_rows_give_what_the_whole_head_gives(name, monkeypatch):
    model = make_model(name)
    assert LevelHead(model, [torch.from_numpy(TOKENS)]).rows is not None
    fast = sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=8)
    monkeypatch.setattr(LevelHead, "_level_rows", lambda self: None)
    called = sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=8)
    untouched = LevelHead.__init__
    monkeypatch.setattr(
        LevelHead, "__init__", lambda self, *args: (untouched(self, *args), setattr(self, "tap", False))[0]
    )
    own = sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=8)
    for other in (called, own):
        assert torch.equal(other.leaves, fast.leaves)
        np.testing.assert_allclose(other.scores, fast.scores, atol=1e-5)


class _Doubling(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


@pytest.mark.parametrize("change", ["class", "hook", "forward", "model"])
def test_a_head_that_is_more_than_its_weight_is_respected(change):
    model = make_model("llama")
    head, plain = (
        model.lm_head,
        sid_beam_search(make_model("llama"), IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=8),
    )
    if change == "class":
        head.__class__ = _Doubling
    elif change == "hook":
        head.register_forward_hook(lambda module, arguments, output: 2 * output)
    elif change == "forward":
        head.forward = lambda hidden: 2 * torch.nn.functional.linear(hidden, head.weight)
    else:
        whole = model.forward

        def doubled(*args, **kwargs):
            output = whole(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

        model.forward = doubled
    oracle = Oracle(model, CODES, TOKENS, True)
    output = sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=len(LEAVES))
    check(output, [oracle.exhaustive(prompt) for prompt in prompts_of(IDS, MASK)], len(LEAVES))
    assert (output.scores[:, :8] - plain.scores).abs().max() > 0.1


def test_cost_does_not_depend_on_the_vocabulary_and_the_prompt_is_read_once():
    from transformers import Qwen3ForCausalLM

    flops, config = [], make_model("qwen3").config
    for size in (VOCABULARY, 50 * VOCABULARY):
        config.vocab_size = size
        model, read = Qwen3ForCausalLM(config).eval(), []
        sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=8)  # probes the model once
        model.get_input_embeddings().register_forward_pre_hook(lambda _, a, read=read: read.append(tuple(a[0].shape)))
        with FlopCounterMode(display=False) as counter:
            sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=8)
        flops.append(counter.get_total_flops())
        first = len({leaf[0] for leaf in LEAVES})
        assert read == [tuple(IDS.shape), (len(IDS), first), (len(IDS), 8)]
    assert flops[0] == flops[1] > 0


def test_every_module_keeps_its_mode_also_after_an_error():
    model = make_model("gpt2")
    expected = sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=5)
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    output = sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=5)
    assert torch.equal(output.scores, expected.scores), "dropout must be off during the search"
    assert not output.scores.requires_grad
    assert [module.training for module in model.modules()] == before
    model.transformer.h[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=5)
    assert [module.training for module in model.modules()] == before
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("name", ["qwen3", "t5"])
def test_bfloat16_finds_nearly_the_same(name):
    exact = sid_beam_search(make_model(name), IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=len(LEAVES))
    half = sid_beam_search(
        make_model(name).to(torch.bfloat16), IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=len(LEAVES)
    )
    assert half.scores.dtype == torch.float32
    assert (half.leaves.sort(dim=1).values == torch.arange(len(LEAVES))).all()
    by_leaf = [torch.zeros_like(o.scores).scatter(1, o.leaves, o.scores.exp()) for o in (exact, half)]
    assert (by_leaf[0] - by_leaf[1]).abs().sum(dim=1).max() < 0.3, "total variation, 2 at most"


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its settings for the whole process; other tests must not inherit ours."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "bart", "t5", "qwen3-lora-head"])
def test_accelerate_mixed_precision(name, fresh_accelerate):
    from accelerate import Accelerator

    model = make_model(name)
    if name == "qwen3":
        # A linear layer before the head leaves bfloat16 under autocast, while the head's weight is float32.
        model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Linear(32, 32)).requires_grad_(False)
    exact = sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=len(LEAVES))
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    for renormalize in (True, False):
        half = sid_beam_search(
            prepared, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=len(LEAVES), renormalize=renormalize
        )
        assert (half.leaves.sort(dim=1).values == torch.arange(len(LEAVES))).all()
        if renormalize:
            by_leaf = [torch.zeros_like(o.scores).scatter(1, o.leaves, o.scores.exp()) for o in (exact, half)]
            assert (by_leaf[0] - by_leaf[1]).abs().sum(dim=1).max() < 0.3, "total variation, 2 at most"


def test_use_cache_false_in_the_config_does_not_matter():
    model = make_model("qwen3")
    expected = sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=5)
    model.config.use_cache = False
    assert torch.equal(
        sid_beam_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=5).scores, expected.scores
    )


def _with_nan(model):
    model.lm_head.weight.data[TOKENS[3]] = float("nan")
    return model


def _prompt_tuned():
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(make_model("gpt2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def _no_start():
    model = make_model("t5")
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    return model


class _Wrapper(torch.nn.Module):
    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def _wrapped(model):
    wrapper = _Wrapper()
    wrapper.inner, wrapper.config, wrapper.get_output_embeddings = model, model.config, model.get_output_embeddings
    return wrapper


LONG = torch.ones(1, 70, dtype=torch.int64)
BAD_CALLS = {
    "no beams": (ConfigError, "num_beams", {"num_beams": 0}),
    "no rows": (ConfigError, "max_rows", {"max_rows": 0}),
    "no memory": (ConfigError, "memory_budget", {"memory_budget": 0}),
    "right padding": (DataError, "padding_side", {"attention_mask": MASK.flip(1)}),
    "empty prompt": (DataError, "every prompt", {"attention_mask": torch.cat([MASK[:3], 0 * MASK[:1]])}),
    "mask shape": (DataError, "same shape", {"attention_mask": MASK[:, 1:]}),
    "no prompts": (DataError, "non-empty", {"input_ids": IDS[:0], "attention_mask": MASK[:0]}),
    "foreign token": (DataError, "tokenizer of this model", {"input_ids": IDS + VOCABULARY}),
    "too long": (DataError, "shorten", {"input_ids": LONG, "attention_mask": None}),
    "ids of other SIDs": (DataError, "sid_token_ids", {"sid_token_ids": TOKENS[:-1]}),
    "ids beyond the head": (DataError, "vocabulary", {"sid_token_ids": TOKENS + VOCABULARY}),
    "repeated ids": (DataError, "distinct", {"sid_token_ids": np.full_like(TOKENS, 3)}),
    "NaN weights": (SidtuneError, "NaN", {"model": lambda: _with_nan(make_model("llama"))}),
    "prompt tuning": (ConfigError, "virtual tokens", {"model": _prompt_tuned}),
    "no start token": (ConfigError, "decoder_start_token_id", {"model": _no_start}),
    "unknown wrapper": (ConfigError, "wrapper", {"model": lambda: _wrapped(make_model("qwen3"))}),
    "no language model": (ConfigError, "Linear", {"model": lambda: torch.nn.Linear(2, 2)}),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_ends_in_one_sentence(case):
    error, words, change = BAD_CALLS[case]
    call = {"trie": TRIE, "sid_token_ids": TOKENS, "input_ids": IDS, "attention_mask": MASK, "num_beams": 4, **change}
    model = call.pop("model", lambda: make_model("qwen3"))()
    with pytest.raises(error, match=words):
        sid_beam_search(model, **call)

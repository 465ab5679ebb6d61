"""reason_then_search against a slow oracle: text written row by row without a cache, then every SID scored."""

import numpy as np
import pytest
import torch
from decoding_oracles import (
    LEVEL_SIZES,
    Oracle,
    make_model,
    prompts_of,
    random_codes,
    random_prompts,
    random_token_ids,
    sorted_leaves,
)
from transformers import GenerationConfig

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.logits_processor import SidLogitsProcessor
from sidtune.decoding.reasoning import _close, reason_then_search
from sidtune.decoding.trie import SidTrie

pytestmark = pytest.mark.medium

CODES, TOKENS = random_codes(1), random_token_ids(2)
LEAVES, TRIE = sorted_leaves(CODES), SidTrie.from_codes(CODES, LEVEL_SIZES)
IDS, MASK = random_prompts(3, (6, 1, 9, 4, 3, 2, 8, 5))
PAD, EOS = 0, 2
END = min(set(range(10, 90)) - set(TOKENS.tolist()))
LONGEST = 7
CALL = {"end_token_id": END, "eos_token_id": EOS, "pad_token_id": PAD, "max_reasoning_tokens": LONGEST}
NEVER = float("-inf")


def ending(name="qwen3", share=0.25, others=()):
    """A model that likes to end: some end soon, some by EOS, some not at all. Deterministic given the text."""
    model = make_model(name)
    head = model.get_output_embeddings()

    def lift(_, arguments, out):
        # A pseudo-random but fixed function of the hidden state decides whether the end is the best token.
        place = (arguments[0].sum(dim=-1, keepdim=True) * 50).sin()
        top = out.amax(dim=-1, keepdim=True) + 1.0
        out = out.index_copy(-1, torch.tensor([END]), torch.where(place > 1 - 2 * share, top, out[..., [END]]))
        return out.index_copy(-1, torch.tensor([EOS]), torch.where(place < 0.4 * share - 1, top, out[..., [EOS]]))

    head.register_forward_hook(lift)
    return model


def write(model, prompt, forbid_sids, forbid_eos):
    """Greedy text of one unpadded prompt, without a cache: (text with end token, closed, stopped)."""
    text = []
    while len(text) < LONGEST:
        logits = model(input_ids=torch.tensor([prompt + text]), use_cache=False).logits[0, -1].clone()
        if forbid_sids:
            logits[TOKENS.tolist()] = NEVER
        if forbid_eos:
            logits[EOS] = NEVER
        token = int(logits.argmax())
        if token == END:
            return [*text, END], True, False
        if token == EOS:
            return [*text, END], False, True
        text.append(token)
    return [*text, END], False, False


@pytest.mark.parametrize(("forbid_sids", "forbid_eos"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "qwen3-lora"])
def test_greedy_reasoning_and_exhaustive_search_equal_the_oracle(name, forbid_sids, forbid_eos):
    model = ending(name)
    oracle = Oracle(model, CODES, TOKENS, True)
    options = {"forbid_sids": forbid_sids, "forbid_eos": forbid_eos}
    found = reason_then_search(
        model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=len(LEAVES) + 2, **CALL, **options
    )
    expected = [write(model, prompt, forbid_sids, forbid_eos) for prompt in prompts_of(IDS, MASK)]
    assert [text for (text,) in found.texts()] == [text for text, _, _ in expected]
    assert found.closed[:, 0].tolist() == [closed for _, closed, _ in expected]
    assert found.stopped[:, 0].tolist() == [stopped for _, _, stopped in expected]
    assert torch.equal(found.forced, ~found.closed)
    assert len({len(text) for text, _, _ in expected}) > 2
    for row, (prompt, (text, _, _)) in enumerate(zip(prompts_of(IDS, MASK), expected, strict=True)):
        pairs = oracle.exhaustive(prompt + text)
        assert found.beams.leaves[row, : len(LEAVES)].tolist() == [leaf for _, leaf in pairs]
        np.testing.assert_allclose(found.beams.scores[row, : len(LEAVES)], [s for s, _ in pairs], atol=2e-5)
        assert found.input_ids[row][found.attention_mask[row].bool()].tolist() == prompt + text
        assert found.reasoning_ids[row, 0][found.mask[row, 0]].tolist() == text
        assert (found.reasoning_ids[row, 0][~found.mask[row, 0]] == PAD).all()


def test_the_oracle_sees_every_kind_of_ending():
    """Keeps the test above honest: rows closed by the model, stopped by EOS, and cut by length all occur."""
    kinds = {write(ending(name), p, True, False)[1:] for name in ("qwen3", "gpt2") for p in prompts_of(IDS, MASK)}
    assert kinds == {(True, False), (False, True), (False, False)}


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_one_generation_with_the_processor_gives_the_same_text_and_the_greedy_sid(name):
    model = ending(name)
    found = reason_then_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=1, **CALL, forbid_eos=True)
    processor = SidLogitsProcessor(
        TRIE, TOKENS, IDS.shape[1], eos_token_id=EOS, start_after=END, max_free_tokens=LONGEST
    )
    config = processor.generation_config(model, pad_token_id=PAD)
    out = model.generate(input_ids=IDS, attention_mask=MASK, logits_processor=[processor], generation_config=config)
    offsets = torch.tensor([0, *np.cumsum(LEVEL_SIZES)[:-1]])
    sids = torch.from_numpy(TOKENS)[TRIE.leaf_codes(found.beams.leaves[:, 0]) + offsets].tolist()
    for row, (text, sid) in enumerate(zip(found.texts(), sids, strict=True)):
        new = out[row, IDS.shape[1] :].tolist()
        whole = [*text[0], *sid, EOS]
        assert new[: len(whole)] == whole


def test_sampled_groups_are_those_of_a_plain_generate():
    model, group = ending(), 5
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    generator = torch.Generator().manual_seed(11)
    found = reason_then_search(
        model,
        IDS,
        MASK,
        trie=TRIE,
        sid_token_ids=TOKENS,
        num_beams=3,
        num_reasonings=group,
        generator=generator,
        **CALL,
        **options,
    )
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(11)))
    torch.manual_seed(seed)
    out = model.generate(
        input_ids=IDS, attention_mask=MASK, max_new_tokens=LONGEST, eos_token_id=[END, EOS], pad_token_id=PAD, top_k=0,
        num_return_sequences=group, suppress_tokens=TOKENS.tolist(), **options,
    )  # fmt: skip
    expected = []
    for row in out[:, IDS.shape[1] :].tolist():
        stops = [place for place, token in enumerate(row) if token in (END, EOS)]
        expected.append([*row[: stops[0] if stops else LONGEST], END])
    texts = [text for prompt in found.texts() for text in prompt]
    assert texts == expected and found.reasoning_ids.shape[:2] == (len(IDS), group)
    assert found.beams.leaves.shape == (len(IDS) * group, 3)
    assert len({tuple(text) for text in texts}) > len(IDS)
    prompts = [prompt for prompt in prompts_of(IDS, MASK) for _ in range(group)]
    oracle = Oracle(model, CODES, TOKENS, True)
    for row in (0, 7, 23, 39):
        pairs = oracle.beam(prompts[row] + texts[row], 3)
        assert found.beams.leaves[row].tolist() == [leaf for _, leaf in pairs]


def test_a_generator_repeats_and_leaves_the_global_source_alone():
    model, options = ending(), {"do_sample": True, "num_reasonings": 3, "num_beams": 2, **CALL}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = reason_then_search(
        model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, generator=torch.Generator().manual_seed(1), **options
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    again = torch.Generator().manual_seed(1)
    second = reason_then_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, generator=again, **options)
    third = reason_then_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, generator=again, **options)
    assert first.texts() == second.texts() != third.texts()


def test_the_models_own_settings_and_its_dropout_are_neither_used_nor_changed():
    model = ending("gpt2")
    expected = reason_then_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=3, **CALL)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=3, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=1, max_length=12,
        min_new_tokens=6, num_beams=4, suppress_tokens=[END], forced_eos_token_id=5, eos_token_id=5, pad_token_id=7,
        num_return_sequences=2, begin_suppress_tokens=[4], bad_words_ids=[[END]], max_time=0.0,
    )  # fmt: skip
    before = model.generation_config.to_dict()
    model.train()
    found = reason_then_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=3, **CALL)
    assert model.generation_config.to_dict() == before and model.training
    assert found.texts() == expected.texts() and torch.equal(found.beams.scores, expected.beams.scores)


def calls(model, monkeypatch, peers):
    """Numbers of `generate` calls and forward passes when other processes need `peers` steps for their texts."""
    import transformers.generation.utils as utils

    counts, step = {"generate": 0, "forward": 0}, [0]

    def all_reduce(flag, op=None):
        step[0] += 1
        flag.copy_(torch.tensor(1.0 if step[0] <= peers else float(flag)))

    monkeypatch.setattr(utils.dist, "all_reduce", all_reduce)
    real = model.generate
    monkeypatch.setattr(model, "generate", lambda **k: (counts.update(generate=counts["generate"] + 1), real(**k))[1])
    hook = model.register_forward_pre_hook(lambda *_: counts.update(forward=counts["forward"] + 1))
    found = reason_then_search(model, IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=3, synced_gpus=True, **CALL)
    hook.remove()
    monkeypatch.undo()
    return counts, found


def test_every_process_makes_the_same_calls_whatever_the_texts_do(monkeypatch):
    """At once, never, or somewhere: with a peer that writes to the limit, the counts are equal."""
    seen = [calls(ending(share=share), monkeypatch, LONGEST) for share in (5.0, 0.25, 0.0)]
    assert seen[0][0] == seen[1][0] == seen[2][0]
    assert seen[0][0]["generate"] == 1
    assert [int(found.lengths.max()) for _, found in seen][::2] == [1, LONGEST + 1]


def test_texts_are_closed_exactly_once():
    rows = torch.tensor([[5, END, PAD, PAD], [5, 6, EOS, PAD], [5, 6, 7, 8], [END, PAD, PAD, PAD], [EOS, 5, END, 6]])
    text, lengths, closed, stopped = _close(rows, END, EOS, PAD)
    assert [row[:n] for row, n in zip(text.tolist(), lengths.tolist(), strict=True)] == [
        [5, END], [5, 6, END], [5, 6, 7, 8, END], [END], [END],
    ]  # fmt: skip
    assert closed.tolist() == [True, False, False, True, False]
    assert stopped.tolist() == [False, True, False, False, True]
    assert ((text == END).sum(dim=1) == 1).all()
    assert _close(rows[:1], END, EOS, PAD)[0].tolist() == [[5, END]], "no columns of padding alone"
    same = _close(torch.tensor([[5, EOS, EOS]]), END, EOS, EOS)
    assert same[0].tolist() == [[5, END]] and same[3].tolist() == [True]


def test_search_options_reach_the_search():
    whole = reason_then_search(
        ending(), IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=4, renormalize=False, **CALL
    )
    parts = reason_then_search(
        ending(), IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=4, renormalize=False, max_rows=8, **CALL
    )
    other = reason_then_search(ending(), IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, num_beams=4, **CALL)
    np.testing.assert_allclose(whole.beams.scores, parts.beams.scores, atol=1e-5)
    assert (whole.beams.scores < other.beams.scores - 0.01).all()


BAD = {
    "end is eos": (ConfigError, "two tokens", {"end_token_id": EOS}),
    "end is a SID": (ConfigError, "no SID tokens", {"end_token_id": int(TOKENS[3])}),
    "no room": (ConfigError, "max_reasoning_tokens", {"max_reasoning_tokens": 0}),
    "greedy group": (ConfigError, "do_sample", {"num_reasonings": 2}),
    "right padding": (DataError, "padding_side", {"attention_mask": MASK.flip(1)}),
    "mask shape": (DataError, "same shape", {"attention_mask": MASK[:, 1:]}),
    "too long": (DataError, "positions", {"max_reasoning_tokens": 60}),
    "no tokens": (ConfigError, "bind", {"sid_token_ids": None}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_one_sentence_before_the_model_runs(case):
    kind, match, change = BAD[case]
    model = make_model("qwen3")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    options = {"trie": TRIE, "sid_token_ids": TOKENS, "input_ids": IDS, "attention_mask": MASK, **CALL, **change}
    with pytest.raises(kind, match=match):
        reason_then_search(model, **options)


def test_an_encoder_decoder_is_sent_to_the_processor():
    with pytest.raises(ConfigError, match="SidLogitsProcessor"):
        reason_then_search(make_model("bart"), IDS, MASK, trie=TRIE, sid_token_ids=TOKENS, **CALL)

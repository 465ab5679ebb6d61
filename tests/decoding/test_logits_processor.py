"""SidLogitsProcessor: its free text, its lists and its generation settings against a slow processor and whole truths."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from decoding_oracles import (
    LEVEL_SIZES,
    VOCABULARY,
    Oracle,
    make_model,
    prefix_dictionary,
    prompts_of,
    random_codes,
    random_prompts,
    random_token_ids,
    right_padded,
    sorted_leaves,
)
from transformers import GenerationConfig, LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.engine.generation_settings import RESET, SidGenerationConfig
from sidtune.decoding.logits_processor import SidLogitsProcessor, _allowed_leaves_below
from sidtune.decoding.trie import SidTrie

pytestmark = pytest.mark.medium

CODES, TOKENS = random_codes(1), random_token_ids(2)
LEAVES, TRIE = sorted_leaves(CODES), SidTrie.from_codes(CODES, LEVEL_SIZES)
IDS, MASK = random_prompts(3)
PAD, EOS = 0, 2
THINK_END = min(set(range(3, VOCABULARY)) - set(TOKENS.tolist()) - set(range(3, 10)))
DEPTH, OFFSETS = len(LEVEL_SIZES), np.cumsum([0, *LEVEL_SIZES])
NEVER = float("-inf")


class SlowProcessor(LogitsProcessor):
    """The same constraint by dictionaries, row by row."""

    def __init__(self, leaves, prompt_length, start_after=None, max_free=None, forbid=True, num_sids=1, distinct=True):
        self.leaves, self.prompt_length, self.start_after, self.max_free = leaves, prompt_length, start_after, max_free
        self.forbid, self.num_sids, self.distinct = forbid, num_sids, distinct
        self.paths = [tuple(int(TOKENS[OFFSETS[level] + code]) for level, code in enumerate(leaf)) for leaf in leaves]

    def allowed(self, row, scores):
        """Token -> score."""
        if self.start_after is not None:
            if self.start_after not in row:
                if len(row) >= self.max_free:
                    return {self.start_after: 0.0}
                never = {EOS, *(TOKENS.tolist() if self.forbid else [])}
                return {token: scores[token].item() for token in range(len(scores)) if token not in never}
            row = row[row.index(self.start_after) + 1 :]
        if len(row) >= self.num_sids * DEPTH:
            return {EOS: 0.0}
        done = [tuple(row[n : n + DEPTH]) for n in range(0, len(row) // DEPTH * DEPTH, DEPTH)]
        prefix = tuple(row[len(done) * DEPTH :])
        left = [p for p in self.paths if not (self.distinct and self.num_sids > 1 and p in done)]
        legal = {path[len(prefix)] for path in left if path[: len(prefix)] == prefix}
        return {token: scores[token].item() for token in legal} or {int(TOKENS[OFFSETS[len(prefix)]]): 0.0}

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, NEVER)
        for number, row in enumerate(input_ids[:, self.prompt_length :].tolist()):
            for token, value in self.allowed(row, scores[number]).items():
                out[number, token] = value
        return out


def random_rows(seed, rows, columns, options):
    """Rows that follow the constraint for a while, at different places; some of them then leave it."""
    generator = np.random.default_rng(seed)
    slow, lists = SlowProcessor(**options), [[] for _ in range(rows)]
    for row in lists:
        stray = generator.random() < 0.25
        for _ in range(columns):
            choices = sorted(slow.allowed(row, torch.zeros(VOCABULARY)))
            likes_end = THINK_END in choices and generator.random() < 0.3
            token = THINK_END if likes_end else int(generator.choice(choices))
            row.append(int(generator.integers(3, VOCABULARY)) if stray and generator.random() < 0.2 else token)
    return torch.tensor(lists, dtype=torch.int64).reshape(rows, columns)


VARIANTS = {
    "plain": {},
    "list": {"num_sids": 4},
    "list-repeats": {"num_sids": 3, "distinct": False},
    "free": {"start_after": THINK_END, "max_free": 5},
    "free-open": {"start_after": THINK_END, "max_free": 3, "forbid": False},
    "free-none": {"start_after": THINK_END, "max_free": 0},
    "free-list": {"start_after": THINK_END, "max_free": 4, "num_sids": 3},
}


def fast(trie, options):
    names = {"max_free": "max_free_tokens", "forbid": "forbid_sids"}
    given = {names.get(name, name): value for name, value in options.items() if name not in ("leaves", "prompt_length")}
    return SidLogitsProcessor(trie, TOKENS, options["prompt_length"], eos_token_id=EOS, **given)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_equal_to_a_slow_processor_on_rows_at_different_places(name, filtered):
    keep = np.random.default_rng(4).random(len(LEAVES)) < 0.3 if filtered else np.ones(len(LEAVES), dtype=bool)
    trie, leaves = TRIE.restrict(keep), [leaf for leaf, kept in zip(LEAVES, keep, strict=True) if kept]
    options = {"leaves": leaves, "prompt_length": 2, **VARIANTS[name]}
    processor, slow, places = fast(trie, options), SlowProcessor(**options), Counter()
    for columns in range(18):
        rows = random_rows(columns, 25, columns, options)
        ids = torch.cat([torch.full((25, 2), THINK_END), rows], dim=1)
        scores = torch.randn(25, VOCABULARY, generator=torch.Generator().manual_seed(columns))
        before = scores.clone()
        expected = slow(ids, scores)
        assert torch.equal(processor(ids, scores), expected)
        assert torch.equal(scores, before), "the scores of the caller are not changed"
        places.update((expected > NEVER).sum(dim=1).tolist())
    assert len(places) > 1, "the rows stand at places of different freedom"


def test_a_sid_that_stands_twice_counts_once():
    codes = np.array([[0, 1, 2], [0, 1, 3], [3, 0, 0]])
    processor = SidLogitsProcessor(SidTrie.from_codes(codes, LEVEL_SIZES), TOKENS, 0, num_sids=3)
    twice = [int(TOKENS[OFFSETS[level] + code]) for level, code in enumerate((0, 1, 2))] * 2
    allowed = (processor(torch.tensor([twice]), torch.zeros(1, VOCABULARY)) > NEVER).nonzero()[:, 1].tolist()
    assert sorted(allowed) == sorted(TOKENS[[0, 3]].tolist())


def test_small_catalogue_lists_every_sid_once():
    codes = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 0], [3, 0, 0], [3, 0, 5]])
    trie, model = SidTrie.from_codes(codes, LEVEL_SIZES), make_model("qwen3")
    processor = SidLogitsProcessor(trie, TOKENS, IDS.shape[1], eos_token_id=EOS, num_sids=5)
    config = processor.generation_config(model, do_sample=True, num_return_sequences=10)
    out = model.generate(input_ids=IDS, attention_mask=MASK, logits_processor=[processor], generation_config=config)
    new = out[:, IDS.shape[1] :]
    assert new.shape[1] == 5 * DEPTH + 1 and (new[:, -1] == EOS).all()
    every = sorted(tuple(int(TOKENS[OFFSETS[level] + c]) for level, c in enumerate(row)) for row in codes.tolist())
    lists = [[tuple(row[n : n + DEPTH]) for n in range(0, 5 * DEPTH, DEPTH)] for row in new.tolist()]
    assert all(sorted(found) == every for found in lists)
    assert len({tuple(found) for found in lists}) > 5


def test_leaves_below_every_node():
    allowed = np.random.default_rng(0).random(len(LEAVES)) < 0.5
    for trie, kept in ((TRIE, LEAVES), (TRIE.restrict(allowed), [LEAVES[i] for i in np.flatnonzero(allowed)])):
        counts = _allowed_leaves_below(trie)
        for prefix in {(), *prefix_dictionary(CODES), *LEAVES}:
            node = int(TRIE.find(torch.tensor([prefix], dtype=torch.int64).reshape(1, -1))[0])
            assert counts[node] == sum(leaf[: len(prefix)] == prefix for leaf in kept)


# Settings


def spoilt(model):
    """A base generation config that is as hostile to the constraint as those of instruct models, and more."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=2,
        top_p=0.5,
        temperature=0.3,
        repetition_penalty=1.7,
        no_repeat_ngram_size=2,
        suppress_tokens=TOKENS[[0, 5, 10]].tolist(),
        bad_words_ids=[[int(TOKENS[1])]],
        sequence_bias={(int(TOKENS[2]),): -5.0},
        forced_eos_token_id=EOS,
        max_length=40,
        length_penalty=2.0,
        pad_token_id=PAD,
        eos_token_id=[EOS, int(TOKENS[3])],
        bos_token_id=1,
        decoder_start_token_id=model.generation_config.decoder_start_token_id,
    )
    return model


def inputs_of(model):
    ids, mask = right_padded(IDS, MASK) if model.config.is_encoder_decoder else (IDS, MASK)
    return {"input_ids": ids, "attention_mask": mask}, 1 if model.config.is_encoder_decoder else IDS.shape[1]


def leaf_numbers(tokens):
    """(R, depth) token ids -> leaf number, -1 for what is no SID."""
    paths = {tuple(int(TOKENS[OFFSETS[n] + c]) for n, c in enumerate(leaf)): i for i, leaf in enumerate(LEAVES)}
    return [paths.get(tuple(row), -1) for row in tokens.tolist()]


@pytest.mark.parametrize("name", ["qwen3", "qwen3-lora", "bart", "t5"])
def test_beams_under_a_hostile_config_are_those_of_the_oracle(name):
    model = spoilt(make_model(name))
    oracle = Oracle(model, CODES, TOKENS, True)
    inputs, prompt = inputs_of(model)
    processor = SidLogitsProcessor(TRIE, TOKENS, prompt)
    before = model.generation_config.to_dict()
    config = processor.generation_config(
        model, num_beams=4, num_return_sequences=4, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    out = model.generate(**inputs, logits_processor=[processor], generation_config=config)
    assert model.generation_config.to_dict() == before
    expected = [oracle.beam(p, 4) for p in prompts_of(IDS, MASK)]
    assert leaf_numbers(out.sequences[:, prompt:]) == [leaf for pairs in expected for _, leaf in pairs]
    np.testing.assert_allclose(out.sequences_scores, [s for pairs in expected for s, _ in pairs], atol=1e-5)


def test_without_the_reset_the_hostile_config_breaks_it():
    """Keeps the test above honest: the processor alone, under those settings, does not give the oracle's result."""
    model = spoilt(make_model("qwen3"))
    oracle = Oracle(model, CODES, TOKENS, True)
    options = {"num_beams": 4, "num_return_sequences": 4, "do_sample": False, "max_new_tokens": 3}
    out = model.generate(
        input_ids=IDS, attention_mask=MASK, logits_processor=[SidLogitsProcessor(TRIE, TOKENS, IDS.shape[1])], **options
    )
    expected = [leaf for p in prompts_of(IDS, MASK) for _, leaf in oracle.beam(p, 4)]
    assert leaf_numbers(out[:, IDS.shape[1] :]) != expected


@pytest.mark.parametrize("temperature", [None, 1.5])
def test_samples_under_a_hostile_config_follow_the_exact_distribution(temperature):
    model, draws = spoilt(make_model("qwen3")), 4000
    processor = SidLogitsProcessor(TRIE, TOKENS, IDS.shape[1])
    wanted = {} if temperature is None else {"temperature": temperature}
    config = processor.generation_config(model, num_return_sequences=draws, **wanted)
    torch.manual_seed(0)
    out = model.generate(
        input_ids=IDS[3:], attention_mask=MASK[3:], logits_processor=[processor], generation_config=config
    )
    found = Counter(leaf_numbers(out[:, IDS.shape[1] :]))
    if temperature is not None:
        model.lm_head.weight.data /= temperature  # its bias-free logits are divided, in every softmax
    probabilities = dict.fromkeys(range(len(LEAVES)), 0.0)
    for score, leaf in Oracle(model, CODES, TOKENS, True).exhaustive(prompts_of(IDS, MASK)[3]):
        probabilities[leaf] = np.exp(score)
    assert set(found) <= set(probabilities)
    worst = max(
        abs(found[leaf] / draws - p) / np.sqrt(max(p * (1 - p), 1e-4) / draws) for leaf, p in probabilities.items()
    )
    assert worst < 4.5
    assert max(probabilities.values()) < 0.9


def test_one_warning_names_what_was_dropped(caplog):
    model, processor = spoilt(make_model("qwen3")), SidLogitsProcessor(TRIE, TOKENS, IDS.shape[1])
    with caplog.at_level(logging.WARNING, logger="sidtune.decoding"):
        config = processor.generation_config(model, top_k=7, max_new_tokens=1, num_beams=2)
    assert len(caplog.records) == 1
    text = caplog.text
    for part in ("top_k=7 (of the call)", "top_p=0.5 (of the model)", "repetition_penalty=1.7", "suppress_tokens=["):
        assert part in text
    for part in ("temperature=0.3", "length_penalty=2.0", "max_new_tokens=1", "forced_eos_token_id=2", "max_length=40"):
        assert part in text
    assert config.max_new_tokens == DEPTH and config.eos_token_id is None and config.num_beams == 2 and config.do_sample
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sidtune.decoding"):
        processor.generation_config(make_model("qwen3"), num_beams=3)
    assert not caplog.records, "nothing dropped, nothing said"
    with caplog.at_level(logging.WARNING, logger="sidtune.decoding"):
        processor.generation_config(make_model("qwen3"), do_sample=True)
    assert "top_k=50 (the default of transformers)" in caplog.text


@pytest.mark.parametrize("sample", [False, True])
def test_nothing_but_normalisation_runs_after_the_processor(sample, monkeypatch):
    """What `generate` really applies, read from transformers itself, for a config in which every known setting is on."""
    model = spoilt(make_model("qwen3"))
    for setting, value in {
        "min_p": 0.4, "top_h": 0.5, "typical_p": 0.3, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "min_new_tokens": 5,
        "begin_suppress_tokens": [int(TOKENS[0])], "forced_bos_token_id": 5, "remove_invalid_values": True,
        "exponential_decay_length_penalty": (1, 2.0), "guidance_scale": 2.0, "encoder_repetition_penalty": 2.0,
        "encoder_no_repeat_ngram_size": 1, "min_length": 30, "watermarking_config": {"greenlist_ratio": 0.5},
        "stop_strings": ["x"], "max_time": 0.0, "num_beam_groups": 2, "diversity_penalty": 1.0, "penalty_alpha": 0.6,
        "dola_layers": "low", "constraints": [1], "force_words_ids": [[5]], "prompt_lookup_num_tokens": 2,
        "assistant_early_exit": 1, "use_mtp": True, "token_healing": True,
    }.items():  # fmt: skip
        setattr(model.generation_config, setting, value)
    missing = [s for s in RESET if getattr(model.generation_config, s) in (None, *RESET[s])]
    assert not missing, f"this test must switch on {missing}"
    seen, real = [], type(model)._get_logits_processor

    def spy(self, *args, **kwargs):
        seen.append([type(p).__name__ for p in real(self, *args, **kwargs)])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "_get_logits_processor", spy)
    processor = SidLogitsProcessor(TRIE, TOKENS, IDS.shape[1])
    config = processor.generation_config(model, do_sample=sample)
    out = model.generate(input_ids=IDS, attention_mask=MASK, logits_processor=[processor], generation_config=config)
    assert seen == [["SidLogitsProcessor", "LogitNormalization"]]
    assert out.shape[1] == IDS.shape[1] + DEPTH and -1 not in leaf_numbers(out[:, IDS.shape[1] :])


def test_every_setting_of_transformers_is_known():
    """A new transformers with a new setting fails here, so that someone decides whether it works against the mask."""
    kept = {
        "max_new_tokens", "early_stopping", "do_sample", "num_beams", "use_cache", "cache_implementation", "cache_config",
        "max_cache_len", "temperature", "length_penalty", "renormalize_logits", "num_return_sequences",
        "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
        "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "is_assistant", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size",
        "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config",
        "disable_compile", "continuous_batching_config", "low_memory", "prefill_chunk_size", "transformers_version",
    }  # fmt: skip
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known == kept | set(RESET)
    assert isinstance(SidGenerationConfig().to_dict(), dict)


# Free text, then a SID


def parse(row):
    """(free text, leaf, rest) of a finished row, or None."""
    if THINK_END not in row:
        return None
    at = row.index(THINK_END)
    leaf = leaf_numbers(torch.tensor([row[at + 1 : at + 1 + DEPTH]]))[0]
    return row[:at], leaf, row[at + 1 + DEPTH :]


def wants_to_end(model):
    """Half of the probability of every step goes to the end token, so that texts end at different places."""

    def lift(_, __, out):
        rest = out.clone()
        rest[..., [THINK_END, EOS, *TOKENS.tolist()]] = NEVER
        return out.index_copy(-1, torch.tensor([THINK_END]), rest.logsumexp(-1, keepdim=True) - 0.5)

    model.get_output_embeddings().register_forward_hook(lift)
    return model


MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 8},
    "beams": {"num_beams": 4, "num_return_sequences": 4},
    "beam-sample": {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["qwen3", "bart"])
def test_free_text_then_a_sid_in_generate_equals_the_slow_processor(name, mode):
    model = wants_to_end(spoilt(make_model(name)))
    inputs, prompt = inputs_of(model)
    options = {"leaves": LEAVES, "prompt_length": prompt, "start_after": THINK_END, "max_free": 6}
    processor, results = fast(TRIE, options), []
    config = processor.generation_config(model, **{"do_sample": False, **MODES[mode]})
    assert config.max_new_tokens == 6 + 1 + DEPTH + 1
    for each in (processor, SlowProcessor(**options)):
        torch.manual_seed(3)
        results.append(model.generate(**inputs, logits_processor=[each], generation_config=config))
    assert torch.equal(*results)
    parsed = [parse(row) for row in results[0][:, prompt:].tolist()]
    assert all(part is not None and part[1] >= 0 for part in parsed)
    for text, _, rest in parsed:
        assert len(text) <= 6 and not set(text) & {EOS, *TOKENS.tolist()}
        assert rest[0] == EOS and not set(rest[1:]) - {PAD, EOS}
    if mode == "sample":
        lengths = {len(text) for text, _, _ in parsed}
        assert 6 in lengths and len(lengths) > 2, "some rows closed the text themselves, some were forced"


def test_free_processors_touch_the_free_text_only():
    model, prompt = wants_to_end(make_model("qwen3")), IDS.shape[1]
    warpers = [TemperatureLogitsWarper(0.5), TopKLogitsWarper(3), TopPLogitsWarper(0.7)]
    options = {"eos_token_id": EOS, "start_after": THINK_END, "max_free_tokens": 4}
    plain = SidLogitsProcessor(TRIE, TOKENS, prompt, **options)
    warped = SidLogitsProcessor(TRIE, TOKENS, prompt, **options, free_processors=warpers)
    assert plain.generation_config(model).max_new_tokens == warped.generation_config(model).max_new_tokens
    sid = [THINK_END, *(int(TOKENS[OFFSETS[n] + c]) for n, c in enumerate(LEAVES[4][:2]))]
    new = torch.tensor([[5, 6, 7], sid, [5, 6, THINK_END], [7, 7, 7]])
    ids, scores = torch.cat([IDS, new], dim=1), torch.randn(4, VOCABULARY)
    mine, other = warped(ids, scores), plain(ids, scores)
    assert torch.equal(mine[1:3], other[1:3])
    expected = scores.clone()
    for warper in warpers:
        expected = warper(ids, expected)
    expected[:, [EOS, *TOKENS.tolist()]] = NEVER
    assert torch.equal(mine[[0, 3]], expected[[0, 3]])


BAD = {
    "no end": ({"start_after": THINK_END, "max_free_tokens": 3}, "eos_token_id"),
    "no limit": ({"start_after": THINK_END, "eos_token_id": EOS}, "max_free_tokens"),
    "no trigger": ({"max_free_tokens": 3, "eos_token_id": EOS}, "start_after"),
    "negative limit": ({"start_after": THINK_END, "max_free_tokens": -1, "eos_token_id": EOS}, "negative"),
    "same tokens": ({"start_after": EOS, "max_free_tokens": 3, "eos_token_id": EOS}, "two tokens"),
    "a SID token": ({"start_after": int(TOKENS[4]), "max_free_tokens": 3, "eos_token_id": EOS}, "no SID tokens"),
    "too many": ({"num_sids": len(LEAVES) + 1}, "distinct"),
    "none": ({"num_sids": 0}, "num_sids"),
    "warpers without text": ({"free_processors": [TopKLogitsWarper(3)]}, "start_after"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_one_sentence(case):
    options, match = BAD[case]
    with pytest.raises(ConfigError, match=match):
        SidLogitsProcessor(TRIE, TOKENS, 2, **options)


def test_unknown_settings_models_and_tokens_are_refused():
    processor = SidLogitsProcessor(TRIE, TOKENS, 2)
    with pytest.raises(ConfigError, match="did you mean 'num_beams'"):
        processor.generation_config(make_model("qwen3"), num_beam=3)
    with pytest.raises(ConfigError, match="generation_config"):
        processor.generation_config(torch.nn.Linear(2, 2))
    with pytest.raises(DataError):
        SidLogitsProcessor(TRIE, TOKENS[:-1], 2)

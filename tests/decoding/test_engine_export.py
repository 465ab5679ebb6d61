"""The exported grammar against the trie, through xgrammar itself, and the exported folder against the model."""

import json
import re

import numpy as np
import pytest
import torch
from lm_stand_ins import extended, tiny_sids, tiny_tokenizer
from tiny_pipeline import pipeline, run_in_process
from transformers import AutoModelForCausalLM, AutoTokenizer

from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.core.folders import read_json
from sidtune.decoding.serving.engine_export import export_engine, leaves_of_tokens, sid_grammar
from sidtune.decoding.trie import SidTrie
from sidtune.recipes.steps import export_engine as recipe
from sidtune.tokenizers.vocabulary.trainable_tokens import set_trainable


def catalogue(seed, items, sizes):
    generator = np.random.default_rng(seed)
    codes = np.stack([generator.integers(0, size, items) for size in sizes], axis=1)
    tokens = generator.permutation(np.arange(100, 100 + 2 * sum(sizes)))[: sum(sizes)]
    return SidTrie.from_codes(codes, sizes).bind(tokens)


def paths_of(trie):
    """Token ids of every allowed SID."""
    offsets = torch.tensor([0, *np.cumsum(trie.level_sizes)[:-1]])
    alive = None if trie.alive is None else trie.alive[trie.level_starts[trie.depth] :]
    leaves = torch.arange(trie.num_leaves) if alive is None else alive.nonzero().flatten()
    return [tuple(row) for row in trie.token_ids[trie.leaf_codes(leaves) + offsets].tolist()]


def language(grammar):
    """All token sequences of a grammar without free text, read by a parser of its own."""
    rules = dict(line.split(" ::= ") for line in grammar.splitlines())
    assert len(rules) == len(grammar.splitlines()), "no rule is written twice"

    def alternatives(words):
        found = []
        while True:
            tails = [()]
            while words and words[0] not in ("|", ")"):
                heads = element(words)
                tails = [tail + head for tail in tails for head in heads]
            found += tails
            if not words or words[0] == ")":
                return found
            words.pop(0)

    def expand(text):
        return alternatives(re.findall(r"Token\([\d,]+\)|\w+|[()|]", text))

    def element(words):
        word = words.pop(0)
        if word == "(":
            inner = alternatives(words)
            assert words.pop(0) == ")"
            return inner
        match = re.fullmatch(r"Token\(([\d,]+)\)", word)
        return [(int(token),) for token in match[1].split(",")] if match else expand(rules[word])

    return expand(rules["root"])


SIZES = [(4, 3, 5), (9,), (5, 6), (3, 1, 4, 2), (2, 2, 2, 2, 2)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("filtered", [False, True])
def test_grammar_says_each_sid_once_and_nothing_else(sizes, filtered):
    trie = catalogue(3, 20, sizes)
    if filtered:
        trie = trie.restrict(np.random.default_rng(1).random(trie.num_leaves) < 0.4)
    words = language(sid_grammar(trie))
    assert len(words) == len(set(words)) and set(words) == set(paths_of(trie))


def test_grammar_stays_small():
    trie = catalogue(0, 20_000, (64, 64, 64))
    grammar = sid_grammar(trie)
    assert grammar.count("::=") <= 2 + 64 and len(grammar) < 25 * trie.num_leaves
    full = SidTrie.from_codes(np.stack(np.meshgrid(*[np.arange(9)] * 4), axis=-1).reshape(-1, 4)).bind(np.arange(36))
    assert sid_grammar(full).count("::=") == 3, "equal subtrees share their rule"
    assert len(language(sid_grammar(full))) == 9**4


def test_refusals():
    trie = catalogue(3, 20, (4, 3, 5))
    with pytest.raises(ConfigError, match="1 to 10 SIDs"):
        sid_grammar(trie, max_sids=10)
    with pytest.raises(ConfigError, match="allows 0"):
        sid_grammar(trie.restrict(np.zeros(trie.num_leaves, dtype=bool)))
    with pytest.raises(ConfigError, match="bind"):
        sid_grammar(SidTrie.from_codes(np.array([[0, 1]])))
    with pytest.raises(ConfigError, match="SID token"):
        sid_grammar(trie, end_token_id=int(trie.token_ids[2]))
    with pytest.raises(DataError):
        sid_grammar(trie, trie.token_ids[:-1])


def test_answers_become_leaves():
    trie = catalogue(5, 40, (4, 5, 6))
    paths = torch.tensor(paths_of(trie))
    assert torch.equal(leaves_of_tokens(trie, paths), torch.arange(trie.num_leaves))
    wrong = paths.clone()
    wrong[:, 1] = paths[:, 0]
    assert (leaves_of_tokens(trie, torch.stack([wrong, paths]))[0] == -1).all()
    assert (leaves_of_tokens(trie, torch.full((2, 3), 10**6)) == -1).all()
    keep = torch.arange(trie.num_leaves) % 2 == 0
    found = leaves_of_tokens(trie.restrict(keep), paths)
    assert torch.equal(found, torch.arange(trie.num_leaves).where(keep, -1))
    with pytest.raises(DataError, match="3 tokens"):
        leaves_of_tokens(trie, paths[:, :2])
    with pytest.raises(ConfigError, match="bind"):
        leaves_of_tokens(SidTrie.from_codes(np.array([[0, 1]])), torch.zeros(1, 2, dtype=torch.int64))


# xgrammar, the engine's own constraint


class Engine:
    """xgrammar as a server uses it for one request."""

    def __init__(self, tokenizer, rows, grammar):
        self.xgrammar = pytest.importorskip("xgrammar")
        self.rows = rows
        info = self.xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=rows)
        self.compiled = self.xgrammar.GrammarCompiler(info, max_threads=1).compile_grammar(grammar)
        self.mask = self.xgrammar.allocate_token_bitmask(1, rows)

    def allowed(self, tokens):
        """Set of tokens that may follow `tokens`, or None when they are not accepted."""
        matcher = self.xgrammar.GrammarMatcher(self.compiled)
        if not all(matcher.accept_token(token) for token in tokens):
            return None
        logits = torch.zeros(1, self.rows)
        self.mask.fill_(-1)
        matcher.fill_next_token_bitmask(self.mask)
        self.xgrammar.apply_token_bitmask_inplace(logits, self.mask)
        return set((logits[0] == 0).nonzero().flatten().tolist())


@pytest.fixture(scope="module")
def parts():
    model, tokenizer, vocabulary = extended("qwen3", True)
    trie = SidTrie.from_semantic_ids(tiny_sids(40)).bind(vocabulary.sid_token_ids)
    return model, tokenizer, vocabulary, trie


@pytest.mark.parametrize("sizes", [None, (3, 2, 4, 2), (2, 2, 2, 2, 2), (5, 6), (9,)])
@pytest.mark.parametrize("filtered", [False, True])
def test_engine_masks_are_the_legal_sets_of_the_trie(parts, filtered, sizes):
    _, tokenizer, vocabulary, trie = parts
    trie = trie if sizes is None else catalogue(3, 30, sizes)
    if filtered:
        trie = trie.restrict(np.arange(trie.num_leaves) % 3 == 0)
    engine, paths = Engine(tokenizer, vocabulary.embedding_rows, sid_grammar(trie)), paths_of(trie)
    prefixes = {path[:length] for path in paths for length in range(trie.depth)}
    for prefix in prefixes:
        assert engine.allowed(prefix) == {path[len(prefix)] for path in paths if path[: len(prefix)] == prefix}
    for path in paths:
        assert engine.allowed(path) == {tokenizer.eos_token_id}
    strays = set(trie.token_ids.tolist()) - {path[0] for path in paths}
    assert all(engine.allowed((stray,)) is None for stray in strays)


def test_a_grammar_of_text_would_let_a_sid_be_spelled_out(parts):
    """Why the grammar is over token ids: the same catalogue as text literals admits ordinary tokens."""
    _, tokenizer, vocabulary, trie = parts
    words = [" ".join(f'"{t}"' for t in tokenizer.convert_ids_to_tokens(list(path))) for path in paths_of(trie)]
    engine = Engine(tokenizer, vocabulary.embedding_rows, "root ::= " + " | ".join(words))
    ordinary = tokenizer.encode("<", add_special_tokens=False)[0]
    assert ordinary < vocabulary.start and ordinary in engine.allowed(())
    exact = Engine(tokenizer, vocabulary.embedding_rows, sid_grammar(trie))
    assert ordinary not in exact.allowed(())


def test_engine_takes_free_text_before_the_sid(parts):
    _, tokenizer, vocabulary, trie = parts
    end, never = tokenizer.convert_tokens_to_ids("<|endoftext|>"), [tokenizer.eos_token_id, tokenizer.pad_token_id]
    grammar = sid_grammar(trie, end_token_id=end, never=never)
    engine, paths = Engine(tokenizer, vocabulary.embedding_rows, grammar), paths_of(trie)
    text = tokenizer.encode("blue pen, grip", add_special_tokens=False)
    for length in range(len(text) + 1):
        allowed = engine.allowed(text[:length])
        assert end in allowed and not allowed & {*never, *vocabulary.sid_token_ids.tolist()}
        assert set(tokenizer.encode("heavy red LED", add_special_tokens=False)) <= allowed
        assert engine.allowed([*text[:length], end]) == {path[0] for path in paths}
        assert engine.allowed([*text[:length], end, *paths[3]]) == {tokenizer.eos_token_id}
    assert engine.allowed([end, text[0]]) is None


# The folder


@pytest.mark.parametrize("mode", [None, "lora", "rows"])
def test_exported_folder_is_the_model(parts, mode, tmp_path):
    model, tokenizer, vocabulary = extended("qwen3", True)
    trie = parts[3]
    if mode is not None:
        model = set_trainable(model, vocabulary, mode, {"r": 4, "lora_alpha": 8} if mode == "lora" else None)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1
    ids = torch.tensor([[5, 9, *vocabulary.sid_token_ids[[1, 5, 8]]]])
    expected = model(input_ids=ids).logits.detach()
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain.generation_config.update(top_k=3, repetition_penalty=1.4, do_sample=True)
    facts = export_engine(model, tokenizer, vocabulary, trie, tmp_path / "out", end_token_id=3)
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(served(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    assert not set(read_json(tmp_path / "out" / "generation_config.json")) & {
        "top_k",
        "repetition_penalty",
        "do_sample",
    }
    again = SidTrie.from_pretrained(tmp_path / "out")
    assert torch.equal(again.token_ids, torch.from_numpy(vocabulary.sid_token_ids.copy()))
    grammar = (tmp_path / "out" / "sid_grammar.ebnf").read_text()
    assert set(language(grammar)) == set(paths_of(again)) and facts["sids"] == trie.num_leaves
    assert "text Token(3) sid" in (tmp_path / "out" / "sid_reasoning_grammar.ebnf").read_text()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Not tested: vLLM and SGLang" in text and "{" + "depth" not in text
    shown = json.loads(re.search(r"leaves_of_tokens\(trie, torch.tensor\(\[(\[.*?\])\]\)", text)[1])
    assert int(leaves_of_tokens(again, torch.tensor(shown))) >= 0


def test_parts_that_do_not_belong_together_are_refused_before_anything_is_written(parts, tmp_path):
    model, tokenizer, vocabulary, trie = parts
    other = catalogue(1, 9, (4, 3, 6))
    with pytest.raises(DataError, match="level"):
        export_engine(model, tokenizer, vocabulary, other, tmp_path / "out")
    with pytest.raises(ConfigError, match="SIDs"):
        export_engine(model, tokenizer, vocabulary, trie, tmp_path / "out", max_sids=2)
    seq2seq = extended("bart", True)
    with pytest.raises(ConfigError, match="decoder-only"):
        export_engine(*seq2seq, trie, tmp_path / "out")
    with pytest.raises(DataError, match="tokenizer"):
        export_engine(model, tiny_tokenizer(), vocabulary, trie, tmp_path / "out")
    endless = extended("qwen3", True)[1]
    endless.eos_token = None
    with pytest.raises(ConfigError, match="EOS"):
        export_engine(model, endless, vocabulary, trie, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipe_from_step_folders(tmp_path_factory, tmp_path, capsys):
    root = run_in_process(pipeline(), tmp_path_factory.mktemp("engine"), until="model")
    options = {"sids_dir": str(root / "sids"), "model_dir": str(root / "model"), "dtype": "float32"}
    recipe.main(recipe.Arguments(**options, output_dir=str(tmp_path / "engine"), end_token="<|endoftext|>"))
    out = tmp_path / "engine"
    assert "README has the commands" in capsys.readouterr().out
    for name in ("model.safetensors", "tokenizer.json", "sid_grammar.ebnf", "sid_reasoning_grammar.ebnf", "README.md"):
        assert (out / name).is_file(), name
    for name in ("sid_trie.safetensors", "serializer.json", "sid_vocabulary.json", "run.json"):
        assert (out / name).is_file(), name
    assert (out / "sids").is_dir() and read_json(out / "run.json")["metrics"]["sids"] > 100
    assert set(language((out / "sid_grammar.ebnf").read_text())) == set(paths_of(SidTrie.from_pretrained(out)))
    with pytest.raises(SidtuneError, match="expected one"):
        recipe.main(recipe.Arguments(**options, output_dir=str(tmp_path / "no"), end_token="</think>"))
    with pytest.raises(ConfigError, match="dtype"):
        recipe.Arguments(**{**options, "dtype": "int8"}, output_dir="x")
    assert not (tmp_path / "no").exists()

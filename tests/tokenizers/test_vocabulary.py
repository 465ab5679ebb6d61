"""The vocabulary grows once, in one place: tokens, rows, first values, refusals."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from lm_stand_ins import (
    CASES,
    LEVEL_SIZES,
    TITLES,
    codebooks,
    extended,
    inputs,
    logits,
    tiny_model,
    tiny_sids,
    tiny_tokenizer,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.base_models.loading import load_plain, load_tokenizer
from sidtune.tokenizers.vocabulary.embedding_init import token_shares
from sidtune.tokenizers.vocabulary.extension import Vocabulary, extend_vocabulary
from sidtune.tokenizers.vocabulary.token_matrices import grow, vocab_matrices
from sidtune.tokenizers.vocabulary.trainable_tokens import set_trainable

NEW = sum(LEVEL_SIZES)


def matrices(model) -> list[torch.Tensor]:
    return [matrix.parameter.detach() for matrix in vocab_matrices(model)]


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_old_rows_stay_and_new_rows_come_in_every_family(kind, tied, tmp_path):
    model, tokenizer = tiny_model(kind, tied), tiny_tokenizer()
    base, before = len(tokenizer), [m.clone() for m in matrices(model)]
    expected = {"t5": 2, "mt5": 2, "bart": 4}.get(kind, 2)
    assert len(before) == (1 if tied else expected)
    old = Vocabulary((4, 3), np.arange(base - 7, base), base - 7, base)  # any batch of old tokens
    old_logits = logits(model, old)
    vocabulary = extend_vocabulary(model, tokenizer, tiny_sids(), codebooks=codebooks())

    assert vocabulary.base_vocab_size == base and len(tokenizer) == base + NEW
    assert vocabulary.embedding_rows == 320 == model.config.vocab_size
    for was, now in zip(before, matrices(model), strict=True):
        assert now.shape == (320, was.shape[1])
        assert torch.equal(now[:base], was)
        torch.testing.assert_close(now[base + NEW :], was.mean(0).expand(320 - base - NEW, -1))
        assert len(now[base : base + NEW].unique(dim=0)) == NEW
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    torch.testing.assert_close(logits(model, old)[..., :base], old_logits, rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_plain(tmp_path), load_tokenizer(tmp_path)
    assert torch.equal(logits(loaded, vocabulary), logits(model, vocabulary))
    assert loaded_tokenizer.encode("pen <a_3><b_1><c_2>.") == tokenizer.encode("pen <a_3><b_1><c_2>.")


def test_a_sid_is_exactly_its_tokens():
    model, tokenizer, vocabulary = extended()
    sids = tiny_sids()
    assert tokenizer.convert_tokens_to_ids(sids.tokens()) == vocabulary.sid_token_ids.tolist()
    for item, text in sids.texts().items():
        ids = vocabulary.token_ids(sids.codes[sids.row_of(item)]).tolist()
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(f"a{text}b") == tokenizer.encode("a") + ids + tokenizer.encode("b")
        assert tokenizer.encode(f" {text} pen") == tokenizer.encode(" ") + ids + tokenizer.encode(" pen")
    for level in range(3):
        texts = tokenizer.convert_ids_to_tokens(vocabulary.level_token_ids(level).tolist())
        assert texts == sids.level_tokens(level)
    with pytest.raises(ConfigError, match="levels 0 to 2"):
        vocabulary.level_token_ids(3)


def test_sid_tokens_are_ordinary_tokens():
    _, tokenizer, vocabulary = extended()
    assert tokenizer.decode(tokenizer.encode("<a_0><b_1><c_4>"), skip_special_tokens=True) == "<a_0><b_1><c_4>"
    assert not set(vocabulary.sid_token_ids.tolist()) & set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder[vocabulary.start]
    assert not (added.special or added.normalized or added.lstrip or added.rstrip or added.single_word)


def _metaspace_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", "a", "b", ":", "p", "e", "n", "\u2581pen"]
    if kind == "unigram":  # T5
        backend = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=2))
    else:  # Llama 2
        vocab = {piece: n for n, piece in enumerate(pieces)}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if kind == "unigram" else "first")
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_tokenizers_with_metaspace(kind):
    tokenizer = _metaspace_tokenizer(kind)
    model = tiny_model("t5", True)
    vocabulary = extend_vocabulary(model, tokenizer, tiny_sids(), init="mean")
    assert vocabulary.start == 11
    assert tokenizer.encode("<a_3><b_1><c_2>") == [14, 16, 20]


def test_a_slow_tokenizer():
    tokenizer = ByT5Tokenizer()
    model = tiny_model("t5", True)
    grow(model, len(tokenizer))
    vocabulary = extend_vocabulary(model, tokenizer, tiny_sids(), init="mean")
    assert tokenizer.encode("<a_3><b_1><c_2>", add_special_tokens=False) == [
        vocabulary.start + n for n in (3, 4 + 1, 4 + 3 + 2)
    ]


def test_spare_rows_are_used_and_never_removed():
    """Qwen3 has more rows than tokens."""
    model, tokenizer = tiny_model("qwen3", False), tiny_tokenizer()
    grow(model, 1000)
    with torch.no_grad():
        for matrix in vocab_matrices(model):
            matrix.parameter[300:] = 77.0
    before = [m.clone() for m in matrices(model)]
    vocabulary = extend_vocabulary(model, tokenizer, tiny_sids(), codebooks=codebooks())
    assert vocabulary.embedding_rows == 1000 and vocabulary.start == 300
    for was, now in zip(before, matrices(model), strict=True):
        assert now.shape[0] == 1000 and torch.equal(now[:300], was[:300])
        torch.testing.assert_close(now[312:], was[:300].mean(0).expand(688, -1))
        assert (now[300:312] != 77).all()


@pytest.mark.parametrize(("multiple", "rows"), [(64, 320), (None, 312), (1, 312), (50, 350), (312, 312)])
def test_padding_of_the_rows(multiple, rows):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    assert len(tokenizer) == 300
    vocabulary = extend_vocabulary(model, tokenizer, tiny_sids(), init="mean", pad_to_multiple_of=multiple)
    assert vocabulary.embedding_rows == rows == model.lm_head.out_features == model.lm_head.weight.shape[0]


def test_an_untied_t5_head_survives_where_transformers_loses_it():
    """Known trap: its config says tied, so transformers' own resize ties the trained head again."""
    reference, model, tokenizer = tiny_model("t5", False), tiny_model("t5", False), tiny_tokenizer()
    head = model.lm_head.weight.detach().clone()
    reference.resize_token_embeddings(312, mean_resizing=False)
    assert not torch.equal(reference.lm_head.weight[:300], head)  # if this fails, transformers has mended it
    extend_vocabulary(model, tokenizer, tiny_sids(), codebooks=codebooks())
    assert torch.equal(model.lm_head.weight[:300], head)


def test_a_head_with_bias_and_final_logits_bias_grow():
    model, tokenizer = tiny_model("llama", False), tiny_tokenizer()
    model.lm_head.bias = torch.nn.Parameter(torch.arange(300.0))
    extend_vocabulary(model, tokenizer, tiny_sids(), init="mean")
    assert torch.equal(model.lm_head.bias[:300], torch.arange(300.0))
    assert torch.allclose(model.lm_head.bias[300:], torch.tensor(149.5)) and len(model.lm_head.bias) == 320
    model, tokenizer = tiny_model("bart"), tiny_tokenizer()
    model.final_logits_bias += 2.0
    extend_vocabulary(model, tokenizer, tiny_sids(), init="mean")
    assert model.final_logits_bias[0].tolist() == [2.0] * 300 + [0.0] * 20


def _cosines(rows: np.ndarray) -> np.ndarray:
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [2, 6, 32, 50])
def test_codebook_rows_keep_the_geometry_of_the_codebook(tied, width):
    """With noise 0 the rows of a level around the mean row have the cosines of its centred centroids.

    Also when the centroids are wider than the embedding: 12 centroids span fewer dimensions than its 32.
    """
    model, tokenizer = tiny_model("qwen3", tied), tiny_tokenizer()
    old = [m.double().numpy() for m in matrices(model)]
    books = codebooks(width)
    vocabulary = extend_vocabulary(model, tokenizer, tiny_sids(), codebooks=books, noise=0.0)
    for was, now in zip(old, matrices(model), strict=True):
        mean = was.mean(0)
        spread = np.square(was - mean).sum(1).mean()
        for level, book in enumerate(books):
            rows = now[vocabulary.level_token_ids(level).tolist()].double().numpy() - mean
            np.testing.assert_allclose(_cosines(rows), _cosines(book - book.mean(0)), atol=1e-4)
            assert np.square(rows).sum(1).mean() == pytest.approx(spread, rel=1e-4)


def test_suffix_levels_and_single_codes_get_the_mean_row():
    sids = tiny_sids(40).with_suffix()
    model, tokenizer = tiny_model(), tiny_tokenizer()
    mean = matrices(model)[0].mean(0)
    vocabulary = extend_vocabulary(model, tokenizer, sids, codebooks=codebooks(), noise=0.0)
    rows = matrices(model)[0]
    suffix = rows[vocabulary.level_token_ids(3).tolist()]
    torch.testing.assert_close(suffix, mean.expand_as(suffix), rtol=1e-5, atol=1e-6)
    assert (rows[vocabulary.level_token_ids(2).tolist()] - mean).abs().max() > 0.1


@pytest.mark.parametrize("as_mapping", [True, False])
def test_text_rows_equal_a_plain_computation(as_mapping):
    sids, model, tokenizer = tiny_sids(), tiny_model("llama", False), tiny_tokenizer()
    texts = [*TITLES[:-2], "", None]
    given = dict(zip(sids.item_ids[:-1], texts, strict=False)) if as_mapping else texts
    lists = [tokenizer.encode(text) if text else [] for text in texts]
    expected = []
    for matrix in matrices(model):
        mean, rows = matrix.mean(0), []
        for level, size in enumerate(LEVEL_SIZES):
            for code in range(size):
                members = [n for n in range(len(sids)) if sids.codes[n, level] == code and lists[n]]
                total = 1.5 * mean + sum((matrix[lists[n]].mean(0) for n in members), torch.zeros_like(mean))
                rows.append(total / (1.5 + len(members)))
        expected.append(torch.stack(rows))
    options = {"init": "text", "item_texts": given, "noise": 0.0, "shrink": 1.5}
    vocabulary = extend_vocabulary(model, tokenizer, sids, **options)
    for matrix, rows in zip(matrices(model), expected, strict=True):
        torch.testing.assert_close(matrix[vocabulary.start : vocabulary.stop], rows, rtol=1e-4, atol=1e-5)


def test_only_old_tokens_count_as_text():
    _, tokenizer, vocabulary = extended()
    shares = token_shares(tokenizer, ["blue pen", "blue pen<a_1>", "<a_1><b_2>", ""], vocabulary.start).toarray()
    expected = np.bincount(tokenizer.encode("blue pen"), minlength=300) / len(tokenizer.encode("blue pen"))
    np.testing.assert_allclose(shares[0], expected)
    np.testing.assert_allclose(shares[1], expected)
    assert not shares[2:].any()


def test_mean_rows_and_noise():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    old = matrices(model)[0]
    exact = copy.deepcopy(model)
    vocabulary = extend_vocabulary(exact, copy.deepcopy(tokenizer), tiny_sids(), init="mean", noise=0.0)
    rows = matrices(exact)[0][vocabulary.start : vocabulary.stop]
    torch.testing.assert_close(rows, old.mean(0).expand_as(rows), rtol=1e-5, atol=1e-6)
    extend_vocabulary(model, tokenizer, tiny_sids(), init="mean", noise=0.5)
    noisy = matrices(model)[0][vocabulary.start : vocabulary.stop] - old.mean(0)
    deviation = (old - old.mean(0)).square().mean().sqrt()
    assert float(noisy.std() / deviation) == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("init", ["codebook", "text", "mean"])
def test_the_seed_decides(init):
    def rows(seed):
        model, tokenizer = tiny_model("qwen3", False), tiny_tokenizer()
        extend_vocabulary(model, tokenizer, tiny_sids(), init, codebooks(), TITLES, seed=seed)
        return matrices(model)

    first, again, other = rows(0), rows(0), rows(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def _refused(change, error, words, **options):
    model, tokenizer, sids = tiny_model("qwen3", False), tiny_tokenizer(), tiny_sids()
    model, tokenizer = change(model, tokenizer) or (model, tokenizer)
    before, length = [m.clone() for m in matrices(model)], len(tokenizer)
    with pytest.raises(error, match=words) as caught:
        extend_vocabulary(model, tokenizer, sids, **{"codebooks": codebooks(), **options})
    assert "\n" not in str(caught.value)
    assert len(tokenizer) == length
    assert all(torch.equal(a, b) for a, b in zip(matrices(model), before, strict=True))


def _nothing(model, tokenizer):
    return None


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ConfigError, "no init 'codebok'.*did you mean 'codebook'", {"init": "codebok"}),
        (ConfigError, "pad_to_multiple_of", {"pad_to_multiple_of": 0}),
        (ConfigError, "pad_to_multiple_of", {"pad_to_multiple_of": 6.5}),
        (ConfigError, "noise must be", {"noise": -1.0}),
        (ConfigError, "noise must be", {"noise": float("nan")}),
        (ConfigError, "shrink must be", {"shrink": float("inf")}),
        (DataError, "needs the codebooks", {"codebooks": None}),
        (DataError, "Expected 3 codebooks.*got 2", {"codebooks": codebooks()[:2]}),
        (DataError, "level 2 has the shape", {"codebooks": [codebooks()[0], codebooks()[0], codebooks()[2]]}),
        (DataError, "level 3.*NaN", {"codebooks": [*codebooks()[:2], codebooks()[2] * np.nan]}),
        (DataError, "needs the item texts", {"init": "text"}),
        (DataError, "Expected 8 item texts.*got 3", {"init": "text", "item_texts": TITLES[:3]}),
        (DataError, "no text for any item", {"init": "text", "item_texts": {"other": "a"}}),
    ],
)
def test_bad_options_change_nothing(error, words, options):
    _refused(_nothing, error, words, **options)


def test_a_tokenizer_that_knows_sid_tokens_is_refused():
    _refused(lambda m, t: t.add_tokens(["<b_1>"]) and grow(m, 301), ConfigError, r"1 of the 12 SID tokens.*'<b_1>'")
    special = {"additional_special_tokens": ["<a_0>", "<c_4>"]}
    _refused(lambda m, t: t.add_special_tokens(special) and grow(m, 302), ConfigError, r"2 of the 12 SID tokens")
    model, tokenizer, _ = extended()
    _refused(lambda m, t: (model, tokenizer), ConfigError, "all 12 SID tokens already.*from_pretrained")


def test_a_tokenizer_of_another_model_is_refused():
    _refused(lambda m, t: t.add_tokens(["<new>"]) and None, ConfigError, "301 tokens but the model only 300 rows")


def test_a_tokenizer_whose_ids_have_gaps_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 40}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    gaps = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="a")
    _refused(lambda m, t: (m, gaps), ConfigError, "3 tokens but ids up to 40, with gaps")


def test_adapted_models_are_refused():
    model, tokenizer, vocabulary = extended()
    for mode in ("rows", "lora"):
        trained = set_trainable(copy.deepcopy(model), vocabulary, mode)
        with pytest.raises(ConfigError, match="before an adapter"):
            extend_vocabulary(trained, tiny_tokenizer(), tiny_sids(), init="mean")


def test_a_model_without_head_is_refused():
    with pytest.raises(ConfigError, match="no language-model head"):
        extend_vocabulary(tiny_model().model, tiny_tokenizer(), tiny_sids(), init="mean")


def test_vocabulary_file(tmp_path):
    _, tokenizer, vocabulary = extended()
    vocabulary.save_pretrained(tmp_path / "new")
    loaded = Vocabulary.from_pretrained(tmp_path / "new")
    assert loaded.level_sizes == vocabulary.level_sizes and loaded.embedding_rows == vocabulary.embedding_rows
    assert loaded.base_vocab_size == vocabulary.base_vocab_size
    assert np.array_equal(loaded.sid_token_ids, vocabulary.sid_token_ids) and loaded.sid_token_ids.dtype == np.int64
    loaded.check(tokenizer, tiny_sids(), rows=320)
    with pytest.raises(DataError, match="levels of"):
        loaded.check(sids=tiny_sids(40).with_suffix())
    with pytest.raises(DataError, match="311"):
        loaded.check(rows=311)
    with pytest.raises(DataError, match="does not hold the SID tokens"):
        loaded.check(tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens([f"<z_{n}>" for n in range(20)])
    with pytest.raises(DataError, match="does not hold the SID tokens"):
        loaded.check(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("level_sizes"),
        lambda v: v.update(level_sizes=[4, 3]),
        lambda v: v.update(sid_token_ids=v["sid_token_ids"][::-1]),
        lambda v: v.update(sid_token_ids=None),
        lambda v: v.update(base_vocab_size="300"),
        lambda v: v.update(base_vocab_size=299),
        lambda v: v.update(embedding_rows=305),
        lambda v: v.update(level_sizes=[12, 0.0, 0]),
        lambda v: v.clear(),
    ],
)
def test_damaged_vocabulary_files_are_one_sentence(change, tmp_path):
    _, _, vocabulary = extended()
    vocabulary.save_pretrained(tmp_path)
    path = tmp_path / "sid_vocabulary.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(DataError) as caught:
        Vocabulary.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    path.write_text("[1, 2")
    with pytest.raises(DataError, match="not readable JSON"):
        Vocabulary.from_pretrained(tmp_path)


def test_base_models_that_cannot_be_read_are_one_sentence(tmp_path):
    model = tiny_model()
    for place, words in ((tmp_path / "none", "does not exist"), ("a/b/c", "does not exist"), (tmp_path, "No model")):
        with pytest.raises(DataError, match=words) as caught:
            load_plain(place)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="dtype"):
        load_plain(tmp_path, dtype="float23")
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(DataError, match="No model can be read"):
        load_plain(tmp_path / "m")


def test_half_precision_models_extend():
    model, tokenizer = tiny_model().to(torch.bfloat16), tiny_tokenizer()
    vocabulary = extend_vocabulary(model, tokenizer, tiny_sids(), codebooks=codebooks())
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(model(**inputs(model, vocabulary)).logits).all()

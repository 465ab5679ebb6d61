"""Item vectors: texts from tables, TF-IDF + SVD against plain scikit-learn, pooling against a plain loop, frozen after
saving."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.tables.schema import table_from_rows
from sidtune.tokenizers.encoders.base import Encoder, item_texts, load_encoder, make_encoder, warn_empty
from sidtune.tokenizers.encoders.precomputed import PrecomputedConfig, PrecomputedEncoder
from sidtune.tokenizers.encoders.text import TransformersConfig, TransformersEncoder
from sidtune.tokenizers.encoders.tfidf import TfidfSvdConfig, TfidfSvdEncoder
from sidtune.tokenizers.registry import ENCODERS

WORDS = ["red", "blue", "green", "tall", "short", "wide", "pen", "pencil", "paper", "stapler", "folder", "lamp", "desk"]
WORDS += ["chair", "cable", "mouse", "board", "tape"]


def catalogue(items: int = 300, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(3, 9))) + f" {n % 7} pack" for n in range(items)]


# ---------------------------------------------------------------- item texts


def test_item_texts_join_fields_in_order():
    rows = [
        {
            "item_id": "1",
            "title": " Red \n pen ",
            "brand": "Acme",
            "category": ["Office", "Pens"],
            "attributes": [{"name": "colour", "value": "red"}, {"name": "tip", "value": None}],
            "description": "writes\twell",
        },
        {"item_id": "2"},
        {"item_id": "3", "title": "lamp", "category": [], "attributes": [], "description": ""},
        {"item_id": "4", "category": [None, "Desk"], "brand": "B"},
    ]
    table = table_from_rows("items", rows)
    expected = ["Red pen Acme Office Pens colour red tip writes well", "", "lamp", "B Desk"]
    assert item_texts(table) == expected
    assert item_texts(table.slice(2)) == expected[2:]
    assert item_texts(table, ["brand", "title"], {"title": 2})[0] == "Acme Red pen Red pen"
    assert item_texts(table.slice(0, 0)) == []


def test_item_texts_refuse_unknown_fields():
    table = table_from_rows("items", [{"item_id": "1"}])
    with pytest.raises(ConfigError, match="no text field 'titel': did you mean 'title'"):
        item_texts(table, ["titel"])
    with pytest.raises(ConfigError, match="repeats of 1 or more"):
        item_texts(table, repeats={"title": 0})
    with pytest.raises(ConfigError, match="at least one field"):
        item_texts(table, [])


# ---------------------------------------------------------------- tfidf_svd


def test_tfidf_svd_keeps_the_similarities_of_tfidf():
    """With as many dimensions as the rank, SVD is a rotation: cosines equal those of plain scikit-learn TF-IDF."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = catalogue(60)
    encoder = TfidfSvdEncoder(TfidfSvdConfig(dims=60, ngram=(1, 1), min_df=1, max_df=1.0, iterations=12)).fit(texts)
    vectors = encoder.encode(texts)
    plain = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+").fit_transform(texts).toarray()
    np.testing.assert_allclose(vectors @ vectors.T, plain @ plain.T, atol=1e-4)
    assert vectors.shape == (60, 60) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_tfidf_svd_is_frozen_seeded_and_row_by_row():
    texts, new = catalogue(), catalogue(40, seed=1)
    encoder = TfidfSvdEncoder(TfidfSvdConfig(dims=16)).fit(texts)
    vectors = encoder.encode(new)
    encoder.encode(texts)
    np.testing.assert_array_equal(np.concatenate([encoder.encode([text]) for text in new]), vectors)
    again = TfidfSvdEncoder(TfidfSvdConfig(dims=16)).fit(texts)
    np.testing.assert_array_equal(again.encode(new), vectors)


@pytest.mark.parametrize("options", [{"dims": 16}, {"dims": 8, "analyzer": "char_wb", "ngram": [2, 3]}, {"dims": 500}])
def test_tfidf_svd_saves_without_pickle_and_loads_bitwise(tmp_path, options):
    texts, new = catalogue(), [*catalogue(40, seed=1), "", "zzz"]
    encoder = make_encoder("tfidf_svd", options).fit(texts)
    encoder.save_pretrained(tmp_path / "e")
    names = sorted(p.name for p in (tmp_path / "e").iterdir())
    assert names == ["encoder.safetensors", "encoder_config.json", "vocabulary.json"]
    for loaded in (load_encoder(tmp_path / "e"), TfidfSvdEncoder.from_pretrained(str(tmp_path / "e"))):
        assert loaded.encode(new).tobytes() == encoder.encode(new).tobytes() and loaded.config == encoder.config
        loaded.save_pretrained(tmp_path / "again")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "e" / name).read_bytes()


def test_empty_and_unknown_texts_get_the_catalogue_mean():
    texts = [*catalogue(50), "", "   "]
    encoder = TfidfSvdEncoder(TfidfSvdConfig(dims=8)).fit(texts)
    vectors = encoder.encode(texts)
    assert encoder.empty_texts == 2
    known = vectors[:50].mean(axis=0)
    np.testing.assert_allclose(vectors[50], known / np.linalg.norm(known), atol=1e-5)
    np.testing.assert_array_equal(encoder.encode(["qwertz", "red pen"])[0], vectors[51])
    assert encoder.empty_texts == 1
    with pytest.warns(UserWarning, match="1 of 2 items had nothing"):
        warn_empty(encoder, 2)


def test_fewer_items_or_terms_than_dims_are_padded_with_zeros():
    few = TfidfSvdEncoder(TfidfSvdConfig(dims=32)).fit(["red pen", "blue pen", "red lamp"])
    vectors = few.encode(["red pen", "blue pen"])
    assert vectors.shape == (2, 32) and not vectors[:, 3:].any()
    one = TfidfSvdEncoder(TfidfSvdConfig(dims=4, min_df=1)).fit(["pen"])
    np.testing.assert_array_equal(one.encode(["pen"]), [[1, 0, 0, 0]])


def test_text_without_spaces_is_split_into_characters():
    texts = ["红色钢笔", "蓝色钢笔", "红色台灯", "蓝色台灯"]
    encoder = TfidfSvdEncoder(TfidfSvdConfig(dims=16, max_df=1.0)).fit(texts)
    vectors = encoder.encode(texts)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[3] + 0.1, "two pens are more alike than a pen and a lamp"


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ([], "catalogue is empty"),
        (["", " "], "No usable term was found in 2 item texts .* lower min_df"),
        (["one", "two"], "No usable term"),
        ("red pen", "got one text"),
        (["red", None], "Item text 1 is NoneType"),
    ],
)
def test_unusable_texts_are_refused(texts, sentence):
    with pytest.raises(DataError, match=sentence):
        TfidfSvdEncoder().fit(texts)


def test_unfitted_and_damaged_encoders_are_refused(tmp_path):
    with pytest.raises(DataError, match="not fitted"):
        TfidfSvdEncoder().encode(["pen"])
    with pytest.raises(DataError, match="not fitted"):
        TfidfSvdEncoder().save_pretrained(tmp_path / "e")
    assert not (tmp_path / "e").exists()
    TfidfSvdEncoder(TfidfSvdConfig(dims=4)).fit(catalogue(20)).save_pretrained(tmp_path / "e")
    terms = json.loads((tmp_path / "e" / "vocabulary.json").read_text())
    for wrong in (terms[:-1], [*terms[:-1], terms[0]], {"a": 1}, None):
        (tmp_path / "e" / "vocabulary.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match="do not fit together"):
            load_encoder(tmp_path / "e")
    with pytest.raises(DataError, match="holds the encoder 'tfidf_svd', not a 'precomputed'"):
        PrecomputedEncoder.from_pretrained(tmp_path / "e")
    (tmp_path / "e" / "encoder_config.json").write_text("{}")
    with pytest.raises(DataError, match="describes no encoder"):
        load_encoder(tmp_path / "e")


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("tfidf_svd", {"dims": 0}, "dims must be at least 1"),
        ("tfidf_svd", {"ngram": [2, 1]}, "ngram must be"),
        ("tfidf_svd", {"max_df": 0.0}, "share in"),
        ("tfidf_svd", {"dim": 3}, "did you mean 'dims'"),
        ("tfidf_svd", {"analyzer": "words"}, "'analyzer' must be one of 'word', 'char_wb'"),
        ("tfidf-svd", {}, "did you mean 'tfidf_svd'"),
        ("precomputed", {}, "needs 'path'"),
        ("precomputed", {"path": "x.npy", "align": "ids"}, "needs 'ids_path' exactly when"),
        ("transformers", {}, "needs 'model'"),
        ("transformers", {"model": "x", "batch_size": 0}, "batch_size"),
        ("transformers", {"model": "x", "pooling": "max"}, "'pooling' must be one of 'auto', 'mean', 'cls', 'last'"),
        ("sentence_transformers", {}, "needs 'model'"),
    ],
)
def test_bad_options_are_refused(name, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_encoder(name, options)


def test_registry_lists_working_classes():
    for name in ENCODERS:
        cls = ENCODERS.get(name)
        assert issubclass(cls, Encoder) and cls.name == name


# ---------------------------------------------------------------- precomputed


def test_precomputed_vectors_are_matched_as_asked(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    save_file({"items": vectors, "users": vectors + 1}, tmp_path / "v.safetensors")
    (tmp_path / "ids.txt").write_text("e\nd\nc\nb\na\n", encoding="utf-8")
    (tmp_path / "ids.json").write_text(json.dumps(list("edcba")))
    npy = str(tmp_path / "v.npy")
    np.testing.assert_array_equal(make_encoder("precomputed", {"path": npy}).fit([]).encode([""] * 5), vectors)
    tensor = make_encoder("precomputed", {"path": str(tmp_path / "v.safetensors"), "tensor": "users"})
    np.testing.assert_array_equal(tensor.encode([""] * 5), vectors + 1)
    rows = make_encoder("precomputed", {"path": npy, "align": "row_number"})
    np.testing.assert_array_equal(rows.encode(["", ""], ["4", "0"]), vectors[[4, 0]])
    for ids in ("ids.txt", "ids.json"):
        by_id = make_encoder("precomputed", {"path": npy, "align": "ids", "ids_path": str(tmp_path / ids)})
        np.testing.assert_array_equal(by_id.encode(["", ""], ["a", "e"]), vectors[[4, 0]])
    by_id.save_pretrained(tmp_path / "saved")
    (tmp_path / "v.npy").unlink()
    np.testing.assert_array_equal(load_encoder(tmp_path / "saved").encode([""], ["b"]), vectors[[3]])
    unit = PrecomputedEncoder(PrecomputedConfig(str(tmp_path / "v.safetensors"), "items", normalize=True))
    np.testing.assert_allclose(np.linalg.norm(unit.encode([""] * 5), axis=1), 1.0, atol=1e-6)


def test_precomputed_mistakes_are_named(tmp_path):
    def make(**options):
        return make_encoder("precomputed", {"path": str(tmp_path / "v.npy")} | options)

    with pytest.raises(DataError, match="does not exist"):
        make().fit([])
    np.save(tmp_path / "v.npy", np.ones((3, 2)))
    with pytest.raises(DataError, match="3 vectors for 2 items"):
        make().encode(["", ""])
    with pytest.raises(DataError, match=r"1 of 2 items have no precomputed vector \(first: '7'\)"):
        make(align="row_number").encode(["", ""], ["0", "7"])
    with pytest.raises(DataError, match="needs the item id"):
        make(align="row_number").encode(["", ""])
    (tmp_path / "ids.txt").write_text("a\na\nb")
    with pytest.raises(DataError, match=r"3 ids \(2 distinct\) were given for 3"):
        make(align="ids", ids_path=str(tmp_path / "ids.txt")).fit([])
    np.save(tmp_path / "v.npy", np.array([[1.0], [np.nan]]))
    with pytest.raises(DataError, match="1 of 2 precomputed vectors hold NaN"):
        make().fit([])
    np.save(tmp_path / "v.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(DataError, match=r"no readable \.npy array"):
        make().fit([])
    (tmp_path / "v.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"no readable \.npy array"):
        make().fit([])
    with pytest.raises(DataError, match=r"a \.npy or \.safetensors file"):
        make(path=str(tmp_path / "v.csv")).fit([])
    save_file({"a": np.ones((2, 2)), "b": np.ones((2, 2))}, tmp_path / "v.safetensors")
    with pytest.raises(DataError, match=r"holds the tensors \['a', 'b'\]"):
        make(path=str(tmp_path / "v.safetensors")).fit([])


def test_published_vectors_of_instruments(real_data):
    path = str(real_data / "instruments" / "Instruments.sasrec-32d.npy")
    encoder = make_encoder("precomputed", {"path": path, "align": "row_number"})
    assert encoder.encode([""] * 2, ["9921", "0"]).shape == (2, 32)
    assert make_encoder("precomputed", {"path": path}).encode([""] * 9922).shape == (9922, 32)


# ---------------------------------------------------------------- pretrained text models


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """Folders of a BERT, a Qwen3 and a T5 of two small layers, with a word tokenizer, made on the spot."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertConfig,
        BertModel,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3Model,
        T5Config,
        T5Model,
    )

    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    size = {"vocab_size": len(vocabulary), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 32}
    t5 = {"vocab_size": len(vocabulary), "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32}
    torch.manual_seed(0)
    made = {
        "bert": BertModel(BertConfig(**size, max_position_embeddings=64)),
        "qwen3": Qwen3Model(Qwen3Config(**size, num_key_value_heads=2, head_dim=8)),
        "t5": T5Model(T5Config(**t5, decoder_start_token_id=0)),
    }
    root = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("qwen3", "last"), ("qwen3", "mean"), ("t5", "mean")])
def test_pooled_vectors_equal_one_text_at_a_time(tiny_models, kind, pooling):
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = str(tiny_models / kind)
    texts = [*catalogue(9), "red", "red pen " * 30]
    config = TransformersConfig(folder, pooling=pooling, batch_size=4, device="cpu", max_length=20, normalize=False)
    vectors = TransformersEncoder(config).fit(texts).encode(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if kind == "t5" else model
    with torch.no_grad():
        for text, vector in zip(texts, vectors, strict=True):
            ids = torch.tensor([tokenizer(text)["input_ids"][:20]])
            states = model(input_ids=ids).last_hidden_state[0]
            expected = states.mean(dim=0) if pooling == "mean" else states[-1]
            np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)


def test_pretrained_encoder_options(tiny_models, tmp_path):
    folder = str(tiny_models / "bert")
    encoder = make_encoder("transformers", {"model": folder, "device": "cpu", "empty_text": "red pen"})
    vectors = encoder.encode(["", "red pen", "lamp"])
    assert encoder.empty_texts == 1 and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    encoder.save_pretrained(tmp_path / "e")
    np.testing.assert_array_equal(load_encoder(tmp_path / "e").encode(["", "red pen", "lamp"]), vectors)
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == ["encoder_config.json"]


def test_unknown_models_and_missing_packages_are_named(monkeypatch, tmp_path):
    missing = str(tmp_path / "none")
    with pytest.raises(DataError, match="does not exist"):
        make_encoder("transformers", {"model": missing}).fit(["pen"])
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"needs the package sentence-transformers.*sidtune\[encoders\]"):
        make_encoder("sentence_transformers", {"model": missing}).fit(["pen"])


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="sentence-transformers is not installed (extra 'encoders')",
)
def test_sentence_transformers_agrees_with_mean_pooling(tiny_models, tmp_path):
    from sentence_transformers import SentenceTransformer, models

    folder = str(tiny_models / "bert")
    layers = models.Transformer(folder, max_seq_length=20)
    pooling = models.Pooling(16, pooling_mode="mean")
    SentenceTransformer(modules=[layers, pooling], device="cpu").save(str(tmp_path / "st"))
    texts = [*catalogue(9), ""]
    options = {"empty_text": "lamp", "device": "cpu"}
    ours = make_encoder("sentence_transformers", {"model": str(tmp_path / "st")} | options)
    other = make_encoder("transformers", {"model": folder, "max_length": 20} | options)
    np.testing.assert_allclose(ours.encode(texts), other.encode(texts), atol=1e-5)
    assert ours.empty_texts == 1

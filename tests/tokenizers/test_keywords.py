"""Core keywords: the matcher against a plain loop over all keywords, mining against counting by hand, Eq. 2 of
OneSearch by its formula, and an encoder that says the same after loading in another process."""

from __future__ import annotations

import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.tables.schema import table_from_rows
from sidtune.data_builders.tables.store import DataFolder
from sidtune.tokenizers.encoders.base import item_texts, load_encoder, make_encoder
from sidtune.tokenizers.encoders.tfidf import TfidfSvdConfig, TfidfSvdEncoder
from sidtune.tokenizers.keywords.fusion import KeywordFusionConfig, KeywordFusionEncoder, fuse
from sidtune.tokenizers.keywords.matcher import KeywordMatcher, normal_form
from sidtune.tokenizers.keywords.mining import PoolConfig, candidates, mine_pool
from sidtune.tokenizers.keywords.pool import KEYWORD_TYPES, KeywordPool


def words(matcher: KeywordMatcher, text: str) -> list[str]:
    return [matcher.keywords[number] for number in matcher.match([text]).indices]


def is_spaced_letter(char: str) -> bool:
    unspaced = any(script in unicodedata.name(char, "") for script in ("CJK", "KATAKANA", "HIRAGANA", "THAI"))
    return not unspaced and (char == "_" or char.isalnum())


def occurs(word: str, text: str, borders: bool) -> bool:
    """One place after the other, by slicing."""
    padded = f" {text} "
    for start in range(1, len(padded) - len(word)):
        if padded[start : start + len(word)] != word:
            continue
        inside = is_spaced_letter(padded[start - 1]) and is_spaced_letter(word[0])
        inside |= is_spaced_letter(padded[start + len(word)]) and is_spaced_letter(word[-1])
        if not (borders and inside):
            return True
    return False


def by_hand(keywords: list[str], text: str, borders: bool) -> list[str]:
    """The released rule: matched words by falling length, a part of a longer kept word is dropped."""
    text, kept = normal_form(text), []
    for word in sorted((word for word in keywords if occurs(word, text, borders)), key=len, reverse=True):
        if not any(occurs(word, longer, borders) for longer in kept):
            kept.append(word)
    return kept


# ---------------------------------------------------------------- matcher


def test_check_1_of_the_sheet_longest_match_and_case():
    matcher = KeywordMatcher(["cotton", "pure cotton", "Red"])
    assert words(matcher, "Shirt of PURE Cotton, rEd") == ["pure cotton", "red"]
    assert words(matcher, "cotton shirt") == ["cotton"]
    assert words(matcher, "pure cotton and other cotton") == ["pure cotton"]  # as released: wherever it stands
    assert words(matcher, "") == []


letters = st.text(alphabet="ab 日本.B_", min_size=0, max_size=14)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(letters.map(normal_form).filter(bool), min_size=1, max_size=12, unique=True),
    st.lists(letters, min_size=1, max_size=5),
    st.booleans(),
)
def test_matcher_equals_a_plain_loop(keywords, texts, borders):
    matcher = KeywordMatcher(keywords, borders)
    found = matcher.match(texts)
    assert found.shape == (len(texts), len(keywords)) and set(found.data) <= {1.0}
    for row, text in enumerate(texts):
        there = found.indices[found.indptr[row] : found.indptr[row + 1]]
        assert [keywords[number] for number in there] == by_hand(keywords, text, borders)


def test_word_boundaries_and_scripts_without_spaces():
    keywords = ["pen", "pencil", "棉", "纯棉", "ручка"]
    assert words(KeywordMatcher(keywords), "pen, pencil") == ["pencil", "pen"]
    assert words(KeywordMatcher(keywords), "pencils or open") == []
    assert words(KeywordMatcher(keywords, word_boundaries=False), "pencils or open") == ["pencil"]
    assert words(KeywordMatcher(keywords), "pen纯棉T恤") == ["pen", "纯棉"]
    assert words(KeywordMatcher(keywords), "Ручка и ручками") == ["ручка"]
    assert words(KeywordMatcher(["i̇stanbul"]), "İSTANBUL") == ["i̇stanbul"]  # lower case is longer than the text


def test_many_texts_match_as_one_at_a_time(monkeypatch):
    draw = np.random.default_rng(0)
    drawn = ["".join(draw.choice(list("abc"), draw.integers(1, 4))) for _ in range(60)]
    keywords = list(dict.fromkeys([*drawn[:30], *(f"{a} {b}" for a, b in zip(drawn, drawn[1:], strict=False))]))
    texts = [" ".join(draw.choice(drawn, draw.integers(0, 9))) for _ in range(300)]
    whole = KeywordMatcher(keywords).match(texts)
    monkeypatch.setattr("sidtune.tokenizers.keywords.matcher._BLOCK", 37)
    matcher = KeywordMatcher(keywords)
    split = matcher.match(texts)
    assert (whole.indices == split.indices).all() and (whole.indptr == split.indptr).all()
    assert [words(matcher, text) for text in texts[:50]] == [by_hand(keywords, text, True) for text in texts[:50]]


def test_matcher_refuses_empty_and_repeated_keywords():
    with pytest.raises(DataError, match="'red' occurs twice"):
        KeywordMatcher(["red", "RED"])
    with pytest.raises(DataError, match="one is empty"):
        KeywordMatcher([" "])
    assert words(KeywordMatcher([]), "red") == []


# ---------------------------------------------------------------- pool


def test_a_keyword_keeps_all_its_types_and_the_pool_its_rows(tmp_path):
    pool = KeywordPool(["Apple", "apple", "pure  Cotton"], ["brand", "entity", "material"], [5, 2, 9])
    assert pool.distinct == ["apple", "pure cotton"] and pool.counts() == {"entity": 1, "brand": 1, "material": 1}
    (tmp_path / "pool.tsv").write_text("Apple\tbrand\t5\napple\tentity\t2\npure  Cotton\tmaterial\t9\n")
    pool.save_pretrained(tmp_path / "pool")
    for again in (KeywordPool.from_tsv(tmp_path / "pool.tsv"), KeywordPool.from_pretrained(tmp_path / "pool")):
        assert (again.keywords, again.types, again.views.tolist()) == (pool.keywords, pool.types, [5, 2, 9])
    assert len(KEYWORD_TYPES) == len(set(KEYWORD_TYPES)) == 18


def test_head_is_taken_per_type():
    pool = KeywordPool(["a", "b", "c", "d", "e"], ["color", "color", "color", "brand", "brand"], [1, 7, 7, 3, 0])
    head = pool.head(2, min_views=1)
    assert list(zip(head.types, head.keywords, head.views.tolist(), strict=True)) == [
        ("brand", "d", 3),
        ("color", "b", 7),
        ("color", "c", 7),
    ]


def test_wrong_pools_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(DataError, match="no keyword type 'colour' .*did you mean 'color'"):
        KeywordPool(["red"], ["colour"])
    with pytest.raises(DataError, match="stands in two rows"):
        KeywordPool(["red", "RED"], ["color", "color"])
    with pytest.raises(DataError, match="as many types"):
        KeywordPool(["red"], [])
    (tmp_path / "bad.tsv").write_text("red\tcolor\nblue color\n", encoding="utf-8")
    with pytest.raises(DataError, match="Line 2 of .*bad.tsv is not"):
        KeywordPool.from_tsv(tmp_path / "bad.tsv")
    with pytest.raises(DataError, match="does not exist"):
        KeywordPool.from_tsv(tmp_path / "none.tsv")
    (tmp_path / "good.tsv").write_text("\ufeffRed\tcolor\n\nred\tcolor\t4\nblue\tcolor\t2\n", encoding="utf-8")
    assert KeywordPool.from_tsv(tmp_path / "good.tsv").keywords == ["red", "blue"]


# ---------------------------------------------------------------- mining


def item(item_id: str, title: str, brand: str | None, category: list[str], price: float | None = None, **attributes):
    pairs = [{"name": name, "value": value} for name, value in attributes.items()]
    return {"item_id": item_id, "title": title, "brand": brand, "category": category, "price": price} | {
        "attributes": pairs
    }


def request(number: int, query: str | None, clicked: list[str], seen: tuple[str, ...] = ()) -> dict:
    labels = [{"item_id": i, "click": 1} for i in clicked] + [{"item_id": i, "click": 0} for i in seen]
    return {"request_id": f"r{number}", "user_id": "u", "time": number, "query": query, "candidates": labels}


@pytest.fixture
def shop() -> DataFolder:
    items = [
        item("1", "red cotton shirt", "Acme", ["Clothing", "Shirts & Tops"], 12.0, Colour="Red", Fabric="pure cotton"),
        item("2", "blue shirt", "Acme", ["Clothing", "Shirts & Tops"], 60.0, Colour="Blue, navy", Size="42"),
        item("3", "oak desk", "Bord", ["Furniture"], None, Material="oak", Grade="A1 plus"),
        item("4", "lamp", None, ["Furniture"], 30.0),
    ]
    train = [
        request(1, "red shirts", ["1", "2"], ("3",)),
        request(2, "acme under 50", ["2"]),
        request(3, None, ["3"]),
        request(4, "desk", ["3", "gone"]),
        request(5, "red shirts", ["1"]),
    ]
    late = table_from_rows("requests", [request(9, "oak oak oak", ["3"])])
    tables = {name: table_from_rows(name, []) for name in ("users", "events")}
    requests = {"train": table_from_rows("requests", train), "valid": late, "test": late}
    return DataFolder(items=table_from_rows("items", items), requests=requests, **tables)


def test_candidates_come_from_typed_fields(shop, tmp_path):
    (tmp_path / "own.tsv").write_text("desk\tentity\nnavy\tseries\n", encoding="utf-8")
    rows, left_out = candidates(shop.items, PoolConfig(dictionary=str(tmp_path / "own.tsv")))
    assert {(kind, word) for word, kind in rows} == {
        *(("brand", w) for w in ("acme", "bord")),
        *(("entity", w) for w in ("clothing", "shirts & tops", "shirts", "tops", "furniture", "desk")),
        *(("color", w) for w in ("red", "blue, navy", "blue", "navy")),
        *(("material", w) for w in ("pure cotton", "oak")),
        *(("price", f"under {n}") for n in (20, 50)),
        ("series", "navy"),
    }
    assert left_out == ["grade"]
    config = PoolConfig(attribute_types={"Grade": "specifications", "Colour": None}, numbers=True, price_phrases=())
    rows, left_out = candidates(shop.items, config)
    found = {(kind, word) for word, kind in rows}
    assert ("specifications", "42") in found and ("specifications", "a1 plus") in found and left_out == []
    assert not {kind for kind, _ in found} & {"color", "price"}


def test_page_views_equal_a_count_by_hand(shop):
    pool = mine_pool(shop, PoolConfig(min_views=0))
    pairs = [("red shirts", "1"), ("red shirts", "2"), ("acme under 50", "2"), ("desk", "3"), ("desk", "gone")]
    pairs.append(("red shirts", "1"))
    texts = dict(zip(shop.items["item_id"].to_pylist(), item_texts(shop.items), strict=True))
    for word, views in zip(pool.keywords, pool.views.tolist(), strict=True):
        texts_of = [(query, texts.get(item_id, "")) for query, item_id in pairs]
        expected = sum(any(word in by_hand(pool.distinct, text, True) for text in both) for both in texts_of)
        assert views == expected, word
    assert ("under 50", "price") in zip(pool.keywords, pool.types, strict=True) and "42" not in pool.distinct
    kept = mine_pool(shop, PoolConfig(head_per_type=1))
    assert all(count == 1 for count in kept.counts().values()) and kept.views.min() >= 1
    assert any("'grade'" in note for note in kept.notes)


def test_mining_reads_nothing_behind_the_split(shop):
    before = mine_pool(shop, PoolConfig(min_views=0))
    shop.requests["test"] = shop.requests["valid"] = shop.requests["valid"].slice(0, 0)
    after = mine_pool(shop, PoolConfig(min_views=0))
    assert before.keywords == after.keywords and (before.views == after.views).all()


def test_without_queries_items_are_counted(shop):
    shop.requests["train"] = shop.requests["train"].slice(2, 1)
    pool = mine_pool(shop)
    views = dict(zip(pool.keywords, pool.views.tolist(), strict=True))
    assert views["acme"] == 2 and views["furniture"] == 2 and any("in the items alone" in note for note in pool.notes)


def test_wrong_mining_options_are_refused():
    with pytest.raises(ConfigError, match="no keyword type 'colour'"):
        PoolConfig(attribute_types={"tone": "colour"})
    with pytest.raises(ConfigError, match="head_per_type"):
        PoolConfig(head_per_type=0)
    with pytest.raises(ConfigError, match="Each price phrase"):
        PoolConfig(price_phrases=["cheap"])


# ---------------------------------------------------------------- fusion


def test_check_1_of_the_sheet_fusion():
    draw = np.random.default_rng(0)
    vectors, keys = draw.normal(size=(3, 5)), draw.normal(size=(4, 5))
    matches = KeywordMatcher(["a", "b", "c", "d"]).match(["a c", "nothing", "d b a"])
    fused = fuse(vectors, keys, matches)
    for row, used in ((0, [0, 2]), (2, [0, 1, 3])):
        expected = 0.5 * vectors[row] + 0.5 * keys[used].mean(axis=0)
        assert np.abs(fused[row] - expected / np.linalg.norm(expected)).max() < 1e-6
    unit = vectors[1] / np.linalg.norm(vectors[1])
    assert np.abs(fused[1] - unit).max() < 1e-6  # m = 0 gives e back, on the scale of the others
    keys[2] = 0.0
    expected = vectors[0] + keys[0]  # a keyword without a vector leaves the mean
    assert np.abs(fuse(vectors, keys, matches)[0] - expected / np.linalg.norm(expected)).max() < 1e-6


TEXTS = [f"{c} {m} {t} number {n % 5}" for n, (c, m, t) in enumerate(
    (c, m, t) for c in ("red", "blue", "green") for m in ("cotton", "oak") for t in ("shirt", "desk", "lamp", "chair")
)]  # fmt: skip
OPTIONS = {"base": {"name": "tfidf_svd", "dims": 16, "min_df": 1}}


@pytest.fixture
def pool_file(tmp_path) -> str:
    (tmp_path / "pool.tsv").write_text("red\tcolor\noak\tmaterial\ndesk\tentity\ndesk\tscene\nzebra\tbrand\n")
    return str(tmp_path / "pool.tsv")


def test_encoder_is_the_formula_over_its_base(pool_file):
    encoder = make_encoder("keyword_fusion", {**OPTIONS, "pool": pool_file, "seed": 3}).fit(TEXTS)
    base = TfidfSvdEncoder(TfidfSvdConfig(dims=16, min_df=1, seed=3)).fit(TEXTS)
    made = encoder.encode([*TEXTS, "blue lamp", "red zebra", "zebra crossing"])
    red, oak, desk = (base.encode([word])[0] for word in ("red", "oak", "desk"))
    for text, keys in ((TEXTS[1], [red, desk]), ("blue lamp", []), ("red zebra", [red]), (TEXTS[5], [red, oak, desk])):
        own = base.encode([text])[0]
        expected = own if not keys else 0.5 * own + 0.5 * np.mean(keys, axis=0)
        row = [*TEXTS, "blue lamp", "red zebra"].index(text)
        assert np.abs(made[row] - expected / np.linalg.norm(expected)).max() < 1e-6
    assert np.allclose(np.linalg.norm(made, axis=1), 1.0, atol=1e-6) and encoder.empty_texts == 1
    nearer = encoder.encode(["red oak desk number 1"])[0] @ encoder.encode(["desk oak red number 4"])[0]
    assert nearer > base.encode(["red oak desk number 1"])[0] @ base.encode(["desk oak red number 4"])[0]


def test_encoder_says_the_same_in_another_process(pool_file, tmp_path):
    encoder = make_encoder("keyword_fusion", {**OPTIONS, "pool": pool_file}).fit(TEXTS)
    encoder.save_pretrained(tmp_path / "saved")
    code = (
        "import sys, numpy as np\nfrom sidtune.tokenizers.encoders.base import load_encoder\n"
        "np.save(sys.argv[2], load_encoder(sys.argv[1]).encode(sys.argv[3:]))"
    )
    texts = ["red desk", "purple oak thing", "nothing known", "RED  Desk"]
    command = [sys.executable, "-c", code, str(tmp_path / "saved"), str(tmp_path / "made.npy"), *texts]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert (np.load(tmp_path / "made.npy") == encoder.encode(texts)).all()
    assert isinstance(load_encoder(tmp_path / "saved"), KeywordFusionEncoder)


def test_encoder_refuses_what_cannot_work(pool_file, tmp_path):
    with pytest.raises(ConfigError, match="cannot stand on 'precomputed'"):
        KeywordFusionConfig(base={"name": "precomputed", "path": "x.npy"})
    with pytest.raises(ConfigError, match="has not been mined yet"):
        make_encoder("keyword_fusion", OPTIONS).fit(TEXTS)
    with pytest.raises(ConfigError, match="unknown key 'head'"):
        KeywordFusionConfig(mining={"head": 3})
    with pytest.raises(ConfigError, match="for pool: mined"):
        KeywordFusionConfig(pool=pool_file, mining={"numbers": True})
    with pytest.raises(DataError, match="not fitted yet"):
        make_encoder("keyword_fusion", OPTIONS).encode(["a"])
    with pytest.raises(DataError, match="not fitted yet"):
        make_encoder("keyword_fusion", OPTIONS).save_pretrained(tmp_path / "none")

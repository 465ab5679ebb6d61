"""One letter for several levels: text, parsing, saving, vocabulary and the commands, and the SID grammar of the OneSearch
sheet (5.3)."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_stand_ins import tiny_model, tiny_tokenizer
from quantizer_data import clusters
from tiny_pipeline import SHOP

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.trie import SidTrie
from sidtune.recipes.steps import build_data, extend_sids, learn_sids
from sidtune.tokenizers.letters import SidLetters
from sidtune.tokenizers.quantizers.base import load_quantizer
from sidtune.tokenizers.quantizers.rq_opq import RqOpq, RqOpqConfig
from sidtune.tokenizers.sids.collisions import CollisionMethod, make_collisions
from sidtune.tokenizers.sids.quality import sid_quality
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import Vocabulary, extend_vocabulary

SIZES = (5, 4, 3, 4, 6)


def shared_sids(items: int = 40, seed: int = 0) -> SemanticIds:
    codes = np.stack([np.random.default_rng(seed).integers(0, size, items) for size in SIZES], axis=1)
    return SemanticIds([f"i{n}" for n in range(items)], codes, SIZES, letters="abcdd")


def by_hand(code) -> str:
    a, b, c, d, e = code
    return f"<a_{a}><b_{b}><c_{c}><d_{d}><d_{e + 4}>"


def test_text_tokens_and_parsing_by_hand():
    sids = shared_sids()
    assert sids.texts() == {i: by_hand(code) for i, code in zip(sids.item_ids, sids.codes, strict=True)}
    assert sids.level_tokens(4) == [f"<d_{n}>" for n in range(4, 10)] and sids.level_names() == [
        "a",
        "b",
        "c",
        "d1",
        "d2",
    ]
    tokens = sids.tokens()
    assert tokens[12:] == [f"<d_{n}>" for n in range(10)] and len(set(tokens)) == len(tokens) == sum(SIZES)
    for code in itertools.product(*map(range, SIZES)):
        text = by_hand(code)
        assert sids.code_text(code) == text and sids.parse(text) == code
        assert [tokens[n] for n in np.array(code) + sids.token_offsets] == re.findall("<[^>]*>", text)
    for wrong in [
        "<d_4><d_4>",
        "<d_3><d_3>",
        "<d_3><d_10>",
        "<d_4><d_3>",
        "<d_0><e_0>",
        "<d_0>",
        "<d_0><d_4>x",
        "<d_0><d_04>",
    ]:
        assert sids.parse("<a_0><b_0><c_0>" + wrong) is None
    assert sids.code_text((1, 2, 0, 3)) == "<a_1><b_2><c_0><d_3>"  # a prefix


def test_default_letters_are_one_per_level():
    letters = SidLetters((3, 2))
    assert letters.letters == "ab" and letters.shifts.tolist() == [0, 0] and letters.level_names() == ["a", "b"]
    three = SidLetters((2, 3, 4, 5), "abbb")
    assert three.shifts.tolist() == [0, 0, 3, 7] and three.text((1, 2, 3, 4)) == "<a_1><b_2><b_6><b_11>"


@pytest.mark.parametrize("letters", ["ab", "abcde f", "aabcdd", "bcdee", "abcda", "abcdf", "ABCDD", 5, ["a"] * 5])
def test_wrong_letters_are_refused(letters):
    with pytest.raises(ConfigError, match="letters must"):
        SidLetters(SIZES, letters)


def test_saving_extending_suffix_and_collisions_keep_the_letters(tmp_path):
    sids = shared_sids()
    sids.save_pretrained(tmp_path / "sids")
    loaded = SemanticIds.from_pretrained(tmp_path / "sids")
    assert loaded.letters == "abcdd" and loaded.texts() == sids.texts()
    suffixed = sids.with_suffix(size=9)
    assert suffixed.letters == "abcdde" and suffixed.text("i0").startswith(sids.text("i0") + "<e_")
    for one, codes in ((sids, sids.codes[:1]), (suffixed, sids.codes[:1])):
        more = one.extended(["new"], codes)
        assert more.letters == one.letters and more.tokens() == one.tokens()
        assert more.text("new").startswith(sids.text("i0"))
    old = json.loads((tmp_path / "sids" / "sid_config.json").read_text())
    del old["letters"]  # as folders were written before
    (tmp_path / "sids" / "sid_config.json").write_text(json.dumps(old))
    assert SemanticIds.from_pretrained(tmp_path / "sids").letters == "abcde"


@pytest.mark.parametrize("name", ["next_nearest", "capacity", "suffix", "expand"])
def test_treatments_of_collisions_keep_the_letters(name):
    vectors = clusters(60, dims=8)
    quantizer = RqOpq(RqOpqConfig(head_sizes=(4, 3), tail_size=4, rotation_rounds=2, shared_letter=True))
    coded = SemanticIds(
        [f"i{n}" for n in range(60)],
        quantizer.fit_encode(vectors),
        quantizer.level_sizes,
        letters=quantizer.level_letters(),
    )
    method: CollisionMethod = make_collisions(name)
    assert method.resolve(coded, vectors, quantizer).letters.startswith("abcc")


def test_published_files_with_a_shared_letter(tmp_path):
    sids, path = shared_sids(), tmp_path / "index.json"
    path.write_text(json.dumps({i: re.findall("<[^>]*>", text) for i, text in sids.texts().items()}))
    read = SemanticIds.from_index_json(path, level_sizes=SIZES, letters="abcdd")
    assert read.texts() == sids.texts() and (read.codes == sids.codes).all()
    with pytest.raises(ConfigError, match="need level_sizes"):
        SemanticIds.from_index_json(path, letters="abcdd")
    with pytest.raises(DataError, match="<d_5> to <d_10>"):
        SemanticIds.from_index_json(path, level_sizes=(5, 4, 3, 5, 6), letters="abcdd")
    with pytest.raises(DataError, match="stand for 3"):
        SemanticIds.from_index_json(path, level_sizes=(5, 4, 3), letters="abb")
    with pytest.raises(DataError, match="expected '<e_N>'"):
        SemanticIds.from_index_json(path, level_sizes=SIZES)


def test_grammar_of_the_sheet():
    """Sheet 5.3: ranges and form of every row; k1 + k2 + k3 + 512 new tokens, each one id."""
    vectors = clusters(2000)
    config = RqOpqConfig(head_sizes=(24, 12, 6), tail_size=256, rotation_rounds=1, iterations=4, shared_letter=True)
    quantizer = RqOpq(config)
    codes, letters = quantizer.fit_encode(vectors), quantizer.level_letters()
    sids = SemanticIds([str(n) for n in range(2000)], codes, quantizer.level_sizes, letters=letters)
    form = re.compile(r"^<a_(\d+)><b_(\d+)><c_(\d+)><d_(\d+)><d_(\d+)>$")
    for code, text in zip(codes.tolist(), sids.texts().values(), strict=True):
        a, b, c, d, e = map(int, form.match(text).groups())
        assert a < 24 and b < 12 and c < 6 and 0 <= d < 256 <= e < 512 and [a, b, c, d, e - 256] == code
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = len(tokenizer)
    vocabulary = extend_vocabulary(model, tokenizer, sids, init="mean")
    assert len(tokenizer) - before == 24 + 12 + 6 + 512
    for token, number in zip(sids.tokens(), vocabulary.sid_token_ids.tolist(), strict=True):
        assert tokenizer.encode(token, add_special_tokens=False) == [number]
    ids = vocabulary.token_ids(codes)
    assert tokenizer.encode(sids.text("7"), add_special_tokens=False) == ids[7].tolist()
    trie = SidTrie.from_semantic_ids(sids).bind(vocabulary.sid_token_ids)
    leaves = trie.leaf_codes(torch.arange(trie.num_leaves)).numpy()
    for text, code in zip(tokenizer.batch_decode(vocabulary.token_ids(leaves[:200])), leaves.tolist(), strict=False):
        assert sids.parse(text.replace(" ", "")) == tuple(code)


def test_vocabulary_knows_its_letters(tmp_path):
    sids, model, tokenizer = shared_sids(), tiny_model(), tiny_tokenizer()
    vocabulary = extend_vocabulary(model, tokenizer, sids, init="mean")
    vocabulary.save_pretrained(tmp_path)
    loaded = Vocabulary.from_pretrained(tmp_path)
    assert loaded.letters == "abcdd" and loaded.level_sizes == SIZES
    loaded.check(tokenizer, sids)
    other = SemanticIds(sids.item_ids, sids.codes, SIZES)
    for refuse in (lambda: loaded.check(sids=other), lambda: loaded.of(other)):
        with pytest.raises(DataError, match="letters 'abcdd', the semantic IDs with 'abcde'"):
            refuse()
    plain_tokenizer = tiny_tokenizer()
    extend_vocabulary(tiny_model(), plain_tokenizer, other, init="mean")
    with pytest.raises(DataError, match="<a_0> to <d_9>"):
        loaded.check(plain_tokenizer)


def test_tables_name_every_level():
    report = sid_quality(shared_sids())
    assert [level.name for level in report.levels] == ["a", "b", "c", "d1", "d2"]


def test_learn_and_extend_keep_the_shared_letter(tmp_path: Path):
    build_data.main(build_data.Arguments(str(tmp_path / "data"), options=SHOP))
    quantizer = {"name": "rq_opq", "head_sizes": [6, 4], "tail_size": 4, "rotation_rounds": 2, "shared_letter": True}
    options = {"encoder": {"dims": 12}, "quantizer": quantizer, "learn_share": 0.8}
    learn_sids.main(learn_sids.Arguments(str(tmp_path / "data"), str(tmp_path / "sids"), **options))
    arguments = (str(tmp_path / "sids"), str(tmp_path / "data"), str(tmp_path / "more"))
    extend_sids.main(extend_sids.Arguments(*arguments, existing="skip"))
    before = SemanticIds.from_pretrained(tmp_path / "sids" / "sids")
    after = SemanticIds.from_pretrained(tmp_path / "more" / "sids")
    assert after.letters == before.letters == "abcc" and len(after) > len(before)
    assert {i: after.text(i) for i in before.item_ids} == before.texts()
    assert load_quantizer(tmp_path / "more" / "quantizer").level_letters() == "abcc"

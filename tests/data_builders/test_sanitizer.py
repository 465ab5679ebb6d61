"""No field becomes a token: fuzzed over six kinds of tokenizers, field by field and across the seams of a template."""

from __future__ import annotations

import csv
import json
import unicodedata

import pytest
import text_tokenizers as made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidtune.core.errors import DataError
from sidtune.data_builders.prompts.encoding import encode_examples, token_ids
from sidtune.data_builders.prompts.sanitizer import Piece, Sanitizer, added_token_ids
from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tasks.behaviour import to_dataset

pytestmark = pytest.mark.medium

KINDS = list(made.ALL)
FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SANITIZERS: dict[str, Sanitizer] = {}


def sanitizer_of(kind: str) -> Sanitizer:
    if kind not in SANITIZERS:
        SANITIZERS[kind] = Sanitizer(made.ALL[kind]())
    return SANITIZERS[kind]


def leaks(kind: str, text: str) -> set[int]:
    """Oracle: added ids (the unknown token too) in the encoding by the tokenizer's own public call."""
    tokenizer = made.ALL[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return set(ids) & (set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids))


def wide(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if 33 <= ord(c) < 127 else c for c in text)


def fragments(kind: str) -> st.SearchStrategy[str]:
    """Texts glued together from whole, halved, widened, spaced-out and re-cased added tokens and nasty characters."""
    tokens = st.sampled_from([str(t) for t in made.ALL[kind]().added_tokens_decoder.values()])
    cut = st.tuples(tokens, st.integers(0, 12), st.integers(0, 12)).map(lambda t: t[0][t[1] : len(t[0]) - t[2]])
    spread = st.tuples(
        tokens, st.sampled_from(["\u200b", "\u00ad", "\u0301", "\u0338", "\ufe0f", " ", "\u034f", "\ue000"])
    ).map(lambda t: t[1].join(t[0]))
    nasty = st.sampled_from(
        list("<>|[]{}()_-▁ \n\t\u00a0\u3000\u2028\ufeff\x00\x7f\ud800≮≯＜＞［］｛｝﹤﹥｜̸́…‹›´ﬀßİǅ日本")
        + ["hot", "dog", "blue", "BLUE", "a" * 120]
    )
    part = st.one_of(
        tokens,
        cut,
        spread,
        tokens.map(wide),
        tokens.map(str.swapcase),
        tokens.map(str.upper),
        nasty,
        st.text(max_size=6),
    )
    return st.lists(part, min_size=1, max_size=7).map("".join)


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_encodes_to_an_added_token(kind):
    @FUZZ
    @given(fragments(kind), st.sampled_from([None, 3, 10, 40]))
    def run(text, max_chars):
        clean = sanitizer_of(kind).clean(text, max_chars)
        assert not leaks(kind, clean), (text, clean)
        assert max_chars is None or len(clean) <= max_chars
        assert clean == clean.strip() and "  " not in clean
        assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") for c in clean)

    run()


@pytest.mark.parametrize("kind", KINDS)
def test_the_fuzz_can_fail(kind):
    """The raw attacks do leak, so the test above is not empty."""
    texts = {
        "byte_bpe": "<|im_start|>",
        "metaspace": "＜extra_id_0＞ <extra_id_0>",
        "wordpiece": "x[SEP]",
        "gemma_like": "a\n\n▁▁",
        "odd": "HOTDOG",
        "slow": "hotdog",
    }
    assert leaks(kind, texts[kind]) and not leaks(kind, sanitizer_of(kind).clean(texts[kind]))


def test_no_lookalike_survives_that_normalises_to_a_bracket():
    checked = 0
    for char in map(chr, range(0x80, 0x30000)):
        folds = "".join(unicodedata.normalize(form, char) for form in ("NFKC", "NFKD")) + char.casefold() + char.upper()
        if set("<>") & set(folds):
            clean = sanitizer_of("byte_bpe").clean(f"{char}a_1{char}")
            for form in ("NFC", "NFD", "NFKC", "NFKD"):
                assert not set("<>") & set(unicodedata.normalize(form, clean)), (char, clean)
            checked += 1
    assert checked >= 6


# Templates that put fields next to each other and into the middle of brackets, as a careless user might.
SEAMS = (
    "{{ query }}{% for c in context %}{{ c.name }}{{ c.value }}{% endfor %}.",
    "a[{{ query }}]<{{ query }}>{% for c in context %}<{{ c.name }}_{{ c.value }}>{% endfor %}",
    "hot{{ query }}<|im_{% for c in context %}{{ c.name }}|>{{ c.value }}dog{% endfor %}",
    "{{ query }} {{ query }}\n{% for c in context %}\n{{ c.name }}{{ c.value }}{% endfor %}\n<|x|>{{ query }}",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seam", range(len(SEAMS)))
def test_no_two_fields_complete_an_added_token(kind, seam, tmp_path):
    (tmp_path / "turn.jinja").write_text(SEAMS[seam])
    serializer = Serializer(made.ALL[kind](), tmp_path)
    tokens = sorted(map(str, made.ALL[kind]().added_tokens_decoder.values()))
    halves = st.tuples(st.sampled_from(tokens), st.integers(0, 12)).map(lambda t: (t[0][: t[1]], t[0][t[1] :]))
    inner = st.sampled_from(tokens).map(lambda t: (t[1:-1], t[1:-1]))
    middle = st.sampled_from(
        [("im_st", "art"), ("a", "1"), ("dog", "hot"), ("start", "y"), ("SEP", "s"), ("y", "y"), ("extra", "id_0")]
    )

    @settings(FUZZ, max_examples=50)
    @given(st.one_of(halves, inner, middle, st.tuples(fragments(kind), fragments(kind))), fragments(kind))
    def run(pair, other):
        for query, name, value in ((pair[0], pair[1], other), (other, *pair), (pair[1], pair[0], pair[1])):
            piece = serializer.turn(query, [{"name": name, "value": value}])
            assert isinstance(piece, Piece)
            assert serializer.sanitizer.agrees(piece)
            # Independent of Piece: no added token but those of the template's own text, field by field removed.
            allowed = {i for text in piece.literals for i in leaks(kind, text)}
            unknown = {made.ALL[kind]().unk_token_id}
            assert leaks(kind, str(piece)) <= allowed | unknown

    run()


def test_seams_without_the_serializer_do_leak():
    """A control: cleaned fields, glued by hand into a bracket, do form a token; that is what the serializer parts."""
    clean = sanitizer_of("wordpiece").clean("SEP")
    assert clean == "SEP" and leaks("wordpiece", f"[{clean}]")
    assert not sanitizer_of("wordpiece").agrees(Piece(f"[{clean}]", ["[", "]"]))


@FUZZ
@given(
    st.text(alphabet=st.characters(categories=["L", "N"], exclude_characters="\u3164\u115f\u1160\uffa0"), max_size=40)
)
def test_letters_and_digits_of_any_script_stay_as_they_are(text):
    folds = any(set("<>") & set(unicodedata.normalize("NFKC", c)) for c in text)
    if not folds:
        assert sanitizer_of("byte_bpe").clean(text) == text


def test_what_happens_to_text():
    clean = sanitizer_of("byte_bpe").clean
    assert clean(None) == clean("") == clean(" \n\t") == ""
    assert (
        clean("HP 74\u00a0Black &\n Tri-color, (2 Pack) | 日本語 é 😀")
        == "HP 74 Black & Tri-color, (2 Pack) | 日本語 é 😀"
    )
    assert clean("<a_1><b_2>") == "‹a_1›‹b_2›"
    assert clean("zero\u200bwidth\ufeff \ue000private") == "zerowidth private"
    assert clean("one two three", 9) == "one two"
    assert clean("onetwothree", 5) == "onetw"
    assert clean("one two", 7) == "one two"
    assert sanitizer_of("metaspace").clean("naïve café ☃ 日本") == "naive cafe"
    assert sanitizer_of("wordpiece").clean("[SEP] naïve") == "(SEP) naïve"
    assert sanitizer_of("odd").clean("HOTdog") == "HOT dog"
    assert sanitizer_of("odd").clean("Blueberry") == "Blueberry", "a single-word token is no prefix"


def test_added_ids_are_those_of_the_tokenizer():
    tokenizer = made.byte_bpe()
    ids = added_token_ids(tokenizer)
    assert ids.tolist() == sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", *made.CHATML, *made.sid_tokens()]))


def test_the_layers_are_chosen_by_the_tokenizer():
    assert {kind: sanitizer_of(kind).exact for kind in KINDS} == {
        "byte_bpe": False, "metaspace": True, "wordpiece": True, "gemma_like": True, "odd": True, "slow": True,
    }  # fmt: skip


def test_a_tokenizer_that_grew_needs_a_new_sanitizer():
    tokenizer = made.byte_bpe.__wrapped__()
    sanitizer = Sanitizer(tokenizer)
    tokenizer.add_tokens(["hotdog"])
    with pytest.raises(DataError, match="new Sanitizer"):
        sanitizer.clean("hotdog")


def test_guard_on_pieces():
    sanitizer = sanitizer_of("byte_bpe")
    for good in ("plain", Piece("<a_1><b_2>", ["<a_1><b_2>"]), Piece("<|im_start|>user x", ["<|im_start|>user "])):
        assert sanitizer.agrees(good)
    for bad in ("buy <a_1>", "x<|endoftext|>", Piece("<|im_start|>x", ["<|im"]), Piece("<a_1>", [])):
        assert not sanitizer.agrees(bad)


def test_guard_on_data_sets():
    import numpy as np
    import pyarrow as pa

    tokenizer = made.byte_bpe()
    serializer = Serializer(tokenizer, "chatml")
    good = [str(serializer.turn("shoes", None)), "<a_1><b_2><c_3>"]
    flags, keys = np.array([False, True]), pa.array(["k"])
    for pieces, fine in ((good, True), (["shoes <b_2>:", good[1]], False)):
        examples = to_dataset("t", pa.array(pieces), np.array([0, 2]), np.array([0, 1]), flags, keys)
        if fine:
            assert len(encode_examples(tokenizer, examples, allowed_ids=serializer.literal_ids())) == 1
        else:
            with pytest.raises(DataError, match="<b_2>"):
                encode_examples(tokenizer, examples, allowed_ids=serializer.literal_ids())


def test_truncation_left_behind_by_a_caller_changes_nothing():
    tokenizer = made.byte_bpe.__wrapped__()
    before = token_ids(tokenizer, ["red shoes for men"])
    tokenizer(["red shoes for men", "x"], truncation=True, max_length=2, padding="max_length")
    assert token_ids(tokenizer, ["red shoes for men"]) == before and len(before[0]) > 2


def test_real_titles_and_descriptions(real_data):
    path = next((real_data / "amazon_office").glob("*.item.json"))
    items = list(json.loads(path.read_text("utf-8")).values())
    for kind in ("byte_bpe", "metaspace"):
        for item in items[:800]:
            for text in (item["title"], item["description"]):
                clean = sanitizer_of(kind).clean(text, 200)
                assert not leaks(kind, clean)
                assert len(clean) >= min(10, len(text)) // 2
    with next((real_data / "amazon_office").glob("*.test.csv")).open(encoding="utf-8") as stream:
        titles = {row["item_title"] for row in csv.DictReader(stream)}
    kept = [sanitizer_of("byte_bpe").clean(title) == " ".join(title.split()) for title in titles]
    assert sum(kept) > 0.98 * len(kept), "nearly all real titles pass unchanged"

"""HTML cleaning: no mark-up survives, no word is lost, and time grows with the length of the text only."""

from __future__ import annotations

import html
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidtune.data_builders.readers.text_cleaning import clean_html, parse_list_text

pytestmark = pytest.mark.medium

CASES = {
    "": "",
    "  two \t words\n": "two words",
    "<p>One</p><p>two</p>": "One two",
    "Marks-A-Lot<sup></sup> Jumbo": "Marks-A-Lot Jumbo",
    "H<sub>2</sub>O <b>bold</b>": "H2O bold",
    "8.5&rdquo; x 11&quot; &amp; more": '8.5” x 11" & more',
    "&lt;b&gt;deep&lt;/b&gt;": "deep",
    "&amp;lt;i&amp;gt;deeper&amp;lt;/i&amp;gt;": "deeper",
    "a<!-- .x {color:#000;} <b> -->b": "a b",
    "a<!-- never closed": "a",
    "a<style type='text/css'>.x > p {color:red}</style>b": "a b",
    "a<SCRIPT>if (a < b) { go('</p>'); }</ScRiPt >b": "a b",
    "a<script>never closed": "a",
    "a<style/>b": "a",
    "İstanbul <SCRIPT>x</SCRIPT>ok": "İstanbul ok",
    "uses <2W and a < b, x<3": "uses <2W and a < b, x<3",
    "labels. <br": "labels.",
    "<!DOCTYPE html><?xml ?>x": "x",
    "Fine print .legal {color:#000;} ul, li {margin: 0;} goes on": "Fine print goes on",
    "Text @media print { .a { color: red; } .b { top: 0; } } end": "Text end",
    "hr.dashed{height:1px}Next": "Next",
    "keep {this} and {so: that}": "keep {this} and {so: that}",
    "NUL\x00 and \x1f bell\x07 \x9fend": "NUL and bell end",
    "non&nbsp;breaking\u2028line": "non breaking line",
    "&#99999999999999999999; &#x41;": "A",
    "AT&T M&M &copy": "AT&T M&M ©",
}


@pytest.mark.parametrize("dirty", CASES)
def test_known_texts(dirty):
    assert clean_html(dirty) == CASES[dirty]


def test_none_is_empty():
    assert clean_html(None) == ""


WORDS = st.lists(st.from_regex(r"[A-Za-zäß0-9.,]{1,8}", fullmatch=True), min_size=1, max_size=8)
TAGS = st.sampled_from(
    ["<p>", "</div>", "<br/>", "<!-- x > y -->", "<style>p {a: b;}</style>", '<a href="x">', "<script>1<2</script>"]
)


@settings(max_examples=200, deadline=None)
@given(words=WORDS, tags=st.lists(TAGS, min_size=8, max_size=8), layers=st.integers(0, 2))
def test_words_survive_and_marks_go(words, tags, layers):
    dirty = "".join(f" {word} {tag}" for word, tag in zip(words, tags, strict=False))
    for _ in range(layers):
        dirty = html.escape(dirty)
    assert clean_html(dirty) == " ".join(words)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="<>/!-&;#{}:.ab pstyle\x00\n", max_size=60))
def test_any_text_ends_without_comments_and_on_one_line(dirty):
    clean = clean_html(dirty)
    assert clean == " ".join(clean.split()) and "\x00" not in clean
    assert not re.search(r"<[a-z][^<]*>", clean) or dirty.count("&") > 0 or "{" in dirty


@pytest.mark.parametrize(
    "piece",
    [
        "<",
        "<a",
        "<!--",
        "<script>",
        "{",
        "{:",
        "{:}",
        ".a {x:y;} ",
        "&amp;",
        "amp;",
        "/*",
        "/* * ",
        "</",
        "<b ",
        "a.b ",
    ],
)
def test_hostile_repetition_ends(piece):
    # A pattern that backtracks would need hours here.
    clean_html("&" * (piece == "amp;") + piece * 100_000 + "<p>{x:y;}</p>")


def test_numbers_beyond_the_digit_limit():
    assert clean_html("a &#" + "1" * 10_000 + "; b") == "a b"


LISTS = {
    "": ([], True),
    "plain text": (["plain text"], True),
    "['one', \"it's\"]": (["one", "it's"], True),
    "['']": ([""], True),
    "[]": ([], True),
    "['it's', 'broken\\nhere']": (["it's broken here"], False),
    "[1, 2]": (["1, 2"], False),
    "[__import__('os').getcwd()]": (["__import__('os').getcwd()"], False),
    "[" * 5000: (["[" * 4999], False),
    "['nul\x00']": (["nul\x00"], False),
}


@pytest.mark.parametrize("text", LISTS, ids=range(len(LISTS)))
def test_lists_written_as_text(text):
    assert parse_list_text(text) == LISTS[text]


def test_real_descriptions(real_data):
    items = json.loads((real_data / "amazon_office" / "Office_Products.item.json").read_text("utf-8"))
    broken = 0
    for item in items.values():
        parts, proper = parse_list_text(item["description"])
        broken += not proper
        for clean in (clean_html(" ".join(parts)), clean_html(item["title"])):
            assert not re.search(r"<\s*[a-zA-Z/!]|-->|[{}]|&#?\w+;", clean), clean
            assert clean == " ".join(clean.split())
            assert clean_html(clean) == clean
    assert broken == 9
    words = clean_html(" ".join(parse_list_text(items["0"]["description"])[0]))
    assert words.endswith("New Original HP 74 & 75 ink cartridges (CC659FN) Colors: Black, tri-color.")

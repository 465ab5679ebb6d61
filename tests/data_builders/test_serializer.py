"""Templates: what they render, what a user may override, and which mistakes become which sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import text_tokenizers as made
from hypothesis import given, settings
from hypothesis import strategies as st

from sidtune.core.errors import ConfigError
from sidtune.data_builders.prompts import serializer as module
from sidtune.data_builders.prompts.encoding import token_ids
from sidtune.data_builders.prompts.serializer import TEMPLATES, Serializer

CONTEXT = [{"name": "place", "value": "paris"}, {"name": "device", "value": "phone"}]
ITEM = {
    "title": "Running shoes",
    "brand": "Acme",
    "category": ["Sport", "Shoes"],
    "attributes": [{"name": "colour", "value": "red"}, {"name": "size", "value": None}],
    "price": 49.5,
    "description": "Light.",
}
SID = "<a_1><b_2><c_3>"


def plain() -> Serializer:
    return Serializer(made.byte_bpe())


def test_plain_templates():
    s = plain()
    assert s.head({"profile": [{"name": "age", "value": "25-34"}]}) == "user age=25-34"
    assert s.head(None) == s.head({"profile": None}) == "user"
    assert s.turn("red shoes", CONTEXT) == "\nred shoes place=paris device=phone:"
    assert s.turn("red shoes", None) == "\nred shoes:"
    assert s.turn(None, None) == s.turn(None, []) == s.turn("", []) == s.turn(" \u200b", []) == ""
    assert s.item(ITEM) == "Running shoes, Acme, Sport / Shoes, colour red, 49.50. Light."
    assert s.item({"title": "Only"}) == "Only" and s.item({}) == ""
    assert s.prompt("item_to_sid", **ITEM) == [f"item: {s.item(ITEM)}:"]
    assert s.prompt("sid_to_item", sid=SID) == ["title of ", SID, ":"]
    assert s.prompt("sid_to_category", sid=SID) == ["category of ", SID, ":"]
    assert s.prompt("query_to_sid", query="red shoes") == ["search: red shoes:"]
    assert s.answer("Running shoes") == " Running shoes<|endoftext|>"


def test_chatml_templates():
    s = Serializer(made.byte_bpe(), "chatml")
    first = "<|im_start|>system\nRecommend items of the shop by their semantic ID. User: age=25-34"
    assert s.head({"profile": [{"name": "age", "value": "25-34"}]}) == first
    fields = "Search: red shoes\nplace: paris\ndevice: phone"
    turn = f"<|im_end|>\n<|im_start|>user\n{fields}<|im_end|>\n<|im_start|>assistant\n"
    assert s.turn("red shoes", CONTEXT) == turn
    bare = "<|im_end|>\n<|im_start|>user\nRecommend an item.<|im_end|>\n<|im_start|>assistant\n"
    assert s.turn(None, None) == bare
    conversation = "".join([s.head(None), s.turn("a", None), SID, s.turn(None, None), SID])
    roles = [block.split("\n")[0] for block in conversation.split("<|im_start|>")[1:]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.count("<|im_end|>") == len(roles) - 1, "the target leaves its message open"
    assert s.prompt("sid_to_item", sid=SID)[1] == SID


@pytest.mark.parametrize("templates", ["plain", "chatml"])
def test_a_turn_is_short(templates):
    s = Serializer(made.byte_bpe(), templates)
    cost = len(token_ids(s.tokenizer, [s.turn("red running shoes", CONTEXT)])[0])
    assert cost <= {"plain": 18, "chatml": 75}[templates], "words of the training text are few tokens"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(*[st.text(alphabet="<>|_imstarend \nab1", max_size=20) for _ in range(4)])
def test_fields_add_nothing_to_the_structure_of_a_chat(query, name, value, title):
    s = _CHATML
    assert token_ids(s.tokenizer, [s.turn(query, [{"name": name, "value": value}])])[0].count(_START) == 2
    pieces = [s.turn(query, [{"name": name, "value": value}]), *s.prompt("item_to_sid", title=title), s.answer(title)]
    assert all(map(s.sanitizer.agrees, pieces))
    assert str(s.answer(title)).count("<|endoftext|>") == 1


_CHATML = Serializer(made.byte_bpe(), "chatml")
_START = made.byte_bpe().convert_tokens_to_ids("<|im_start|>")


def test_only_the_templates_own_text_may_hold_tokens(tmp_path):
    (tmp_path / "turn.jinja").write_text(
        '<|im_start|>{{ "<|im_end|>" }}{{ query | upper }}{{ "<" ~ "a_1>" }}{{ "%s|im_end|>" | format("<") }}'
        "{% set x %}<a_1>{{ query }}{% endset %}{{ x }}{% macro m() %}<a_1>{% endmacro %}{{ m() }}<|im_end|>"
    )
    s = Serializer(made.byte_bpe(), tmp_path)
    turn = s.turn("ab", None)
    assert turn == "<|im_start|>‹|im_end|›AB‹a_1›‹|im_end|›‹a_1›ab‹a_1›<|im_end|>"
    assert s.sanitizer.agrees(turn)


def test_literal_ids_are_the_tokens_of_the_templates():
    tokenizer = made.byte_bpe()
    eos, start, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", *made.CHATML])
    assert Serializer(tokenizer).literal_ids() == [eos]
    assert Serializer(tokenizer, "chatml").literal_ids() == sorted([eos, start, end])


def test_max_chars():
    s = Serializer(made.byte_bpe(), max_chars={"query": 9, "title": None})
    assert s.turn("one two three four", None) == "\none two:"
    assert s.item({"title": "x" * 500}) == "x" * 500
    assert s.item({"title": "t", "description": "y" * 500}) == "t. " + "y" * 200
    with pytest.raises(ConfigError, match="'titel'.*'title'"):
        Serializer(made.byte_bpe(), max_chars={"titel": 3})


def test_a_folder_overrides_some_files(tmp_path):
    (tmp_path / "turn.jinja").write_text("\nQ {{ query }} A")
    (tmp_path / "README.md").write_text("my templates")
    s = Serializer(made.byte_bpe(), tmp_path)
    assert s.turn("shoes", CONTEXT) == "\nQ shoes A" and s.head(None) == "user"


def test_saved_templates_render_the_same(tmp_path):
    chat = Serializer(made.byte_bpe(), "chatml")
    chat.save_templates(tmp_path / "templates")
    again = Serializer(made.byte_bpe(), tmp_path / "templates")
    assert again.turn("shoes", CONTEXT) == chat.turn("shoes", CONTEXT) and again.sources == chat.sources
    assert set(chat.sources) == set(TEMPLATES)


def test_editing_a_builtin_copy_needs_no_code(tmp_path):
    shutil.copy(Path(module.__file__).parent / "templates" / "plain" / "item.jinja", tmp_path)
    path = tmp_path / "item.jinja"
    path.write_text(path.read_text().replace("{{ title }}", "{{ title | upper }}"))
    assert Serializer(made.byte_bpe(), tmp_path).item({"title": "shoe"}) == "SHOE"


def test_fields_and_text_that_form_a_token_are_parted(tmp_path):
    (tmp_path / "turn.jinja").write_text("[{{ query }}]{% for c in context %}<{{ c.name }}_{{ c.value }}>{% endfor %}")
    s = Serializer(made.wordpiece(), tmp_path)
    assert s.turn("sep", None) == "[sep]", "lower case is no token here"
    assert s.turn("SEP", None) == "[ SEP ]"
    assert s.turn("x", [{"name": "a", "value": "1"}]) == "[ x ]< a _ 1 >"
    assert s.turn("x", [{"name": "a", "value": "99"}]) == "[x]<a_99>"


MISTAKES = {
    "unknown file": ("turns.jinja", "x", r"unknown file 'turns\.jinja'.*did you mean 'turn\.jinja'"),
    "other file": ("notes.txt", "x", r"unknown file 'notes\.txt'"),
    "syntax": ("turn.jinja", "a\n{% if query %}b", r"line \d.*no valid Jinja2.*turn\.jinja are: query, context"),
    "unknown variable": ("turn.jinja", "\n\n{{ qeury }}", r"line 3 uses .*'qeury' \(did you mean 'query'"),
    "unknown attribute": ("head.jinja", "\nu{% for p in profile %}{{ p.nam }}{% endfor %}", r"line 2 cannot.*nam"),
    "unknown filter": ("turn.jinja", "{{ query | shout }}", r"turn\.jinja, line 1 is no valid Jinja2.*shout"),
    "unknown include": ("turn.jinja", '{% include "itm.jinja" %}', r"includes 'itm\.jinja'.*'item\.jinja'"),
    "include without its fields": ("turn.jinja", 'x{% include "item.jinja" %}', r"cannot be rendered.*title"),
    "wrong type": ("turn.jinja", "{{ query + 1 }}", r"turn\.jinja, line 1 cannot be rendered"),
    "unsafe": ("turn.jinja", "{{ query.__class__.__mro__ }}", r"cannot be rendered.*__class__"),
    "cut field": ("turn.jinja", "{% filter truncate(6, true) %}{{ query }}{% endfilter %}x", r"cuts through a field"),
    "empty head": ("head.jinja", "{% for p in profile %}{{ p.value }}{% endfor %}", r"head\.jinja renders to nothing"),
    "empty prompt": ("query_to_sid.jinja", "{{ query }}", r"query_to_sid\.jinja renders to nothing"),
    "private use": ("turn.jinja", "\ue000", r"private-use character"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_template_is_one_sentence(mistake, tmp_path):
    name, text, sentence = MISTAKES[mistake]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence) as caught:
        Serializer(made.byte_bpe(), tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_other_mistakes(tmp_path):
    (tmp_path / "turn.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        Serializer(made.byte_bpe(), tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'chatml'"):
        Serializer(made.byte_bpe(), "chat_ml")
    with pytest.raises(ConfigError, match="<\\|im_start\\|>"):
        Serializer(made.metaspace(), "chatml")
    with pytest.raises(ConfigError, match="did you mean 'item_to_sid'"):
        plain().prompt("item_to_sids")
    with pytest.raises(ConfigError, match="no variable 'title'"):
        plain().prompt("query_to_sid", title="x")
    tokenizer = made.byte_bpe.__wrapped__()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="eos"):
        Serializer(tokenizer).answer("x")


def test_without_a_tokenizer_it_renders_texts_to_train_one_on():
    s = Serializer(None)
    assert s.turn("red <a_1> shoes", CONTEXT) == "\nred ‹a_1› shoes place=paris device=phone:"
    assert s.answer("Shoe") == " Shoe" and s.literal_ids() == []


def test_turns_are_rendered_once():
    s = plain()
    assert s.turn("x", CONTEXT) is s.turn("x", [dict(pair) for pair in CONTEXT])

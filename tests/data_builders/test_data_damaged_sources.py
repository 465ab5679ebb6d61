"""Damaged sources and wrong options: each reader ends in one sentence that names file, line and remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from source_folders import jd, kuai, letter, office, qrels

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.registry import READERS

VALID, TEST = [("u", [1], 2)], [("u", [1, 2], 3)]
OFFICE, JD_USER = {"valid": VALID, "test": TEST}, "q\t1\t0.0\tx\t1\tCLICK\t0_1"


def spoil(make: Callable[[Path], Path], file: str, how: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        make(folder)
        (folder / file).write_bytes(how((folder / file).read_bytes()))
        return folder

    return made


def good_qrels(folder: Path) -> Path:
    return qrels(folder, "u_0 0 i1 1\n" * 50, "w_1 0 i2 1\n")


DAMAGED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing folder": (
        "amazon_sid",
        lambda f: f,
        "needs the folder of its source, but .* does not exist; check the path",
    ),
    "missing file": (
        "amazon_sid",
        lambda f: office(f, {"valid": VALID}),
        "has no file \\*.test.csv \\(it holds X.item.json",
    ),
    "two categories": (
        "amazon_sid",
        lambda f: (office(f, OFFICE), (f / "Y.item.json").write_text("{}")),
        "2 files like",
    ),
    "no rows": ("amazon_sid", lambda f: office(f, {"test": TEST}), "must hold valid \\(or train\\) rows and test rows"),
    "no UTF-8 csv": (
        "amazon_sid",
        spoil(lambda f: office(f, OFFICE), "X.test.csv", lambda b: b + b"caf\xe9,x,[1],2\n"),
        "X.test.csv is not UTF-8 text: line 3 has the byte 0xe9; convert it",
    ),
    "window is no list": (
        "amazon_sid",
        spoil(lambda f: office(f, OFFICE), "X.valid.csv", lambda b: b + b"u,t,__import__('os'),2\n"),
        "X.valid.csv, row 1, column 'history_item_id': a list of item ids belongs here, got \"__import",
    ),
    "short csv row": (
        "amazon_sid",
        spoil(lambda f: office(f, OFFICE), "X.valid.csv", lambda b: b + b"u,t\n"),
        "X.valid.csv, row 1: the row has 2 fields, the header 4",
    ),
    "open quote": (
        "amazon_sid",
        spoil(lambda f: office(f, OFFICE), "X.valid.csv", lambda b: b + b'u,"never closed,[1],2\n'),
        "X.valid.csv: the file is no CSV",
    ),
    "renamed column": (
        "amazon_sid",
        spoil(lambda f: office(f, OFFICE), "X.valid.csv", lambda b: b.replace(b"history_item_id", b"history_items")),
        "X.valid.csv, column 'history_item_id': the column is missing \\(did you mean 'history_items'",
    ),
    "no user": (
        "amazon_sid",
        lambda f: office(f, {"valid": [("", [1], 2)], "test": TEST}),
        "X.valid.csv, row 0, column 'user_id': an id belongs here, got None",
    ),
    "broken items": ("amazon_sid", lambda f: office(f, OFFICE, "{"), "X.item.json is not valid JSON"),
    "half a character": (
        "amazon_sid",
        lambda f: office(f, OFFICE, '{"1": {"title": "a\\ud800b"}}'),
        "X.item.json is not valid JSON \\(it holds half a character",
    ),
    "items are a list": (
        "amazon_sid",
        lambda f: office(f, OFFICE, "[]"),
        "must hold one JSON object, but holds a list",
    ),
    "item is a text": ("amazon_sid", lambda f: office(f, OFFICE, {"1": "x"}), "'1' is a str"),
    "title is a number": (
        "amazon_sid",
        lambda f: office(f, OFFICE, {"1": {"title": 5}}),
        "no text as 'title' of item '1' but 5",
    ),
    "sequence no list": ("letter", lambda f: letter(f, {"u": 3}), "has no list of item ids for user 'u' but 3"),
    "sequence of floats": ("letter", lambda f: letter(f, {"u": [1.5]}), "has no list of item ids for user 'u'"),
    "no sequences": ("letter", lambda f: letter(f, {}), "has no sequences; check the path"),
    "broken SID": (
        "letter",
        lambda f: letter(f, {"u": [1]}, {"1": ["<a_1>", "<c_2>"]}),
        "has for item '1' the tokens .* expected 2",
    ),
    "uneven SIDs": ("letter", lambda f: letter(f, {"u": [1]}, {"1": ["<a_1>"], "2": ["<a_1>", "<b_1>"]}), "item '2'"),
    "truncated gz": (
        "amazon_search",
        spoil(good_qrels, "train.qrels.gz", lambda b: b[:-9]),
        "train.qrels.gz is no complete gzip",
    ),
    "gz that is none": (
        "amazon_search",
        spoil(good_qrels, "query_text.txt.gz", lambda b: b"red shoe\n"),
        "no complete gzip file",
    ),
    "bad qrels line": (
        "amazon_search",
        lambda f: qrels(f, "u_0 0 i1 1\nu_0 i1\n", "w_1 0 i2 1\n"),
        "train.qrels.gz has in line 2 'u_0 i1'",
    ),
    "unknown query": ("amazon_search", lambda f: qrels(f, "u_7 0 i1 1\n", "w_1 0 i2 1\n"), "a query number below 2"),
    "no test lines": ("amazon_search", lambda f: qrels(f, "u_0 0 i1 1\n", ""), "has no train or no test lines"),
    "train and test mixed": (
        "amazon_search",
        lambda f: qrels(f, "u_0 0 i1 1\n", "u_0 0 i2 1\nw_0 0 i2 1\n"),
        "both in train and in test",
    ),
    "missing fields": (
        "jdsearch",
        lambda f: jd(f, [JD_USER, "q\t1\t0"]),
        "release_data.txt has 3 fields in line 2, expected 7",
    ),
    "too few times": (
        "jdsearch",
        lambda f: jd(f, ["q\t1\t0.0\tx\t1\tCLICK\t0"]),
        "1 values of 'history_gaps' in line 1, expected 2",
    ),
    "too few labels": (
        "jdsearch",
        lambda f: jd(f, ["q\t1_2\t0.0\tx\t1\tCLICK\t0_1"]),
        "1 values of 'labels' in line 1, expected 2",
    ),
    "time no number": (
        "jdsearch",
        lambda f: jd(f, [JD_USER, JD_USER.replace("0_1", "0_x")]),
        "'x' among 'history_gaps' in line 2",
    ),
    "negative gap": ("jdsearch", lambda f: jd(f, [JD_USER.replace("0_1", "0_-1")]), "negative time gap in line 1"),
    "label 7": (
        "jdsearch",
        lambda f: jd(f, [JD_USER.replace("0.0", "7.0")]),
        "the label 7 in line 1; expected 0, 1, 2 or 3",
    ),
    "unknown kind": (
        "jdsearch",
        lambda f: jd(f, [JD_USER.replace("CLICK", "BUY")]),
        "the unknown action 'BUY' in line 1",
    ),
    "short product": (
        "jdsearch",
        lambda f: jd(f, [JD_USER], ["1\tname"]),
        "product_data.txt has 2 fields in line 1, expected 13",
    ),
    "no users": ("jdsearch", lambda f: jd(f, []), "release_data.txt has no users"),
    "broken recall line": (
        "kuaisearch",
        lambda f: kuai(f, recall=['{"user_id": 1,']),
        "recall.jsonl, row 0: line 1 is not valid JSON",
    ),
    "text as user": (
        "kuaisearch",
        lambda f: kuai(f, users=[{"user_id": "x"}]),
        'line 1 has "x" where an integer of 64 bits',
    ),
    "item without id": (
        "kuaisearch",
        lambda f: kuai(f, items=[{"item_title": "x"}]),
        "column 'item_id': 'item_id' is missing or null",
    ),
    "missing rank": ("kuaisearch", lambda f: (kuai(f), (f / "rank.jsonl").unlink()), "has no file rank.jsonl"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_sources_end_in_one_sentence(name, tmp_path):
    reader, make, text = DAMAGED[name]
    make(tmp_path / "in")
    with pytest.raises(DataError, match=text) as caught:
        READERS.get(reader)(str(tmp_path / "in"))
    assert str(caught.value).endswith((".", ")")) and len(str(caught.value)) < 600


# The ids keep the reader named "hub" from looking like the mark of that name.
@pytest.mark.parametrize("reader", [name for name in READERS if name != "shop_world"], ids="reader {}".format)
def test_unknown_options_are_refused_before_any_work(reader, tmp_path):
    with pytest.raises(ConfigError, match=f"reader '{reader}': unknown key 'valid_shares'"):
        READERS.get(reader)(str(tmp_path / "nowhere"), valid_shares=0.1)


@pytest.mark.parametrize(
    "reader, option, text",
    [
        ("amazon_sid", {"valid_share": 1.0}, "valid_share must be from 0 to below 1, got 1.0"),
        ("amazon_sid", {"valid_share": "0.1"}, "'valid_share' must be a number, got '0.1'"),
        ("letter", {"action": "buy"}, "action must be click, like or order, got 'buy'"),
        ("jdsearch", {"session_gap": -1}, "session_gap must be 0 or more seconds, got -1"),
        ("kuaisearch", {"unknown": "keep"}, "'unknown' must be one of 'add', 'drop', got 'keep'"),
    ],
)
def test_wrong_option_values_are_refused(reader, option, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        READERS.get(reader)(str(tmp_path), **option)


def test_an_unknown_reader_names_the_nearest():
    with pytest.raises(ConfigError, match="no reader named 'amazon-sid': did you mean 'amazon_sid'"):
        READERS.get("amazon-sid")

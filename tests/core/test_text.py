"""What people and other programs write: byte-order marks, line ends, odd YAML, JSON of another shape, and errors of the system."""

import errno
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from sidtune.core.config import build, load_yaml, parse
from sidtune.core.errors import ConfigError, DataError, system_error
from sidtune.core.folders import is_whole, read_json, read_run
from sidtune.core.shapes import misfit
from sidtune.core.text import parse_yaml, read_lines, read_text

pytestmark = pytest.mark.medium

MARK = b"\xef\xbb\xbf"


def test_a_mark_and_line_ends_of_windows_are_no_part_of_a_text(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_bytes(MARK + "i0\r\ni\u20281\r\ni\x852\r\n".encode())
    assert read_lines(file) == ["i0", "i\u20281", "i\x852"] and read_text(file).count("\n") == 3
    file.write_bytes(b"a\n\n b")
    assert read_lines(file) == ["a", "", " b"]
    for name, text in (("a.json", '{"a":\n1}'), ("a.yaml", "a: 1\n")):
        (tmp_path / name).write_bytes(MARK + text.replace("\n", "\r\n").encode())
    assert read_json(tmp_path / "a.json") == load_yaml(tmp_path / "a.yaml") == {"a": 1}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.write_bytes(b"ok\n\xff"), "line 2 has the byte 0xff"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.symlink_to(p), "Too many levels"),
        (lambda p: None, "does not exist"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path, damage, words):
    damage(tmp_path / "x.txt")
    with pytest.raises(DataError, match=words):
        read_lines(tmp_path / "x.txt")
    with pytest.raises(DataError, match="File name too long"):
        read_text(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("-2.5E4", -25000.0), ("1E5", 1e5), ("1_000", 1000), ("0x1f", 31), ("2020-13-45", "2020-13-45"),
        ("2020-01-02", "2020-01-02"), ("007", "007"), ("12:30", "12:30"), ("no", False), ("0", 0), ("1.", 1.0), (".5", 0.5),
        ("1.2.3", "1.2.3"), ("[1, a]", [1, "a"]), ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}), ("=", "="),
    ],
)  # fmt: skip
def test_yaml_says_what_people_mean(text, value):
    assert parse_yaml(text) == value and type(parse_yaml(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("9" * 5000, "4300 digits"), ("{[1]: 2}", "A key must be a text"), ("on: 1", "A key must be a text, got True"),
        ("a: 1\na: 2", "stands twice"), ("!!timestamp 2020-13-45", "month must be"), ("!!binary aGk=", "which no option takes"),
        ("&x [*x]", "in itself"), ("[" * 5000, "nested too deeply"), ("a: [", "parsing"), ("!!python/object:os.x {}", "tag"),
        ("\n".join(["a: &a [1]"] + [f"{b}: &{b} [{','.join([f'*{a}'] * 20)}]" for a, b in zip("abcdef", "bcdefg", strict=True)]),
         "more than 1,000,000"),
    ],
)  # fmt: skip
def test_yaml_that_no_option_takes_is_one_sentence(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text if ":" in text.partition("\n")[0] else f"a: {text}", "utf-8")
    with pytest.raises(ConfigError, match=words) as caught:
        load_yaml(tmp_path / "c.yaml")
    assert str(tmp_path / "c.yaml") in str(caught.value) and "\n" not in str(caught.value)


@dataclass
class Options:
    rate: float = 0.1
    rates: list[float] = field(default_factory=list)
    steps: int = 1
    note: str | None = None
    kind: Literal["a", 1] = "a"


def test_a_number_with_an_exponent_is_one_in_every_config():
    values = yaml.safe_load("{rate: 1e-3, rates: [1e-3, 2], steps: 1e4}")  # plain YAML makes texts of them
    assert values["rate"] == "1e-3" and build(Options, values, "x") == Options(1e-3, [1e-3, 2], 10_000)
    assert parse(Options, ["--rate", "1e-3", "--steps", "2E3", "--note", "x: y: z"]) == Options(
        1e-3, [], 2000, "x: y: z"
    )
    wrong = ({"note": {"a": 1}}, {"note": [1]}, {"rate": "1e"}, {"steps": 1.5}, {"steps": 10**30}, {"note": "a\0"}, {"rate": 1e999},
             {"kind": True}, {"steps": True}, {"note": "\ud800"})  # fmt: skip
    for one in wrong:
        with pytest.raises(ConfigError, match=next(iter(one))):
            build(Options, one, "x")


@dataclass
class Row:
    name: str
    mean: float | None = None


SHAPE = {"rows": list[Row], "by": dict[str, list[int]], "pair?": tuple[int, int], "deep": [{"a?": str, ...: str | int}]}
GOOD = {
    "rows": [{"name": "x", "mean": 1}, {"name": "y"}],
    "by": {"a": [1]},
    "pair": [1, 2],
    "deep": [{"a": "s", "b": 3}],
    "more": 0,
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None), ({"rows": {}}, "'rows' must be a list"), ({"rows": [{}]}, "'rows.0' has no 'name'"),
        ({"rows": [{"name": "x", "mean": "1"}]}, "'rows.0.mean' must be a number or null, got '1'"),
        ({"by": {"a": [1, "b"]}}, "'by.a.1' must be an integer"), ({"pair": [1]}, "'pair' must be"),
        ({"deep": [{"a": 3}]}, "'deep.0.a' must be a text"), ({"deep": [{"b": []}]}, "'deep.0.b' must be a text or an integer"),
    ],
)  # fmt: skip
def test_json_of_another_shape_is_named_by_its_place(tmp_path, change, why):
    value = GOOD | change
    found = misfit(value, SHAPE)
    assert found is None if why is None else found.startswith(why)
    (tmp_path / "a.json").write_text(json.dumps(value))
    if why is not None:
        with pytest.raises(DataError, match="is not as it was written"):
            read_json(tmp_path / "a.json", SHAPE)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"a": NaN}', "[" * 100_000, '{"files": 3}', '{"inputs": {"a": 1}}']
)
def test_a_damaged_record_is_no_finished_step(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"run\.json"):
        read_run(tmp_path)
    assert not is_whole(tmp_path)


def test_errors_of_the_system_are_one_sentence_whatever_library_was_between():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    outer = RuntimeError("could not build the table")
    outer.__cause__ = full
    for error in (full, outer, Exception("I/O error: No space left on device (os error 28)"),
                  RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), PermissionError(13, "x", "/a/b"),
                  ValueError("embedded null byte"), RuntimeError("Symlink loop from '/a'"), MemoryError()):  # fmt: skip
        assert str(system_error(error)).endswith(".") and "\n" not in str(system_error(error))
    assert "/a/b: Permission denied" in str(system_error(PermissionError(13, "x", "/a/b")))
    for defect in (ValueError("x"), RuntimeError("x"), KeyError("x")):
        assert system_error(defect) is None


def command(*words: object, limit: int | None = None) -> subprocess.CompletedProcess:
    def limited() -> None:
        if limit is not None:  # files cannot grow further, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    line = [sys.executable, "-m", "sidtune", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, preexec_fn=limited)


SHOP = "{n_items: 200, n_users: 20, n_requests: 200, n_departments: 2, leaves_per_department: 4}"


@pytest.mark.parametrize("limit", [0, 3000, 8000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, limit):
    found = command("build-data", "--options", SHOP, "--output_dir", tmp_path / "out", limit=limit)
    assert found.returncode == 2 and found.stderr.count("error: ") == 1 and "Traceback" not in found.stderr, (
        found.stderr
    )
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("path", "words"),
    [("f" * 300, "File name too long"), ("loop/x", "oop"), ("file/x", "Not a directory"), ("nul\0x", "NUL")],
)
def test_paths_that_the_system_refuses(tmp_path, capsys, path, words):
    from sidtune.core.cli import main

    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    for option in ("--output_dir", "--config"):
        with pytest.raises(SystemExit) as ended:
            main(["learn-sids", "--data_dir", str(tmp_path / path), option, str(Path(tmp_path, path))])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1 and said.startswith("error: "), said
        assert option == "--config" or words in said, said

"""Strict configs: unknown keys, wrong types, dotted options, exit code 2."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sidtune.core.config import build, load_yaml, parse
from sidtune.core.errors import ConfigError, DataError, Problem, nearest


@dataclass
class Options:
    output_dir: str
    steps: int = 3
    rate: float = 0.1
    flag: bool = False
    name: str | None = None
    sizes: list[int] = field(default_factory=lambda: [1])
    nested: dict = field(default_factory=dict)
    stages: list[dict] = field(default_factory=list)


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "c.yaml"
    file.write_text(text, "utf-8")
    return str(file)


def test_yaml_and_command_line_agree_and_the_command_line_wins(tmp_path):
    file = write(
        tmp_path, "output_dir: a\nsteps: 5\nnested: {x: {y: 1}}\nstages: [{args: {max_steps: 1}}, {args: {}}]\n"
    )
    got = parse(
        Options, ["--config", file, "--steps=7", "--nested.x.y", "2", "--stages.1.args.max_steps", "9", "--flag"]
    )
    assert got == Options(
        "a", 7, 0.1, True, None, [1], {"x": {"y": 2}}, [{"args": {"max_steps": 1}}, {"args": {"max_steps": 9}}]
    )


@pytest.mark.parametrize(
    ("text", "argv", "words"),
    [
        ("output_dir: a\nstep: 5\n", [], ["'step'", "did you mean 'steps'?"]),
        ("output_dir: a\n", ["--stps", "4"], ["'stps'", "did you mean 'steps'?"]),
        ("output_dir: a\nsteps: many\n", [], ["'steps' must be an integer", "'many'"]),
        ("output_dir: a\nsteps: 1.5\n", [], ["'steps' must be an integer", "1.5"]),
        ("output_dir: a\nflag: 1\n", [], ["'flag' must be true or false"]),
        ("output_dir: a\nsizes: [1, x]\n", [], ["'sizes' must be a list of an integer"]),
        ("output_dir: a\nnested: 3\n", [], ["'nested' must be a mapping"]),
        ("steps: 5\n", [], ["'output_dir' is missing"]),
        ("output_dir: a\nsteps: 5\nsteps: 6\n", [], ["'steps' stands twice", "line 3"]),
        ("- a\n- b\n", [], ["must be a mapping"]),
        ("output_dir: [a\n", [], ["not valid YAML"]),
        ("output_dir: a\n", ["steps"], ["Expected an option"]),
        ("output_dir: a\nstages: []\n", ["--stages.0.x", "1"], ["element '0' of a list of 0"]),
        ("output_dir: a\nsteps: 5\n", ["--steps.x", "1"], ["holds no nested keys"]),
    ],
)
def test_every_mistake_is_one_clear_sentence(tmp_path, text, argv, words):
    with pytest.raises(ConfigError) as caught:
        parse(Options, ["--config", write(tmp_path, text), *argv])
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_missing_and_binary_config_files(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_yaml(tmp_path)


def test_nested_dataclasses_are_checked_with_their_place():
    with pytest.raises(ConfigError, match=r"stages\[1\].*'steps'"):
        build(Options, {"output_dir": "a", "stepz": 1}, "stages[1]")


def test_nearest_and_problem_texts():
    assert nearest("zzzz", ["a", "b"]) == "known are: a, b."
    many = [Problem("items.parquet", row, "price", "the price is NaN", "set a number or null") for row in range(30)]
    text = str(DataError(many, shown=3))
    assert "30 problems" in text and "row 2" in text and "row 3" not in text and "27 more" in text


def test_a_command_ends_with_exit_code_2_and_no_trace(tmp_path):
    script = tmp_path / "s.py"
    script.write_text(
        "from dataclasses import dataclass\nfrom sidtune.core.config import command\n"
        "@dataclass\nclass A:\n    steps: int = 1\n"
        "command(lambda a: print(a.steps), A)\n"
    )
    bad = subprocess.run([sys.executable, script, "--setps", "3"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
    good = subprocess.run([sys.executable, script, "--steps", "3"], capture_output=True, text=True)
    assert good.returncode == 0 and good.stdout.strip() == "3"
    assert "--steps" in subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("price_max", ["query", "profile", "history", "k"], None),
        ("colour", ["query", "context", "order"], None),
        ("lr", ["hr", "k"], None),
        ("qurey", ["query", "profile"], "query"),
        ("NDCG", ["ndcg", "map"], "ndcg"),
        ("rate", ["learning_rate", "epochs"], "learning_rate"),
        ("query_text", ["query", "profile"], "query"),
    ],
)
def test_a_suggestion_is_near_or_there_is_none(name, known, hint):
    found = nearest(name, known)
    assert found == (f"did you mean '{hint}'?" if hint else f"known are: {', '.join(sorted(known))}.")

"""The comment that opens a YAML file is the command that runs it: the right script, its own file, options that are accepted."""

from __future__ import annotations

import importlib
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from sidtune.core.cli import split_launch
from sidtune.core.config import parse
from sidtune.core.errors import ConfigError
from sidtune.core.pipeline import launch_options, resolve
from sidtune.core.scripts import Script, find_script, scripts

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    p.relative_to(ROOT).as_posix() for room in ("recipes", "accelerate_configs") for p in (ROOT / room).rglob("*.yaml")
)


def header(file: str) -> str:
    """The first comment line of a file that is a command."""
    lines = [line.removeprefix("# ") for line in (ROOT / file).read_text("utf-8").splitlines() if line.startswith("# ")]
    found = [line for line in lines[:3] if re.match(r"(\w+=\S+ )*(sidtune|accelerate launch) ", line)]
    assert found, f"{file} opens with no command"
    return found[0]


def read(line: str) -> tuple[Script, list[str], dict]:
    """Script, options and launcher's options of a command line."""
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if words[0] == "sidtune":
        script = find_script(words[1])
        launch, rest = split_launch(words[2:])
        return (script, words[2:], {}) if script.alone else (script, rest, launch_options(launch))
    place = words.index("-m")
    (script,) = [script for script in scripts().values() if script.module == words[place + 1]]
    assert not script.alone, f"{script.name} runs as one process; start it by 'sidtune {script.command}'"
    parser = launch_command_parser()
    parser.error = pytest.fail
    return script, words[place + 2 :], vars(parser.parse_args(words[2:]))


@pytest.mark.parametrize("file", FILES)
def test_the_header_is_a_command_that_is_accepted(file, monkeypatch, tmp_path):
    """All checks of the script before its work run; steps of pipelines are resolved too."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SIDTUNE_DATA", str(tmp_path))
    for name in ("amazon_office", "instruments"):
        (tmp_path / name).mkdir()
    (tmp_path / "instruments" / "Instruments.sasrec-32d.npy").touch()
    script, options, launch = read(os.path.expandvars(header(file)))
    if file.startswith("accelerate_configs/"):
        assert launch["config_file"] == file
    else:
        assert options[options.index("--config") + 1] == file
    arguments = parse(importlib.import_module(script.module).Arguments, options)
    if script.name in ("run", "seeds"):
        resolve(arguments)
    elif script.name == "ablation":
        resolve(arguments.pipeline_of(0))


def test_every_yaml_below_recipes_is_looked_at():
    assert len(FILES) > 40 and all(yaml.safe_load((ROOT / file).read_text("utf-8")) for file in FILES)


@pytest.mark.parametrize(
    "line",
    [
        "accelerate launch -m sidtune.recipes.steps.build_data --config x.yaml",
        "accelerate launch --num_processes 2 -m sidtune.recipes.steps.publish",
    ],
)
def test_a_launcher_before_a_step_that_runs_alone_is_found(line):
    with pytest.raises(AssertionError, match="runs as one process"):
        read(line)


@pytest.mark.parametrize(
    "line",
    [
        "accelerate launch --num_proceses 2 -m sidtune.recipes.steps.sft --config x.yaml",
        "accelerate launch --mixed_precision bf61 -m sidtune.recipes.steps.sft",
        "sidtune sft --launch.num_proceses 2 --config x.yaml",
    ],
)
def test_a_wrong_option_of_the_launcher_is_found(line):
    with pytest.raises((ConfigError, pytest.fail.Exception)):
        read(line)


def commands_in(text: str) -> list[str]:
    """Command lines of the fenced shell blocks of a README, with continued lines joined and comments cut."""
    blocks = re.findall(r"```(?:bash|sh|shell)\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return [line for line in lines if re.match(r"(\w+=\S+ )*(sidtune|accelerate launch) ", line)]


READMES = sorted(
    (path.relative_to(ROOT).as_posix(), line)
    for path in ROOT.rglob("*.md")
    if not {".venv", "runs", "build"} & set(path.relative_to(ROOT).parts)
    for line in commands_in(path.read_text("utf-8"))
    if "run my_shop/" not in line  # the file that `sidtune new my_shop` writes
)


@pytest.mark.parametrize(("file", "line"), READMES)
def test_commands_of_a_readme_are_accepted(file, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SIDTUNE_DATA", "/data")
    script, options, _ = read(line.partition(" #")[0])
    parse(importlib.import_module(script.module).Arguments, options)


def test_readmes_have_commands():
    assert len(READMES) > 20

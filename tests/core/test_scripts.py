"""Scripts by name, the command `sidtune`, its completion in a real shell, and `--help` that loads nothing heavy."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sidtune.core import cli
from sidtune.core.config import command, parse
from sidtune.core.errors import ConfigError
from sidtune.core.pipeline import launch_command, launch_options
from sidtune.core.scripts import find_script, scripts

pytestmark = pytest.mark.medium

HEAVY = ("torch", "transformers", "trl", "accelerate", "sklearn", "matplotlib", "faiss")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("sft", "steps.sft"), ("steps.sft", "steps.sft"), ("build-data", "steps.build_data"), ("run", "run"),
        ("crs.reason", "crs.reason"), ("crs.self-evolve", "crs.self_evolve"), ("self_evolve", "crs.self_evolve"),
        ("post_rank", "llm4pr.post_rank"), ("next_item", "next_item.train"),
    ],
)  # fmt: skip
def test_a_script_is_found_by_its_names(name, module):
    assert find_script(name).module == f"sidtune.recipes.{module}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sfft", "did you mean 'sft'"),
        ("self_evolv", "'self_evolve'"),
        ("crs", "may be any of crs.reason"),
        ("", "known are"),
    ],
)
def test_a_wrong_name_is_told_with_the_nearest(name, words):
    with pytest.raises(ConfigError, match=words):
        find_script(name)


def test_every_script_has_the_two_parts_that_the_command_needs():
    for script in scripts().values():
        module = importlib.import_module(script.module)
        assert callable(module.main) and module.Arguments.__dataclass_fields__, script.name
        assert script.summary, script.name
        assert script.alone == (getattr(module, "LAUNCH", None) == "alone"), script.name


def test_what_trains_or_decodes_is_not_alone():
    launched = {name for name, script in scripts().items() if not script.alone}
    assert launched == {
        "align_encoder", "evaluate", "grpo", "retrieve", "sft", "crs.reason", "crs.trajectories", "next_item.train"
    }  # fmt: skip


def test_help_of_every_command_loads_nothing_heavy():
    """What made `sft --help` take 12 seconds; one fresh process for all commands."""
    code = (
        "import contextlib, io, sys\n"
        "from sidtune.core import cli\n"
        "from sidtune.core.scripts import scripts\n"
        "for script in scripts().values():\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):\n"
        "        cli.main([script.command, '--help'])\n"
        "    assert out.getvalue().startswith(f'usage: sidtune {script.command} '), out.getvalue()\n"
        f"    print(script.command, *[name for name in {HEAVY} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == [script.command for script in scripts().values()]


def test_a_launchers_options_start_the_launcher(monkeypatch):
    started: list[list[str]] = []
    monkeypatch.setattr(cli, "run_tied", lambda words, environment, launcher: started.append(words) or 7)
    monkeypatch.setattr(cli, "command", lambda main, arguments, words: started.append(list(words)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["sft", "--launch.num_processes", "2", "--seed", "3", "--launch.cpu", "--launch.config_file=cpu.yaml"])
    assert ended.value.code == 7
    (words,) = [started.pop(0)]
    assert words[1:3] == ["-m", "accelerate.commands.launch"] and words[-4:] == [
        "-m",
        "sidtune.recipes.steps.sft",
        "--seed",
        "3",
    ]
    assert "--cpu" in words and words[words.index("--num_processes") + 1] == "2"
    assert Path(words[words.index("--config_file") + 1]).is_file()  # found in accelerate_configs
    cli.main(["run", "--launch.num_processes", "2"])  # its own option
    assert started[-1] == ["--launch.num_processes", "2"]


def test_a_launchers_values_stay_what_was_typed(tmp_path):
    typed = ["--launch.mixed_precision", "no", "--launch.main_process_ip", "010", "--launch.role=: x", "--launch.cpu"]
    launch, rest = cli.split_launch([*typed, "--launch.gpu_ids", "0,1", "--seed", "3"])
    assert launch == {"mixed_precision": "no", "main_process_ip": "010", "role": ": x", "cpu": True, "gpu_ids": "0,1"}
    assert rest == ["--seed", "3"]
    words = launch_command(find_script("sft"), launch, rest)
    assert words[4:-4] == [
        "--mixed_precision", "no", "--main_process_ip", "010", "--role", ": x", "--cpu", "--gpu_ids", "0,1"
    ]  # fmt: skip


def test_yes_and_no_of_yaml_are_words_again_for_the_launcher():
    options = yaml.safe_load("{mixed_precision: no, dynamo_backend: no, cpu: off, multi_gpu: on, config_file: null}")
    words = launch_command(find_script("sft"), options, [])
    assert words[4:-2] == ["--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_proceses": 2}, "did you mean 'num_processes'"),
        ({"mixed_precision": "bf61"}, "invalid choice: 'bf61'"),
        ({"num_processes": "two"}, "invalid int value: 'two'"),
        ({"num_processes": True}, "invalid int value: 'true'"),
        ({"cpu": 1}, "cpu must be true or false"),
        ({"gpu_ids": [0, 1]}, "gpu_ids must be one value"),
    ],
)
def test_what_the_launcher_would_refuse_is_refused_before_any_step(options, told):
    with pytest.raises(ConfigError, match=told):
        launch_options(options)


def test_wrong_words_end_in_one_sentence(capsys):
    for words, told in (
        (["sfft"], "did you mean 'sft'"),
        (["sft", "--stagez", "1"], "did you mean 'stages'"),
        (["completion", "tcsh"], "takes one of bash, zsh, fish"),
        (["sft", "--launch.config_file", "nowhere.yaml"], "accelerate_configs"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        err = capsys.readouterr().err
        assert caught.value.code == 2 and err.startswith("error: ") and told in err and "Traceback" not in err


def test_the_list_of_commands(capsys):
    cli.main([])
    out = capsys.readouterr().out
    assert all(f"\n  {script.command} " in out for script in scripts().values())
    assert max(map(len, out.splitlines())) <= 125


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(tmp_path):
    (tmp_path / "sidtune").write_text(f'#!/bin/sh\nexec {sys.executable} -m sidtune "$@"\n')
    (tmp_path / "sidtune").chmod(0o755)

    def complete(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in words)
        script = (
            f'PATH="{tmp_path}:$PATH"; eval "$(sidtune completion bash)"; COMP_WORDS=(sidtune {quoted}); '
            f'COMP_CWORD={len(words)}; _sidtune; printf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()

    assert complete("lear") == ["learn-sids"]
    assert complete("crs.") == ["crs.reason", "crs.self-evolve", "crs.trajectories"]
    assert complete("build-data", "--re") == ["--reader"]
    assert complete("build-data", "--reader", "") == []  # a value: files, by the shell


def test_an_alone_script_refuses_several_processes(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["__main__"], "LAUNCH", "alone", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        command(lambda arguments: None, importlib.import_module("sidtune.recipes.steps.publish").Arguments, [])
    assert "one process" in capsys.readouterr().err


def test_neither_does_it_run_so_through_the_command_sidtune(monkeypatch, capsys):
    """What `accelerate launch -m sidtune report` starts in each process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", "--data_dir", "a"])
    assert ended.value.code == 2 and "one process" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["sft", "--data_dir", "a"])
    assert "'sids_dir' is missing" in capsys.readouterr().err


def write_script(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text + '\n\nif __name__ == "__main__":\n    pass\n')


def test_a_file_that_is_no_python_stops_nobody_else(tmp_path, monkeypatch):
    write_script(tmp_path, "steps/good.py", '"""Good."""')
    write_script(tmp_path, "steps/bad.py", "def (:")
    write_script(tmp_path, "crs/zero.py", "a = '\0'")
    for hidden in (".ipynb_checkpoints/copy.py", "steps/.#good.py"):
        write_script(tmp_path, hidden, '"""Hidden."""')
    found = scripts(tmp_path)
    assert list(found) == ["bad", "good", "crs.zero"] and found["good"].summary == "Good."
    monkeypatch.setattr("sidtune.core.scripts.scripts", lambda: found)
    for name in ("bad", "zero"):
        with pytest.raises(ConfigError, match=rf"'.*{name}' cannot run: line \d+ of .*{name}.py is no Python"):
            find_script(name).load()


@pytest.mark.parametrize("name", ["post_rank", "reason", "self-evolve", "trajectories", "next_item"])
def test_names_of_before_stay_bound_when_another_file_gets_them(name, monkeypatch):
    was, word, known = find_script(name), name.replace("-", "_"), scripts()
    others = dict.fromkeys([word, f"new.{word}", "next_item.more"], known["sft"])
    monkeypatch.setattr("sidtune.core.scripts.scripts", lambda: known | others)
    assert find_script(name) == was and find_script(f"steps.{word}").name == "sft"


def test_paths_in_a_config_start_at_its_folder(tmp_path):
    arguments = importlib.import_module("sidtune.recipes.run").Arguments
    (tmp_path / "p.yaml").write_text("steps: []\noutput_dir: out\n")
    assert parse(arguments, ["--config", str(tmp_path / "p.yaml")]).root == str(tmp_path)
    assert parse(arguments, ["--config", str(tmp_path / "p.yaml"), "--root", "else"]).root == "else"
    assert parse(arguments, ["--steps", "[]", "--output_dir", "out"]).root is None
    for value in ("null", "/elsewhere"):
        (tmp_path / "p.yaml").write_text(f"steps: []\noutput_dir: out\nroot: {value}\n")
        assert parse(arguments, ["--config", str(tmp_path / "p.yaml")]).root == str(tmp_path)

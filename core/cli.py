"""The command `sidtune`: every script of `recipes/` by name, with its own options. Our choice.

    sidtune                                  lists the commands
    sidtune build-data --help
    sidtune sft --config recipes/quickstart/sft.yaml ...
    sidtune sft --launch.num_processes 2 --launch.config_file accelerate_configs/ddp.yaml --config ...

A script runs in this process; with options `--launch.NAME VALUE` it is started by `accelerate launch` with these, and ends with
this process. `python -m sidtune.recipes.steps.sft` and `accelerate launch -m sidtune.recipes.steps.sft` do the same work.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Sequence

from sidtune.core.config import check_alone, command, one_sentence
from sidtune.core.errors import ConfigError
from sidtune.core.pipeline import launch_command, launch_options
from sidtune.core.scripts import Script, find_script, scripts
from sidtune.core.stopping import run_tied, stoppable

LAUNCH_PREFIX = "--launch."
_BASH = """_sidtune() {
    local IFS=$'\\n'
    COMPREPLY=($(sidtune completion words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _sidtune sidtune
"""
# What a shell needs for completion, to be evaluated or saved: `eval "$(sidtune completion bash)"`.
SHELLS = {
    "bash": _BASH,
    "zsh": "autoload -U +X compinit bashcompinit && compinit -u && bashcompinit\n" + _BASH,
    "fish": "complete -c sidtune -a '(sidtune completion words (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'\n",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `sidtune WORD OPTIONS...`. A wrong word ends in one sentence that names the nearest command, and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with one_sentence():
            if not words or words[0] in ("-h", "--help", "help"):
                print(overview())
            elif words[0] in ("-V", "--version"):
                print(importlib.import_module("sidtune").__version__)
            elif words[0] == "completion":
                completion(words[1:])
            else:
                run_script(find_script(words[0]), words[1:])
    except BrokenPipeError:  # `sidtune --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def overview() -> str:
    """All commands with one line each."""
    about = {script.command: re.split(r"[,;:] | \(", script.summary)[0].rstrip(".") for script in scripts().values()}
    about["completion"] = 'Prints completion for a shell: eval "$(sidtune completion bash)", or zsh, fish.'
    lines = [f"  {name:<{max(map(len, about))}}  {text}" for name, text in about.items()]
    usage = "usage: sidtune COMMAND [--help] [--config FILE] [--OPTION VALUE ...] [--launch.OPTION VALUE ...]"
    return "\n".join([usage, "", *lines])


def run_script(script: Script, words: list[str]) -> None:
    """Runs a script in this process, or by `accelerate launch` when an option of the launcher is given."""
    if script.alone:
        check_alone()
    launch, rest = ({}, words) if script.alone else split_launch(words)
    if launch:
        line = launch_command(script, launch_options(launch), rest)
        with stoppable():
            sys.exit(run_tied(line, os.environ, launcher=True))
    module = script.load()
    sys.argv = [f"sidtune {script.command}", *rest]  # the name that --help prints
    command(module.main, module.Arguments, rest)


def split_launch(words: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """Options of the launcher as they were typed (one without a value is True), and the other words.

    >>> split_launch(["--launch.num_processes", "2", "--launch.cpu", "--seed", "1"])
    ({'num_processes': '2', 'cpu': True}, ['--seed', '1'])
    """
    found: dict[str, object] = {}
    rest, left = [], list(words)
    while left:
        word = left.pop(0)
        if not word.startswith(LAUNCH_PREFIX):
            rest.append(word)
            continue
        name, equals, value = word.removeprefix(LAUNCH_PREFIX).partition("=")
        if equals:
            found[name] = value
        else:
            found[name] = left.pop(0) if left and not left[0].startswith("--") else True
    return found, rest


def completion(words: Sequence[str]) -> None:
    """Prints the completion script of a shell, or (`words ...`) the words that may stand where the last one stands."""
    if words and words[0] == "words":
        print("\n".join(candidates(words[1:])))
    elif words and words[0] in ("-h", "--help"):
        print('usage: sidtune completion bash|zsh|fish    (to use it: eval "$(sidtune completion bash)")')
    elif len(words) == 1 and words[0] in SHELLS:
        print(SHELLS[words[0]], end="")
    else:
        raise ConfigError(f"sidtune completion takes one of {', '.join(SHELLS)}, got {' '.join(words) or 'nothing'}.")


def candidates(words: Sequence[str]) -> list[str]:
    """The commands, or the options of the command, that begin with the last word; nothing where a value stands.

    >>> candidates(["lear"])
    ['learn-sids']
    """
    if len(words) < 2:
        names = [*(script.command for script in scripts().values()), "completion"]
        return sorted(name for name in names if name.startswith(words[0] if words else ""))
    if words[0] == "completion":
        return [name for name in SHELLS if name.startswith(words[-1])]
    if not words[-1].startswith("--"):
        return []
    script = find_script(words[0])
    fields = dataclasses.fields(script.load().Arguments)
    names = ["--help", "--config", *(f"--{field.name}" for field in fields)]
    if not script.alone:
        names += [f"{LAUNCH_PREFIX}config_file", f"{LAUNCH_PREFIX}num_processes"]
    return [name for name in names if name.startswith(words[-1])]

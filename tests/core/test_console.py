"""What stands on the console and what in the log of a step: seen from outside, with real processes."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
from dataclasses import dataclass
import logging, warnings
from sidtune.core.config import command
@dataclass
class Arguments:
    loud: bool = False
def main(arguments):
    from tqdm.auto import tqdm
    for _ in tqdm(range(3)):
        pass
    warnings.warn_explicit("a library's warning", UserWarning, "there.py", 1, module="library.there")
    warnings.warn("our sentence")
    for name in ("transformers.trainer", "DeepSpeed"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)  # as libraries do when they are imported
        logger.warning("a library's word")
    logging.getLogger("sidtune.here").info("our line")
    logging.getLogger("sidtune.here").warning("our warning")
    print("a table")
command(main, Arguments)
"""


def run(**environment: str) -> tuple[list[str], list[str]]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SIDTUNE_", "TQDM_", "PYTHONWARNINGS"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env={**clean, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_our_lines_are_shown_and_the_noise_of_libraries_is_not():
    assert run() == (["a table"], ["our sentence", "our line", "our warning"])


def test_a_step_of_a_pipeline_writes_its_lines_into_its_log_and_only_warnings_on_the_console():
    assert run(SIDTUNE_LOGGED="1") == (
        ["our sentence", "our line", "our warning", "a table"],
        ["our sentence", "our warning"],
    )


@pytest.mark.parametrize("word", ["a library's warning", "a library's word", "3/3"])
def test_who_wants_it_hears_everything(word):
    assert word in "\n".join(run(SIDTUNE_VERBOSE="1")[1])


def test_threads_that_wait_sleep_in_every_command_unless_told_otherwise():
    """Also under a plain launcher, which starts a script without `sidtune`; before any library with threads is there."""
    ask = "import os, sys\nfrom sidtune.core.console import quiet\nquiet()\n"
    ask += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    clean = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    for given, wanted in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run([sys.executable, "-c", ask], env={**clean, **given}, capture_output=True, text=True)
        assert done.stdout.split() == [wanted, "False"]

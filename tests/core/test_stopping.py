"""A step ends with its runner, and whoever is stopped says in one sentence how to go on: with real processes."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidtune.core import stopping as core
from sidtune.core.stopping import GOES_ON

pytestmark = pytest.mark.medium

STEP = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from sidtune.core.config import command
@dataclass
class Arguments:
    folder: str
    deaf: bool = False
def main(arguments):
    Path(arguments.folder, f"{os.getpid()}").write_text(os.environ.get("RANK", "-"))
    while True:
        try:
            time.sleep(100)
        except BaseException:
            if not arguments.deaf:
                raise
command(main, Arguments)
"""
# A runner as `sidtune run` is one: a command that starts other commands.
RUNNER = """
import os, sys
from dataclasses import dataclass, field
from sidtune.core.config import command
from sidtune.core.stopping import run_tied
@dataclass
class Arguments:
    words: list[str]
    launcher: bool = False
def main(arguments):
    sys.exit(run_tied([sys.executable, *arguments.words], os.environ, arguments.launcher))
command(main, Arguments)
"""


def usual_signals() -> None:
    """In a child: the signals mean what they usually do, also where the tests themselves run under `nohup` or behind a `&`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def exists(pid: int) -> bool:
    """Whether a process runs; one that ended and is waited for by nobody does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(what, limit: float = 60) -> None:
    end = time.monotonic() + limit
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


class Run:
    """A runner with its step, begun."""

    def __init__(self, folder: Path, processes: int = 0, nested: bool = False, deaf: bool = False) -> None:
        self.marks = folder / "marks"
        self.marks.mkdir()
        for name, text in (("step.py", STEP), ("runner.py", RUNNER)):
            (folder / name).write_text(text)
        options = ["--folder", str(self.marks), "--deaf", str(deaf).lower()]
        step = [str(folder / "step.py"), *options]
        if processes:
            kind = str(
                Path(core.__file__).parents[1]
                / "accelerate_configs"
                / ("ddp_cpu.yaml" if processes > 1 else "cpu.yaml")
            )
            step = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", kind, "--num_processes", str(processes),
                    "--main_process_port", "0", *step]  # fmt: skip
        for _ in range(1 + nested):
            step = [str(folder / "runner.py"), "--words", repr(step), "--launcher", str(processes > 0).lower()]
            processes = 0
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "SIDTUNE_LEASH")}
        self.process = subprocess.Popen(
            [sys.executable, *step], stderr=subprocess.PIPE, text=True, start_new_session=True, env=clean,
            preexec_fn=usual_signals,
        )  # fmt: skip

    def begun(self, workers: int = 1) -> "Run":
        until(
            lambda: (
                len([m for m in self.marks.iterdir() if m.read_text()]) == workers or self.process.poll() is not None
            )
        )
        assert self.process.poll() is None, self.process.stderr.read()
        return self

    @property
    def pids(self) -> list[int]:
        return [int(mark.name) for mark in self.marks.iterdir()]

    def ended(self) -> str:
        """Waits for the end of all; returns what stands on stderr."""
        self.process.wait(60)
        until(lambda: not any(map(exists, self.pids)))
        assert select.select([self.process.stderr], [], [], 60)[0]
        return self.process.stderr.read()


@pytest.fixture
def start(tmp_path) -> Iterator:
    runs = []

    def started(workers: int = 1, **options) -> Run:
        runs.append(Run(tmp_path, **options))
        return runs[-1].begun(workers)

    yield started
    for run in runs:
        for pid in (run.process.pid, *run.pids):
            if exists(pid):
                os.kill(pid, signal.SIGKILL)


def sentence(number: int) -> str:
    return f"Stopped by {signal.Signals(number).name}; {GOES_ON}.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("nested", [False, True])
def test_a_stopped_runner_ends_its_step_and_says_how_to_go_on(start, number, nested):
    run = start(nested=nested)
    run.process.send_signal(number)
    assert run.ended() == sentence(number) and run.process.returncode == 128 + number


@pytest.mark.parametrize("nested", [False, True])
def test_a_killed_runner_takes_its_step_along(start, nested):
    run = start(nested=nested)
    run.process.kill()
    run.ended()
    assert run.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_workers_of_a_launcher_end_with_the_runner(start, number):
    run = start(workers=2, processes=2)
    run.process.send_signal(number)
    said = run.ended()
    if number != signal.SIGKILL:
        assert said.endswith(sentence(number)) and "Traceback" not in said and run.process.returncode == 128 + number


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_a_stopped_step_stops_its_runner_with_one_sentence(start, processes):
    run = start(workers=max(1, processes), processes=processes)
    os.kill(run.pids[-1], signal.SIGTERM)
    said = run.ended()
    assert said.endswith(sentence(signal.SIGTERM)) and said.count("Stopped by") == 1 and "Traceback" not in said
    assert run.process.returncode == 128 + signal.SIGTERM


def test_a_killed_launcher_takes_its_workers_along(start):
    run = start(workers=2, processes=2)
    parent = int(Path(f"/proc/{run.pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    run.ended()
    assert run.process.returncode not in (0, 2)


def test_a_step_that_swallows_the_stop_is_ended_nevertheless(start):
    run = start(deaf=True)
    run.process.terminate()
    assert run.ended() == sentence(signal.SIGTERM)


def test_nohup_is_respected(tmp_path):
    (tmp_path / "step.py").write_text(STEP)
    words = ["nohup", sys.executable, str(tmp_path / "step.py"), "--folder", str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               preexec_fn=usual_signals)  # fmt: skip
    until(lambda: (tmp_path / str(process.pid)).exists())
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM and b"SIGHUP" not in process.stdout.read()


def test_a_forked_child_that_is_ended_does_not_end_its_parent(tmp_path):
    code = STEP.replace("while True:", "run_children(); return\n    while True:").replace(
        "@dataclass\n",
        "def run_children():\n"
        "    import multiprocessing\n"
        "    for _ in range(20):\n"
        "        child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(100,))\n"
        "        child.start(); child.terminate(); child.join()\n"
        "    time.sleep(6)  # longer than a stop is waited for\n"
        "    print('ended with', child.exitcode)\n@dataclass\n",
    )
    (tmp_path / "step.py").write_text(code)
    words = [sys.executable, str(tmp_path / "step.py"), "--folder", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended with -15\n", "")

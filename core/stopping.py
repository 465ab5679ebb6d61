"""How a run ends when it is told to, and how a step ends with its runner. Our own plumbing.

A command that is stopped (Ctrl-C, SIGTERM, SIGHUP) raises `Stopped` where it is, so that scratch folders are removed, says in one
sentence how to go on, and exits with 128 plus the number of the signal. What does not end so, because it waits in foreign
code for another process, is ended after a few seconds; a checkpoint that is cut short then is not used (`core/resume.py`).

A runner holds the only writing end of a named pipe, and every process of its step, workers of a launcher included, reads it: the
pipe closes with the runner, however it dies, and the system tells the readers at once. A worker whose launcher is gone ends too.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

LEASH_VARIABLE = "SIDTUNE_LEASH"
GOES_ON = "the same command goes on from what is finished and from the last checkpoint"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE = 5.0  # seconds for an orderly end
_LOOK = 0.2  # seconds between looks at a launcher, and at the parent of its worker
_CLOSED = 255
_STOPPED = "stopped"  # beside the pipe: the number of the signal that a process of the step got
_running: set[int] = set()  # what `run_tied` has started
_WORKER = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")  # what a launcher tells its workers


class Stopped(KeyboardInterrupt):
    """The run was told to end.

    Args:
        number: the signal.
        told: somebody else says so to the person.
    """

    def __init__(self, number: int, told: bool = False) -> None:
        self.number, self.told = int(number), told
        super().__init__(f"Stopped by {signal.Signals(number).name}; {GOES_ON}.")


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Makes the block one that can be stopped; ends the process when it was. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch()
    try:
        yield
    except KeyboardInterrupt as stop:
        watch.leave(stop if isinstance(stop, Stopped) else Stopped(signal.SIGINT))
    finally:
        watch.close()


def own_signals() -> None:
    """For a program that ends in its own way, as a server does: the signals have their usual meaning from now on."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def run_tied(
    words: Sequence[str], environment: Mapping[str, str], launcher: bool, output: IO[str] | None = None
) -> int:
    """Runs a command to its end; it and everything below it end with this process, in whatever way that ends.

    Args:
        words: the command; a script of `recipes/`, or a launcher of one.
        launcher: it starts the script's processes; it is then not asked to end but killed, because it would show traces.
        output: receives its standard output, and None leaves it on this process's.

    Returns:
        Its exit code.

    Raises:
        Stopped: this process, or the command, was told to end.
    """
    with tempfile.TemporaryDirectory() as folder:
        leash = Path(folder) / "leash"
        os.mkfifo(leash)
        first = os.open(leash, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a reader cannot be opened for writing
        hold = os.open(leash, os.O_WRONLY)
        os.close(first)
        told = {**environment, LEASH_VARIABLE: str(leash)}
        process = subprocess.Popen(words, env=told, stdout=output, start_new_session=True)
        _running.add(process.pid)
        try:
            code = _wait(process, leash.with_name(_STOPPED))
            if code:
                _end(process, hold, launcher)
            return code
        except BaseException:
            _end(process, hold, launcher)
            raise
        finally:
            _running.discard(process.pid)
            os.close(hold)


def _wait(process: subprocess.Popen, stopped: Path) -> int:
    code = None
    while code is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(_LOOK)
        if stopped.exists():
            raise Stopped(int(stopped.read_text()))
    if -code in _SIGNALS:
        raise Stopped(-code)
    return code


def _end(process: subprocess.Popen, hold: int, launcher: bool) -> None:
    """Ends a command: tells all readers of its pipe, waits until they are gone, and kills what is left."""
    if launcher:
        process.kill()
    with contextlib.suppress(OSError):
        os.write(hold, b"." * 4096)  # each of them takes one
    readers = select.poll()
    readers.register(hold, 0)  # says when nobody reads any more
    readers.poll(2000 * _GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Watch:
    """Handlers of the signals, and a thread that sees to it that this process ends."""

    def __init__(self) -> None:
        self.owner, self.told = os.getpid(), False
        self.parent = os.getppid() if any(name in os.environ for name in _WORKER) else None
        self.runner = os.environ.get(LEASH_VARIABLE)
        self.leash = self._open_leash()
        self.ear, self.mouth = os.pipe()
        os.set_blocking(self.mouth, False)
        self.old = {}
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` and a shell's `&` want it
                self.old[number] = signal.signal(number, self._handle)
        self.old_wakeup = signal.set_wakeup_fd(self.mouth, warn_on_full_buffer=False)
        # A signal for a child that is just being forked would be taken for one for this process.
        block, free = partial(self._mask, signal.SIG_BLOCK), partial(self._mask, signal.SIG_UNBLOCK)
        os.register_at_fork(before=block, after_in_parent=free, after_in_child=self._forget)
        threading.Thread(target=self._look, name="sidtune-watch", daemon=True).start()

    def _open_leash(self) -> int | None:
        if self.runner is None:
            return None
        try:
            return os.open(self.runner, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            self.runner = None
            self.leave(Stopped(signal.SIGTERM))  # the runner ended before its step began

    def _handle(self, number: int, frame: object) -> None:
        for other in self.old:  # the end is under way; another signal does not disturb it
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number, self.told)

    def _look(self) -> None:
        """Waits for a signal, for the runner to go, and for the launcher to go; then gives the main thread some time."""
        ears = [self.ear, *([] if self.leash is None else [self.leash])]
        number = None
        while number is None:
            ready, _, _ = select.select(ears, [], [], None if self.parent is None else _LOOK)
            if self.ear in ready:
                byte = os.read(self.ear, 1)[0]
                if byte == _CLOSED:
                    for pipe in (*ears, self.mouth):
                        os.close(pipe)
                    return
                number = byte if byte in self.old else None
            elif self.leash in ready or (self.parent is not None and os.getppid() != self.parent):
                self.told = self.leash in ready and os.read(self.leash, 1) != b""  # by a runner that lives
                number = signal.SIGTERM
                os.kill(self.owner, number)
        threading.Event().wait(4 * _GRACE if _running else _GRACE)
        self.leave(Stopped(number, self.told))

    def leave(self, stop: Stopped) -> None:
        """Says the sentence, once for all processes of a run, and ends this one without waiting for anything."""
        told = stop.told or self.told or self._runner_tells(stop)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            if not told and os.environ.get("RANK", "0") == "0":
                print(stop, file=sys.stderr, flush=True)
        os._exit(128 + stop.number)

    def _runner_tells(self, stop: Stopped) -> bool:
        """Lets a runner that lives know that its step was stopped; it ends the other processes and says so."""
        if self.runner is None:
            return False
        with contextlib.suppress(OSError):
            Path(self.runner).with_name(_STOPPED).write_text(str(stop.number))
            return bool(select.select([self.leash], [], [], _GRACE)[0]) and (self.told or os.read(self.leash, 1) != b"")
        return self.told

    def _mask(self, how: int) -> None:
        if self.owner:
            signal.pthread_sigmask(how, _SIGNALS)

    def _forget(self) -> None:
        """In a forked child, which is no run of its own."""
        if self.owner:
            own_signals()
            if self.leash is not None:
                os.close(self.leash)
            self._mask(signal.SIG_UNBLOCK)
            self.owner = 0

    def close(self) -> None:
        if self.owner:
            self.owner = 0
            signal.set_wakeup_fd(self.old_wakeup)
            for number, handler in self.old.items():
                signal.signal(number, handler)
            os.write(self.mouth, bytes([_CLOSED]))

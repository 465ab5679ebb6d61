"""One lock per output folder, so that two runs never write the same one.

The lock is the kernel's (`flock` on a hidden file beside the folder), so that of a dead process is none. The file says who holds
it. A file system without such locks gives none, and the run goes on without.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sidtune.core.errors import ConfigError, SidtuneError

_HELD: dict[Path, IO[str] | None] = {}


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Holds the lock of `folder`, which need not exist yet; a second time in the same process is free.

    Raises:
        SidtuneError: another process holds it; the sentence names that process.
        ConfigError: the file of the lock cannot be written.
    """
    folder = Path(folder).resolve()
    if folder in _HELD:
        yield
        return
    file = folder.parent / f".{folder.name}.lock"
    _HELD[folder] = stream = _take(file, folder)
    try:
        yield
    finally:
        if _HELD.pop(folder, None) is not None and stream is not None:
            file.unlink(missing_ok=True)
            stream.close()


def _take(file: Path, folder: Path) -> IO[str] | None:
    import fcntl

    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = file.open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"The output folder {folder} cannot be written ({error}); name another one.") from None
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = _owner(stream.read())
            stream.close()
            raise SidtuneError(f"{owner} writes {folder} now; wait until it has ended, or stop it.") from None
        except OSError:
            stream.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                break
        stream.close()  # its holder ended and removed it in between
    stream.truncate(0)
    words, now = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "command": words, "started": now}, stream)
    stream.flush()
    return stream


def _owner(text: str) -> str:
    try:
        told = json.loads(text)
        return f"Process {told['pid']} on {told['host']} ('{told['command']}', since {told['started']})"
    except (ValueError, KeyError, TypeError):  # it has only just begun
        return "Another process"


def _forget() -> None:
    """A forked worker must not keep the lock of a process that is gone."""
    for stream in _HELD.values():
        if stream is not None:
            stream.close()
    _HELD.clear()


os.register_at_fork(after_in_child=_forget)

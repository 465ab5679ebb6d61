"""A process of several ends after its threads, however late these are, and tells an error once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import run

from sidtune.core import processes
from sidtune.core.errors import DataError, SidtuneError
from sidtune.core.processes import end_processes, on_all, on_main

LATE = """
import os, sys, time
import torch

def late(future):
    time.sleep(0.1)
    print("the thread has ended its work", flush=True)

other = os.fork()
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(not other), world_size=2)
if not other:
    time.sleep(0.3)
    torch.distributed.all_reduce(torch.ones(3))
    os._exit(0)
future = torch.distributed.all_reduce(torch.ones(3), async_op=True).get_future()
future.then(late)
future.wait()
"""


def test_a_process_waits_for_what_a_thread_of_the_group_still_does(tmp_path: Path) -> None:
    """It calls back for 0.1 s after the collective is done; ended there by the interpreter, it would abort."""
    end = "from sidtune.core.processes import end_processes\nend_processes()\nassert not torch.distributed.is_initialized()"
    assert "the thread has ended" in run(["-c", LATE + end, str(tmp_path / "store")], tmp_path)


def test_a_process_of_its_own_has_nothing_to_end() -> None:
    assert not torch.distributed.is_initialized()
    end_processes()


class Process:
    """Stands in for accelerate's state of one process of two."""

    num_processes = 2

    def __init__(self, main: bool) -> None:
        self.is_main_process = main

    def __call__(self) -> Process:
        return self


def test_the_other_processes_leave_quietly_when_the_main_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [None, True]
    monkeypatch.setattr(processes, "_GRACE", 0.0)
    monkeypatch.setattr("accelerate.PartialState", Process(main=False))
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda given: given.__setitem__(slice(None), told))
    with pytest.raises(SystemExit) as caught:
        on_main(lambda: 1)
    assert caught.value.code == 2
    told = [5, False]
    assert on_main(lambda: 1) == 5


def refuse() -> None:
    raise DataError("wrong here")


def test_an_error_of_any_process_is_told_once_by_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ["wrong there"]
    monkeypatch.setattr(processes, "_GRACE", 0.0)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, *others])
    monkeypatch.setattr("accelerate.PartialState", Process(main=True))
    with pytest.raises(DataError, match="wrong here"):
        on_all(refuse)
    with pytest.raises(SidtuneError, match="wrong there"):
        on_all(lambda: 1)
    monkeypatch.setattr("accelerate.PartialState", Process(main=False))
    with pytest.raises(SystemExit) as caught:
        on_all(lambda: 1)
    assert caught.value.code == 2
    others = [None]
    assert on_all(lambda: 1) == 1

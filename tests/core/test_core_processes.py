"""A process of several ends after its threads, however late these are."""

from __future__ import annotations

from pathlib import Path

import torch
from launching import run

from sidtune.core.processes import end_processes

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

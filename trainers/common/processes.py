"""Work that one process does while the others wait, without a deadlock when it fails. Our own plumbing; nothing from a
paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def on_main(work: Callable[[], T]) -> T:
    """Runs `work` on the main process and gives its (JSON-ready) result to all processes.

    An error of the main process is raised there; every other process ends with exit code 2 and no message, so that the
    error is told once and nobody waits for a process that is gone.
    """
    state = PartialState()
    result, error = None, None
    if state.is_main_process:
        try:
            result = work()
        except BaseException as caught:  # told to the others first, then raised
            error = caught
    if state.num_processes > 1:
        told = [result, error is not None]
        broadcast_object_list(told)
        if not state.is_main_process:
            if told[1]:
                raise SystemExit(2)
            return told[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]

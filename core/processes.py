"""How several processes share work, tell an error once, and end without aborting or hanging. Our own plumbing.

`on_main` and `on_all` never leave a process waiting for one that has failed; both are plain calls where there is one process.

A worker thread of gloo frees the tensors of its last collective after the collective is done, and needs Python's lock for
it. If the interpreter is ending by then, that thread is ended inside C++ code that forbids it and the process aborts; if a
`DistributedDataParallel` that is still alive is the last holder of the group, it waits for that thread while it holds the
lock, and the process hangs. Either happens after all work is done and turns a run that succeeded into one that failed.
Destroying the group does not prevent it, because what else holds the group keeps its threads alive.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from sidtune.core.errors import SidtuneError

T = TypeVar("T")
_GRACE = 3.0  # seconds that the others leave the main process to tell its error, before a launcher ends all of them
_PAUSE = 0.2  # seconds without the lock, in which the threads of the group free what they hold; they need microseconds


def end_processes() -> None:
    """Ends the process group of `torch.distributed` once its threads rest; does nothing without a group.

    The last thing that `core.config.command` does on every process. Our choice.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    gc.collect()  # a trainer is a circle of objects, one of which holds the group outside Python
    time.sleep(_PAUSE)
    deepspeed = sys.modules.get("deepspeed.comm.comm")
    if deepspeed is not None and deepspeed.is_initialized():
        deepspeed.destroy_process_group()
    else:
        distributed.destroy_process_group()


def launch() -> dict[str, Any]:
    """How this run is spread over processes; a checkpoint fits only the same spread."""
    from accelerate import PartialState

    state = PartialState()
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") if "DEEPSPEED" in str(state.distributed_type) else None
    return {"processes": state.num_processes, "kind": state.distributed_type.value, "zero_stage": stage}


def on_main(work: Callable[[], T]) -> T:
    """Runs `work` on the main process and gives its (JSON-ready) result to all processes.

    An error of the main process is raised there; every other process ends with exit code 2 and no message, so that the
    error is told once and nobody waits for a process that is gone.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

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
                _leave()
            return told[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def on_all(work: Callable[[], T]) -> T:
    """Runs `work` on every process; an error of the input on any of them ends all, and the main process raises it."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    value, own = None, None
    try:
        value = work()
    except SidtuneError as error:
        own = error
    sentences = [one for one in gather_object([None if own is None else str(own)]) if one is not None]
    if sentences and state.is_main_process:
        raise own or SidtuneError(sentences[0])
    if sentences:
        _leave()
    return value  # type: ignore[return-value]


def _leave() -> NoReturn:
    time.sleep(_GRACE)
    raise SystemExit(2)

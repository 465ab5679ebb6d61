"""How a process of several ends without aborting or hanging. Our own plumbing; nothing from a paper.

A worker thread of gloo frees the tensors of its last collective after the collective is done, and needs Python's lock for
it. If the interpreter is ending by then, that thread is ended inside C++ code that forbids it and the process aborts; if a
`DistributedDataParallel` that is still alive is the last holder of the group, it waits for that thread while it holds the
lock, and the process hangs. Either happens after all work is done and turns a run that succeeded into one that failed.
Destroying the group does not prevent it, because what else holds the group keeps its threads alive.
"""

from __future__ import annotations

import gc
import sys
import time

_PAUSE = 0.2  # seconds without the lock, in which the threads of the group free what they hold; they need microseconds


def end_processes() -> None:
    """Ends the process group of `torch.distributed` once its threads rest; does nothing without a group.

    Call it as the last thing of a script that `accelerate launch` started, on every process; the recipes' commands do.
    Nothing can be sent between processes afterwards. Our choice.
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

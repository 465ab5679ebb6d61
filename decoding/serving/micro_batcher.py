"""Dynamic micro-batching: many callers, one queue, one worker thread that answers what has gathered.

The worker takes what waits, up to `max_batch` jobs. A job that finds it idle is run at once; while a batch runs the next one
gathers by itself, and when there is one, it is given `max_wait_ms` more to fill up, because callers who have just been
answered are about to ask again. So a lone caller never waits on purpose, and under load the batches are full. It knows
nothing of HTTP or of models: jobs go in, `run(jobs)` answers them in order. Our choice.

What callers can rely on: every accepted job is answered exactly once, by its own result or its own error; an error of
`run` never reaches the neighbours of the job that caused it (the batch is run again job by job); a job whose caller has
gone is not run; `close` finishes what was accepted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sidtune.core.errors import ConfigError, SidtuneError

logger = logging.getLogger(__name__)


class QueueFull(SidtuneError):
    """Too many jobs wait; try again later."""


class Closed(SidtuneError):
    """No more jobs are taken."""


@dataclass
class Answer:
    """A result with its timing.

    Attributes:
        value: what `run` returned for the job.
        queue_s: seconds from submission to the start of the batch. run_s: seconds the batch ran.
        batch: jobs in the batch.
    """

    value: Any
    queue_s: float
    run_s: float
    batch: int


@dataclass
class _Job:
    item: Any
    future: Future = field(default_factory=Future)
    born: float = field(default_factory=time.perf_counter)


class MicroBatcher:
    """See the module's docstring.

    Args:
        run: answers a list of jobs, one result each, in order; a result that is an exception fails that job alone. Called
            on the worker thread only.
        max_batch: most jobs in one call.
        max_wait_ms: longest time that a batch which gathered behind another one waits to be full.
        max_queue: most jobs that wait; one more is refused.

    Raises:
        ConfigError: a limit that makes no sense.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        *,
        max_batch: int = 16,
        max_wait_ms: float = 4.0,
        max_queue: int = 256,
    ) -> None:
        if max_batch < 1 or max_queue < 1 or max_wait_ms < 0:
            raise ConfigError(
                f"max_batch and max_queue must be at least 1 and max_wait_ms at least 0, got {max_batch}, {max_queue} "
                f"and {max_wait_ms}."
            )
        self._run, self.max_batch, self.max_queue = run, max_batch, max_queue
        self._wait_s = max_wait_ms / 1000
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="micro-batcher", daemon=True)
        self._thread.start()

    def submit(self, item: Any) -> Future[Answer]:
        """Queues a job; its future gives an `Answer` or the job's error. Cancel the future to give the job up.

        Raises:
            QueueFull: `max_queue` jobs wait already. Closed: `close` was called.
        """
        with self._changed:
            if self._closed:
                raise Closed("The server is shutting down and takes no more requests; try again in a moment.")
            if len(self._jobs) >= self.max_queue:
                self._forget_cancelled()
            if len(self._jobs) >= self.max_queue:
                raise QueueFull(f"The server is busy: {self.max_queue} requests wait already; try again in a moment.")
            job = _Job(item)
            self._jobs.append(job)
            self._changed.notify_all()
        return job.future

    @property
    def waiting(self) -> int:
        """Jobs in the queue; those that run or were given up are not counted."""
        with self._changed:
            self._forget_cancelled()
            return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether the worker is there to answer."""
        return self._thread.is_alive()

    def close(self, timeout: float | None = None) -> bool:
        """Refuses new jobs and waits until all accepted ones are answered. False when `timeout` seconds did not do."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _forget_cancelled(self) -> None:
        self._jobs = deque(job for job in self._jobs if not job.future.cancelled())

    def _work(self) -> None:
        while batch := self._gather():
            # A caller that has given up is not worth a run; a job marked as running can no longer be given up.
            batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _gather(self) -> list[_Job]:
        """The next batch; empty only when closed and nothing waits."""
        with self._changed:
            busy = bool(self._jobs)  # they came while the last batch ran, so more are likely on their way
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if busy:
                self._changed.wait_for(lambda: len(self._jobs) >= self.max_batch or self._closed, self._wait_s)
            return [self._jobs.popleft() for _ in range(min(self.max_batch, len(self._jobs)))]

    def _answer(self, batch: list[_Job]) -> None:
        begin = time.perf_counter()
        try:
            results = list(self._run([job.item for job in batch]))
            if len(results) != len(batch):
                raise RuntimeError(f"{len(batch)} jobs got {len(results)} results")
        except Exception as error:
            if len(batch) > 1:
                logger.warning(
                    "A batch of %d failed (%s); its jobs are run one by one.", len(batch), type(error).__name__
                )
                for job in batch:
                    self._answer([job])
                return
            results = [error]
        seconds = time.perf_counter() - begin
        for job, result in zip(batch, results, strict=True):
            if isinstance(result, BaseException):
                job.future.set_exception(result)
            else:
                job.future.set_result(Answer(result, begin - job.born, seconds, len(batch)))

"""The micro-batcher answers every job once, by its own result or error, whatever its neighbours do."""

import random
import threading
import time
from concurrent.futures import CancelledError

import pytest
from serving_client import in_threads, until

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.serving.micro_batcher import Closed, MicroBatcher, QueueFull


def gated(**options):
    """A batcher that squares numbers once its gate is open, and the batches that it saw."""
    gate, seen = threading.Event(), []

    def run(items):
        gate.wait(30)
        seen.append(list(items))
        return [item * item for item in items]

    return MicroBatcher(run, **options), gate, seen


def test_many_threads_get_their_own_answers_in_batches():
    sizes = []

    def run(items):
        sizes.append(len(items))
        time.sleep(0.001)
        return [DataError(f"{item} is odd") if item % 2 else item * 10 for item in items]

    batcher = MicroBatcher(run, max_batch=7, max_wait_ms=2, max_queue=1000)

    def call(place):
        rng, wrong = random.Random(place), 0
        for number in range(place * 100, place * 100 + 40):
            time.sleep(rng.random() * 0.002)
            try:
                wrong += batcher.submit(number).result(30).value != number * 10 or number % 2
            except DataError as error:
                wrong += str(error) != f"{number} is odd"
        return wrong

    threads, wrong = in_threads(16, call)
    for thread in threads:
        thread.join()
    assert wrong == [0] * 16 and sum(sizes) == 640
    assert max(sizes) <= 7 and len(sizes) < 500, "jobs were hardly ever put together"
    assert batcher.close(10)


def test_a_lone_job_is_run_at_once():
    batcher, gate, seen = gated(max_batch=8, max_wait_ms=600_000)
    gate.set()
    answer = batcher.submit(3).result(20)
    assert answer.value == 9 and answer.batch == 1 and answer.queue_s >= 0 and answer.run_s >= 0 and seen == [[3]]
    assert batcher.close(20)


def test_under_load_a_batch_waits_to_be_full():
    batcher, gate, seen = gated(max_batch=3, max_wait_ms=600_000)
    futures = [batcher.submit(1)]
    until(lambda: batcher.waiting == 0)
    futures.append(batcher.submit(2))
    gate.set()
    assert futures[0].result(20).value == 1
    futures += [batcher.submit(3), batcher.submit(4)]
    assert [f.result(20).batch for f in futures] == [1, 3, 3, 3] and seen == [[1], [2, 3, 4]]
    assert batcher.close(20)


def test_an_error_of_the_run_stays_with_its_job():
    calls = []

    def run(items):
        calls.append(list(items))
        if len(calls) == 1:
            time.sleep(0.3)
        if 5 in items:
            raise RuntimeError("five")
        return list(items)

    batcher = MicroBatcher(run, max_batch=8, max_wait_ms=0)
    first = batcher.submit(0)
    until(lambda: calls)
    rest = [batcher.submit(number) for number in range(1, 9)]
    assert [f.result(10).value for f in (first, *rest) if f is not rest[4]] == [0, 1, 2, 3, 4, 6, 7, 8]
    with pytest.raises(RuntimeError, match="five"):
        rest[4].result(10)
    assert batcher.submit(11).result(10).value == 11 and calls[1] == list(range(1, 9))
    batcher.close()


def test_a_run_that_loses_a_job_fails_it_and_mixes_nothing_up():
    gate = threading.Event()

    def run(items):
        gate.wait(30)
        return [item for item in items if item != 2]

    batcher = MicroBatcher(run, max_batch=4, max_wait_ms=0)
    futures = [batcher.submit(0)]
    until(lambda: batcher.waiting == 0)
    futures += [batcher.submit(number) for number in (1, 2, 3)]
    gate.set()
    assert [futures[n].result(10).value for n in (0, 1, 3)] == [0, 1, 3]
    with pytest.raises(RuntimeError, match="1 jobs got 0 results"):
        futures[2].result(10)
    batcher.close()


def test_a_full_queue_refuses_and_recovers_and_given_up_jobs_make_room():
    batcher, gate, seen = gated(max_batch=1, max_wait_ms=0, max_queue=2)
    running = batcher.submit(1)
    until(lambda: batcher.waiting == 0)
    waiting = [batcher.submit(2), batcher.submit(3)]
    with pytest.raises(QueueFull, match="2 requests wait"):
        batcher.submit(4)
    assert waiting[0].cancel()
    late = batcher.submit(5)
    gate.set()
    assert [f.result(10).value for f in (running, waiting[1], late)] == [1, 9, 25]
    with pytest.raises(CancelledError):
        waiting[0].result(1)
    assert [2] not in seen
    batcher.close()


def test_a_job_that_was_given_up_is_not_run():
    batcher, gate, seen = gated(max_batch=2, max_wait_ms=0)
    running = batcher.submit(1)
    until(lambda: batcher.waiting == 0)
    gone, kept = batcher.submit(2), batcher.submit(3)
    assert gone.cancel() and not running.cancel()
    gate.set()
    assert running.result(10).value == 1 and kept.result(10).value == 9 and seen == [[1], [3]]
    batcher.close()


def test_a_queue_full_of_jobs_given_up_takes_new_ones():
    batcher, gate, seen = gated(max_batch=4, max_wait_ms=0, max_queue=1)
    first = batcher.submit(1)
    until(lambda: batcher.waiting == 0)
    assert batcher.submit(2).cancel()
    later = batcher.submit(3)
    gate.set()
    assert first.result(10).value == 1 and later.result(10).value == 9 and batcher.submit(4).result(10).value == 16
    assert batcher.alive and seen == [[1], [3], [4]]
    batcher.close()


def test_close_answers_what_was_taken_and_refuses_the_rest():
    batcher, gate, _ = gated(max_batch=3, max_wait_ms=1000)
    futures = [batcher.submit(number) for number in range(10)]
    assert not batcher.close(timeout=0.05)
    with pytest.raises(Closed, match="shutting down"):
        batcher.submit(1)
    gate.set()
    assert batcher.close(10) and [f.result(0).value for f in futures] == [n * n for n in range(10)]
    assert not batcher.alive


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_queue": 0}, {"max_wait_ms": -1.0}])
def test_senseless_limits_are_refused(options):
    with pytest.raises(ConfigError, match="at least"):
        MicroBatcher(list, **options)

"""A server in a thread, a plain HTTP client, and a gate to hold the worker: for the tests of serving."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from sidtune.decoding.serving.http_app import SearchService, ServingOptions, server_config


def send(
    port: int, body: Any = None, path: str = "/search", method: str = "POST", headers: dict | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """One request on a connection of its own: status, JSON body, headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"{}"), {k.lower(): v for k, v in answer.getheaders()}
    finally:
        connection.close()


class Running:
    """A server thread. `port` is set once it listens."""

    def __init__(self, server: uvicorn.Server) -> None:
        self.server = server
        self.thread = threading.Thread(target=server.run, daemon=True)
        self.thread.start()
        until(lambda: server.started or not self.thread.is_alive())
        self.port = server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive(), "the server did not stop"


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(load: Callable[[], Any], **options: Any) -> Iterator[tuple[int, SearchService, Running]]:
    """Serves what `load` makes: port, service and server."""
    hooks = {name: options.pop(name) for name in ("before_batch", "on_failure") if name in options}
    service = SearchService(load, ServingOptions(**options), **hooks)
    config = server_config(service, port=0, log_level="critical", timeout_graceful_shutdown=30)
    running = Running(uvicorn.Server(config))
    try:
        yield running.port, service, running
    finally:
        running.stop()


class Gate:
    """Holds the worker before each batch until it is opened; counts the batches that came."""

    def __init__(self) -> None:
        self.open, self.came = threading.Event(), 0

    def __call__(self) -> None:
        self.came += 1
        assert self.open.wait(60)


def in_threads(count: int, call: Callable[[int], Any]) -> tuple[list[threading.Thread], list[Any]]:
    """Starts `call(0) ... call(count - 1)`; results appear in the list."""
    found: list[Any] = [None] * count

    def work(place: int) -> None:
        try:
            found[place] = call(place)
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    return threads, found


def same_hits(found: list[dict[str, Any]], expected: list[Any], tolerance: float = 1e-5) -> bool:
    """Whether served hits are those of `search`; items within the tolerance of each other may trade places."""
    if len(found) != len(expected):
        return False
    score = {hit.item_id: hit.score for hit in expected}
    for hit, other in zip(found, expected, strict=True):
        if abs(hit["score"] - other.score) > tolerance:
            return False
        near = abs(score.get(hit["item_id"], hit["score"]) - other.score) <= tolerance
        if hit["item_id"] != other.item_id and not near:
            return False
    return True

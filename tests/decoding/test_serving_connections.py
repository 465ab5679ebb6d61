"""Clients that do not play along, over real sockets: half a request, too many connections, hung up before the answer."""

import http.client
import re
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from serving_client import Gate, send, serving, until

SEARCH = b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
# A server without a model, in a process that may open few files.
SMALL = """
import resource, sys, uvicorn
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from sidtune.decoding.serving.connections import BACKLOG, bounded, most_connections
from sidtune.decoding.serving.server_counts import ServerCounts
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
protocol = bounded(most_connections(1000), 1.0, ServerCounts())
uvicorn.run(app, port=int(sys.argv[1]), http=protocol, loop="asyncio", backlog=BACKLOG, lifespan="off", access_log=False)
"""


class Ids(list):
    level_sizes = (2,)


class Retriever:
    """Stands in for a retriever: every request has no hits; what was decoded is counted."""

    def __init__(self) -> None:
        self.decoded = 0
        self.sids, self.trie = Ids(["a", "b"]), SimpleNamespace(num_leaves=2)
        self.model = torch.nn.Linear(1, 1)
        self.catalogue = SimpleNamespace(categories=None, stock=None)
        self.prompter = SimpleNamespace(pieces=lambda _: [], check_length=lambda _: None, target=lambda _: None)

    def rank_targets(self, prompts, targets, batch_size):
        self.decoded += len(prompts)
        return [([], []) for _ in prompts]

    def hits(self, rows, scores):
        return []


@pytest.fixture
def served(request):
    retriever = Retriever()
    with serving(lambda: retriever, **request.param) as (port, service, _):
        until(lambda: service.ready)
        yield port, service, retriever


def opened(port: int, data: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(data)
    return client


def answer(client: socket.socket) -> bytes:
    """One answer of `/search`."""
    told = b""
    while b'"batch"' not in told and (part := client.recv(65536)):
        told += part
    return told


def rest(client: socket.socket) -> bytes:
    """What the server still says until it closes the connection."""
    told = b""
    while part := client.recv(65536):
        told += part
    return told


@pytest.mark.parametrize("served", [{"header_timeout_s": 0.3, "timeout_s": 20.0}], indirect=True)
def test_a_head_that_does_not_come_ends_the_connection_and_a_slow_body_does_not(served):
    port, service, _ = served
    with (
        opened(port) as silent,
        opened(port, b"POST /search HTTP/1.1\r\nHos") as half,
        opened(port, SEARCH[:-1]) as slow,
    ):
        for client in (silent, half):
            assert rest(client).startswith(b"HTTP/1.1 408 ")
        slow.sendall(SEARCH[-1:])
        assert answer(slow).startswith(b"HTTP/1.1 200 ")
        slow.sendall(SEARCH)  # a second request on the same connection
        assert answer(slow).startswith(b"HTTP/1.1 200 ")
        slow.sendall(SEARCH[:10])
        assert rest(slow).startswith(b"HTTP/1.1 408 ")
    assert service.counts.slow_heads == 3
    until(lambda: service.counts.connections == 0)


@pytest.mark.parametrize("served", [{"max_connections": 3}], indirect=True)
def test_one_connection_too_many_is_told_so_and_the_others_go_on(served):
    port, service, _ = served
    until(lambda: service.counts.connections == 0)
    clients = [opened(port) for _ in range(3)]
    until(lambda: service.counts.connections == 3)
    with opened(port) as fourth:
        told = rest(fourth)
    assert told.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in told
    clients[0].sendall(SEARCH)
    assert answer(clients[0]).startswith(b"HTTP/1.1 200 ")
    for client in clients:
        client.close()
    until(lambda: service.counts.connections == 0)
    assert send(port, {})[0] == 200 and service.counts.refused == 1


@pytest.mark.parametrize("served", [{"max_batch": 1, "max_queue": 8}], indirect=True)
def test_requests_of_clients_that_hung_up_are_not_decoded_and_leave_the_queue(served):
    port, service, retriever = served
    gate = Gate()
    service._before_batch = gate
    first = threading.Thread(target=send, args=(port, {}))
    first.start()
    until(lambda: gate.came == 1)  # the worker holds the first request
    clients = [opened(port, SEARCH) for _ in range(8)]
    until(lambda: service.waiting == 8)
    assert send(port, {})[0] == 503
    for client in clients:
        client.close()
    until(lambda: service.counts.given_up == 8)
    assert service.waiting == 0
    gate.open.set()
    assert send(port, {})[0] == 200
    first.join()
    assert retriever.decoded == 2


@pytest.mark.parametrize("served", [{}], indirect=True)
def test_a_path_with_a_slash_is_not_redirected_to_the_host_of_the_client(served):
    connection = http.client.HTTPConnection("127.0.0.1", served[0], timeout=20)
    connection.request("POST", "/search/", b"{}", {"Host": "evil.example"})
    answer = connection.getresponse()
    assert answer.status == 404 and answer.getheader("location") is None


@pytest.mark.parametrize("served", [{}], indirect=True)
def test_metrics_count_what_happened(served):
    port, service, _ = served
    for body, status in (({}, 200), ({}, 200), ({"qery": "x"}, 422), (b"{", 400)):
        assert send(port, body)[0] == status
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    assert answer.getheader("content-type") == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.read().decode().splitlines()
    found = dict(re.fullmatch(r"(\w+(?:\{[^}]*\})?) ([\d.]+)", line).groups() for line in lines if line[0] != "#")
    assert {name: value for name, value in found.items() if "requests_total" in name} == {
        f'sidtune_requests_total{{status="{status}"}}': count for status, count in ((200, "2"), (400, "1"), (422, "1"))
    }
    buckets = [int(value) for name, value in found.items() if "_bucket" in name]
    assert buckets == sorted(buckets) and buckets[-1] == int(found["sidtune_request_seconds_count"]) == 4
    assert (found["sidtune_queue_waiting"], found["sidtune_ready"]) == ("0", "1")
    assert float(found["sidtune_request_seconds_sum"]) == pytest.approx(service.counts.total_seconds, abs=1e-6)


def test_with_few_descriptors_the_server_goes_on_answering_and_writes_no_traces(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-c", SMALL, str(port)], stdout=stream, stderr=stream)
    try:
        until(lambda: process.poll() is not None or b"running on" in log.read_bytes())
        clients = []
        for _ in range(400):
            clients.append(opened(port, b"GET / HTTP/1.1\r\nHos"))

        def answered() -> bool:
            with opened(port, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") as client:
                try:
                    return b" 200 " in rest(client)
                except ConnectionResetError:
                    return False

        until(answered)  # as soon as the half requests are too old
        for client in clients:
            client.close()
        time.sleep(0.1)
        assert process.poll() is None and len(log.read_bytes()) < 2000, log.read_text()[:3000]
    finally:
        process.kill()
        process.wait()

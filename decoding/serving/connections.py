"""Connections that cannot starve a server: a limit on their number and on the time the head of a request may take. Our choice.

uvicorn waits for the head of a request without end, and takes connections until the process has no descriptor left; asyncio then
answers nobody and writes a trace each second. `bounded` is uvicorn's own protocol class with these two limits, the only place where
we reach into it: `connection_made`, `connection_lost` and `data_received` are extended, `cycle` and `conn.their_state` are read.
"""

from __future__ import annotations

import asyncio
import os
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sidtune.core.errors import ConfigError

BACKLOG = 32  # connections that the loop accepts before it looks at the first of them
_SPARE = 32  # descriptors for files that are opened while serving


def most_connections(wanted: int) -> int:
    """`wanted`, or as many as the process has descriptors for. Raises ConfigError where there are next to none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 64
    free = soft - used - 2 * BACKLOG - _SPARE
    if free < 1:
        raise ConfigError(
            f"This process may open {soft} files only, too few for a server; raise the limit (ulimit -n)."
        )
    return min(wanted, free)


def bounded(most: int, header_timeout_s: float, counts: Any) -> type[H11Protocol]:
    """A protocol for `uvicorn.Config(http=...)`.

    Args:
        most: connections at a time; one more gets 503 and is closed.
        header_timeout_s: longest time from the opening of a connection, or from the first byte of a further request, to the end
            of its head; then 408.
        counts: has the counters `connections`, `refused` and `slow_heads`.
    """

    class BoundedProtocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            counts.connections += 1
            if len(self.connections) > most:
                counts.refused += 1
                self._end(
                    "503 Service Unavailable", "The server has all the connections it can have; try again in a moment."
                )
            else:
                self.timer = self.loop.call_later(header_timeout_s, self._too_slow)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            waits = self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)
            if not waits and self.timer is not None:
                self.timer.cancel()
                self.timer = None
            elif waits and self.timer is None:
                self.timer = self.loop.call_later(header_timeout_s, self._too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            counts.connections -= 1
            if self.timer is not None:
                self.timer.cancel()
            super().connection_lost(exc)

        def _too_slow(self) -> None:
            if not self.transport.is_closing():
                counts.slow_heads += 1
                self._end(
                    "408 Request Timeout", f"No request came within {header_timeout_s:g} seconds; send it faster."
                )

        def _end(self, status: str, sentence: str) -> None:
            body = f'{{"error": "{sentence}"}}'
            lines = [
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
                "Connection: close",
                "Retry-After: 1",
            ]
            self.transport.write("\r\n".join([f"HTTP/1.1 {status}", *lines, "", body]).encode())
            self.transport.close()

    return BoundedProtocol

"""What a server counts, and how Prometheus reads it (text format 0.0.4). Our choice of names and buckets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass
class ServerCounts:
    """Counts since the start; the event loop alone changes them.

    Attributes:
        answers: status -> answers to `/search`. seconds: how long each of them took, in buckets by upper bound, and their sum.
        given_up: clients that hung up before their answer.
        connections: open now. refused: turned away because there were too many. slow_heads: closed for a head that did not come.
    """

    answers: Counter[int] = field(default_factory=Counter)
    seconds: Counter[float] = field(default_factory=Counter)
    total_seconds: float = 0.0
    given_up: int = 0
    connections: int = 0
    refused: int = 0
    slow_heads: int = 0

    def answered(self, status: int, seconds: float) -> None:
        """Counts an answer to `/search`."""
        self.answers[status] += 1
        self.total_seconds += seconds
        self.seconds[next((bound for bound in _BUCKETS if seconds <= bound), float("inf"))] += 1

    def text(self, waiting: int, ready: bool) -> str:
        """The page of `GET /metrics`; `waiting` and `ready` are those of now."""
        lines = ["# TYPE sidtune_requests_total counter"]
        lines += [f'sidtune_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.answers.items())]
        lines.append("# TYPE sidtune_request_seconds histogram")
        below = 0
        for bound in (*_BUCKETS, float("inf")):
            below += self.seconds[bound]
            shown = "+Inf" if bound == float("inf") else f"{bound:g}"
            lines.append(f'sidtune_request_seconds_bucket{{le="{shown}"}} {below}')
        lines += [f"sidtune_request_seconds_sum {self.total_seconds:.6f}", f"sidtune_request_seconds_count {below}"]
        for name, kind, value in (
            ("queue_waiting", "gauge", waiting),
            ("ready", "gauge", int(ready)),
            ("connections", "gauge", self.connections),
            ("connections_refused_total", "counter", self.refused),
            ("slow_heads_total", "counter", self.slow_heads),
            ("given_up_total", "counter", self.given_up),
        ):
            lines += [f"# TYPE sidtune_{name} {kind}", f"sidtune_{name} {value}"]
        return "\n".join(lines) + "\n"

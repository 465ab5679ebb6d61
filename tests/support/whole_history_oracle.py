"""A small random world in our schemas, and a slow, plain-Python telling of what the examples must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sidtune.data_builders.prompts.serializer import Serializer
from sidtune.data_builders.tables.schema import table_from_rows
from sidtune.data_builders.tasks.input import TaskInput

STRENGTH = {"order": 0, "like": 1, "click": 2}
QUERIES = ["red shoes", "blue t-shirt", "water bottle", "<a_1> mouse", None]


@dataclass
class World:
    items: list[dict[str, Any]]
    users: list[dict[str, Any]]
    requests: list[dict[str, Any]]
    events: list[dict[str, Any]]
    sids: dict[str, str]
    train_until: int

    @property
    def train(self) -> list[dict[str, Any]]:
        return [r for r in self.requests if r["time"] < self.train_until]

    def task_input(self, serializer: Serializer, **options: Any) -> TaskInput:
        return TaskInput(
            items=table_from_rows("items", self.items),
            users=table_from_rows("users", self.users),
            events=table_from_rows("events", self.events),
            requests=table_from_rows("requests", self.train),
            context_requests=table_from_rows("requests", self.requests),
            sids=self.sids,
            serializer=serializer,
            **{"until": self.train_until, **options},
        )


def make_world(seed: int = 0, users: int = 12, moments: int = 30, ties: bool = True, loose: bool = True) -> World:
    """Requests with several labels, ties in time, repeated items, events without a request, an item without a SID."""
    rng = np.random.default_rng(seed)
    items = [
        {
            "item_id": f"i{n:02d}",
            "title": f"red shoes {n}" if n % 7 else None,
            "brand": "acme" if n % 3 else None,
            "category": ["office", f"paper {n % 4}"] if n % 5 else None,
            "price": float(n),
        }
        for n in range(20)
    ]
    items[7] = {"item_id": "i07"}
    sids = {f"i{n:02d}": f"<a_{n % 4}><b_{n % 5}><c_{n % 16}>" for n in range(19)}
    people = [
        {"user_id": f"u{n}", "profile": [{"name": "age", "value": str(20 + n)}] if n % 3 else None}
        for n in range(users)
    ]
    requests, events = [], []
    for user in range(users + 1):  # the last user is not in the users table
        name = f"u{user}"
        for time in np.sort(rng.choice(100, size=int(rng.integers(0, moments)), replace=ties)).tolist():
            number = len(requests)
            query = QUERIES[int(rng.integers(len(QUERIES)))]
            place = ["paris", "rome", None][int(rng.integers(3))]
            shown = rng.choice(20, size=6, replace=False)
            labels = [{a: [1, 0, None][int(rng.choice(3, p=[0.2, 0.5, 0.3]))] for a in STRENGTH} for _ in shown]
            requests.append(
                {
                    "request_id": f"r{number}",
                    "user_id": name,
                    "time": time,
                    "query": query,
                    "context": [{"name": "place", "value": place}] if place else [],
                    "candidates": [
                        {"item_id": f"i{n:02d}", "position": p, **la}
                        for p, (n, la) in enumerate(zip(shown, labels, strict=True))
                    ],
                }
            )
            for n, label in zip(shown, labels, strict=True):
                for action in ("click", "like", "order"):
                    if label[action] == 1:
                        events.append(
                            {
                                "user_id": name,
                                "item_id": f"i{n:02d}",
                                "time": time,
                                "action": action,
                                "query": query,
                                "request_id": f"r{number}",
                            }
                        )
            if loose and rng.random() < 0.2:
                events.append(
                    {
                        "user_id": name,
                        "item_id": f"i{int(rng.integers(20)):02d}",
                        "time": time + 1,
                        "action": "view",
                        "query": "mouse",
                    }
                )
    order = rng.permutation(len(events))
    return World(items, people, requests, [events[n] for n in order], sids, train_until=70)


def positives(world: World, request: dict[str, Any]) -> list[str]:
    found = []
    for candidate in request["candidates"]:
        marks = [STRENGTH[a] for a in STRENGTH if candidate[a] == 1]
        if marks and candidate["item_id"] in world.sids:
            found.append((min(marks), candidate["item_id"]))
    return [item for _, item in sorted(found)]


def turns_before(world: World, user: str, time: int) -> list[dict[str, Any]]:
    """Past turns, oldest first: one per (request, item), or per (time, item) without a request."""
    best: dict[Any, tuple] = {}
    for row, event in enumerate(world.events):
        if event["user_id"] == user and event["time"] < time and event["item_id"] in world.sids:
            source = event.get("request_id") or ("loose", event["time"])
            rank = (event["time"], STRENGTH.get(event["action"], 3), event["item_id"], row)
            key = (source, event["item_id"])
            if key not in best or rank < best[key][0]:
                best[key] = (rank, event)
    return [event for _, event in sorted(best.values(), key=lambda pair: pair[0])]


def pieces_of(world: World, serializer: Serializer, user: str, turns: list[dict[str, Any]]) -> list[str]:
    profile = next((u["profile"] for u in world.users if u["user_id"] == user), None)
    by_id = {r["request_id"]: r for r in world.requests}
    pieces = [str(serializer.head({"profile": profile}))]
    for event in turns:
        request = by_id.get(event.get("request_id"))
        query, context = (request["query"], request["context"]) if request else (event["query"], None)
        pieces += [
            str(serializer.turn(query, context if serializer.history_context else None)),
            world.sids[event["item_id"]],
        ]
    return pieces


def windowed(world: World, serializer: Serializer, request: dict[str, Any], max_history: int) -> list[str]:
    """Pieces of a request up to its target."""
    past = turns_before(world, request["user_id"], request["time"])
    pieces = pieces_of(
        world, serializer, request["user_id"], past[len(past) - max_history :] if max_history < len(past) else past
    )
    return [*pieces, str(serializer.turn(request["query"], request["context"]))]


def as_rows(table: pa.Table) -> list[dict[str, Any]]:
    return table.to_pylist()
